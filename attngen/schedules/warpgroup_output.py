"""O of a warpgroup while its products are in flight: where it is rescaled, and how parts of it are promoted to f32."""

from dataclasses import dataclass
from typing import Literal

from attngen.plan import Buffer, Cursor, Program, RegTile, RegVec
from attngen.plan.steps import Advance, CopyRows, IssueGemm, Promote, Release, Step, WaitFull, WaitGemm
from attngen.schedules.online_softmax import OnlineSoftmax

Rescale = Literal["middle", "last"]


@dataclass(frozen=True)
class Output:
    """O = P V, one block of keys behind S where the two overlap.

    Attributes:
        acc_o: (block_m, head_dim_v), the accumulators of O.
        softmax: what P is made by.
        v, stage: where V of a block is, and where the warpgroup stands in its ring.
        overlap: the softmax of a block runs under the product of the one before.
        rescale: where O is rescaled: "last", after everything else of a block; "middle", between maximum and
            exponentials, which then wait for O's product.
        rescale_votes: a warp none of whose maxima grew does not rescale.
        part: what the tensor core adds up of one block where O itself is kept in true f32; None where it adds to O.
            With fewer columns than O it is worked out slice by slice.
        alpha_before: the rescale factor of the block before, which `part` is behind.
    """

    acc_o: RegTile
    softmax: OnlineSoftmax
    v: Buffer
    stage: Cursor
    overlap: bool
    rescale: Rescale
    rescale_votes: bool
    part: RegTile | None
    alpha_before: RegVec

    @property
    def issue(self) -> Program:
        """Start the product of the present block, once V is there."""
        return (WaitFull(self.stage), self._issue(0))

    @property
    def keep_alpha(self) -> Program:
        """What the maximum is about to change, and a part still wants."""
        if self.part is None or not self.overlap:
            return ()
        return (CopyRows(self.alpha_before, self.softmax.alpha),)

    def land(self, meanwhile: Program = (), is_last: bool = False) -> Program:
        """Wait for the product and hand V back; a part is added to what alpha rescales, slice by slice.

        Args:
            meanwhile: what is done before the last wait.
            is_last: no maximum was updated since the product was issued.
        """
        part = self.part or self.acc_o
        alpha = self.alpha_before if self.overlap and not is_last else self.softmax.alpha
        last = self.acc_o.cols - part.cols
        steps: list[Step] = []
        for first in range(0, last + 1, part.cols):
            steps += (
                *((self._issue(first),) if first else ()),
                *(meanwhile if first == last else ()),
                WaitGemm(0, (part, self.softmax.p)),
                *((Release(self.stage), Advance(self.stage)) if first == last else ()),
                *((Promote(self.acc_o, part, alpha, first),) if self.part else ()),
            )
        return tuple(steps)

    def rescale_at(self, where: Rescale) -> Program:
        """O under the new maximum, if this is the place for it; a promotion does it one block later."""
        is_here = self.rescale == where and self.part is None
        return self.softmax.rescale(self.acc_o, self.rescale_votes) if is_here else ()

    def _issue(self, first_column: int) -> IssueGemm:
        starts_at_zero = self.part is not None
        return IssueGemm(
            self.part or self.acc_o, self.softmax.p, self.v.at(self.stage), starts_at_zero, first_column
        )
