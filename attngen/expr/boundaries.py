"""Boundaries: where along the keys a comparison with sorted elements begins to hold, for each row; and along the rows.

`doc[b, kv_idx] == doc[b, q_pos]` is no bound of kv_idx itself. But where doc never falls, the keys for which
`doc[b, kv_idx] >= doc[b, q_pos]` holds are all those from one key on, and that key never moves to the left from one row
to the next. So such comparisons are an interval of keys for each row, and the extremes of its ends over a block of rows
are those of the block's first and last row. A kernel finds the ends by bisection before the attention kernel reads
them; where elements are not sorted after all, they are somewhere between the first key and the last.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from attngen.expr.logic import less, less_equal
from attngen.expr.tables import HEAD_NAMES
from attngen.expr.tree import Expr, affine, affine_parts, free_names, lookup, name, scale, tensor_names

Place = Literal["q_idx", "kv_idx"]
OTHER: dict[Place, Place] = {"q_idx": "kv_idx", "kv_idx": "q_idx"}


@dataclass(frozen=True)
class Boundary:
    """For each row the first key for which a condition holds, or for each key the first row; the length if none is.

    It is a tensor of i32, with a dimension for each of `indices`. It never falls along the last of them, and what comes
    behind a boundary is behind it as well, as long as the tensors are sorted that are declared so.

    Attributes:
        along: "kv_idx" where it is a key, "q_idx" where it is a row.
        condition: reads that index, and the last of `indices`.
        indices: those of b, h and h_kv that the condition depends on, then the other of the two.
    """

    name: str
    along: Place
    condition: Expr
    indices: tuple[Expr, ...]

    @property
    def element(self) -> Expr:
        """The boundary of the row, or key, at hand."""
        return lookup(self.name, self.indices, "i32")

    @property
    def field(self) -> str:
        """The parameter of a kernel that carries its address."""
        return self.name.replace(".", "_")


class Boundaries:
    """The boundaries of one mask along the keys, or along the rows; one for each condition."""

    def __init__(self, along: Place, sorted_tensors: Collection[str]) -> None:
        self._along = along
        self._sorted = frozenset(sorted_tensors)
        self._found: dict[Expr, Boundary] = {}

    @property
    def found(self) -> tuple[Boundary, ...]:
        """All that have been asked for."""
        return tuple(self._found.values())

    def of(self, comparison: Expr) -> tuple[Expr | None, Expr | None] | None:
        """From which index on a comparison holds, and before which; None on either side where that is no bound.

        Returns:
            None where the comparison reads no sorted tensor, or is not of a number that rises with the index to one
            that rises with the other.
        """
        if not tensor_names(comparison) & self._sorted:
            return None
        coefficients, constant = affine_parts(comparison.args[0])
        own = {atom: factor for atom, factor in coefficients.items() if self._along in free_names(atom)}
        rest = affine({atom: k for atom, k in coefficients.items() if atom not in own}, constant)
        # own + rest <= 0, or == 0: own <= -rest where own rises, and -own >= rest where it falls.
        for sign in (1, -1):
            number, limit = scale(sign, affine(own, 0)), scale(-sign, rest)
            if self._rises(number, self._along) and self._rises(limit, OTHER[self._along]):
                is_equal = comparison.op == "eq"
                lower = self._first(less_equal(limit, number)) if is_equal or sign < 0 else None
                upper = self._first(less(limit, number)) if is_equal or sign > 0 else None
                return lower, upper
        return None

    def _first(self, condition: Expr) -> Expr:
        """The first index at which a condition holds."""
        if condition not in self._found:
            axis = "keys" if self._along == "kv_idx" else "rows"
            read = free_names(condition)
            indices = [index for index in HEAD_NAMES if index in read] + [OTHER[self._along]]
            label = f"{axis}.boundary{len(self._found)}"
            self._found[condition] = Boundary(label, self._along, condition, tuple(map(name, indices)))
        return self._found[condition].element

    def _rises(self, number: Expr, index: Place) -> bool:
        """Whether an i32 never falls while an index rises and the other stays."""
        return all(
            factor > 0 and self._atom_rises(atom, index)
            for atom, factor in affine_parts(number)[0].items()
            if index in free_names(atom)
        )

    def _atom_rises(self, atom: Expr, index: Place) -> bool:
        if OTHER[index] in free_names(atom):
            return False
        if atom.op == "name":
            return True
        if atom.op == "lookup" and atom.name in self._sorted:
            *others, last = atom.args
            return self._rises(last, index) and not any(index in free_names(other) for other in others)
        if atom.op == "arith" and atom.name == "//":
            dividend, divisor = atom.args
            return divisor.op == "const" and divisor.value > 0 and self._rises(dividend, index)
        return (
            atom.op == "call"
            and atom.name in ("min", "max")
            and all(self._rises(x, index) for x in atom.args)
        )
