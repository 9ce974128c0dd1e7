"""The places that schedules work with, handed to them by lowering, and what every family of schedules says alike."""

from collections.abc import Callable
from dataclasses import dataclass

from attngen.expr import Expr
from attngen.plan import (
    BlockIndex,
    Buffer,
    Cursor,
    Descales,
    Program,
    Range,
    RegTile,
    RegVec,
    Rows,
    Tensor,
    View,
    Walk,
)
from attngen.plan.steps import (
    ByTanh,
    Clear,
    Exponentiate,
    FinishRows,
    ForBlocks,
    ForVisited,
    LookUp,
    MaskScores,
    MaskScoresEach,
    ModifyScores,
    NegateTile,
    ReadRowScales,
    ReadScoreScale,
    ReadTopScale,
    ReadValueWeight,
    RowMax,
    ScaleKeys,
    ScaleRows,
    SeedScores,
    StageScales,
    StartWalk,
    Step,
    When,
    WhenBlock,
    WhenNext,
    WhenPartial,
    WhenVisited,
)
from attngen.scaling import COARSE_SCORES, coarse_where_scales_are_chosen
from attngen.schedules.pairs import Pairs

M_BLOCK, N, N_MIN, N_FULL_BEGIN, N_FULL_END, N_MAX = (
    BlockIndex("m_block"),
    BlockIndex("n"),
    BlockIndex("n_min"),
    BlockIndex("n_full_begin"),
    BlockIndex("n_full_end"),
    BlockIndex("n_max"),
)
VISIT, LOAD = Walk("visit"), Walk("load")


@dataclass(frozen=True)
class KeyBlock:
    """A block of keys that a loop is at.

    Attributes:
        n: its number.
        before: that of the block visited before it, to its right.
        mask: what hides the scores of its invisible keys; empty where it has none.
        may_be_last: it may reach past the end of the sequence.
    """

    n: BlockIndex
    before: BlockIndex
    mask: Program
    may_be_last: bool


@dataclass(frozen=True)
class Scales:
    """What 8-bit operands are scaled by, in device memory and in registers.

    Attributes:
        q, k, v: descales.
        of_rows: of the scores of a row, without what K's descale changes from block to block.
        of_scores: of those of a block; `of_rows` itself where blocks of keys share one descale.
        top: V's largest descale of the head.
        weight: that of a block of V in relation to it; None where blocks share one descale.
        staged: where the producer leaves those of a block, K's and V's, with the stages of K; None likewise.
        groups: of columns of a block in which no other granule of V begins.
        lift: P is 2^lift times what it means, to use the whole range of its format.
    """

    q: Descales
    k: Descales
    v: Descales
    of_rows: RegVec
    of_scores: RegVec
    top: RegVec
    weight: RegVec | None
    staged: Buffer | None
    groups: int
    lift: int

    @property
    def has_key_scales(self) -> bool:
        """Whether each key has a scale; the producer's warp stages them."""
        return self.k.granule == 1

    @property
    def vectors(self) -> tuple[RegVec, ...]:
        """What of it is kept in registers."""
        known = (self.of_rows, self.of_scores, self.top, self.weight)
        return tuple(dict.fromkeys(vector for vector in known if vector))


