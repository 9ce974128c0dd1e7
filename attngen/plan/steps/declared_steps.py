"""Steps of gradients of what a spec declares: s (dp - delta) of every pair, added up for whoever reads an element.

There s is P times the derivative of the score by what is read, of the pairs of a tile; dp and delta are as of
`ScoreGradient`, and so is `rows`, the block of queries.
"""

from dataclasses import dataclass

from attngen.expr import Expr
from attngen.plan.declared_places import BlockTables, Elements, PairMatrix, PrivateTable
from attngen.plan.places import BlockIndex, RegTile, RegVec
from attngen.plan.steps.gradient_steps import RowNumbers
from attngen.plan.steps.step import Step


@dataclass(frozen=True)
class AddPairs(Step):
    """acc = acc + s (dp - delta): gradients of what each pair reads, batch after batch and head after head.

    Attributes:
        s: P times the derivative of the score by what is read.
        dp, delta, rows: as of `ScoreGradient`.
    """

    acc: RegTile
    s: RegTile
    dp: RegTile
    delta: RowNumbers
    rows: BlockIndex

    def __str__(self) -> str:
        return f"{self.acc} = {self.acc} + {self.s} ({self.dp} - {self.delta}[{self.rows}])"


@dataclass(frozen=True)
class SumPairs(Step):
    """part = part + the sums of s (dp - delta) over the columns of the tile, in the parts that lanes hold.

    Attributes:
        part: of every row of the tile.
        s, dp, delta, rows: as of `AddPairs`.
    """

    part: RegVec
    s: RegTile
    dp: RegTile
    delta: RowNumbers
    rows: BlockIndex

    def __str__(self) -> str:
        return f"{self.part} = {self.part} + sums of {self.s} ({self.dp} - {self.delta}[{self.rows}])"


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
class AddToTable(Step):
    """Add s (dp - delta) of each pair to the entry of a table that it reads, each thread to its own.

    Attributes:
        s, dp, delta, rows: as of `AddPairs`.
        block: of keys.
        entry: its number.
    """

    table: PrivateTable
    s: RegTile
    dp: RegTile
    delta: RowNumbers
    rows: BlockIndex
    block: BlockIndex
    entry: Expr

    def __str__(self) -> str:
        return f"{self.table}[{self.entry}] += {self.s} ({self.dp} - {self.delta}[{self.rows}]) of each pair"


@dataclass(frozen=True)
class StoreTable(Step):
    """Add the tables of all threads up, always in the same order, and write the sums."""

    src: PrivateTable
    dst: BlockTables
    rows: BlockIndex

    def __str__(self) -> str:
        return f"{self.dst}[{self.rows}] = {self.src} added over the threads"


@dataclass(frozen=True)
class AddToElements(Step):
    """Add s (dp - delta) of each pair to the element that it reads, where that stands, in no order.

    Attributes:
        s, dp, delta, rows: as of `AddPairs`.
        block: of keys.
        read: the lookup.
    """

    dst: Elements
    s: RegTile
    dp: RegTile
    delta: RowNumbers
    rows: BlockIndex
    block: BlockIndex
    read: Expr

    def __str__(self) -> str:
        return f"{self.dst} at {self.read} += {self.s} ({self.dp} - {self.delta}[{self.rows}]) of each pair"
