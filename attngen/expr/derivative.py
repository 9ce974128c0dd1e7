"""Tree to tree: the derivative of a modified score by `score`, or by what else it reads, for the backward pass.

Where there is none, it is the one that torch takes. `abs` follows `sign`, `where` the branch that it chooses; `min`
and `max` of equal numbers follow the first, so that `clamp` passes its argument on at both ends too, and never a
NaN that they pass over. `sign` and `floor` are flat. So are comparisons, `i32` and the indices of lookups: what a
score decides moves in steps.
"""

import math
from collections.abc import Callable

from attngen.errors import InternalError
from attngen.expr.arithmetic import call, compare, minus, negative, over, plus, times, where
from attngen.expr.logic import disjunction
from attngen.expr.tree import Expr, name, nodes, real

_ZERO, _ONE = real(0.0), real(1.0)
_SCORE = name("score")


def derivative(score: Expr, by: Expr = _SCORE) -> Expr:
    """The derivative of an f32 expression by a name or a lookup of f32 in it; it shares nodes with the expression.

    Of a lookup that is by the element which each pair finds: what other lookups find is taken to stay.

    Raises:
        InternalError: the expression is no f32.
    """
    if score.type != "f32":
        raise InternalError(f"{score} is no f32")
    slopes: dict[Expr, Expr] = {}
    for each in nodes(score):
        if each is by:
            slopes[each] = _ONE
        else:
            slopes[each] = _slope(each, [slopes[arg] for arg in each.args]) if each.type == "f32" else _ZERO
    return slopes[score]


def _slope(expr: Expr, slopes: list[Expr]) -> Expr:
    """The derivative of an f32 node, from those of its arguments."""
    if expr.op == "lookup" or all(slope is _ZERO for slope in slopes):
        return _ZERO
    if expr.op == "where":
        return where(expr.args[0], slopes[1], slopes[2])
    if expr.op == "call" and len(slopes) == 1:
        return _product(slopes[0], _SLOPES[expr.name](expr, expr.args[0]))
    (a, b), (a_slope, b_slope) = expr.args, slopes
    if expr.op == "call":
        return where(_is_first(expr.name, a, b), a_slope, b_slope)
    if expr.name == "+":
        return _sum(a_slope, b_slope)
    if expr.name == "-":
        return _difference(a_slope, b_slope)
    if expr.name == "*":
        return _sum(_product(a_slope, b), _product(a, b_slope))
    return _quotient(_difference(a_slope, _product(expr, b_slope)), b)


_SLOPES: dict[str, Callable[[Expr, Expr], Expr]] = {
    "abs": lambda value, x: call("sign", x),
    "sign": lambda value, x: _ZERO,
    "exp": lambda value, x: value,
    "exp2": lambda value, x: times(value, real(math.log(2))),
    "log": lambda value, x: over(_ONE, x),
    "log2": lambda value, x: over(real(1 / math.log(2)), x),
    "tanh": lambda value, x: minus(_ONE, times(value, value)),
    "sigmoid": lambda value, x: times(value, minus(_ONE, value)),
    "sqrt": lambda value, x: over(real(0.5), value),
    "sin": lambda value, x: call("cos", x),
    "cos": lambda value, x: negative(call("sin", x)),
    "floor": lambda value, x: _ZERO,
}
"""The derivative of each function of one f32, from its value and its argument."""


def _is_first(name: str, a: Expr, b: Expr) -> Expr:
    """Whether `min` or `max` of a and b is a: b does not surpass it, or is NaN."""
    holds = compare("<=" if name == "min" else ">=", a, b)
    return holds if b.op == "const" else disjunction([holds, compare("!=", b, b)])


def _sum(a: Expr, b: Expr) -> Expr:
    return a if b is _ZERO else b if a is _ZERO else plus(a, b)


def _difference(a: Expr, b: Expr) -> Expr:
    return a if b is _ZERO else negative(b) if a is _ZERO else minus(a, b)


def _product(a: Expr, b: Expr) -> Expr:
    return _ZERO if a is _ZERO or b is _ZERO else times(a, b)


def _quotient(a: Expr, b: Expr) -> Expr:
    return _ZERO if a is _ZERO else over(a, b)
