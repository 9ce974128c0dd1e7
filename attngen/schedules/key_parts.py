"""What warps and tiles leave that have each some keys, and how that becomes a result."""

from dataclasses import dataclass

from attngen.plan import BlockIndex, Buffer, NamedBarriers, PartRows, Program, RegTile, RegVec, Rows, Tensor
from attngen.plan.steps import CountPart, JoinShares, LeaveShare, MergeParts, StoreRegisters, When
from attngen.schedules.online_softmax import OnlineSoftmax


@dataclass(frozen=True)
class WarpShares:
    """Places for what the keys of each warp have come to, where warps share out the keys of a tile.

    Attributes:
        left: what they leave in shared memory, each in rows of its own.
        joined: the columns of O that a warp adds up.
    """

    left: Buffer
    joined: RegTile

    def leave(self, acc_o: RegTile, softmax: OnlineSoftmax) -> LeaveShare:
        """What a warp's own keys have come to, for all warps to see."""
        return LeaveShare(acc_o, softmax.total, *_maxima(softmax), self.left.at().own)

    def join(self, softmax: OnlineSoftmax) -> JoinShares:
        """What the tile's keys have come to."""
        return JoinShares(self.left.at(), self.joined, softmax.total, *_maxima(softmax))


@dataclass(frozen=True)
class KeyParts:
    """Places in device memory for what a tile's part of the keys has come to, and how parts are counted.

    Attributes:
        out: O, unnormalised.
        row_sum: the sum that would normalise it.
        row_max, reference: what both are relative to; None where scores are exponents as they are.
        meet: where all that have rows of the tile meet, before one counts; None where all threads of the block do.
    """

    out: PartRows
    row_sum: PartRows
    row_max: PartRows | None
    reference: PartRows | None
    meet: NamedBarriers | None = None

    @property
    def places(self) -> tuple[PartRows, ...]:
        """All of them."""
        return tuple(place for place in (self.out, self.row_sum, self.row_max, self.reference) if place)

    def leave_numbers(self, softmax: OnlineSoftmax, block: BlockIndex) -> Program:
        """Leave what O of each row is relative to."""
        row_max, reference = _maxima(softmax)
        numbers = ((softmax.total, self.row_sum), (row_max, self.row_max), (reference, self.reference))
        return tuple(StoreRegisters(vector, place, block) for vector, place in numbers if vector and place)

    def finish(
        self,
        softmax: OnlineSoftmax,
        block: BlockIndex,
        result: Tensor,
        lse: Rows,
        leave: Program,
        finish: Program,
    ) -> Program:
        """Finish rows of which the tile has all keys; of others leave the part, and merge all if it is the last.

        A merge comes last, so that O of the tile, which it does not need, has left its registers.
        """
        merge = MergeParts(
            self.out,
            self.row_sum,
            self.row_max,
            self.reference,
            softmax.finish,
            softmax.sink is not None,
            result,
            lse,
            block,
        )
        part = (*leave, CountPart(self.meet), When("all parts are there", (merge,)))
        return (When("tile is whole", finish), When("tile is a part", part))


def _maxima(softmax: OnlineSoftmax) -> tuple[RegVec | None, RegVec | None]:
    """The maximum of each row, and what exponents refer to."""
    return (None, None) if softmax.bounded_scores else (softmax.row_max, softmax.reference)
