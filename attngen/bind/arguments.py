"""What a call may pass: every fault is an ArgumentError that names the argument, before anything is touched.

The checks look at shapes, strides, types and addresses, so they serve the GPU and the simulator alike. What each value
must be is its entry's in the manifest.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from attngen.bind.declared import check_declared
from attngen.bind.numbers import softmax_scale_of
from attngen.bind.overlap import check_overlap
from attngen.bind.sequences import sequence_sizes
from attngen.bind.tensors import check_plain, check_rows
from attngen.dtypes import dtype, torch_dtype
from attngen.errors import ArgumentError, shown
from attngen.expr import LARGEST_LENGTH, LARGEST_TILE
from attngen.plan import (
    COLUMNS_OF_HEADS,
    DENSE,
    GRADIENTS_INTAKE,
    LETTERS,
    OPERANDS_INTAKE,
    PAGES_OF_HEADS,
    ROWS_OF_HEADS,
    SINK_VALUES,
    TOKENS_OF_HEADS,
    Intake,
    Lengths,
    Manifest,
    Value,
    evaluate_formula,
)

Layout = Literal["bshd", "bhsd"]
PAGE_LAYOUTS = ("nhd", "hnd")
"""How a page lies in a cache: (rows, heads, head_dim), as "bshd" says too, or (heads, rows, head_dim)."""
_EXCHANGED: Mapping[tuple[str, ...], str] = {ROWS_OF_HEADS: "bhsd", PAGES_OF_HEADS: "hnd"}
"""The layout in which the two dimensions in the middle are exchanged, by the axes of a tensor."""
NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Given:
    """What a call passes, checked.

    Attributes:
        intake: in which way it begins.
        sizes: batch, lengths, heads and group.
        tensors: by the names of their values, dimensions in the order of the values' axes.
        scalars: what the spec declares, defaults included.
        declared_sizes: of the dimensions that the spec's tensors are declared with.
    """

    intake: Intake
    sizes: dict[str, int]
    tensors: dict[str, torch.Tensor]
    scalars: dict[str, Any]
    declared_sizes: dict[str, int]

    @property
    def declared(self) -> dict[str, torch.Tensor]:
        """The tensors of the spec's expressions, by the names that it has for them."""
        prefix = "tensor."
        return {name.removeprefix(prefix): x for name, x in self.tensors.items() if name.startswith(prefix)}

    @property
    def by_name(self) -> dict[str, torch.Tensor]:
        """Those, and the tensors that say lengths: what every way to begin a call is passed by name, but for a sink."""
        others = (*self.intake.values, *SINK_VALUES)
        return {name.removeprefix("tensor."): x for name, x in self.tensors.items() if name not in others}


def check_arguments(
    manifest: Manifest,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    into: Mapping[str, torch.Tensor] = NOTHING,
    layout: str = "bshd",
    declared: Mapping[str, Any] = NOTHING,
    intake: str | None = None,
) -> Given:
    """Check the arguments of a call against what its kernels were made for.

    Args:
        manifest: of the call.
        q: (batch, seqlen_q, num_heads_q, head_dim_qk), or (tokens_q, num_heads_q, head_dim_qk) of ragged queries,
            of a type that the manifest takes; last dimension contiguous.
        k: (batch, seqlen_k, num_heads_kv, head_dim_qk).
        v: (batch, seqlen_k, num_heads_kv, head_dim_v).
        softmax_scale: of at most 2^127, either sign, or None.
        into: memory for outputs, by the names of their values: {"out": (batch, seqlen_q, num_heads_q, head_dim_v)}.
        layout: "bshd" as above, or "bhsd" with seqlen and heads exchanged in q, k, v and outputs that have batches;
            of caches, (pages, page_size, num_heads_kv, head_dim), "nhd", or "hnd" with the two in the middle exchanged.
        declared: what is passed by name.
        intake: in which way the call begins; that of q's type where None.

    Raises:
        ArgumentError: the first fault found.
    """
    given = check_rows_of_heads(manifest, q, k, v, softmax_scale, into, layout, intake)
    if not manifest.lengths.are_dense:
        given.sizes.update(sequence_sizes(manifest, given.sizes, declared))
    tensors, scalars, sizes = check_declared(manifest, given.intake, declared, given.sizes, q.device)
    named = {name.removeprefix("tensor."): x for name, x in tensors.items()}
    for name, x in into.items():
        check_overlap(manifest.value_of[name].passed_as, x, named)
    return Given(given.intake, given.sizes, {**given.tensors, **tensors}, scalars, sizes)


