"""Boundaries found by torch: what the kernels that find them are held against. torch is imported late."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from attngen.expr.boundaries import Boundary
from attngen.expr.torch_value import evaluate

if TYPE_CHECKING:
    import torch

_LENGTHS = {"q_idx": "seqlen_q", "kv_idx": "seqlen_k"}
_SIZE_OF = {"b": "batch", "h": "num_heads_q", "h_kv": "num_heads_kv", **_LENGTHS}


def find_boundaries(
    boundaries: Iterable[Boundary],
    sizes: Mapping[str, int],
    scalars: Mapping[str, Any],
    tensors: Mapping[str, "torch.Tensor"],
) -> dict[str, "torch.Tensor"]:
    """Each boundary by its name, found by the steps of bisection that the kernels take, so of unsorted tensors too.

    Args:
        boundaries: those of a mask.
        sizes: of the call, a value for each of `declarations.SIZE_NAMES`.
        scalars: a value for each scalar that conditions read.
        tensors: what they look up.
    """
    return {each.name: _find(each, sizes, scalars, tensors) for each in boundaries}


def _find(
    boundary: Boundary,
    sizes: Mapping[str, int],
    scalars: Mapping[str, Any],
    tensors: Mapping[str, "torch.Tensor"],
) -> "torch.Tensor":
    import torch

    shape = [sizes[_SIZE_OF[index.name]] for index in boundary.indices]
    names: dict[str, Any] = {"seqlen_q": sizes["seqlen_q"], "seqlen_k": sizes["seqlen_k"], **scalars}
    for axis, index in enumerate(boundary.indices):
        along = [1] * len(shape)
        along[axis] = shape[axis]
        names[index.name] = torch.arange(shape[axis]).reshape(along)
    first = torch.zeros(shape, dtype=torch.int64)
    end = torch.full(shape, sizes[_LENGTHS[boundary.along]], dtype=torch.int64)
    while (first < end).any():
        middle = first + (end - first) // 2
        holds = torch.as_tensor(evaluate(boundary.condition, names | {boundary.along: middle}, tensors))
        is_open = first < end
        first, end = (
            torch.where(is_open & ~holds, middle + 1, first),
            torch.where(is_open & holds, middle, end),
        )
    return first.to(torch.int32)
