"""Arithmetic on bounds: from where an operation's arguments lie, where its value does.

Bounds are trees, so what comes out is text for CUDA or a value in torch like any other expression. An i32 value lies
in lo..hi. An f32 value does too, or it is NaN, and where it may be NaN either

- lo is -inf and hi is +inf, or
- lo and hi are one expression, the value itself, which every comparison finds false, as it does the value.

f32 arithmetic rounds monotonically, so the same operation on the ends gives the ends. Functions that the hardware
approximates (`exp`, `sin`, ...) need not be monotone, and only what their values can be is said of them.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial, reduce

from attngen.errors import InternalError
from attngen.expr.arithmetic import (
    call,
    compare,
    floor_divide,
    minus,
    modulo,
    negative,
    over,
    plus,
    times,
    where,
)
from attngen.expr.logic import conjunction, disjunction, equal, less_equal
from attngen.expr.ranges import index_range
from attngen.expr.tree import TRUE, Expr, add, const, real, scale, sub


@dataclass(frozen=True)
class Bounds:
    """The least and the greatest value, both included."""

    lo: Expr
    hi: Expr

    @property
    def is_exact(self) -> bool:
        """Whether this is the one value itself."""
        return self.lo is self.hi


UNKNOWN = Bounds(real(-math.inf), real(math.inf))
"""Any f32, or NaN."""

_CODOMAINS = {
    "exp": Bounds(real(0.0), UNKNOWN.hi),
    "exp2": Bounds(real(0.0), UNKNOWN.hi),
    "tanh": Bounds(real(-1.0), real(1.0)),
    "sigmoid": Bounds(real(0.0), real(1.0)),
    "sin": Bounds(real(-1.0), real(1.0)),
    "cos": Bounds(real(-1.0), real(1.0)),
}
"""Between what the functions lie that are not known to be monotone, wherever their argument is finite."""


def total(terms: Iterable[Bounds]) -> Bounds:
    """The sum of i32."""
    found = list(terms)
    return Bounds(reduce(add, (term.lo for term in found)), reduce(add, (term.hi for term in found)))


def multiple(factor: int, x: Bounds) -> Bounds:
    """A constant times an i32."""
    ends = scale(factor, x.lo), scale(factor, x.hi)
    return Bounds(*ends) if factor > 0 else Bounds(*reversed(ends))


def product(x: Bounds, y: Bounds) -> Bounds:
    """The product of two i32."""
    if index_range(x.lo)[0] >= 0 and index_range(y.lo)[0] >= 0:
        return Bounds(times(x.lo, y.lo), times(x.hi, y.hi))
    return _hull_of_corners(times, x, y)


def quotient(x: Bounds, y: Bounds, divisors: tuple[int, int]) -> Bounds:
    """`x // y`, of a divisor that stays within `divisors`."""
    divisor = _nonzero(y, divisors)
    if divisors[0] > 0 and divisor.is_exact:
        return Bounds(floor_divide(x.lo, divisor.lo), floor_divide(x.hi, divisor.lo))
    return _hull_of_corners(floor_divide, x, divisor)


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


def function(name: str, x: Bounds, *others: Bounds) -> Bounds:
    """The value of `arithmetic.call`, of numbers of one type."""
    if name in ("min", "max"):
        (y,) = others
        choose = lesser if name == "min" else greater
        return Bounds(choose(x.lo, y.lo), choose(x.hi, y.hi))
    if name in ("sign", "floor", "i32", "f32"):
        return Bounds(call(name, x.lo), call(name, x.hi))
    if name == "abs":
        return _magnitude(x)
    if name == "sqrt":  # of what is negative it is NaN
        return _where_known(compare("<=", real(0.0), x.lo), Bounds(call(name, x.lo), call(name, x.hi)))
    if name not in _CODOMAINS:
        return UNKNOWN
    is_finite = conjunction([compare("<", UNKNOWN.lo, x.lo), compare("<", x.hi, UNKNOWN.hi)])
    return _where_known(is_finite, _CODOMAINS[name])


def _magnitude(x: Bounds) -> Bounds:
    zero = const(0) if x.lo.type == "i32" else real(0.0)
    lo = greater(greater(x.lo, negative(x.hi)), zero)
    hi = greater(negative(x.lo), x.hi)
    if x.lo.type == "i32":
        return Bounds(lo, hi)
    return Bounds(where(compare("<", hi, UNKNOWN.hi), lo, UNKNOWN.lo), hi)  # what has no end may be NaN


def real_arithmetic(sign: str, x: Bounds, y: Bounds) -> Bounds:
    """`+`, `-`, `*` or `/` of two f32. Where an end is NaN, or the divisor may be 0, nothing is known."""
    if sign == "+":
        found = Bounds(plus(x.lo, y.lo), plus(x.hi, y.hi))
    elif sign == "-":
        found = Bounds(minus(x.lo, y.hi), minus(x.hi, y.lo))
    else:
        operation, zero = times if sign == "*" else over, real(0.0)
        corners = _corners(operation, x, y)
        is_known = conjunction(compare("==", corner, corner) for corner in corners)
        if sign == "/":
            keeps_sign = disjunction([compare("<", zero, y.lo), compare("<", y.hi, zero)])
            is_known = conjunction([is_known, keeps_sign])
        return _where_known(is_known, Bounds(reduce(lesser, corners), reduce(greater, corners)))
    return _where_known(compare("<=", found.lo, found.hi), found)


def hull(x: Bounds, y: Bounds) -> Bounds:
    """Either of two values of one type."""
    both = Bounds(lesser(x.lo, y.lo), greater(x.hi, y.hi))
    if x.lo.type == "i32":
        return both
    # `min` and `max` would forget a NaN.
    return _where_known(conjunction(compare("<=", each.lo, each.hi) for each in (x, y)), both)


def _where_known(is_known: Expr, x: Bounds) -> Bounds:
    return Bounds(where(is_known, x.lo, UNKNOWN.lo), where(is_known, x.hi, UNKNOWN.hi))


def _hull_of_corners(operation: Callable[[Expr, Expr], Expr], x: Bounds, y: Bounds) -> Bounds:
    corners = _corners(operation, x, y)
    return Bounds(reduce(lesser, corners), reduce(greater, corners))


def _corners(operation: Callable[[Expr, Expr], Expr], x: Bounds, y: Bounds) -> list[Expr]:
    return list(dict.fromkeys(operation(a, b) for a in (x.lo, x.hi) for b in (y.lo, y.hi)))


def _chosen(name: str, a: Expr, b: Expr) -> Expr:
    """The lesser or the greater, without a call where that is the same one always."""
    if a.type == "i32":
        lowest, highest = index_range(sub(a, b))
        if highest <= 0 or lowest >= 0:
            return a if (highest <= 0) == (name == "min") else b
    return call(name, a, b)


lesser = partial(_chosen, "min")
greater = partial(_chosen, "max")


def is_at_most(x: Bounds, y: Bounds) -> tuple[Expr, Expr]:
    """Whether x <= y of two f32 may hold, and whether it must; it does not where either is NaN."""
    known = [] if x.is_exact or _is_finite(x.hi) else [compare("<", x.hi, UNKNOWN.hi)]
    known += [] if y.is_exact or _is_finite(y.lo) else [compare("<", UNKNOWN.lo, y.lo)]
    return compare("<=", x.lo, y.hi), conjunction([compare("<=", x.hi, y.lo), *known])


def is_less(x: Bounds, y: Bounds) -> tuple[Expr, Expr]:
    """The same of x < y. What must be less than another is not infinite, nor is the other -inf: neither is NaN."""
    return compare("<", x.lo, y.hi), compare("<", x.hi, y.lo)


def is_equal(x: Bounds, y: Bounds) -> tuple[Expr, Expr]:
    """The same of x == y. Ends that meet from both sides are one number."""
    may = conjunction([compare("<=", x.lo, y.hi), compare("<=", y.lo, x.hi)])
    return may, conjunction([compare("<=", x.hi, y.lo), compare("<=", y.hi, x.lo)])


def _is_finite(bound: Expr) -> bool:
    return (bound.op == "call" and bound.name == "f32") or (
        bound.op == "const" and math.isfinite(bound.value)
    )


def may_leave_remainder(x: Bounds, divisor: int, least: Expr | None, most: Expr | None) -> Expr:
    """Whether some integer of lo..hi leaves a remainder of `least` at least and `most` at most.

    Args:
        x: the dividend.
        divisor: positive.
        least: None is 0.
        most: None is `divisor` - 1.
    """
    last = const(divisor - 1)
    legal = [
        TRUE if least is None else less_equal(least, last),
        TRUE if most is None else less_equal(const(0), most),
    ]
    if most is not None and least is not None:
        legal.append(less_equal(const(0), least))
        legal.append(less_equal(most, last))
    # The last stretch of such remainders that begins by hi must not end before lo.
    begin = scale(divisor, floor_divide(x.hi if least is None else sub(x.hi, least), const(divisor)))
    return conjunction([*legal, less_equal(x.lo, add(begin, last if most is None else most))])
