"""What a tile whose keys are cut leaves of its part of them, in place of a result."""

from dataclasses import dataclass

from attngen.plan import BlockIndex, PartRows, Program, RegTile
from attngen.plan.steps import StoreRegisters, When
from attngen.schedules.online_softmax import OnlineSoftmax


@dataclass(frozen=True)
class KeyParts:
    """Places in device memory for what parts have come to.

    Attributes:
        out: O, unnormalised.
        row_sum: the sum that would normalise it.
        row_max: the maximum that both are relative to; None where scores are exponents as they are.
    """

    out: PartRows
    row_sum: PartRows
    row_max: PartRows | None

    @property
    def places(self) -> tuple[PartRows, ...]:
        """All of them."""
        return (self.out, self.row_sum, *((self.row_max,) if self.row_max else ()))

    def store_or_finish(
        self, acc_o: RegTile, softmax: OnlineSoftmax, block: BlockIndex, finish: Program
    ) -> Program:
        """Leave what a part has come to; a tile that is all there is of its rows finishes them."""
        of_maximum = (StoreRegisters(softmax.row_max, self.row_max, block),) if self.row_max else ()
        store = (
            StoreRegisters(acc_o, self.out, block),
            StoreRegisters(softmax.total, self.row_sum, block),
            *of_maximum,
        )
        return (When("tile is a part", store), When("tile is whole", finish))
