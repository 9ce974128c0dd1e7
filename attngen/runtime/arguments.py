"""What a call may pass: every fault is an ArgumentError that names the argument, before anything is touched.

The checks look at shapes, strides, types and addresses, so they serve the GPU and the simulator alike.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from attngen.arch import ARCHS
from attngen.dtypes import dtype, torch_dtype
from attngen.errors import ArgumentError, shown
from attngen.expr import LARGEST_LENGTH, LARGEST_TILE
from attngen.quantize import KEY_BLOCK
from attngen.runtime.numbers import softmax_scale_of
from attngen.runtime.tensors import check_no_derivative, check_plain

Layout = Literal["bshd", "bhsd"]
ROW_ALIGNMENT = 16
"""Bytes: what one cp.async moves, and so where every row of head_dim numbers must start."""

Strides = tuple[int, int, int]
"""Elements between batches, rows and heads."""


class _Expectations(Protocol):
    """What of a manifest says which tensors a call may pass."""

    @property
    def arch(self) -> str: ...
    @property
    def inputs(self) -> str: ...
    @property
    def output(self) -> str: ...
    @property
    def head_dim_qk(self) -> int: ...
    @property
    def head_dim_v(self) -> int: ...
    @property
    def scales(self) -> str | None: ...


@dataclass(frozen=True)
class Problem:
    """The sizes and strides of a call, in elements, independent of the layout's order of dimensions."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads_q: int
    num_heads_kv: int
    q: Strides
    k: Strides
    v: Strides

    @property
    def sizes(self) -> dict[str, int]:
        """What a formula of the manifest may name."""
        return {
            "batch": self.batch,
            "seqlen_q": self.seqlen_q,
            "seqlen_k": self.seqlen_k,
            "num_heads_q": self.num_heads_q,
            "num_heads_kv": self.num_heads_kv,
            "group": self.num_heads_q // max(1, self.num_heads_kv),
        }


