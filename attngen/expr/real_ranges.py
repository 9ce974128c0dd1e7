"""Static ranges of f32: between which numbers an expression stays in every call, NaN apart."""

import math
from collections.abc import Sequence

from attngen.expr.ranges import index_range
from attngen.expr.tree import Expr, nodes

RealRange = tuple[float, float]
"""The lowest and the highest value, both included; NaN is no value."""

_UNKNOWN: RealRange = (-math.inf, math.inf)
_CODOMAINS: dict[str, RealRange] = {
    **dict.fromkeys(("tanh", "sin", "cos", "sign"), (-1.0, 1.0)),
    "sigmoid": (0.0, 1.0),
    **dict.fromkeys(("exp", "exp2", "sqrt"), (0.0, math.inf)),
}


def real_range(expr: Expr) -> RealRange:
    """Where the value of an f32 expression lies in every legal call, but for rounding."""
    found: dict[Expr, RealRange] = {}
    for each in nodes(expr):
        if each.type == "f32":
            found[each] = _range_of(each, [found[arg] for arg in each.args if arg.type == "f32"])
    return found[expr]


def magnitude(expr: Expr) -> float:
    """What the value of an f32 expression is never larger than, either way; infinite where that is not known."""
    return max(map(abs, real_range(expr)))


def _range_of(expr: Expr, parts: Sequence[RealRange]) -> RealRange:
    if expr.op == "const":
        return (float(expr.value), float(expr.value))
    if expr.op == "where":
        yes, no = parts
        return (min(yes[0], no[0]), max(yes[1], no[1]))
    if expr.op == "arith":
        return _arithmetic(expr.name, *parts)
    if expr.op != "call":
        return _UNKNOWN
    if expr.name == "f32":
        lowest, highest = index_range(expr.args[0])
        return (float(lowest), float(highest))
    if expr.name in ("min", "max"):
        choose = min if expr.name == "min" else max
        (a, b), (c, d) = parts
        return (choose(a, c), choose(b, d))
    if expr.name == "abs":
        ((lo, hi),) = parts
        return (max(lo, -hi, 0.0), max(-lo, hi))
    return _CODOMAINS.get(expr.name, _UNKNOWN)


def _arithmetic(sign: str, x: RealRange, y: RealRange) -> RealRange:
    if sign == "+":
        ends = [x[0] + y[0], x[1] + y[1]]
    elif sign == "-":
        ends = [x[0] - y[1], x[1] - y[0]]
    elif sign == "/" and y[0] <= 0 <= y[1]:
        return _UNKNOWN
    else:
        ends = [a * b if sign == "*" else a / b for a in x for b in y]
    return _UNKNOWN if any(map(math.isnan, ends)) else (min(ends), max(ends))