@dataclass(frozen=True)
class TilePlaces:
    """What a schedule of any family may name.

    Attributes:
        pairs: what the spec says of a query and a key.
        ahead: lookups of the score that are loaded before the score GEMM, and the registers for them.
        by_tanh: that of the pairs, where scores are computed so.
        bounded_scores: they are small enough to be exponents as they are, under no running maximum.
        integer_maxima: as `RowMax.by_integers`.
        q, k, v, out: tiles in shared memory: (block_m or block_n, padded head dim); `out` stages the result.
        acc_s, p, acc_o: (block_m, block_n) scores, the same rounded, (block_m, head_dim_v) output.
        row_max, reference, exponent_scale, row_sum, alpha, total, inv_sum, row_lse: one value per row, see the Steps of
            the softmax; `row_sum` is partial, `total` whole.
        q_in, k_in, v_in, result, lse: tensors in device memory.
        scales: of 8-bit operands; None for others.
    """

    pairs: Pairs
    ahead: tuple[tuple[Expr, RegTile], ...]
    by_tanh: ByTanh | None
    bounded_scores: bool
    integer_maxima: bool
    q: Buffer
    k: Buffer
    v: Buffer
    out: Buffer
    acc_s: RegTile
    p: RegTile
    acc_o: RegTile
    row_max: RegVec
    reference: RegVec
    exponent_scale: RegVec
    row_sum: RegVec
    alpha: RegVec
    total: RegVec
    inv_sum: RegVec
    row_lse: RegVec
    q_in: Tensor
    k_in: Tensor
    v_in: Tensor
    result: Tensor
    lse: Rows
    scales: Scales | None

    @property
    def walks(self) -> bool:
        """Whether blocks of keys are classed one by one, for want of a closed form."""
        return self.pairs.visible is None

    @property
    def row_vectors(self) -> tuple[RegVec, ...]:
        """What is kept of each row."""
        of_maximum = () if self.bounded_scores else (self.row_max, self.alpha)
        of_reference = () if self.bounded_scores or self._score_scale else (self.reference,)
        of_scale = (self.exponent_scale,) if self._chooses_scale else ()
        return (*of_maximum, *of_reference, *of_scale, self.row_sum, self.total, self.inv_sum, self.row_lse)

    # ---- scales of 8-bit operands -----------------------------------------------------------------------------------
    def start_scales(self, rows: BlockIndex) -> Program:
        """What a tile needs to know of scales before its first block."""
        if (at := self.scales) is None:
            return ()
        k = at.k if at.k.granule is None else None
        return (
            ReadRowScales(at.of_rows, at.q, k, rows, self.pairs.modifies_scores),
            ReadTopScale(at.top, at.v),
        )

    def stage_scales(self, stage: Cursor, block: BlockIndex) -> Program:
        """What the producer says of the scales of a block; a load by its consumers would hold their GEMMs up."""
        if (at := self.scales) is None or at.staged is None:
            return ()
        return (StageScales(at.staged.at(stage), at.k, at.v, at.groups, block),)

    def read_scales(self, stage: Cursor) -> Program:
        """What a block of keys and values needs to know of scales."""
        if (at := self.scales) is None or at.staged is None or at.weight is None:
            return ()
        staged = at.staged.at(stage)
        of_scores = (ReadScoreScale(at.of_scores, at.of_rows, staged, self.pairs.modifies_scores),)
        return (
            *(() if at.of_scores is at.of_rows else of_scores),
            ReadValueWeight(at.weight, at.top, staged),
        )

    def scale_keys(self, stage: Cursor) -> Program:
        """What each key's scores are multiplied by, read before its stage is released."""
        if (at := self.scales) is None or at.staged is None or not at.has_key_scales:
            return ()
        return (ScaleKeys(self.acc_s, at.staged.at(stage)),)

    # ---- scores of a block ------------------------------------------------------------------------------------------
    def look_up(self, rows: BlockIndex, block: BlockIndex) -> Program:
        """Load what can be loaded before there are scores."""
        return tuple(LookUp(place, rows, block, lookup) for lookup, place in self.ahead)

    def look_up_here(self, rows: BlockIndex, block: BlockIndex) -> Program:
        """The same for a further block, where the one before it could not know of it: in a walk."""
        return self.look_up(rows, block) if self.walks else ()

    def seed(self, rows: BlockIndex, block: BlockIndex) -> Program:
        """What the score GEMM of a block adds to, where the spec adds something to the product."""
        if (added := self.pairs.added) is None:
            return ()
        return (SeedScores(self.acc_s, rows, block, added),)

    def modify(self, rows: BlockIndex, block: BlockIndex) -> Program:
        """Scores of a block as the spec wants them."""
        scales, pairs = self.scales, self.pairs
        if not pairs.modifies_scores:
            return ()
        scale = scales.of_scores if scales else None
        modified = ModifyScores(self.acc_s, rows, block, pairs.score, scale, self.ahead, self.by_tanh)
        return (modified, *self._look_up_next(rows, block))

    def _look_up_next(self, rows: BlockIndex, block: BlockIndex) -> Program:
        """Load for the block after this one, what was loaded for this one being used."""
        if self.walks or not self.ahead:
            return ()
        return (WhenBlock(block - 1, N_MIN, self.look_up(rows, block - 1)),)

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
    def row_max_of_scores(self) -> Program:
        """The running maximum of a row, and what it does to all before."""
        if self.bounded_scores:
            return ()
        chosen = self.exponent_scale if self._chooses_scale else None
        reference = None if self._score_scale else self.reference
        return (
            RowMax(
                self.acc_s,
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
    def exponentials(self) -> Program:
        """P, unrounded, and its sums."""
        at = self.scales
        lift, weight = (at.lift, at.weight) if at else (0, None)
        row_max, alpha = (None, None) if self.bounded_scores else (self.row_max, self.alpha)
        reference = None if self.bounded_scores or self._score_scale else self.reference
        scale = self.exponent_scale if self._chooses_scale else self._score_scale
        of_row = (self.row_sum, reference, row_max, alpha, scale, self._is_scaled and scale is None)
        return (Exponentiate(self.acc_s, *of_row, lift, weight),)

    def rescale_output(self, votes: bool = False) -> Program:
        """O under the new maximum."""
        return () if self.bounded_scores else (ScaleRows(self.acc_o, self.alpha, votes),)

    @property
    def finish_rows(self) -> Step:
        """The factor of each row of O, and its log-sum-exp."""
        of_scales = (self.scales.lift, self.scales.top) if self.scales else ()
        row_max = None if self.bounded_scores else self.row_max
        of_max = (self._coarse, self._is_scaled)
        return FinishRows(row_max, self.total, self.inv_sum, self.row_lse, *of_max, *of_scales)

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
        return self.by_tanh is not None and self.by_tanh.is_all

    @property
    def _score_scale(self) -> RegVec | None:
        """What the softmax multiplies scores by, if not a number of the call; modified ones have it behind them."""
        return self.scales.of_scores if self.scales and not self.pairs.modifies_scores else None

    def mask(self, rows: BlockIndex, block: BlockIndex) -> Program:
        """The masking Step that this mask allows: by interval where there is a closed form, else one by one."""
        if self.pairs.visible is None:
            return (MaskScoresEach(self.acc_s, rows, block, self.pairs.mask),)
        return (MaskScores(self.acc_s, rows, block, self.pairs.visible),)

    def negate_q(self, q: View, around: tuple[Program, Program]) -> Program:
        """What a negative softmax_scale asks of Q, between two programs; a modified score is scaled by itself.

        Of a sum it must be the product that changes its sign, so that is done before.
        """
        if self.pairs.modifies_scores and self.pairs.added is None:
            return ()
        before, after = around
        return (When("scale is negative", (*before, NegateTile(q), *after)),)

    # ---- the blocks of keys of a tile, from right to left -----------------------------------------------------------
    def start_keys(self, *walks: Walk) -> Program:
        """What must be done before the first block is asked for."""
        return tuple(map(StartWalk, walks)) if self.walks else ()

    def when_first(self, body: Program, walk: Walk = VISIT) -> Step:
        """Go to the first block, and run the body if there is one."""
        return WhenNext(walk, body) if self.walks else When("tile has blocks", body)

    def when_any(self, body: Program) -> Step:
        """Run the body if there was a first block."""
        return WhenVisited(VISIT, body) if self.walks else When("tile has blocks", body)

    @property
    def first_block(self) -> KeyBlock:
        """The first block, as a loop would be at it."""
        n = VISIT.n if self.walks else N_MAX - 1
        return KeyBlock(n, n, self._mask_if_partial if self.walks else self.mask(M_BLOCK, n), True)

    @property
    def last_block(self) -> BlockIndex:
        """The last block, once all have been visited."""
        return VISIT.n if self.walks else N_MIN

    def for_further_blocks(self, body: Callable[[KeyBlock], Program], split: bool = True) -> Program:
        """Run the body for every block after the first, those that need no mask apart if `split`."""
        if not self.walks and not split:
            rest = Range("rest", N_MIN, N_MAX - 1, descending=True, tile_class="any")
            return (ForBlocks(rest, "n", body(KeyBlock(N, N + 1, (), True))),)
        return self._for_blocks(body, N_MAX - 1)

    def for_all_blocks(self, body: Callable[[KeyBlock], Program]) -> Program:
        """Run the body for every block, those that need no mask apart."""
        return self._for_blocks(body, N_MAX)

    def _for_blocks(self, body: Callable[[KeyBlock], Program], end: BlockIndex) -> Program:
        """Masked at both ends of what a row sees, unmasked between.

        Keys past the end of the sequence are masked in the last block only, whatever the mask; so without an upper
        bound the right end is empty where `end` leaves that block out.
        """
        visible = self.pairs.visible
        if visible is None:
            block = KeyBlock(VISIT.n, BlockIndex("visit.before"), self._mask_if_partial, True)
            return (ForVisited(VISIT, body(block)),)
        right = Range("right", N_FULL_END, end, descending=True, tile_class="partial")
        full = Range("full", N_FULL_BEGIN, N_FULL_END, descending=True, tile_class="full")
        left = Range("left", N_MIN, N_FULL_BEGIN, descending=True, tile_class="partial")
        has_right = visible.upper or end is N_MAX
        return tuple(
            ForBlocks(
                range_,
                "n",
                body(KeyBlock(N, N + 1, () if range_ is full else self.mask(M_BLOCK, N), range_ is not full)),
            )
            for range_ in (*((right,) if has_right else ()), full, *((left,) if visible.lower else ()))
        )

    @property
    def _mask_if_partial(self) -> Program:
        return (WhenPartial(VISIT, self.mask(M_BLOCK, VISIT.n)),)


@dataclass(frozen=True)
class Places(TilePlaces):
    """What the schedules that every warp runs alike may name.

    Attributes:
        stages: of the ring of K and V.
        score_unroll: k-steps of the score GEMM that are written out.
        load_at, read_at: where the next copy into the ring goes, and which stage is worked on.
        o_acc, saved_max, saved_sum: what a schedule keeps in device memory between blocks of keys.
    """

    stages: int
    score_unroll: int
    load_at: Cursor
    read_at: Cursor
    o_acc: Tensor
    saved_max: Rows
    saved_sum: Rows