def check_rows_of_heads(
    manifest: Manifest,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    into: Mapping[str, torch.Tensor] = NOTHING,
    layout: str = "bshd",
    intake: str | None = None,
) -> Given:
    """Check all that a call passes but what the spec declares; arguments as of `check_arguments`."""
    _check_layout(layout, manifest.lengths)
    if softmax_scale is not None:
        softmax_scale_of(softmax_scale)
    begun = choose_intake(manifest, q, intake)
    entries = [manifest.value_of[name] for name in begun.tensors]
    passed = [*zip(entries, (q, k, v), strict=True)]
    outputs = [(manifest.value_of[name], x) for name, x in into.items()]
    for value, x in (*passed, *outputs):
        _check_tensor(manifest.arch, value, x, q)
    sizes: dict[str, int] = {}
    tensors = {value.name: _bind_shape(value, x, layout, sizes) for value, x in passed}
    _check_heads(sizes, begun)
    for axis, name in LETTERS.items():
        if manifest.lengths.is_paged(axis):  # of which the table tells, see `sequence_sizes`
            continue
        is_by_token = manifest.lengths.is_by_token(axis)
        if (length := sizes[f"tokens_{name}" if is_by_token else f"seqlen_{name}"]) > LARGEST_LENGTH:
            raise ArgumentError(name, f"length {length}", f"at most 2^30 - {LARGEST_TILE}")
    sizes["group"] = sizes["num_heads_q"] // max(1, sizes["num_heads_kv"])
    others = {"q": q, "k": k, "v": v}
    for value, x in outputs:
        _bind_shape(value, x, layout, sizes)
        check_overlap(value.passed_as, x, others)
        others[value.passed_as] = x
    return Given(begun, sizes, tensors, {}, {})


def choose_intake(manifest: Manifest, q: Any, name: str | None = None) -> Intake:
    """The way in which a call begins: the one of that name, or of q's type.

    Raises:
        ArgumentError: the call begins with no such q.
    """
    if name is not None:
        return next(intake for intake in manifest.intakes if intake.name == name)
    by_name = (OPERANDS_INTAKE, GRADIENTS_INTAKE)
    begun = [intake for intake in manifest.intakes if intake.name not in by_name] or manifest.intakes
    if len(begun) == 1 or not isinstance(q, torch.Tensor):
        return begun[0]
    types = {torch_dtype(dtype(manifest.value_of[intake.values[0]].dtype)): intake for intake in begun}
    if q.dtype not in types:
        *others, last = map(str, types)
        must = f"{', '.join(others)} or {last}"
        raise ArgumentError("q", f"dtype {q.dtype}", must, f"pass q.to({others[0]})")
    return types[q.dtype]


def q_types(manifest: Manifest) -> tuple[torch.dtype, ...]:
    """The types of Q that a call may begin with."""
    firsts = (manifest.value_of[intake.values[0]] for intake in manifest.intakes)
    return tuple(dict.fromkeys(torch_dtype(dtype(value.dtype)) for value in firsts))


def _check_heads(sizes: Mapping[str, int], intake: Intake) -> None:
    heads_q, heads_kv = sizes["num_heads_q"], sizes["num_heads_kv"]
    if intake.name == GRADIENTS_INTAKE and heads_kv > heads_q == 0:
        must = f"at least 1 beside {heads_kv} of k, whose gradients are sums over them"
        raise ArgumentError("q", "0 heads", must)
    if heads_kv == 0 and heads_q > 0:
        raise ArgumentError("k", "0 heads", f"a divisor of q's {heads_q} heads")
    if heads_kv and heads_q % heads_kv:
        raise ArgumentError(
            "k",
            f"{heads_kv} heads",
            f"a divisor of q's {heads_q} heads",
            "each key head serves a group",
        )


