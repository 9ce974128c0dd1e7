"""Tree to range: which keys a row sees, or which rows see a key, in closed form, and a bound's extremes over a tile."""

from dataclasses import dataclass

from attngen.expr.tree import FALSE, TRUE, Expr, add, affine_parts, const, free_names, scale, sub, substitute
from attngen.expr.tree import name as index

_PLACES = {"q_idx", "kv_idx"}


@dataclass(frozen=True)
class IndexRange:
    """The keys a mask leaves visible to a row, or the rows it leaves to a key: from every lower to every upper bound.

    Attributes:
        lower: affine forms without the index that is bounded, inclusive.
        upper: affine forms without it, exclusive.
    """

    lower: tuple[Expr, ...]
    upper: tuple[Expr, ...]


def key_range(mask: Expr) -> IndexRange | None:
    """The one range of keys that a mask is for a row, or None where it is anything else.

    It is one where it is a conjunction of comparisons in each of which kv_idx stands with factor 1 or -1, beside names
    and what is the same for all rows. The lengths themselves are not among the bounds: that keys end at seqlen_k is the
    kernel's business.
    """
    return _range(mask, "kv_idx")


def row_range(mask: Expr) -> IndexRange | None:
    """The one range of rows that a mask is for a key, or None, as `key_range` has it with q_idx in kv_idx's place."""
    return _range(mask, "q_idx")


def _range(mask: Expr, of: str) -> IndexRange | None:
    if mask is TRUE:
        return IndexRange((), ())
    if mask is FALSE:
        return IndexRange((), (const(0),))
    place = index(of)
    lower: list[Expr] = []
    upper: list[Expr] = []
    for part in mask.args if mask.op == "and" else (mask,):
        if part.op not in ("le", "eq"):
            return None
        form = part.args[0]
        atoms, _ = affine_parts(form)
        factor = atoms.get(place, 0)
        if abs(factor) != 1 or any(atom.op != "name" and free_names(atom) & _PLACES for atom in atoms):
            return None
        # factor·index + rest <= 0, or == 0: the index is bounded by -rest / factor.
        bound = scale(-factor, sub(form, scale(factor, place)))
        if part.op == "eq" or factor < 0:
            lower.append(bound)
        if part.op == "eq" or factor > 0:
            upper.append(add(bound, const(1)))
    return IndexRange(tuple(lower), tuple(upper))


def extremes(form: Expr, name: str, lo: Expr, hi: Expr) -> tuple[Expr, Expr]:
    """The smallest and the largest value of an affine form while `name` runs over lo..hi, both included."""
    atom = index(name)
    at_lo, at_hi = substitute(form, atom, lo), substitute(form, atom, hi)
    rises = affine_parts(form)[0].get(atom, 0) >= 0
    return (at_lo, at_hi) if rises else (at_hi, at_lo)
