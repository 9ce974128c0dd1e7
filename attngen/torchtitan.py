"""TorchTitan's inner attention by attngen's kernels: what a model's config names in the place of `VarlenAttention`.

Of TorchTitan at commit b5bcd76 (August 2026, behind 0.2.2), whose layers pass packed tokens. The config is one of
`VarlenAttention.Config`, so that a model makes the masks and the windows for it that it makes for that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.models.common.attention import VarlenAttention, VarlenMetadata

from attngen.errors import ArgumentError, shown
from attngen.fit_heads import check_strided
from attngen.flash_attn.attend import attend, longest
from attngen.flash_attn.wish import Wish, window_of
from attngen.varlen import RAGGED

Transform = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_NAMES = {
    "q": "q_TNH",
    "k": "k_TNH",
    "v": "v_TNH",
    "softmax_scale": "scale",
    **{f"cu_seqlens_{axis}": f"attention_masks.cu_seq_{axis}" for axis in "qk"},
    **{f"max_seqlen_{axis}": f"attention_masks.max_{axis}" for axis in "qk"},
}
"""What TorchTitan calls the arguments of a kernel."""


class InnerAttention(VarlenAttention):  # type: ignore[misc] # TorchTitan need not be installed
    """Attention of the documents of packed tokens, each with itself."""

    @dataclass(kw_only=True, slots=True)
    class Config(VarlenAttention.Config):  # type: ignore[misc]
        """`window_size`, as there: keys before and behind a query, -1 for all; (-1, 0), which is causal, by default."""

    def __init__(self, config: Config) -> None:
        # TorchTitan's own would choose a flash attention for the whole process, which then has to be installed.
        super(VarlenAttention, self).__init__()
        self.window_size = config.window_size
        self._window = window_of(config.window_size, causal=False, unbounded=-1)

    def forward(
        self,
        q_TNH: torch.Tensor,
        k_TNH: torch.Tensor,
        v_TNH: torch.Tensor,
        *,
        attention_masks: VarlenMetadata,
        scale: float | None = None,
        out_transform: Transform | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention of each document with itself, differentiated by autograd; CPU tensors run on the simulator.

        Args:
            q_TNH: (tokens, num_heads_q, head_dim), f16 or bf16, on the CPU f32 too; as they are, not cast to bf16.
            k_TNH: (tokens, num_heads_kv, head_dim).
            v_TNH: (tokens, num_heads_kv, head_dim_v).
            attention_masks: where documents begin and end; its lengths on the host are bounds, and change no result.
            scale: 1/sqrt(head_dim) where None.
            out_transform: is given out and lse, (tokens, num_heads_q), f32, with its gradient, and makes the result.
            **kwargs: enable_gqa: whether num_heads_q may be a multiple of num_heads_kv; False by default.

        Returns:
            (tokens, num_heads_q, head_dim_v), of q's type.

        Raises:
            ArgumentError: an argument that is not served, by its name.
        """
        enable_gqa = kwargs.pop("enable_gqa", False)
        for name, value in kwargs.items():
            raise ArgumentError(name, shown(value), "left out: there is no such argument of varlen attention")
        if not isinstance(attention_masks, VarlenMetadata):
            cure = "a mask_mod is the mask of attngen.attention, by attngen.expression"
            raise ArgumentError("attention_masks", type(attention_masks).__name__, "VarlenMetadata", cure)
        for name, x in (("q_TNH", q_TNH), ("k_TNH", k_TNH), ("v_TNH", v_TNH)):
            check_strided(name, x)
            if x.dim() != 3:
                raise ArgumentError(name, f"{x.dim()} dimensions", "3: (tokens, heads, head_dim)")
        if not enable_gqa and q_TNH.shape[1] != k_TNH.shape[1]:
            got = f"{k_TNH.shape[1]} heads beside {q_TNH.shape[1]} of q_TNH"
            raise ArgumentError("k_TNH", got, "as many, without enable_gqa", "pass enable_gqa=True")
        if attention_masks.cu_seq_q is attention_masks.cu_seq_k and q_TNH.shape[0] != k_TNH.shape[0]:
            got = f"{q_TNH.shape[0]} tokens beside {k_TNH.shape[0]} of k_TNH, cut alike"
            raise ArgumentError("q_TNH", got, "as many: there is no context parallelism here")
        cut = {"cu_seqlens_q": attention_masks.cu_seq_q, "cu_seqlens_k": attention_masks.cu_seq_k}
        cut |= longest("max_seqlen_q", attention_masks.max_q) | longest("max_seqlen_k", attention_masks.max_k)
        texts = Wish(self._window, scale).texts
        out, lse = attend(q_TNH, k_TNH, v_TNH, texts, out_transform is not None, RAGGED, cut, _NAMES)
        return out if out_transform is None else out_transform(out, lse.transpose(0, 1))  # type: ignore[union-attr]
