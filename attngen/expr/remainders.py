"""Bands of remainders: whether a stretch of integers has one whose remainder by a constant lies in a band.

The remainders of a stretch that is longer than what is left of its first period are 0..c-1 to an interval, and that
says nothing of a band in the middle. Where the band's last period begins by the end of the stretch says all.
"""

from collections.abc import Callable
from dataclasses import dataclass

from attngen.expr.arithmetic import floor_divide
from attngen.expr.intervals import Bounds, greater, lesser
from attngen.expr.logic import conjunction, less_equal, negate
from attngen.expr.tree import Expr, add, affine, affine_parts, const, scale, sub


@dataclass(frozen=True)
class Band:
    """A comparison, or several, of x % c with numbers that do not differ within a tile.

    Attributes:
        remainder: x % c, c a positive constant.
        least: None where nothing is said.
        most: the same.
    """

    remainder: Expr
    least: Expr | None
    most: Expr | None

    def within(self, other: "Band") -> "Band":
        """What lies in this band and in another of the same remainder."""
        return Band(
            self.remainder,
            _chosen(greater, self.least, other.least),
            _chosen(lesser, self.most, other.most),
        )

    def may_meet(self, x: Bounds) -> Expr:
        """Whether an integer of x has its remainder in the band."""
        divisor = int(self.remainder.args[1].value)
        first, last = const(0), const(divisor - 1)
        if self.least is self.most and self.least is not None:
            least = most = self.least
            legal = [less_equal(first, least), less_equal(least, last)]
        else:
            least, most = greater(self.least or first, first), lesser(self.most or last, last)
            legal = [less_equal(least, most)]
        # The last period of the band that begins by the end of x must not end before x begins.
        begin = scale(divisor, floor_divide(sub(x.hi, least), const(divisor)))
        return conjunction([*legal, less_equal(x.lo, add(begin, most))])

    def must_hold(self, x: Bounds) -> Expr:
        """Whether every integer of x has: none lies below the band or above it."""
        outside = []
        if self.least is not None:
            outside.append(Band(self.remainder, None, sub(self.least, const(1))))
        if self.most is not None:
            outside.append(Band(self.remainder, add(self.most, const(1)), None))
        return conjunction(negate(each.may_meet(x)) for each in outside)


def band_of(comparison: Expr, is_uniform: Callable[[Expr], bool]) -> Band | None:
    """The band that a condition is, where it compares one remainder with what is uniform."""
    if comparison.op not in ("le", "eq"):
        return None
    coefficients, constant = affine_parts(comparison.args[0])
    mixed = [atom for atom in coefficients if not is_uniform(atom)]
    if len(mixed) != 1 or abs(coefficients[mixed[0]]) != 1 or not _is_remainder(mixed[0]):
        return None
    factor = coefficients.pop(mixed[0])
    limit = scale(-factor, affine(coefficients, constant))
    is_equal = comparison.op == "eq"
    return Band(
        mixed[0],
        least=limit if is_equal or factor < 0 else None,
        most=limit if is_equal or factor > 0 else None,
    )


def _is_remainder(atom: Expr) -> bool:
    return atom.op == "arith" and atom.name == "%" and atom.args[1].op == "const" and atom.args[1].value > 0


def _chosen(choose: Callable[[Expr, Expr], Expr], a: Expr | None, b: Expr | None) -> Expr | None:
    return a if b is None else b if a is None else choose(a, b)
