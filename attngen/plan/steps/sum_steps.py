"""Steps by which a block of keys adds to the gradient of queries that many blocks of keys see.

dS of a pair of blocks goes through shared memory, where its product with K finds it; the product goes back there, and
the copy engine adds it to sums in device memory.
"""

from dataclasses import dataclass

from attngen.expr import Expr
from attngen.plan.places import BlockIndex, QueryRanks, QuerySums, RegTile, View
from attngen.plan.steps.step import Step


@dataclass(frozen=True)
class ClearTile(Step):
    """Write zeros to the warpgroup's own part of a stage."""

    dst: View

    def __str__(self) -> str:
        return f"{self.dst} = 0"


@dataclass(frozen=True)
class StageTransposed(Step):
    """Write a tile of pairs whose rows are keys to the warpgroup's own columns of a buffer whose rows are queries.

    Attributes:
        rows: block of queries.
    """

    src: RegTile
    dst: View
    rows: BlockIndex

    def __str__(self) -> str:
        return f"stage {self.dst} <- {self.src}ᵀ[{self.rows}]"


@dataclass(frozen=True)
class StageSums(Step):
    """Write the warpgroup's part of an accumulator to its part of a buffer, in the order of registers and lanes."""

    src: RegTile
    dst: View

    def __str__(self) -> str:
        return f"stage {self.dst} <- {self.src}, register by register"


@dataclass(frozen=True)
class AddSums(Step):
    """Have the copy engine add the warpgroup's part of a buffer to sums of a block of queries in device memory.

    Additions of other blocks of threads come before and after, in no order but that of ranks where the sums have these.
    Source: PTX ISA, cp.reduce.async.bulk.

    Attributes:
        of: the accumulator that was staged, of which each warpgroup has its part.
    """

    src: View
    of: RegTile
    dst: QuerySums
    block: BlockIndex

    def __str__(self) -> str:
        return f"{self.dst}[{self.block}] += {self.src}, whenever its turn comes"


@dataclass(frozen=True)
class TakeRank(Step):
    """Wait until all blocks of keys that come earlier have added to the warpgroup's part of a block of queries.

    Source: PTX ISA, ld.acquire; fence.proxy.async.

    Attributes:
        ranks: how many have.
        block: of queries.
        rank: how many come earlier, by the numbers of the blocks of queries and of keys.
    """

    ranks: QueryRanks
    block: BlockIndex
    rank: Expr

    def __str__(self) -> str:
        return f"wait until {self.ranks}[{self.block}] == {self.rank}"


@dataclass(frozen=True)
class WaitAdded(Step):
    """Wait until what the copy engine was to add stands in device memory.

    Source: PTX ISA, cp.async.bulk.wait_group.
    """

    def __str__(self) -> str:
        return "wait until the sums have been written"


@dataclass(frozen=True)
class PassRank(Step):
    """Let the next block of keys add to the warpgroup's part of a block of queries.

    Source: PTX ISA, red.release.

    Attributes:
        ranks: how many have added.
        block: of queries.
    """

    ranks: QueryRanks
    block: BlockIndex

    def __str__(self) -> str:
        return f"{self.ranks}[{self.block}] += 1"
