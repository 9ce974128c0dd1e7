"""Where a score reads what a gradient is wanted of, and which pairs of query and key read one element of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from attngen.expr.arithmetic import call, times
from attngen.expr.declarations import Declarations
from attngen.expr.derivative import derivative
from attngen.expr.tree import Expr, add, const, nodes, real

Owner = Literal["pair", "query", "key", "head", "table"]
"""Who reads an element: a pair, in each of some heads; all pairs of a query, of a key, or of some heads; or pairs here
and there, as an index says that is worked out."""

SIZE_OF_INDEX: Mapping[str, str] = MappingProxyType(
    {"b": "batch", "h": "num_heads_q", "h_kv": "num_heads_kv", "q_idx": "seqlen_q", "kv_idx": "seqlen_k"}
)
"""How many values an index of the language takes."""


@dataclass(frozen=True)
class GradientSite:
    """The one place where a score reads a tensor or a scalar of f32.

    Attributes:
        name: as the spec declares it.
        dtype: of its elements.
        dims: as declared; a scalar has none.
        read: the lookup, or the scalar's name.
        slope: the derivative of the score by what is read there.
    """

    name: str
    dtype: str
    dims: tuple[str | int, ...]
    read: Expr
    slope: Expr

    @property
    def indices(self) -> tuple[Expr, ...]:
        """One for each dimension."""
        return self.read.args

    @property
    def owner(self) -> Owner:
        """Who reads an element, where its indices are not clamped."""
        named = [index.name for index in self.indices if index.op != "const"]
        if not set(named) <= SIZE_OF_INDEX.keys():
            return "table"
        if {"q_idx", "kv_idx"} <= set(named):
            return "pair" if len(named) == len(set(named)) else "table"
        return "query" if "q_idx" in named else "key" if "kv_idx" in named else "head"

    @property
    def table_dims(self) -> tuple[int, ...]:
        """The numbers of the dimensions along which the pairs of a tile read here and there."""
        return tuple(
            number
            for number, index in enumerate(self.indices)
            if index.op != "const" and index.name not in ("b", "h", "h_kv")
        )

    @property
    def entries(self) -> int | None:
        """How many elements the pairs of a tile may read, where that is known before a call."""
        sizes = [self.dims[number] for number in self.table_dims]
        return (
            math.prod(int(size) for size in sizes) if all(isinstance(size, int) for size in sizes) else None
        )

    @property
    def entry(self) -> Expr:
        """Which of them a pair reads, indices clamped."""
        number = const(0)
        for dim in self.table_dims:
            size = const(int(self.dims[dim]))
            clamped = call("clamp", self.indices[dim], const(0), const(int(self.dims[dim]) - 1))
            number = add(times(number, size), clamped)
        return number

    @property
    def extents(self) -> tuple[str | int, ...]:
        """How many elements each index runs over, from 0 on: a dimension that is as long is never clamped."""
        return tuple(
            SIZE_OF_INDEX[index.name] if index.op == "name" else max(0, int(index.value)) + 1
            for index in self.indices
        )


def gradient_sites(score: Expr, name: str, declared: Declarations) -> tuple[GradientSite, ...]:
    """Every place where a score reads a tensor or a scalar of numbers on which it depends, other than by steps."""
    tensor, scalar = declared.tensors.get(name), declared.scalars.get(name)
    op, dtype, dims = ("lookup", tensor.dtype, tensor.dims) if tensor else ("name", "f32", ())
    if scalar and scalar.type != "f32":
        return ()
    reads = (each for each in nodes(score) if each.op == op and each.name == name and each.type == "f32")
    sites = (GradientSite(name, dtype, dims, read, derivative(score, read)) for read in reads)
    return tuple(site for site in sites if site.slope is not real(0.0))
