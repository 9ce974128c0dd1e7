"""Conditions: comparisons, and the canonical form of and, or, not.

`not` turns comparisons round and exchanges `and` with `or`; it stays only where there is nothing to turn, and before
`<` and `<=` of f32, since a NaN makes both false. Conjuncts over one
affine form are intersected (`kv_idx < 5 and kv_idx < 3` is `kv_idx < 3`), and disjunctions follow by
De Morgan's law, so that only conjunction has rules. Two texts that differ by more than these rules may stay
two nodes; that costs nothing but a second compilation.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import gcd
from operator import eq, le, lt, ne
from weakref import WeakKeyDictionary

from attngen.expr.tree import (
    FALSE,
    TRUE,
    Expr,
    Op,
    affine,
    affine_parts,
    const,
    node,
    nodes,
    scale,
    sort_key,
    sub,
)

_NEGATED: dict[Op, Op] = {"eq": "ne", "ne": "eq", "and": "or", "or": "and"}
_INDEX_COMPARISONS = ("le", "eq", "ne")
_REAL_COMPARISONS: dict[str, Callable[[float, float], bool]] = {"<": lt, "<=": le, "==": eq, "!=": ne}


def less_equal(a: Expr, b: Expr) -> Expr:
    """The comparison a <= b."""
    coefficients, constant = affine_parts(sub(a, b))
    if not coefficients:
        return const(constant <= 0)
    divisor = gcd(*coefficients.values())
    # d·f + c <= 0 over the integers is f <= floor(-c / d), that is f - floor(-c / d) <= 0.
    form = affine({key: value // divisor for key, value in coefficients.items()}, -(-constant // divisor))
    return node("le", (form,), "", 0, "bool")


def less(a: Expr, b: Expr) -> Expr:
    """The comparison a < b."""
    return less_equal(a, sub(b, const(1)))


def equal(a: Expr, b: Expr) -> Expr:
    """The comparison a == b."""
    coefficients, constant = affine_parts(sub(a, b))
    if not coefficients:
        return const(constant == 0)
    divisor = gcd(*coefficients.values())
    if constant % divisor:
        return FALSE
    if next(iter(coefficients.values())) < 0:
        divisor = -divisor
    form = affine({key: value // divisor for key, value in coefficients.items()}, constant // divisor)
    return node("eq", (form,), "", 0, "bool")


def compare_reals(sign: str, a: Expr, b: Expr) -> Expr:
    """The comparison of two f32, sign one of < <= == !=."""
    if a.op == b.op == "const":
        return const(_REAL_COMPARISONS[sign](float(a.value), float(b.value)))
    if sign in ("==", "!="):
        a, b = sorted((a, b), key=sort_key)
    return node("compare", (a, b), sign, 0, "bool")


_negations: WeakKeyDictionary[Expr, Expr] = WeakKeyDictionary()


def negate(condition: Expr) -> Expr:
    """Whether the condition does not hold."""
    if (remembered := _negations.get(condition)) is not None:
        return remembered
    known: dict[Expr, Expr] = {}
    for each in nodes(condition, below=("and", "or")):
        known[each] = _negations.get(each) or _negated(each, known)
    _negations.update(known)
    return known[condition]


def _negated(condition: Expr, known: Mapping[Expr, Expr]) -> Expr:
    """The negation of a condition whose parts have theirs."""
    if condition.op == "const":
        return const(not condition.value)
    if condition.op == "le":
        return less_equal(const(1), condition.args[0])
    if condition.op in ("eq", "ne"):
        return node(_NEGATED[condition.op], condition.args, "", 0, "bool")
    if condition.op == "not":
        return condition.args[0]
    if condition.op == "compare" and condition.name in ("==", "!="):
        return compare_reals("!=" if condition.name == "==" else "==", *condition.args)
    if condition.op not in ("and", "or"):
        return node("not", (condition,), "", 0, "bool")
    # What is canonical stays so under De Morgan's law; only the order of the arguments changes.
    return _sorted_node(_NEGATED[condition.op], (known[arg] for arg in condition.args))


def disjunction(conditions: Iterable[Expr]) -> Expr:
    """Whether any of the conditions holds."""
    return negate(conjunction(map(negate, conditions)))


def conjunction(conditions: Iterable[Expr]) -> Expr:
    """Whether all of the conditions hold."""
    bands: dict[Expr, _Band] = {}
    others: set[Expr] = set()
    for condition in conditions:
        for part in condition.args if condition.op == "and" else (condition,):
            if part is FALSE:
                return FALSE
            if part.op in _INDEX_COMPARISONS:
                direction, band = _band_of(part)
                bands.setdefault(direction, _Band()).intersect(band)
            elif part is not TRUE:
                others.add(part)
    parts = [part for direction, band in bands.items() for part in band.conditions(direction)] + list(others)
    known = set(parts)
    if FALSE in known or any(_is_ruled_out(other, known) for other in others):
        return FALSE
    if len(parts) <= 1:
        return parts[0] if parts else TRUE
    return _sorted_node("and", parts)


def agreement(condition: Expr) -> tuple[Expr, Expr] | None:
    """The a and b of `a and b or not a and not b`, which is what `a == b` means; None of any other condition."""
    if condition.op != "or" or any(arg.op != "and" or len(arg.args) != 2 for arg in condition.args):
        return None
    both, *others = condition.args
    a, b = both.args
    return (a, b) if len(others) == 1 and {negate(a), negate(b)} == set(others[0].args) else None


def _is_ruled_out(condition: Expr, parts: set[Expr]) -> bool:
    """Whether conjuncts contradict one of them: they negate it, or every branch of it."""
    branches = condition.args if condition.op == "or" else (condition,)
    return all(negate(branch) in parts for branch in branches)


def _sorted_node(op: Op, parts: Iterable[Expr]) -> Expr:
    return node(op, tuple(sorted(parts, key=sort_key)), "", 0, "bool")


@dataclass
class _Band:
    """The values that conjuncts leave to one affine form: from lowest to highest, without the holes."""

    lowest: int | None = None
    highest: int | None = None
    holes: set[int] = field(default_factory=set)

    def intersect(self, other: "_Band") -> None:
        if other.lowest is not None:
            self.lowest = other.lowest if self.lowest is None else max(self.lowest, other.lowest)
        if other.highest is not None:
            self.highest = other.highest if self.highest is None else min(self.highest, other.highest)
        self.holes |= other.holes

    def conditions(self, direction: Expr) -> list[Expr]:
        """The canonical conjuncts that leave `direction` exactly these values."""
        lowest, highest = self.lowest, self.highest
        while lowest is not None and lowest in self.holes:
            lowest += 1
        while highest is not None and highest in self.holes:
            highest -= 1
        if lowest is not None and highest is not None:
            if lowest > highest:
                return [FALSE]
            if lowest == highest:
                return [equal(direction, const(lowest))]
        parts = [] if lowest is None else [less_equal(const(lowest), direction)]
        parts += [] if highest is None else [less_equal(direction, const(highest))]
        return parts + [
            negate(equal(direction, const(hole)))
            for hole in sorted(self.holes)
            if (lowest is None or hole > lowest) and (highest is None or hole < highest)
        ]


def _band_of(comparison: Expr) -> tuple[Expr, _Band]:
    """The affine form without constant and with a positive first coefficient, and the values it may take."""
    coefficients, constant = affine_parts(comparison.args[0])
    direction = affine(coefficients, 0)
    if comparison.op == "eq":
        return direction, _Band(lowest=-constant, highest=-constant)
    if comparison.op == "ne":
        return direction, _Band(holes={-constant})
    if next(iter(coefficients.values())) > 0:
        return direction, _Band(highest=-constant)
    return scale(-1, direction), _Band(lowest=constant)
