"""What torch's own backends of scaled_dot_product_attention have against a call, and which of them it would choose."""

import warnings
from dataclasses import dataclass

import torch
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
_ASKED_ON_GPUS = {
    "flash": can_use_flash_attention,
    "efficient": can_use_efficient_attention,
    "cudnn": can_use_cudnn_attention,
}
FUSED = tuple(_ASKED_ON_GPUS)
_ON_GPUS_ALONE = ("efficient", "cudnn")


@dataclass(frozen=True)
class TorchsCall:
    """The arguments of a call that torch asks its backends about; dense tensors of four dimensions at most.

    Attributes:
        query: as of torch's function, like all that follow.
        key: see query.
        value: see query.
        mask: see query.
        dropout_p: see query.
        is_causal: see query.
        enable_gqa: see query.
        scale: see query.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    enable_gqa: bool = False
    scale: float | None = None

    def choice(self) -> str:
        """The backend that torch would take, of those that are enabled, or that it would raise."""
        try:
            number = torch._fused_sdp_choice(
                self.query,
                self.key,
                self.value,
                self.mask,
                self.dropout_p,
                self.is_causal,
                scale=self.scale,
                enable_gqa=self.enable_gqa,
            )
        except RuntimeError as error:
            return f"an error: {str(error).splitlines()[0]}"
        return SDPBackend(number).name.lower()

    def reasons_against(self, backend: str) -> tuple[str, ...]:
        """What torch has against one of `BACKENDS`, in its own words; nothing where that could take the call."""
        if backend == "math":
            return ()
        if not self.query.is_cuda and backend in _ON_GPUS_ALONE:
            return (f"torch has it on GPUs alone, not for {self.query.device.type} tensors",)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            can = self._could_take(backend)
        told = (str(warning.message).splitlines()[0] for warning in caught)
        # Torch heads its list with this, and says where in its source each line stands.
        reasons = (line.partition(" (Triggered")[0] for line in told if "not used because" not in line)
        return () if can else tuple(reasons) or ("it cannot, and does not say why",)

    def _could_take(self, backend: str) -> bool:
        """Whether a backend could; warnings say why not."""
        if not self.query.is_cuda:
            with sdpa_kernel(BACKENDS[backend]):
                return self.choice() == BACKENDS[backend].name.lower()
        arguments = (self.query, self.key, self.value, self.mask, self.dropout_p, self.is_causal)
        return bool(_ASKED_ON_GPUS[backend](SDPAParams(*arguments, self.enable_gqa), debug=True))
