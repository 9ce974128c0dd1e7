"""The places that schedules work with, handed to them by lowering, and what every family of schedules says alike."""

from dataclasses import dataclass

from attngen.expr import Expr, KeyRange
from attngen.plan import BlockIndex, Buffer, Cursor, Range, RegTile, RegVec, Rows, Step, Tensor
from attngen.plan.steps import MaskScores, MaskScoresEach

M_BLOCK, N, N_MIN, N_FULL_BEGIN, N_FULL_END, N_MAX = (
    BlockIndex("m_block"),
    BlockIndex("n"),
    BlockIndex("n_min"),
    BlockIndex("n_full_begin"),
    BlockIndex("n_full_end"),
    BlockIndex("n_max"),
)


@dataclass(frozen=True)
class TilePlaces:
    """What a schedule of any family may name.

    Attributes:
        mask: the mask, as a tree.
        visible: the keys it lets a row see, where they have a closed form.
        q, k, v, out: tiles in shared memory: (block_m or block_n, padded head dim); `out` stages the result.
        acc_s, p, acc_o: (block_m, block_n) scores, the same rounded, (block_m, head_dim_v) output.
        row_max, row_sum, alpha, total, inv_sum, row_lse: one value per row; `row_sum` is partial, `total` whole.
        q_in, k_in, v_in, result, lse: tensors in device memory.
    """

    mask: Expr
    visible: KeyRange | None
    q: Buffer
    k: Buffer
    v: Buffer
    out: Buffer
    acc_s: RegTile
    p: RegTile
    acc_o: RegTile
    row_max: RegVec
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

    def mask_scores(self, rows: BlockIndex, block: BlockIndex) -> Step:
        """The masking Step that this mask allows: by interval where there is a closed form, else one by one."""
        if self.visible is None:
            return MaskScoresEach(self.acc_s, rows, block, self.mask)
        return MaskScores(self.acc_s, rows, block, self.visible)

    def ranges(self, last_is_peeled: bool) -> tuple[Range, ...]:
        """The blocks of keys from right to left: masked at both ends of what a row sees, unmasked between.

        Keys past the end of the sequence are masked in the last block only, whatever the mask; so without an upper
        bound the right end is empty where the schedule has peeled that block off.
        """
        end = N_MAX - 1 if last_is_peeled else N_MAX
        if self.visible is None:
            return (Range("every", N_MIN, end, descending=True, tile_class="any"),)
        right = Range("right", N_FULL_END, end, descending=True, tile_class="partial")
        full = Range("full", N_FULL_BEGIN, N_FULL_END, descending=True, tile_class="full")
        left = Range("left", N_MIN, N_FULL_BEGIN, descending=True, tile_class="partial")
        has_right = self.visible.upper or not last_is_peeled
        return (*((right,) if has_right else ()), full, *((left,) if self.visible.lower else ()))


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
