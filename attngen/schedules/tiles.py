"""The places that every schedule of this family works with, handed to it by lowering."""

from dataclasses import dataclass

from attngen.expr import Expr, KeyRange
from attngen.plan import BlockIndex, Buffer, Cursor, RegTile, RegVec, Rows, Step, Tensor
from attngen.plan.steps import MaskScores, MaskScoresEach


@dataclass(frozen=True)
class Places:
    """What a schedule may name.

    Attributes:
        q, k, v, out: tiles in shared memory: (block_m or block_n, padded head dim); `out` stages the result.
        score_unroll: k-steps of the score GEMM that are written out.
        load_at, read_at: where the next copy into the ring of K and V goes, and which stage is worked on.
        acc_s, p, acc_o: (block_m, block_n) scores, the same rounded, (block_m, head_dim_v) output.
        row_max, row_sum, alpha, total, inv_sum, row_lse: one value per row; `row_sum` is partial, `total` whole.
    """

    mask: Expr
    visible: KeyRange | None
    stages: int
    score_unroll: int
    q: Buffer
    k: Buffer
    v: Buffer
    out: Buffer
    load_at: Cursor
    read_at: Cursor
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
    o_acc: Tensor
    saved_max: Rows
    saved_sum: Rows

    def mask_scores(self, rows: BlockIndex, block: BlockIndex) -> Step:
        """The masking Step that this mask allows: by interval where there is a closed form, else one by one."""
        if self.visible is None:
            return MaskScoresEach(self.acc_s, rows, block, self.mask)
        return MaskScores(self.acc_s, rows, block, self.visible)
