"""What a call of scaled_dot_product_attention asks, and why there may be no kernel for it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from attngen.autograd import is_differentiated
from attngen.errors import ArgumentError
from attngen.fit_heads import check_strided, fit_heads

Causal = Literal["no", "top_left", "bottom_right"]
"""Whether keys behind a query are hidden, and if so which query and key stand beside each other, first or last."""
MASK = "attn_mask"
FORMATS = {torch.bool: "bool", torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
"""Types that a mask may have, as specs write them."""
_OWN_NAMES = {"q": "query", "k": "key", "v": "value", "softmax_scale": "scale"}
"""What the function calls the arguments of a kernel."""


@dataclass(frozen=True)
class Question:
    """The arguments of a call, as torch documents them.

    Attributes:
        query: (..., heads, seqlen_q, head_dim), of two dimensions at least, like key and value.
        key: (..., heads_kv, seqlen_k, head_dim).
        value: (..., heads_kv, seqlen_k, head_dim_v).
        attn_mask: True where a key is seen, or a number that is added to a score; of any shape that can be broadcast.
        dropout_p: as documented, like scale and enable_gqa.
        causal: is_causal is "top_left".
        scale: see dropout_p.
        enable_gqa: see dropout_p.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    dropout_p: float = 0.0
    causal: Causal = "no"
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """Query, key and value by their names."""
        return {"query": self.query, "key": self.key, "value": self.value}

    @property
    def signature(self) -> tuple[Any, ...] | None:
        """All that decides which texts a call is said in, and what may be said against it; None of symbolic sizes."""
        tensors, mask = (self.query, self.key, self.value), self.attn_mask
        sizes = [size for x in (*tensors, mask) if x is not None for size in x.shape]
        if any(type(size) is not int for size in sizes):
            return None
        found = [(type(x), x.layout, x.dtype, x.device, x.shape) for x in tensors]
        if mask is not None:
            strides = mask.layout is torch.strided and tuple(map(bool, mask.stride()))
            about = (type(mask), mask.layout, mask.dtype, mask.device, mask.shape)
            found.append((*about, strides, is_differentiated(mask)))  # type: ignore[arg-type]
        return (*found, self.causal, bool(self.dropout_p), self.enable_gqa)

    @property
    def heads(self) -> tuple[int, int]:
        """Heads of queries, and of keys and values, once one has been repeated for all."""
        of_q, of_k, of_v = (x.shape[-3] if x.dim() > 2 else 1 for x in self.inputs.values())
        of_kv = max(of_k, of_v)
        return (of_q, of_kv) if self.enable_gqa or of_kv == 1 else (of_kv, of_kv)

    @property
    def batches(self) -> torch.Size:
        """The dimensions before heads, which all three tensors share; (1,) where none has any.

        Raises:
            RuntimeError: they do not go together.
        """
        leading = [x.shape[:-3] for x in self.inputs.values()]
        return torch.Size(torch.broadcast_shapes((1,), *leading))  # type: ignore[no-untyped-call]

    def reasons(self) -> Iterator[str]:
        """Why no kernel takes the call, as far as its tensors and options tell."""
        if self.dropout_p:
            yield "dropout_p: there is no dropout; torch applies it wherever it is not 0, in evaluation too"
        tensors = self.inputs if self.attn_mask is None else {**self.inputs, MASK: self.attn_mask}
        faults = list(_reasons_of_tensors(tensors))
        yield from faults
        if faults:
            return
        if len({(x.dtype, x.device) for x in self.inputs.values()}) > 1:
            yield "query, key, value: more than one type or device"
        faults = list(self._reasons_of_shapes())
        yield from faults
        if self.attn_mask is not None and not faults:
            yield from self._reasons_of_mask(self.attn_mask)

    def _reasons_of_shapes(self) -> Iterator[str]:
        of_k, of_v = self.key.shape[-2], self.value.shape[-2]
        if of_k != of_v:
            yield f"value: {of_v} rows beside {of_k} of key"
        try:
            fit_heads(self.query[..., :0, :], self.key[..., :0, :], self.value[..., :0, :], None)
        except ArgumentError as error:
            yield reason_of(error)
        of_q, of_kv = self.heads
        counts = [x.shape[-3] if x.dim() > 2 else 1 for x in self.inputs.values()]
        go_together = all(count in (1, of) for count, of in zip(counts, (of_q, of_kv, of_kv), strict=True))
        if not go_together or of_kv == 0 or of_q % of_kv:
            yield f"query, key, value: {counts} heads with enable_gqa={self.enable_gqa}"
        try:
            _ = self.batches
        except RuntimeError:
            yield "query, key, value: dimensions before heads that do not go together"

    def _reasons_of_mask(self, mask: torch.Tensor) -> Iterator[str]:
        if self.causal != "no":
            yield f"{MASK}: a tensor beside is_causal, of which torch documents one at a time"
        if mask.dtype not in FORMATS:
            yield f"{MASK}: {mask.dtype}, and neither bool, f16, bf16 nor f32"
        if mask.device != self.query.device:
            yield f"{MASK}: another device than query's"
        pairs = (*self.batches, self.heads[0], self.query.shape[-2], self.key.shape[-2])
        sizes = zip(reversed(mask.shape), reversed(pairs), strict=False)
        if not 2 <= mask.dim() <= len(pairs) or any(size not in (1, of) for size, of in sizes):
            yield f"{MASK}: shape {tuple(mask.shape)}, which does not stand for {pairs}"


def _reasons_of_tensors(tensors: dict[str, torch.Tensor]) -> Iterator[str]:
    for name, x in tensors.items():
        try:
            check_strided(name, x)
        except ArgumentError as error:
            yield reason_of(error)
        else:
            if x.dim() < 2:
                yield f"{name}: {x.dim()} dimensions, of at least two"


def reason_of(error: ArgumentError) -> str:
    """A fault in one line, by the names that the function has for its arguments."""
    return str(error.renamed(_OWN_NAMES)).splitlines()[0]
