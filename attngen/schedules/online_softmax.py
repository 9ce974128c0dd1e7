"""The online softmax: running maximum and sum of each row, and P of a block.

Source: Dao, "FlashAttention-2", arXiv 2307.08691, Algorithm 1, lines 8 to 14.
"""

from dataclasses import dataclass

from attngen.plan import Program, RegTile, RegVec
from attngen.plan.steps import (
    Clear,
    ConvertP,
    Exponentiate,
    FinishRows,
    JoinSink,
    Note,
    ReadSink,
    RowMax,
    ScaleRows,
    Step,
)
from attngen.scaling import COARSE_SCORES, coarse_where_scales_are_chosen
from attngen.schedules.scores import Scores


@dataclass(frozen=True)
class OnlineSoftmax:
    """What turns scores into probabilities, block after block.

    Attributes:
        scores: what it takes.
        p: (block_m, block_n), probabilities rounded to the type of the inputs.
        row_max, reference, exponent_scale, row_sum, alpha, total, inv_sum, row_lse: one value per row, see the Steps of
            the softmax; `row_sum` is partial, `total` whole.
        bounded_scores: they are small enough to be exponents as they are, under no running maximum.
        integer_maxima: as `RowMax.by_integers`.
        sink: the learned sink of the tile's head; None where the spec has none.
    """

    scores: Scores
    p: RegTile
    row_max: RegVec
    reference: RegVec
    exponent_scale: RegVec
    row_sum: RegVec
    alpha: RegVec
    total: RegVec
    inv_sum: RegVec
    row_lse: RegVec
    bounded_scores: bool = False
    integer_maxima: bool = False
    sink: RegVec | None = None

    @property
    def vectors(self) -> tuple[RegVec, ...]:
        """What is kept of each row."""
        of_maximum = () if self.bounded_scores else (self.row_max, self.alpha)
        of_reference = () if self.bounded_scores or self._score_scale else (self.reference,)
        of_scale = (self.exponent_scale,) if self._chooses_scale else ()
        of_sink = (self.sink,) if self.sink else ()
        finished = (self.row_sum, self.total, self.inv_sum, self.row_lse)
        return (*of_maximum, *of_reference, *of_scale, *finished, *of_sink)

    @property
    def start_maximum(self) -> Program:
        """The maximum of a row that has seen no key."""
        if self.bounded_scores:
            return ()
        if self._score_scale:
            return (Clear(self.row_max, "-inf"),)
        of_reference = (Clear(self.reference, "lowest"),) if self._chooses_scale else ()
        return (Clear(self.row_max, "lowest"), *of_reference)

    @property
    def update_maximum(self) -> Program:
        """The running maximum of a row, and what it does to all before."""
        if self.bounded_scores:
            return ()
        chosen = self.exponent_scale if self._chooses_scale else None
        reference = None if self._score_scale else self.reference
        return (
            RowMax(
                self.scores.acc_s,
                self.row_max,
                reference,
                self.alpha,
                self._score_scale,
                chosen,
                self._coarse,
                self._is_scaled,
                self.integer_maxima,
            ),
        )

    @property
    def exponentiate(self) -> Program:
        """P, unrounded, and its sums."""
        at = self.scores.scales
        lift, weight = (at.lift, at.weight) if at else (0, None)
        row_max, alpha = (None, None) if self.bounded_scores else (self.row_max, self.alpha)
        reference = None if self.bounded_scores or self._score_scale else self.reference
        scale = self.exponent_scale if self._chooses_scale else self._score_scale
        of_row = (self.row_sum, reference, row_max, alpha, scale, self._is_scaled and scale is None)
        return (Exponentiate(self.scores.acc_s, *of_row, lift, weight),)

    @property
    def convert(self) -> Step:
        """P as an operand."""
        return ConvertP(self.scores.acc_s, self.p)

    def rescale(self, o: RegTile, votes: bool = False) -> Program:
        """O under the new maximum."""
        return () if self.bounded_scores else (ScaleRows(o, self.alpha, votes),)

    def of_block(self, o: RegTile, votes: bool = False) -> Program:
        """P of a block, and O under its maximum: alpha rescales what was summed under the old one."""
        return (
            Note("online softmax"),
            *self.update_maximum,
            *self.exponentiate,
            *(self.scores.cache.weigh(self.scores.acc_s, o) if self.scores.cache else ()),
            *self.rescale(o, votes),
            self.convert,
        )

    @property
    def finish(self) -> FinishRows:
        """The factor of each row of O, and its log-sum-exp."""
        scales = self.scores.scales
        of_scales = (scales.lift, scales.top) if scales else ()
        row_max = None if self.bounded_scores else self.row_max
        of_max = (self._coarse, self._is_scaled)
        return FinishRows(row_max, self.total, self.inv_sum, self.row_lse, *of_max, *of_scales)

    @property
    def read_sink(self) -> Program:
        """What a tile needs to know of the sink, ahead of `join_sink`: memory answers under what stands between."""
        return (ReadSink(self.sink),) if self.sink else ()

    @property
    def join_sink(self) -> Program:
        """What the sink has of rows that are finished."""
        return (JoinSink(self.inv_sum, self.row_lse, self.sink),) if self.sink else ()

    @property
    def _chooses_scale(self) -> bool:
        """Whether each row's maximum says what its scores are multiplied by."""
        return not (self.bounded_scores or self.integer_maxima or self._score_scale)

    @property
    def _coarse(self) -> float | None:
        """From which maximum on a row takes another way, where there is one and rows have that."""
        if self.bounded_scores or self._score_scale:
            return None
        return (
            coarse_where_scales_are_chosen(self.p.dtype.max_finite) if self._chooses_scale else COARSE_SCORES
        )

    @property
    def _is_scaled(self) -> bool:
        """Whether a score comes out as an exponent."""
        return self.scores.by_tanh is not None and self.scores.by_tanh.is_all

    @property
    def _score_scale(self) -> RegVec | None:
        """What the softmax multiplies scores by, if not a number of the call; modified ones have it behind them."""
        scales = self.scores.scales
        return scales.of_scores if scales and not self.scores.pairs.modifies_scores else None
