"""Steps of gradients of what a spec declares: s (dp - delta) of every pair, added up for whoever reads an element."""

from dataclasses import dataclass

from attngen.expr import Expr
from attngen.plan.declared_places import BlockTables, Elements, PairMatrix, PrivateTable
from attngen.plan.places import BlockIndex, RegTile, RegVec
from attngen.plan.steps.gradient_steps import GradientOfPairs
from attngen.plan.steps.step import Step


@dataclass(frozen=True)
class AddPairs(GradientOfPairs, Step):
    """acc = acc + s (dp - delta): gradients of what each pair reads, batch after batch and head after head."""

    acc: RegTile

    def __str__(self) -> str:
        return f"{self.acc} = {self.acc} + {self.of_pairs}"


@dataclass(frozen=True)
class SumPairs(GradientOfPairs, Step):
    """part = part + the sums of s (dp - delta) over the columns of the tile, in the parts that lanes hold.

    Attributes:
        part: of every row of the tile.
    """

    part: RegVec

    def __str__(self) -> str:
        return f"{self.part} = {self.part} + sums of {self.of_pairs}"


@dataclass(frozen=True)
class StorePairs(Step):
    """Write an accumulator to the pairs of a block of queries and one of keys, rounded; what ends before is dropped."""

    src: RegTile
    dst: PairMatrix
    rows: BlockIndex
    block: BlockIndex

    def __str__(self) -> str:
        return f"{self.dst}[{self.rows}, {self.block}] = {self.src}"


@dataclass(frozen=True)
class ClearTable(Step):
    """Fill a thread's own table with 0."""

    dst: PrivateTable

    def __str__(self) -> str:
        return f"{self.dst} = 0"


@dataclass(frozen=True)
class AddToTable(GradientOfPairs, Step):
    """Add s (dp - delta) of each pair to the entry of a table that it reads, each thread to its own.

    Attributes:
        block: of keys.
        entry: its number.
    """

    block: BlockIndex
    table: PrivateTable
    entry: Expr

    def __str__(self) -> str:
        return f"{self.table}[{self.entry}] += {self.of_pairs} of each pair"


@dataclass(frozen=True)
class StoreTable(Step):
    """Add the tables of all threads up, always in the same order, and write the sums."""

    src: PrivateTable
    dst: BlockTables
    rows: BlockIndex

    def __str__(self) -> str:
        return f"{self.dst}[{self.rows}] = {self.src} added over the threads"


@dataclass(frozen=True)
class AddToElements(GradientOfPairs, Step):
    """Add s (dp - delta) of each pair to the element that it reads, where that stands, in no order.

    Attributes:
        block: of keys.
        read: the lookup.
    """

    block: BlockIndex
    dst: Elements
    read: Expr

    def __str__(self) -> str:
        return f"{self.dst} at {self.read} += {self.of_pairs} of each pair"
