"""Steps that move tiles between device memory, shared memory and registers."""

from dataclasses import dataclass
from typing import Literal

from attngen.expr import Expr
from attngen.plan.places import BlockIndex, PartRows, RegTile, RegVec, Rows, Tensor, View
from attngen.plan.steps.step import Step

Keep = Literal["evict_first", "evict_last", "evict_normal"]
"""What the L2 cache is to do with lines that are read."""


@dataclass(frozen=True)
class LoadTile(Step):
    """Start copying a block of rows of this tile's head to shared memory, asynchronously.

    Attributes:
        pads: rows past the sequence may occur; they arrive as zeros.
    """

    dst: View
    src: Tensor
    block: BlockIndex
    pads: bool

    def __str__(self) -> str:
        return f"load {self.dst} <- {self.src}[{self.block}]" + (" (zeros past the end)" if self.pads else "")


@dataclass(frozen=True)
class CommitCopies(Step):
    """Close the group of copies started since the last commit; a group may be empty."""

    def __str__(self) -> str:
        return "commit copies"


@dataclass(frozen=True)
class WaitCopies(Step):
    """Wait until at most `pending` of this thread's groups of copies are in flight, the newest ones."""

    pending: int

    def __str__(self) -> str:
        return "wait for copies" + (f", {self.pending} newest may be in flight" if self.pending else "")


@dataclass(frozen=True)
class StageTile(Step):
    """Write an accumulator to a buffer, rounded to its type, each warp its rows."""

    src: RegTile
    dst: View

    def __str__(self) -> str:
        return f"stage {self.dst} <- {self.src}"


@dataclass(frozen=True)
class StoreTile(Step):
    """Write a buffer to a block of rows in device memory; rows past the sequence are dropped."""

    src: View
    dst: Tensor
    block: BlockIndex

    def __str__(self) -> str:
        return f"store {self.dst}[{self.block}] <- {self.src}"


@dataclass(frozen=True)
class LoadRegisters(Step):
    """Read an accumulator, or one value per row, from a block of rows in device memory; zero past the sequence."""

    dst: RegTile | RegVec
    src: Tensor | Rows
    block: BlockIndex

    def __str__(self) -> str:
        return f"load {self.dst} <- {self.src}[{self.block}]"


@dataclass(frozen=True)
class StoreRegisters(Step):
    """Write an accumulator, or one value per row, to a block of rows in device memory; dropped past the sequence.

    Of what a tile leaves of its part of the keys that block is the tile's own.
    """

    src: RegTile | RegVec
    dst: Tensor | Rows | PartRows
    block: BlockIndex

    def __str__(self) -> str:
        return f"store {self.dst}[{self.block}] <- {self.src}"


@dataclass(frozen=True)
class TmaLoad(Step):
    """Have the copy engine fill the stage of a ring with a block of rows of this tile's head; `full` tells when.

    Rows past the sequence and columns past the head dim arrive as zeros.

    Attributes:
        keep: what the L2 cache is to do with the lines.
    """

    dst: View
    src: Tensor
    block: BlockIndex
    keep: Keep

    def __str__(self) -> str:
        return f"load {self.dst} <- {self.src}[{self.block}]"


@dataclass(frozen=True)
class FindPages(Step):
    """Look up in which pages the keys of a block lie, each lane of the warp a piece, for the TmaLoads of that block.

    It stands ahead of the wait for the stage, under which memory answers.
    """

    block: BlockIndex

    def __str__(self) -> str:
        return f"find the pages of block {self.block}"


@dataclass(frozen=True)
class TmaLoadRows(Step):
    """Have the copy engine fill a stage with one number of each row of a block, beside the TmaLoad that follows.

    Attributes:
        src: padded, so that the block is there as a whole.
    """

    dst: View
    src: Rows
    block: BlockIndex

    def __str__(self) -> str:
        return f"load {self.dst} <- {self.src}[{self.block}]"


@dataclass(frozen=True)
class TmaStore(Step):
    """Have the copy engine write this warpgroup's rows of a buffer to device memory; what lies past it is dropped."""

    src: View
    dst: Tensor
    block: BlockIndex

    def __str__(self) -> str:
        return f"store {self.dst}[{self.block}] <- {self.src}"


@dataclass(frozen=True)
class TmaStoreOwn(Step):
    """Write this warpgroup's rows of a buffer to device memory, but for those past the sequence's end.

    The copy engine writes them where all are the sequence's; else the threads do: it would write over a neighbour's.
    """

    src: View
    dst: Tensor
    block: BlockIndex

    def __str__(self) -> str:
        return f"store {self.dst}[{self.block}] <- {self.src} (not past the end)"


@dataclass(frozen=True)
class ZeroTail(Step):
    """Write zeros over the rows of a stage that lie past the sequence's end, where the copy engine left a neighbour's.

    Every warpgroup that reads the stage does so for itself, and meets none but itself: zeros over zeros disturb nobody.

    Attributes:
        tile: the stage, or the warpgroup's own rows of it; a row of it is one of the sequence.
        block: which of the sequence's blocks it has.
    """

    tile: View
    block: BlockIndex

    def __str__(self) -> str:
        return f"zero {self.tile} past the end of {self.tile.axes[0]} in block {self.block}"


@dataclass(frozen=True)
class ZeroHidden(Step):
    """Write zeros over the keys of a stage that the mask hides from every query: 0 times a NaN of V is a NaN.

    The threads of a role share the keys. Warpgroups that read one stage do so each for itself, as in `ZeroTail`.

    Attributes:
        tile: the stage, or the warpgroup's own rows of it.
        block: which of the sequence's blocks of keys it has.
        shown: holds for a key that some query of a head may see.
        by_group: keys are those of all heads that share them; else of the tile's head alone.
    """

    tile: View
    block: BlockIndex
    shown: Expr
    by_group: bool = False

    def __str__(self) -> str:
        return f"zero {self.tile} where not {self.shown}, of the keys of block {self.block}"


@dataclass(frozen=True)
class WaitStores(Step):
    """Wait until the copy engine has read what this warpgroup's stores were to write."""

    def __str__(self) -> str:
        return "wait until the stores have read shared memory"