def check_length(x: torch.Tensor, layout: str, name: str = "k") -> int:
    """The number of keys, of a K or V of which nothing else need be right.

    Raises:
        ArgumentError: x has no such dimension, or there is no such layout.
    """
    _check_layout(layout, DENSE)
    _check_dimensions(name, x)
    return _bshd(x.shape, layout)[1]


def strides(x: torch.Tensor) -> tuple[int, ...]:
    """Elements between neighbours in each dimension; 0 where there is only one, or none of anything."""
    if not x.numel():
        return (0,) * x.dim()
    return tuple(0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True))


def _bshd(values: torch.Size | tuple[int, ...], layout: str) -> tuple[int, int, int, int]:
    a, b, c, d = values
    return (a, b, c, d) if layout == "bshd" else (a, c, b, d)


def _check_layout(layout: str, lengths: Lengths) -> None:
    is_paged = lengths.is_paged("keys")
    known = ("bshd", *PAGE_LAYOUTS) if is_paged else ("bshd", "bhsd")
    if not isinstance(layout, str) or layout not in known:
        must = "'nhd' or 'hnd', as the pages of k and v lie" if is_paged else "'bshd' or 'bhsd'"
        raise ArgumentError("layout", shown(layout), must)


def _check_dimensions(name: str, x: torch.Tensor, axes: tuple[str, ...] = ROWS_OF_HEADS) -> None:
    """Refuse what has not these dimensions with strides."""
    check_plain(name, x)
    if x.dim() != len(axes):
        raise ArgumentError(name, f"{x.dim()} dimensions", f"{len(axes)}: ({', '.join(_words(axes))})")


def _check_tensor(arch: str, value: Value, x: torch.Tensor, q: torch.Tensor) -> None:
    """Refuse what is no tensor of the value's type, beside q, with rows that a kernel can read."""
    name = value.passed_as
    _check_dimensions(name, x, value.axes)
    expected = torch_dtype(dtype(value.dtype))
    if x.dtype != expected:
        raise ArgumentError(name, f"dtype {x.dtype}", f"{expected}", f"pass {name}.to({expected})")
    if x.device != q.device:
        raise ArgumentError(name, f"device {x.device}", f"{q.device}, the device of q")
    check_rows(arch, name, x)


def _bind_shape(value: Value, x: torch.Tensor, layout: str, sizes: dict[str, int]) -> torch.Tensor:
    """The tensor with its dimensions in the order of the value's axes; sizes that are new get its extents."""
    name, is_exchanged = value.passed_as, _EXCHANGED.get(value.axes) == layout
    ordered = x.transpose(1, 2) if is_exchanged else x
    for dim, size in zip(value.shape, ordered.shape, strict=True):
        if isinstance(dim, str):
            sizes.setdefault(dim, size)
    expected = tuple(evaluate_formula(dim, sizes) for dim in value.shape)
    if tuple(ordered.shape) != expected:
        letters = _words(value.axes)
        if is_exchanged:
            letters[1:3], expected = letters[2:0:-1], (expected[0], expected[2], expected[1], expected[3])
        must = f"{expected} = ({', '.join(letters)})"
        raise ArgumentError(name, f"shape {tuple(x.shape)}", must, _CURES.get(value.axes))
    return ordered


def _words(axes: tuple[str, ...]) -> list[str]:
    """What people call the dimensions of rows of heads."""
    rows = {TOKENS_OF_HEADS: "tokens", PAGES_OF_HEADS: "page"}.get(axes, "seqlen")
    return [rows if axis == "seqlen" else _WORDS[axis] for axis in axes]


_WORDS = {"batch": "batch", "page": "pages", "head": "heads", "column": "head_dim", "key": "padded keys"}
_CURES: Mapping[tuple[str, ...], str] = {COLUMNS_OF_HEADS: "pass k and v of one length"}
