"""Static ranges: between which integers an i32 expression stays, whatever the call, and what that rules out.

The range is what the arguments' ranges allow, each taken for itself, so it may be wider than the values are: that
of `max(q_idx, 5) - q_idx` reaches below 0. It is computed without limit of size; who needs to know whether 32 bits
hold a value asks here.
"""

from collections.abc import Iterable
from weakref import WeakKeyDictionary

from attngen.errors import InternalError
from attngen.expr.tree import (
    DECODING_RANGES,
    INDEX_NAMES,
    LARGEST_INDEX,
    LARGEST_LENGTH,
    TILE_NAMES,
    Expr,
    nodes,
)

Range = tuple[int, int]
"""The lowest and the highest value, both included."""

SMALLEST_I32, LARGEST_I32 = -(2**31), 2**31 - 1

_NAMED: dict[str, Range] = {each: (0, LARGEST_INDEX) for each in INDEX_NAMES + TILE_NAMES}
_NAMED |= {"seqlen_q": (0, LARGEST_LENGTH), "seqlen_k": (0, LARGEST_LENGTH), **DECODING_RANGES}


def index_range(expr: Expr) -> Range:
    """Where the value of an i32 expression lies in every legal call.

    Raises:
        InternalError: the expression is no i32, or divides by what is always 0.
    """
    if expr.type != "i32":
        raise InternalError(f"{expr} is no i32")
    for each in nodes(expr, known=_ranges):
        if each.type == "i32":
            _ranges[each] = _range_of(each)
    return _ranges[expr]


def never_holds(condition: Expr) -> bool:
    """Whether ranges rule a condition out in every legal call; it may be ruled out by more than ranges."""
    found: dict[Expr, bool] = {}
    for each in nodes(condition):
        if each.op == "const":
            found[each] = each.value is False
        elif each.op in ("le", "eq"):
            lowest, highest = index_range(each.args[0])
            found[each] = lowest > 0 or (each.op == "eq" and highest < 0)
        elif each.op in ("and", "or"):
            found[each] = (any if each.op == "and" else all)(found[arg] for arg in each.args)
        else:
            found[each] = False
    return found[condition]


_ranges: WeakKeyDictionary[Expr, Range] = WeakKeyDictionary()


def _range_of(expr: Expr) -> Range:
    """The range of a node whose i32 arguments have theirs."""
    if expr.op == "const":
        return int(expr.value), int(expr.value)
    if expr.op == "name":
        return _NAMED.get(expr.name, (SMALLEST_I32, LARGEST_I32))
    if expr.op == "lookup" or (expr.op == "call" and expr.name == "i32"):
        return SMALLEST_I32, LARGEST_I32
    parts = [_ranges[arg] for arg in expr.args if arg.type == "i32"]
    if expr.op == "add":
        return sum(lo for lo, _ in parts), sum(hi for _, hi in parts)
    if expr.op == "where":
        return _hull(end for part in parts for end in part)
    if expr.op == "call":
        return _call(expr.name, *parts)
    left, right = parts  # a mul, or an arith
    if expr.op == "arith" and expr.name == "//":
        return _hull(end // divisor for end in left for divisor in _divisors(right))
    if expr.op == "arith" and expr.name == "%":
        return _remainder(left, right)
    return _hull(a * b for a in left for b in right)


def _call(name: str, first: Range, *others: Range) -> Range:
    lo, hi = first
    if name in ("min", "max"):
        ((other_lo, other_hi),) = others
        choose = min if name == "min" else max
        return choose(lo, other_lo), choose(hi, other_hi)
    if name == "sign":
        return (lo > 0) - (lo < 0), (hi > 0) - (hi < 0)
    if name == "abs":
        return max(lo, -hi, 0), max(-lo, hi)
    raise InternalError(f"{name} has no range")


def _remainder(dividend: Range, divisor: Range) -> Range:
    """A remainder has the divisor's sign; it is the dividend, shifted, where the quotient is always the same."""
    lo, hi = divisor
    quotients = {end // by for end in dividend for by in _divisors(divisor)}
    if lo == hi and len(quotients) == 1:
        return dividend[0] % lo, dividend[1] % lo
    return min(lo + 1, 0), max(hi - 1, 0)


def _divisors(divisor: Range) -> list[int]:
    """The divisors between which a quotient is monotone: the ends of the range's negative and of its positive part."""
    lo, hi = divisor
    ends = [end for end in (lo, min(hi, -1), max(lo, 1), hi) if lo <= end <= hi and end]
    if not ends:
        raise InternalError("a divisor is always 0")
    return ends


def _hull(values: Iterable[int]) -> Range:
    found = list(values)
    return min(found), max(found)
