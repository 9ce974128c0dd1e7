"""Tree to range: which keys a row sees, or which rows see a key, in closed form, and a bound's extremes over a tile."""

from collections.abc import Collection
from dataclasses import dataclass

from attngen.expr.boundaries import Boundaries, Boundary, Place
from attngen.expr.logic import conjunction, less, less_equal
from attngen.expr.tree import (
    FALSE,
    TRUE,
    Expr,
    add,
    affine_parts,
    const,
    free_names,
    lookup,
    scale,
    sub,
    total,
)
from attngen.expr.tree import name as index

_PLACES = {"q_idx", "kv_idx"}


@dataclass(frozen=True)
class IndexRange:
    """The keys a mask leaves visible to a row, or the rows it leaves to a key: from every lower to every upper bound.

    Attributes:
        lower: affine forms without the index that is bounded, inclusive; or elements of boundaries.
        upper: such forms or elements, exclusive.
        boundaries: those whose elements these are, which must be found before.
    """

    lower: tuple[Expr, ...]
    upper: tuple[Expr, ...]
    boundaries: tuple[Boundary, ...] = ()

    def holds(self, place: Place) -> Expr:
        """Whether the index that is bounded lies within all bounds."""
        at = index(place)
        return conjunction(
            (*(less_equal(bound, at) for bound in self.lower), *(less(at, bound) for bound in self.upper))
        )


def key_range(mask: Expr, sorted_tensors: Collection[str] = ()) -> IndexRange | None:
    """The one range of keys that a mask is for a row, or None where it is anything else.

    It is one where it is a conjunction of comparisons in each of which kv_idx stands with factor 1 or -1, beside names
    and what is the same for all rows; or which have a boundary, since they compare elements of sorted tensors. The
    lengths themselves are not among the bounds: that keys end at seqlen_k is the kernel's business.
    """
    return _range(mask, "kv_idx", sorted_tensors)


def row_range(mask: Expr, sorted_tensors: Collection[str] = ()) -> IndexRange | None:
    """The one range of rows that a mask is for a key, or None, as `key_range` has it with q_idx in kv_idx's place."""
    return _range(mask, "q_idx", sorted_tensors)


def _range(mask: Expr, of: Place, sorted_tensors: Collection[str]) -> IndexRange | None:
    if mask is TRUE:
        return IndexRange((), ())
    if mask is FALSE:
        return IndexRange((), (const(0),))
    place, boundaries = index(of), Boundaries(of, sorted_tensors)
    lower: list[Expr] = []
    upper: list[Expr] = []
    for part in mask.args if mask.op == "and" else (mask,):
        if part.op not in ("le", "eq"):
            return None
        form = part.args[0]
        atoms, _ = affine_parts(form)
        factor = atoms.get(place, 0)
        if abs(factor) != 1 or any(atom.op != "name" and free_names(atom) & _PLACES for atom in atoms):
            if (ends := boundaries.of(part)) is None:
                return None
            for found, end in zip((lower, upper), ends, strict=True):
                found += [] if end is None else [end]
            continue
        # factor·index + rest <= 0, or == 0: the index is bounded by -rest / factor.
        bound = scale(-factor, sub(form, scale(factor, place)))
        if part.op == "eq" or factor < 0:
            lower.append(bound)
        if part.op == "eq" or factor > 0:
            upper.append(add(bound, const(1)))
    return IndexRange(tuple(lower), tuple(upper), boundaries.found)


def extremes(form: Expr, place: Place, lo: Expr, hi: Expr) -> tuple[Expr, Expr]:
    """The least and the greatest value of a bound of a range while the other index runs over lo..hi, both included."""
    coefficients, _ = affine_parts(form)
    at_lo, at_hi = _at(form, place, lo), _at(form, place, hi)
    rises = all(factor >= 0 for atom, factor in coefficients.items() if place in free_names(atom))
    return (at_lo, at_hi) if rises else (at_hi, at_lo)


def _at(form: Expr, place: Place, value: Expr) -> Expr:
    """A bound with a value for an index, which elements of boundaries have for the last of theirs."""
    coefficients, constant = affine_parts(form)
    at = index(place)

    def of(atom: Expr) -> Expr:
        if atom.op == "lookup" and at in atom.args:
            return lookup(atom.name, (*atom.args[:-1], value), atom.type)
        return value if atom is at else atom

    return total((*((factor, of(atom)) for atom, factor in coefficients.items()), (constant, const(1))))
