"""What tiles leave whose keys are cut into parts, and how the last of them makes a result of it."""

from dataclasses import dataclass

from attngen.plan import BlockIndex, Buffer, PartRows, Program, RegTile, RegVec, Rows, Tensor
from attngen.plan.steps import (
    CountPart,
    JoinShares,
    LeaveShare,
    MergeParts,
    StoreColumns,
    StoreRegisters,
    When,
)
from attngen.schedules.online_softmax import OnlineSoftmax


@dataclass(frozen=True)
class KeyParts:
    """Places for what keys have come to: those of a warp, in shared memory, and those of a tile, in device memory.

    Attributes:
        shares: what warps leave, each in rows of its own.
        joined: the columns of O that a warp adds up.
        out: O, unnormalised.
        row_sum: the sum that would normalise it.
        row_max, reference: what both are relative to; None where scores are exponents as they are.
    """

    shares: Buffer
    joined: RegTile
    out: PartRows
    row_sum: PartRows
    row_max: PartRows | None
    reference: PartRows | None

    @property
    def places(self) -> tuple[PartRows, ...]:
        """All that is in device memory."""
        return tuple(place for place in (self.out, self.row_sum, self.row_max, self.reference) if place)

    def leave_share(self, acc_o: RegTile, softmax: OnlineSoftmax) -> LeaveShare:
        """What a warp's own keys have come to, for all warps to see."""
        row_max, reference = _maxima(softmax)
        return LeaveShare(acc_o, softmax.total, row_max, reference, self.shares.at().own)

    def join_shares(self, softmax: OnlineSoftmax) -> JoinShares:
        """What the tile's keys have come to."""
        return JoinShares(self.shares.at(), self.joined, softmax.total, *_maxima(softmax))

    def finish(
        self, softmax: OnlineSoftmax, block: BlockIndex, result: Tensor, lse: Rows, finish: Program
    ) -> Program:
        """Finish rows of which the tile has all keys; of others leave the part, and merge all if it is the last."""
        row_max, reference = _maxima(softmax)
        numbers: Program = (StoreRegisters(softmax.total, self.row_sum, block),)
        for vector, place in ((row_max, self.row_max), (reference, self.reference)):
            if vector and place:
                numbers += (StoreRegisters(vector, place, block),)
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
        part = (
            StoreColumns(self.joined, self.out, block),
            When("first warp", numbers),
            CountPart(),
            When("all parts are there", (merge,)),
        )
        return (When("tile is a part", part), When("tile is whole", finish))


def _maxima(softmax: OnlineSoftmax) -> tuple[RegVec | None, RegVec | None]:
    """The maximum of each row, and what exponents refer to."""
    return (None, None) if softmax.bounded_scores else (softmax.row_max, softmax.reference)
