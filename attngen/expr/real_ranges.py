"""Static ranges of f32: between which numbers an expression stays in every call, NaN apart."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from attngen.expr.ranges import index_range
from attngen.expr.tree import Expr, nodes


class RealRange(NamedTuple):
    """The lowest and the highest value, both included, and whether there may be NaN besides."""

    lo: float
    hi: float
    may_be_nan: bool = True


_UNKNOWN = RealRange(-math.inf, math.inf)
_CODOMAINS = {
    **dict.fromkeys(("tanh", "sin", "cos", "sign"), RealRange(-1.0, 1.0)),
    "sigmoid": RealRange(0.0, 1.0),
    **dict.fromkeys(("exp", "exp2", "sqrt"), RealRange(0.0, math.inf)),
}


def real_range(expr: Expr) -> RealRange:
    """Where the value of an f32 expression lies in every legal call, but for rounding."""
    found: dict[Expr, RealRange] = {}
    for each in nodes(expr):
        if each.type == "f32":
            found[each] = _range_of(each, [found[arg] for arg in each.args if arg.type == "f32"])
    return found[expr]


@lru_cache(maxsize=64)  # a simulated kernel asks at every block
def magnitude(expr: Expr) -> float:
    """What the value of an f32 expression is never larger than, either way; infinite where that is not known."""
    found = real_range(expr)
    return max(abs(found.lo), abs(found.hi))


def _range_of(expr: Expr, parts: Sequence[RealRange]) -> RealRange:
    if expr.op == "const":
        return RealRange(float(expr.value), float(expr.value), may_be_nan=False)
    if expr.op == "where":
        return _hull(*parts)
    if expr.op == "arith":
        return _arithmetic(expr.name, *parts)
    if expr.op != "call":
        return _UNKNOWN
    if expr.name == "f32":
        lowest, highest = index_range(expr.args[0])
        return RealRange(float(lowest), float(highest), may_be_nan=False)
    if expr.name in ("min", "max"):
        return _chosen(min if expr.name == "min" else max, *parts)
    if expr.name == "abs":
        ((lo, hi, may_be_nan),) = parts
        return RealRange(max(lo, -hi, 0.0), max(-lo, hi), may_be_nan)
    return _CODOMAINS.get(expr.name, _UNKNOWN)


def _hull(*ranges: RealRange) -> RealRange:
    lows, highs, nans = zip(*ranges, strict=True)
    return RealRange(min(lows), max(highs), any(nans))


def _chosen(choose: Callable[[float, float], float], x: RealRange, y: RealRange) -> RealRange:
    """The smaller or the larger of two; of NaN and a number it is the number."""
    both = RealRange(choose(x.lo, y.lo), choose(x.hi, y.hi))
    alone = [number for number, other in ((x, y), (y, x)) if other.may_be_nan]
    return _hull(both, *alone)._replace(may_be_nan=x.may_be_nan and y.may_be_nan)


def _arithmetic(sign: str, x: RealRange, y: RealRange) -> RealRange:
    if sign == "+":
        ends = [x.lo + y.lo, x.hi + y.hi]
    elif sign == "-":
        ends = [x.lo - y.hi, x.hi - y.lo]
    elif sign == "/" and y.lo <= 0 <= y.hi:
        return _UNKNOWN
    else:
        ends = [a * b if sign == "*" else a / b for a in x[:2] for b in y[:2]]
    return _UNKNOWN if any(map(math.isnan, ends)) else RealRange(min(ends), max(ends))
