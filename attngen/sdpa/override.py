"""attngen behind torch.nn.functional.scaled_dot_product_attention, for the whole process, until it is taken back.

The operator is overridden in torch's dispatcher, at the keys of the devices and of their autograd, so that gradients
are those of attngen's kernels. What no kernel takes goes on to torch's own choice, with a line in the log for every new
reason.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nested._internal import ops
from torch.nn.attention.bias import CausalBias, CausalVariant

from attngen.errors import ArgumentError, RefusedError, shown
from attngen.sdpa.jagged import translated_jagged
from attngen.sdpa.question import Causal, Question
from attngen.sdpa.translation import translated

DEVICES = ("cuda", "cpu")
_KEYS = {"cuda": ("CUDA", "AutogradCUDA"), "cpu": ("CPU", "AutogradCPU")}
_LOG = logging.getLogger("attngen.sdpa")
_TORCHS_OWN = torch.ops.aten.scaled_dot_product_attention.default.decompose
_TORCHS_DISPATCH = CausalBias._dispatch
_OF_NESTED: Any = ops
_TORCHS_JAGGED = _OF_NESTED.jagged_scaled_dot_product_attention


@dataclass
class Override:
    """An override that stands.

    Attributes:
        devices: whose tensors are taken.
        strict: whether a refusal is raised.
        library: torch's registrations, which go when it does.
        told: reasons that have been logged.
    """

    devices: tuple[str, ...]
    strict: bool
    library: torch.library.Library | None = None
    told: set[str] = field(default_factory=set)

    def install(self) -> None:
        """Register with torch."""
        self.library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        for key in (key for device in self.devices for key in _KEYS[device]):
            self.library.impl("scaled_dot_product_attention", self._attend, key)  # type: ignore[no-untyped-call]
        # Subclasses of tensors take their calls before the dispatcher sees them.
        CausalBias._dispatch = staticmethod(self._attend_by_bias)  # type: ignore[method-assign]
        _OF_NESTED.jagged_scaled_dot_product_attention = self._attend_jagged

    def remove(self) -> None:
        """Take it back."""
        CausalBias._dispatch = staticmethod(_TORCHS_DISPATCH)  # type: ignore[method-assign]
        _OF_NESTED.jagged_scaled_dot_product_attention = _TORCHS_JAGGED
        if self.library is not None:
            self.library._destroy()  # type: ignore[no-untyped-call]
        self.library = None

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        causal: Causal = "top_left" if is_causal else "no"
        try:
            question = Question(query, key, value, attn_mask, dropout_p, causal, scale, enable_gqa)
            return translated(question).attend()
        except RefusedError as refusal:
            self._tell(refusal)
        options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        left: torch.Tensor = _TORCHS_OWN(query, key, value, attn_mask, dropout_p, is_causal, **options)
        return left

    def _attend_by_bias(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: CausalBias,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """What a causal bias asks, which torch would mostly write out; a square one it says by is_causal."""
        if (
            query.device.type in self.devices
            and attn_mask.variant == CausalVariant.LOWER_RIGHT
            and not is_causal
        ):
            try:
                question = Question(query, key, value, None, dropout_p, "bottom_right", scale, enable_gqa)
                check_bias(attn_mask, question)
                return translated(question).attend()
            except RefusedError as refusal:
                self._tell(refusal)
        left: torch.Tensor = _TORCHS_DISPATCH(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
        return left

    def _attend_jagged(self, query: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        """What nested tensors of the jagged layout ask."""
        if query.device.type in self.devices:
            try:
                return translated_jagged(query, *rest, **options).attend()
            except RefusedError as refusal:
                self._tell(refusal)
        left: torch.Tensor = _TORCHS_JAGGED(query, *rest, **options)
        return left

    def _tell(self, refusal: RefusedError) -> None:
        """Raise a refusal, or log those of its reasons that are new."""
        if self.strict:
            raise refusal
        for reason in refusal.reasons:
            if reason not in self.told:
                self.told.add(reason)
                _LOG.warning("scaled_dot_product_attention is left to torch: %s", reason)


def check_bias(bias: CausalBias, question: Question) -> None:
    """Refuse a causal bias of other lengths than the call has.

    Raises:
        RefusedError: it is.
    """
    said = (bias.seq_len_q, bias.seq_len_kv)
    if said != (lengths := (question.query.shape[-2], question.key.shape[-2])):
        raise RefusedError([f"attn_mask: a causal bias of {said}, where lengths are {lengths}"])


_standing: Override | None = None


def standing() -> Override | None:
    """The override that stands, if one does."""
    return _standing


def enable(devices: Iterable[str] = ("cuda",), strict: bool = False) -> None:
    """Put attngen behind scaled_dot_product_attention, for all threads, in place of what was enabled before.

    Args:
        devices: "cuda", and "cpu" where calls of CPU tensors are to run on the simulator, which is slow.
        strict: raise `RefusedError` where no kernel takes a call, instead of going on to torch's own choice.

    Raises:
        ArgumentError: there is no such device, or strict is no flag.
    """
    chosen = tuple(devices) if not isinstance(devices, str) else (devices,)
    if not chosen or not set(chosen) <= set(DEVICES):
        raise ArgumentError("devices", shown(devices), f"some of {', '.join(DEVICES)}")
    if not isinstance(strict, bool):
        raise ArgumentError("strict", shown(strict), "True or False")
    _stand(Override(chosen, strict))


def disable() -> None:
    """Leave scaled_dot_product_attention to torch again."""
    _stand(None)


@contextmanager
def enabled(devices: Iterable[str] = ("cuda",), strict: bool = False) -> Iterator[None]:
    """Enable for the time of a block, then go back to what was; arguments as of `enable`."""
    before = _standing
    enable(devices, strict)
    try:
        yield
    finally:
        _stand(before)


def _stand(override: Override | None) -> None:
    global _standing
    if _standing is not None:
        _standing.remove()
    _standing = override
    if override is not None:
        override.install()
