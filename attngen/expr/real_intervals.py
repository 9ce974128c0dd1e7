"""Arithmetic on bounds of f32, functions of any number, and comparisons of bounds.

An f32 value lies in lo..hi or is NaN, and where it may be NaN either

- lo is -inf and hi is +inf, or
- lo and hi are one expression, the value itself, which every comparison finds false, as it does the value.

f32 arithmetic rounds monotonically, so the same operation on the ends gives the ends. Functions that the hardware
approximates (`exp`, `sin`, ...) need not be monotone, and only what their values can be is said of them.
"""

import math

from attngen.expr.arithmetic import call, compare, minus, negative, over, plus, times, where
from attngen.expr.intervals import Bounds, corners, greater, hull, lesser
from attngen.expr.logic import conjunction, disjunction
from attngen.expr.ranges import index_range
from attngen.expr.tree import TRUE, Expr, const, real

_ZERO = real(0.0)
_UNKNOWN = Bounds(real(-math.inf), real(math.inf))
"""Any f32, or NaN."""

_CODOMAINS = {
    "exp": Bounds(_ZERO, _UNKNOWN.hi),
    "exp2": Bounds(_ZERO, _UNKNOWN.hi),
    "tanh": Bounds(real(-1.0), real(1.0)),
    "sigmoid": Bounds(_ZERO, real(1.0)),
    "sin": Bounds(real(-1.0), real(1.0)),
    "cos": Bounds(real(-1.0), real(1.0)),
}
"""Between what the functions lie that are not known to be monotone, wherever their argument is finite."""


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
        return _where_known(compare("<=", _ZERO, x.lo), Bounds(call(name, x.lo), call(name, x.hi)))
    if name in _CODOMAINS:
        return _where_known(
            conjunction([_is_above_infinity(x.lo), _is_below_infinity(x.hi)]), _CODOMAINS[name]
        )
    return _UNKNOWN


def _magnitude(x: Bounds) -> Bounds:
    is_i32 = x.lo.type == "i32"
    lo = greater(greater(x.lo, negative(x.hi)), const(0) if is_i32 else _ZERO)
    hi = greater(negative(x.lo), x.hi)
    if is_i32:
        return Bounds(lo, hi)
    return Bounds(where(_is_below_infinity(hi), lo, _UNKNOWN.lo), hi)  # what has no end may be NaN


def arithmetic(sign: str, x: Bounds, y: Bounds) -> Bounds:
    """`+`, `-`, `*` or `/` of two f32. Where an end is NaN, or the divisor may be 0, nothing is known."""
    if sign == "+":
        return _where_number(Bounds(plus(x.lo, y.lo), plus(x.hi, y.hi)))
    if sign == "-":
        return _where_number(Bounds(minus(x.lo, y.hi), minus(x.hi, y.lo)))
    if sign == "/":
        keeps_sign = disjunction([compare("<", _ZERO, y.lo), compare("<", y.hi, _ZERO)])
        quotients = corners(over, x, y)
        return _where_known(conjunction([keeps_sign, *map(_is_number, quotients)]), hull(quotients))
    for factor, other in ((x, y), (y, x)):
        value = factor.lo.value if factor.is_exact and factor.lo.op == "const" else 0
        if value and math.isfinite(value):
            ends = times(factor.lo, other.lo), times(factor.lo, other.hi)
            return Bounds(*ends) if value > 0 else Bounds(*reversed(ends))
    products = corners(times, x, y)
    return _where_known(conjunction(map(_is_number, products)), hull(products))


def either(x: Bounds, y: Bounds) -> Bounds:
    """One of two values of one type."""
    both = Bounds(lesser(x.lo, y.lo), greater(x.hi, y.hi))
    if x.lo.type == "i32":
        return both
    ends = (x.lo, x.hi, y.lo, y.hi)  # `min` and `max` would forget a NaN
    return _where_known(conjunction(map(_is_number, dict.fromkeys(ends))), both)


def is_at_most(x: Bounds, y: Bounds) -> tuple[Expr, Expr]:
    """Whether x <= y of two f32 may hold, and whether it must; it does not where either is NaN."""
    known = [] if x.is_exact else [_is_below_infinity(x.hi)]
    known += [] if y.is_exact else [_is_above_infinity(y.lo)]
    return compare("<=", x.lo, y.hi), conjunction([compare("<=", x.hi, y.lo), *known])


def is_less(x: Bounds, y: Bounds) -> tuple[Expr, Expr]:
    """Whether x < y may hold, and whether it must: what must be less is not +inf, the other not -inf, neither NaN."""
    return compare("<", x.lo, y.hi), compare("<", x.hi, y.lo)


def is_equal(x: Bounds, y: Bounds) -> tuple[Expr, Expr]:
    """Whether x == y may hold, and whether it must. Ends that meet from both sides are one number."""
    may = conjunction([compare("<=", x.lo, y.hi), compare("<=", y.lo, x.hi)])
    return may, conjunction([compare("<=", x.hi, y.lo), compare("<=", y.hi, x.lo)])


def _where_number(x: Bounds) -> Bounds:
    return _where_known(conjunction(map(_is_number, (x.lo, x.hi))), x)


def _where_known(is_known: Expr, x: Bounds) -> Bounds:
    return Bounds(where(is_known, x.lo, _UNKNOWN.lo), where(is_known, x.hi, _UNKNOWN.hi))


def _is_number(bound: Expr) -> Expr:
    return TRUE if _is_finite(bound) else compare("==", bound, bound)


def _is_below_infinity(bound: Expr) -> Expr:
    return TRUE if _is_finite(bound) else compare("<", bound, _UNKNOWN.hi)


def _is_above_infinity(bound: Expr) -> Expr:
    return TRUE if _is_finite(bound) else compare("<", _UNKNOWN.lo, bound)


def _is_finite(bound: Expr) -> bool:
    """Whether a bound is finite in every call."""
    return _largest(bound) < 2.0**127


def _largest(bound: Expr) -> float:
    """What the magnitude of an f32 does not exceed, but for its rounding; infinite where that is not known."""
    if bound.op == "const":
        return abs(float(bound.value))
    if bound.op == "call" and bound.name == "f32":
        return float(max(map(abs, index_range(bound.args[0]))))
    is_known = bound.op == "call" and bound.name in ("min", "max", "abs", "floor")
    if not is_known and (bound.op != "arith" or bound.name == "/"):
        return math.inf
    sizes = [_largest(arg) for arg in bound.args]
    if math.inf in sizes or bound.op == "call":
        return max(sizes)
    return math.prod(sizes) if bound.name == "*" else sum(sizes)