def check_arguments(
    manifest: _Expectations,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None,
    out: torch.Tensor | None,
    layout: str,
) -> Problem:
    """Check the arguments of a call against what the kernel was made for.

    Args:
        manifest: of the kernel.
        q: (batch, seqlen_q, num_heads_q, head_dim_qk), the manifest's input type; last dimension contiguous.
        k: (batch, seqlen_k, num_heads_kv, head_dim_qk).
        v: (batch, seqlen_k, num_heads_kv, head_dim_v).
        softmax_scale: of at most 2^127, either sign, or None.
        out: (batch, seqlen_q, num_heads_q, head_dim_v), the manifest's output type, or None.
        layout: "bshd" as above, or "bhsd" with seqlen and heads exchanged in q, k, v and out.

    Raises:
        ArgumentError: the first fault found.
    """
    _check_layout(layout)
    if softmax_scale is not None:
        softmax_scale_of(softmax_scale)
    tensors = {"q": q, "k": k, "v": v} | ({} if out is None else {"out": out})
    for name, x in tensors.items():
        _check_tensor(manifest, name, x, q)
    batch, seqlen_q, num_heads_q, _ = _bshd(q.shape, layout)
    _, seqlen_k, num_heads_kv, _ = _bshd(k.shape, layout)
    dims = {"q": manifest.head_dim_qk, "k": manifest.head_dim_qk, "v": manifest.head_dim_v}
    _check_shape("q", q, layout, (batch, seqlen_q, num_heads_q, dims["q"]))
    _check_shape("k", k, layout, (batch, seqlen_k, num_heads_kv, dims["k"]))
    if manifest.scales is None:
        _check_shape("v", v, layout, (batch, seqlen_k, num_heads_kv, dims["v"]))
    else:
        _check_packed_values(v, (batch, num_heads_kv, dims["v"], -(-seqlen_k // KEY_BLOCK) * KEY_BLOCK))
    if num_heads_kv == 0 and num_heads_q > 0:
        raise ArgumentError("k", "0 heads", f"a divisor of q's {num_heads_q} heads")
    if num_heads_kv and num_heads_q % num_heads_kv:
        raise ArgumentError(
            "k",
            f"{num_heads_kv} heads",
            f"a divisor of q's {num_heads_q} heads",
            "each key head serves a group",
        )
    for name, length in (("q", seqlen_q), ("k", seqlen_k)):
        if length > LARGEST_LENGTH:
            raise ArgumentError(name, f"length {length}", f"at most 2^30 - {LARGEST_TILE}")
    if out is not None:
        _check_shape("out", out, layout, (batch, seqlen_q, num_heads_q, manifest.head_dim_v))
        check_overlap(out, {"q": q, "k": k, "v": v})
    return Problem(
        batch,
        seqlen_q,
        seqlen_k,
        num_heads_q,
        num_heads_kv,
        strides(q, layout),
        strides(k, layout),
        strides(v, layout if manifest.scales is None else "bhsd"),
    )


def check_length(x: torch.Tensor, layout: str, name: str = "k") -> int:
    """The number of keys, of a K or V of which nothing else need be right.

    Raises:
        ArgumentError: x has no such dimension, or there is no such layout.
    """
    _check_layout(layout)
    _check_dimensions(name, x)
    return _bshd(x.shape, layout)[1]


def strides(x: torch.Tensor, layout: str) -> Strides:
    """Elements between batches, rows and heads; 0 where there is only one, or none of anything."""
    if not x.numel():
        return 0, 0, 0
    steps = (0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True))
    batch, seqlen, head, _ = _bshd(tuple(steps), layout)
    return batch, seqlen, head


def check_rows(arch: str, name: str, x: torch.Tensor) -> None:
    """Refuse a tensor whose rows a kernel of an arch cannot read, or whose derivative would be wanted.

    Raises:
        ArgumentError: rows are not contiguous, do not start on 16 bytes on a GPU, or x requires grad or has a tangent.
    """
    if x.shape[-1] > 1 and x.stride(-1) != 1 and x.numel():
        raise ArgumentError(
            name,
            f"stride {x.stride(-1)} in the last dimension",
            "1 (contiguous head_dim)",
            f"pass {name}.contiguous()",
        )
    check_no_derivative(name, x)
    if ARCHS[arch].emits:
        check_alignment(name, x)


def check_alignment(name: str, x: torch.Tensor) -> None:
    """Refuse a tensor whose rows do not all start on 16 bytes.

    Raises:
        ArgumentError: the address or a stride is off.
    """
    if not x.numel():
        return
    size = x.element_size()
    if x.data_ptr() % ROW_ALIGNMENT:
        raise ArgumentError(
            name,
            f"an address that is {x.data_ptr() % ROW_ALIGNMENT} bytes past a multiple of {ROW_ALIGNMENT}",
            f"rows that start on {ROW_ALIGNMENT} bytes",
            f"pass {name}.clone()",
        )
    for dim, (extent, step) in enumerate(zip(x.shape[:-1], x.stride()[:-1], strict=True)):
        if extent > 1 and step * size % ROW_ALIGNMENT:
            raise ArgumentError(
                name,
                f"stride {step} in dimension {dim} ({step * size} bytes)",
                f"a multiple of {ROW_ALIGNMENT // size} elements ({ROW_ALIGNMENT} bytes)",
                f"pass {name}.contiguous()",
            )


def _bshd(values: torch.Size | tuple[int, ...], layout: str) -> tuple[int, int, int, int]:
    a, b, c, d = values
    return (a, b, c, d) if layout == "bshd" else (a, c, b, d)


def _check_layout(layout: str) -> None:
    if not isinstance(layout, str) or layout not in ("bshd", "bhsd"):
        raise ArgumentError("layout", shown(layout), "'bshd' or 'bhsd'")


def _check_dimensions(name: str, x: torch.Tensor) -> None:
    """Refuse what has no four dimensions with strides."""
    check_plain(name, x)
    if x.dim() != 4:
        raise ArgumentError(name, f"{x.dim()} dimensions", "4: (batch, seqlen, heads, head_dim)")


def _check_tensor(manifest: _Expectations, name: str, x: torch.Tensor, q: torch.Tensor) -> None:
    _check_dimensions(name, x)
    expected = torch_dtype(dtype(manifest.output if name == "out" else manifest.inputs))
    if x.dtype != expected:
        raise ArgumentError(name, f"dtype {x.dtype}", f"{expected}", f"pass {name}.to({expected})")
    if x.device != q.device:
        raise ArgumentError(name, f"device {x.device}", f"{q.device}, the device of q")
    check_rows(manifest.arch, name, x)


def _check_shape(name: str, x: torch.Tensor, layout: str, expected: tuple[int, int, int, int]) -> None:
    shown = _bshd(expected, layout)
    if tuple(x.shape) != shown:
        letters = (
            "(batch, seqlen, heads, head_dim)" if layout == "bshd" else "(batch, heads, seqlen, head_dim)"
        )
        raise ArgumentError(name, f"shape {tuple(x.shape)}", f"{shown} = {letters}")


def _check_packed_values(v: torch.Tensor, expected: tuple[int, int, int, int]) -> None:
    """Refuse a V of 8 bits that has not been transposed."""
    if tuple(v.shape) != expected:
        must = f"{expected} = (batch, heads, head_dim, keys padded to {KEY_BLOCK})"
        raise ArgumentError("v", f"shape {tuple(v.shape)}", must, "pass k and v of one length")


def check_overlap(out: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
    """Refuse an `out` two of whose elements may share memory, or that may share memory with an input.

    Dimensions sorted by stride must nest: each stride at least spans what the smaller ones reach. An input may lie
    between the rows of `out` only where both step through memory with the same strides (slices of one packed
    tensor) and neither row reaches into the other's.

    Raises:
        ArgumentError: `out` overlaps itself or an input.
    """
    if out.numel() == 0:
        return
    reach = 1
    dims = [(step, size) for step, size in zip(out.stride(), out.shape, strict=True) if size > 1]
    for step, size in sorted(dims):
        if step < reach:
            raise ArgumentError(
                "out", f"strides {tuple(out.stride())}", "a tensor that does not overlap itself"
            )
        reach += step * (size - 1)
    first, last = _extent(out)
    for name, x in inputs.items():
        begin, end = _extent(x)
        if x.numel() and begin < last and first < end and not _interleaved(out, x):
            raise ArgumentError("out", f"memory shared with {name}", "memory of its own")


def _extent(x: torch.Tensor) -> tuple[int, int]:
    reach = sum(step * (size - 1) for step, size in zip(x.stride(), x.shape, strict=True))
    return x.data_ptr(), x.data_ptr() + (reach + 1) * x.element_size()


def _interleaved(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are provably disjoint slices of one packed tensor.

    They are where, for the stride of some dimension, both keep to parts of their own within one step of it.
    """
    if a.stride() != b.stride() or a.element_size() != b.element_size():
        return False
    steps = {step for x in (a, b) for step, size in zip(x.stride(), x.shape, strict=True) if size > 1}
    offset = b.data_ptr() - a.data_ptr()
    for step in steps:
        period = step * a.element_size()
        if period and all(larger % step == 0 for larger in steps if larger > step):
            ahead = offset % period
            if _reach_within(a, step) <= ahead and ahead + _reach_within(b, step) <= period:
                return True
    return False


def _reach_within(x: torch.Tensor, step: int) -> int:
    """Bytes that the dimensions of smaller stride than `step` span."""
    dims = zip(x.stride(), x.shape, strict=True)
    return (1 + sum(inner * (size - 1) for inner, size in dims if inner < step)) * x.element_size()
