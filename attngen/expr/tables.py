"""Tables of extremes: what a condition over a tile reads in the place of a lookup that differs within the tile."""

from dataclasses import dataclass
from typing import Literal

from attngen.expr.tree import Expr, free_names, lookup, name, tensor_names

HEAD_NAMES = ("b", "h", "h_kv")
"""The indices besides q_idx and kv_idx, each of which has one value in a tile."""


@dataclass(frozen=True)
class Table:
    """The extremes of a lookup over each block of rows, of keys, or of both.

    They are two tensors of the element's type, `{name}.lo` and `{name}.hi`, with a dimension for each of
    `indices`: of bool, whether all and whether any element of the block is true; of numbers, the least and the
    greatest. A block whose elements include a NaN has -inf and +inf. Rows and keys that do not exist do not count.

    Attributes:
        lookup: what is looked up, as the mask writes it.
        reads: the indices that it depends on: "q" for q_idx, "k" for kv_idx, "qk" for both.
        indices: those of b, h and h_kv that it depends on, then q_idx.tile and kv_idx.tile, as `reads` says.
    """

    name: str
    lookup: Expr
    reads: Literal["q", "k", "qk"]
    indices: tuple[Expr, ...]

    @property
    def least(self) -> Expr:
        """The least element of a tile; of bool, whether all are true."""
        return lookup(f"{self.name}.lo", self.indices, self.lookup.type)

    @property
    def greatest(self) -> Expr:
        """The greatest element of a tile; of bool, whether any is true."""
        return lookup(f"{self.name}.hi", self.indices, self.lookup.type)

    @property
    def ends(self) -> tuple[str, str]:
        """The names of its two tensors, which no declared one can have."""
        return self.least.name, self.greatest.name

    @property
    def fields(self) -> tuple[str, str]:
        """The parameters of a kernel that carry their addresses."""
        return f"{self.name}_lo", f"{self.name}_hi"


class Tables:
    """The tables of one mask, one for each lookup."""

    def __init__(self) -> None:
        self._tables: dict[Expr, Table] = {}

    def of(self, element: Expr) -> Table:
        """The table of a lookup that reads q_idx or kv_idx; its name counts the tables before it."""
        if element not in self._tables:
            read = free_names(element)
            reads: Literal["q", "k", "qk"] = "qk"
            if not {"q_idx", "kv_idx"} <= read:
                reads = "q" if "q_idx" in read else "k"
            indices = [index for index in HEAD_NAMES if index in read]
            tiles = (("q_idx.tile", "q"), ("kv_idx.tile", "k"))
            indices += [index for index, letter in tiles if letter in reads]
            label = f"extremes{len(self._tables)}"
            self._tables[element] = Table(label, element, reads, tuple(map(name, indices)))
        return self._tables[element]

    def used_by(self, *conditions: Expr) -> tuple[Table, ...]:
        """Those that the conditions read, by first use."""
        used = frozenset().union(*map(tensor_names, conditions))
        return tuple(each for each in self._tables.values() if used & {each.least.name, each.greatest.name})
