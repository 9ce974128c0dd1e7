"""Steps by which those that have each keys of their own bring together what these have come to: warps, then blocks."""

from dataclasses import dataclass

from attngen.plan.places import BlockIndex, NamedBarriers, PartRows, RegTile, RegVec, Rows, Tensor, View
from attngen.plan.steps.softmax import FinishRows
from attngen.plan.steps.step import Step


@dataclass(frozen=True)
class LeaveShare(Step):
    """Leave in shared memory what a warp's own keys have come to: O of all rows, and numbers of each row.

    Attributes:
        o: unnormalised.
        total: the sum that would normalise it.
        row_max, reference: what both are relative to; None where scores are exponents as they are.
        dst: the warp's own rows of a buffer of f32, whose last columns are for the numbers.
    """

    o: RegTile
    total: RegVec
    row_max: RegVec | None
    reference: RegVec | None
    dst: View

    def __str__(self) -> str:
        return f"leave {self.dst} <- {self.o}, {self.total}"


@dataclass(frozen=True)
class JoinShares(Step):
    """Add up what all warps have left, in their order, under the largest maximum of each row.

    Attributes:
        src: what they have left.
        o: the columns of O that the warp has of all rows.
        total, row_max, reference: of all keys of the tile, the same in every warp.
    """

    src: View
    o: RegTile
    total: RegVec
    row_max: RegVec | None
    reference: RegVec | None

    def __str__(self) -> str:
        return f"join {self.o}, {self.total} <- {self.src} of all warps"


@dataclass(frozen=True)
class StoreColumns(Step):
    """Write the warp's columns of all rows of a tile to device memory, rounded to its type; rows past the sequence are
    dropped.

    Of what a tile leaves of its part of the keys the block is the tile's own.
    """

    src: RegTile
    dst: Tensor | PartRows
    block: BlockIndex

    def __str__(self) -> str:
        return f"store {self.dst}[{self.block}] <- {self.src} (own columns)"


@dataclass(frozen=True)
class CountPart(Step):
    """Meet all that have rows of the tile, and count it among the parts of these, now that all may see what came of it.

    The count goes back to 0 with the last of them.

    Attributes:
        meet: where consumer warpgroups meet; None where all threads of the block do.
    """

    meet: NamedBarriers | None

    def __str__(self) -> str:
        return "count the part"


@dataclass(frozen=True)
class MergeParts(Step):
    """Make a result of what all parts of the tile's rows have left, in their order, a warp a row.

    Attributes:
        out, row_sum, row_max, reference: where they have left it; the last two None where scores are exponents.
        finish: how rows are finished of which a tile has all keys.
        has_sink: a learned sink joins the sum of each row.
        result, lse: where rows go; `block` is theirs.
    """

    out: PartRows
    row_sum: PartRows
    row_max: PartRows | None
    reference: PartRows | None
    finish: FinishRows
    has_sink: bool
    result: Tensor
    lse: Rows
    block: BlockIndex

    def __str__(self) -> str:
        return f"merge {self.result}[{self.block}], {self.lse} <- {self.out}, {self.row_sum} of all parts"
