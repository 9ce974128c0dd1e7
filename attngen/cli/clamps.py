"""Where a call clamps an index of a lookup and it counts: at pairs that the mask shows."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attngen.check.inputs import Shape
from attngen.expr import (
    FALSE,
    TRUE,
    Expr,
    conjunction,
    const,
    disjunction,
    evaluate,
    free_names,
    less,
    less_equal,
    negate,
    nodes,
)
from attngen.spec import Spec

PAIRS = 2**22
"""Asked at a time."""


@dataclass(frozen=True)
class Clamp:
    """An index that lies outside of a tensor's dimension.

    Attributes:
        dimension: number and declared name.
        pair: the first where it counts: batch, head, query and key.
    """

    tensor: str
    dimension: tuple[int, str]
    index: int
    size: int
    pair: tuple[int, int, int, int]

    def __str__(self) -> str:
        number, name = self.dimension
        b, h, q_idx, kv_idx = self.pair
        return (
            f"{self.tensor} is read at {self.index} in dimension {number} ({name}), which has {self.size}: clamped, "
            f"first at the visible pair b = {b}, h = {h}, q_idx = {q_idx}, kv_idx = {kv_idx}"
        )


def clamps(spec: Spec, shape: Shape, declared: Mapping[str, Any]) -> Iterator[Clamp]:
    """The clamps that count in a call; one for each dimension of each lookup at most.

    Indices that depend on the score are not asked, nor are sequences that have lengths of their own.
    """
    if shape.cuts or not (shape.batch and shape.seqlen_q and shape.seqlen_k):
        return
    for tree in (spec.mask_expr, spec.score_expr):
        for lookup in (each for each in nodes(tree) if each.op == "lookup"):
            dims = zip(lookup.args, spec.declarations.tensors[lookup.name].dims, strict=True)
            for i, (index, dim) in enumerate(dims):
                size = declared[lookup.name].shape[i]
                pair = _first_outside(tree, lookup, index, size, spec.mask_expr, shape, declared)
                if pair is not None:
                    at = int(evaluate(index, _names(shape, declared, *pair), _tensors(declared)))
                    yield Clamp(lookup.name, (i, str(dim)), at, size, pair)


def _first_outside(
    tree: Expr,
    lookup: Expr,
    index: Expr,
    size: int,
    mask: Expr,
    shape: Shape,
    declared: Mapping[str, Any],
) -> tuple[int, int, int, int] | None:
    """The first pair, by query and key, at which an index is outside and the lookup counts."""
    outside = disjunction((less(index, const(0)), less_equal(const(size), index)))
    if outside is FALSE or "score" in free_names(outside):
        return None
    device = declared[lookup.name].device
    b, h, kv_idx = (torch.arange(n, device=device) for n in (shape.batch, shape.heads, shape.seqlen_k))
    rows = max(1, PAIRS // (shape.batch * shape.heads * shape.seqlen_k))
    for first in range(0, shape.seqlen_q, rows):
        q_idx = torch.arange(first, min(first + rows, shape.seqlen_q), device=device)
        names = _names(
            shape,
            declared,
            b.view(-1, 1, 1, 1),
            h.view(1, -1, 1, 1),
            q_idx.view(1, 1, -1, 1),
            kv_idx.view(1, 1, 1, -1),
        )
        if not torch.as_tensor(evaluate(outside, names, _tensors(declared))).any():
            continue
        counts = conjunction((mask, _counts(tree, lookup), outside))
        found = torch.as_tensor(evaluate(counts, names, _tensors(declared)), device=device)
        every = found.expand(shape.batch, shape.heads, len(q_idx), shape.seqlen_k)
        places = every.permute(2, 3, 0, 1).nonzero()
        if len(places):
            row, key, batch, head = places[0].tolist()
            return batch, head, first + row, key
    return None


def _counts(tree: Expr, lookup: Expr) -> Expr:
    """When a node has a part in a tree's value: a choice takes it, and what it is joined with does not decide alone."""
    counts = {tree: TRUE}
    for each in reversed(nodes(tree)):
        for i, arg in enumerate(each.args):
            others = [other for j, other in enumerate(each.args) if j != i]
            if each.op == "where" and i:
                needed = each.args[0] if i == 1 else negate(each.args[0])
            elif each.op == "and":
                needed = conjunction(others)
            elif each.op == "or":
                needed = conjunction(map(negate, others))
            else:
                needed = TRUE
            if "score" in free_names(needed):
                needed = TRUE
            counts[arg] = disjunction((counts.get(arg, FALSE), conjunction((counts[each], needed))))
    return counts[lookup]


def _names(
    shape: Shape, declared: Mapping[str, Any], b: Any, h: Any, q_idx: Any, kv_idx: Any
) -> dict[str, Any]:
    return {
        **declared,
        "b": b,
        "h": h,
        "h_kv": h // (shape.heads // shape.heads_kv),
        "q_idx": q_idx,
        "kv_idx": kv_idx,
        "seqlen_q": shape.seqlen_q,
        "seqlen_k": shape.seqlen_k,
    }


def _tensors(declared: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in declared.items() if isinstance(value, torch.Tensor)}
