"""Arithmetic on bounds: from where the arguments of an i32 operation lie, where its value does.

Bounds are trees, so what comes out is text for CUDA or a value in torch like any other expression. For f32 see
real_intervals.py.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial, reduce

from attngen.errors import InternalError
from attngen.expr import tree
from attngen.expr.arithmetic import (
    call,
    floor_divide,
    modulo,
    times,
    where,
)
from attngen.expr.logic import equal
from attngen.expr.ranges import index_range
from attngen.expr.tree import Expr, add, const, scale, sub


@dataclass(frozen=True)
class Bounds:
    """The least and the greatest value, both included."""

    lo: Expr
    hi: Expr

    @property
    def is_exact(self) -> bool:
        """Whether this is the one value itself."""
        return self.lo is self.hi


def total(terms: Iterable[Bounds]) -> Bounds:
    """The sum of i32."""
    found = list(terms)
    return Bounds(tree.total((1, term.lo) for term in found), tree.total((1, term.hi) for term in found))


def multiple(factor: int, x: Bounds) -> Bounds:
    """A constant times an i32."""
    ends = scale(factor, x.lo), scale(factor, x.hi)
    return Bounds(*ends) if factor > 0 else Bounds(*reversed(ends))


def product(x: Bounds, y: Bounds) -> Bounds:
    """The product of two i32."""
    if index_range(x.lo)[0] >= 0 and index_range(y.lo)[0] >= 0:
        return Bounds(times(x.lo, y.lo), times(x.hi, y.hi))
    return hull(corners(times, x, y))


def quotient(x: Bounds, y: Bounds, divisors: tuple[int, int]) -> Bounds:
    """`x // y`, of a divisor that stays within `divisors`."""
    divisor = _nonzero(y, divisors)
    if divisors[0] > 0 and divisor.is_exact:
        return Bounds(floor_divide(x.lo, divisor.lo), floor_divide(x.hi, divisor.lo))
    return hull(corners(floor_divide, x, divisor))


def remainder(x: Bounds, y: Bounds, divisors: tuple[int, int]) -> Bounds:
    """`x % y`, of a divisor that stays within `divisors`: a stretch of x where all have one quotient, else anything."""
    divisor = _nonzero(y, divisors)
    is_positive = divisors[0] > 0
    lowest = const(0) if is_positive else add(divisor.lo, const(1))
    highest = sub(divisor.hi, const(1)) if is_positive else const(0)
    if not divisor.is_exact:
        return Bounds(lowest, highest)
    by = divisor.lo
    is_one_stretch = equal(floor_divide(x.lo, by), floor_divide(x.hi, by))
    return Bounds(
        where(is_one_stretch, modulo(x.lo, by), lowest),
        where(is_one_stretch, modulo(x.hi, by), highest),
    )


def _nonzero(y: Bounds, divisors: tuple[int, int]) -> Bounds:
    """Bounds of a divisor that leave out 0 as well."""
    lowest, highest = divisors
    if lowest > 0:
        return Bounds(greater(y.lo, const(1)), greater(y.hi, const(1)))
    if highest < 0:
        return Bounds(lesser(y.lo, const(-1)), lesser(y.hi, const(-1)))
    raise InternalError(f"a divisor between {lowest} and {highest} may be 0")


def corners(operation: Callable[[Expr, Expr], Expr], x: Bounds, y: Bounds) -> list[Expr]:
    """The values at the ends; an operation that is monotone in each argument lies between them."""
    return list(dict.fromkeys(operation(a, b) for a in (x.lo, x.hi) for b in (y.lo, y.hi)))


def hull(values: Iterable[Expr]) -> Bounds:
    """From the least to the greatest."""
    found = list(values)
    return Bounds(reduce(lesser, found), reduce(greater, found))


def _chosen(name: str, a: Expr, b: Expr) -> Expr:
    """The lesser or the greater, without a call where that is the same one always."""
    if a.type == "i32":
        lowest, highest = index_range(sub(a, b))
        if highest <= 0 or lowest >= 0:
            return a if (highest <= 0) == (name == "min") else b
    return call(name, a, b)


lesser = partial(_chosen, "min")
greater = partial(_chosen, "max")
