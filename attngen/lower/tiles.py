"""What `auto` stands for: schedule, tile, stages and warps per head dim and mask. Numbers only."""

from dataclasses import dataclass, replace
from typing import Literal

from attngen.arch import Arch


@dataclass(frozen=True)
class Choice:
    """The numbers a spec leaves open, decided.

    Attributes:
        blocks_per_sm: resident blocks the compiler must leave registers for.
        score_unroll: k-steps of the score GEMM that are written out.
        longest_first: blocks of rows that see the most keys (the last ones) start first.
    """

    block_m: int
    block_n: int
    stages: int
    warps: int
    blocks_per_sm: int = 1
    score_unroll: int = 4
    longest_first: bool = False


@dataclass(frozen=True)
class WarpgroupChoice:
    """The numbers that a spec leaves open to the schedules of warpgroups, decided.

    Attributes:
        warpgroups: consumers; each owns a matrix instruction's rows of block_m.
        rescale: where in a block O is rescaled, see `WarpgroupPlaces`.
        rescale_votes: a warp none of whose maxima grew skips it.
        passes_late: the turn is passed when the GEMMs have landed, not when they have been issued.
        out_over_q: the result is staged over Q, for want of shared memory of its own.
        q_stages: with two, one warpgroup may begin the next tile while another is still at this one.
        part_cols: columns of O that the tensor core adds up at a time, before they join O in true f32; 0 where it adds
            to O itself.
        integer_maxima: see `RowMax.by_integers`.
    """

    block_m: int
    block_n: int
    stages: int
    warpgroups: int
    overlap: bool = True
    persistent: bool = True
    longest_first: bool = True
    rescale: Literal["middle", "last"] = "middle"
    rescale_votes: bool = False
    passes_late: bool = False
    out_over_q: bool = False
    q_stages: int = 1
    blocks_per_sm: int = 1
    part_cols: int = 0
    integer_maxima: bool = False


@dataclass(frozen=True)
class Row:
    """What `auto` stands for on calls of up to `up_to` keys; on all others in the last row of a table."""

    up_to: int | None
    schedule: str
    choice: WarpgroupChoice


@dataclass(frozen=True)
class Demands:
    """What a mask and a score ask of a tile, besides the GEMMs.

    Attributes:
        bounded: the mask has an upper bound, so that rows of a head see more and more keys.
        lower: the mask has a lower bound, as windows have.
        walks: blocks of keys are classed one by one.
        modified: scores are modified when the score GEMM has landed.
        by_tanh: they are in two steps, by their tanh: instructions rather than exponentials while they are small.
        seeded: the score GEMM adds to something.
        capped: they are bounded, are in two steps with three warpgroups too, and their exponentials under no maximum.
        mask_loads: the mask looks something up for each pair, in partial blocks.
        score_loads: the score does, in every block.
        adds_a_bias: that is a bias of two neighbouring keys at a time, and but for sums and products there is no more.
    """

    bounded: bool = False
    lower: bool = False
    walks: bool = False
    modified: bool = False
    by_tanh: bool = False
    seeded: bool = False
    capped: bool = False
    mask_loads: bool = False
    score_loads: bool = False
    adds_a_bias: bool = False


def warpgroup_table(head_dim_qk: int, head_dim_v: int, demands: Demands = Demands()) -> tuple[Row, ...]:
    """The rows for a head dim on sm_90a, shortest sequences first.

    Source: benchmarks/results/tune_warpgroups.json (H200, 2026-11-21), bf16; head dims between follow the next larger.

    Args:
        head_dim_qk: of Q and K.
        head_dim_v: of V.
        demands: of the mask and the score. What is looked up for each pair takes registers: tiles are those that
            compile without spills; scores that load nothing: tune_scores.json; a bias: tune_overlap.json.
    """
    widest = max(head_dim_qk, head_dim_v)
    if rows := _of_lookups(widest, demands) or _of_scores(widest, demands):
        return rows
    if widest <= 64:
        small = WarpgroupChoice(64, 128, 2, 1, rescale="last", q_stages=2, blocks_per_sm=2)
        wide = WarpgroupChoice(192, 128, 3, 3, q_stages=2)
        return (
            *((Row(4096, "warp_specialized", small),) if demands.bounded else ()),
            Row(None, "pingpong", replace(wide, passes_late=True, integer_maxima=True)),
        )
    if widest <= 96:
        long = WarpgroupChoice(192, 112, 2, 3) if widest <= 80 else WarpgroupChoice(192, 96, 2, 3)
        return (
            Row(1024, "pingpong", WarpgroupChoice(128, 128, 2, 2, q_stages=2)),
            Row(None, "pingpong", replace(long, integer_maxima=True)),
        )
    if widest <= 128:
        return (Row(None, "warp_specialized", WarpgroupChoice(128, 128, 2, 2, integer_maxima=True)),)
    if head_dim_v <= 128 and head_dim_qk <= 192:
        return (Row(None, "warp_specialized", WarpgroupChoice(128, 112, 2, 2)),)
    if widest <= 192:
        return (
            Row(2048, "warp_specialized", WarpgroupChoice(128, 80, 2, 2, rescale="last")),
            Row(None, "warp_specialized", WarpgroupChoice(128, 96, 2, 2, rescale="last", out_over_q=True)),
        )
    wide = WarpgroupChoice(128, 80, 2, 2, rescale="last", rescale_votes=True, out_over_q=True)
    if demands.modified and demands.lower:
        return (Row(None, "warp_specialized", replace(wide, block_n=64)),)
    return (
        Row(512, "warp_specialized", replace(wide, block_n=64)),
        Row(None, "warp_specialized", wide),
    )


def _of_lookups(widest: int, demands: Demands) -> tuple[Row, ...]:
    """Where something is looked up for each pair and takes registers; none where all is as without."""
    if not (demands.mask_loads or demands.score_loads):
        return ()
    if widest <= 64:
        return (Row(None, "warp_specialized", WarpgroupChoice(128, 128, 2, 2)),)
    if widest <= 96:
        return (Row(None, "warp_specialized", WarpgroupChoice(128, 80, 2, 2)),)
    if widest > 128:
        block_n = 32 if demands.score_loads and widest > 192 else 48
        narrow = WarpgroupChoice(128, block_n, 2, 2, rescale="last", out_over_q=widest > 192)
        return (Row(None, "warp_specialized", narrow),)
    if demands.score_loads:
        sees_all = not (demands.bounded or demands.lower or demands.walks)
        if demands.adds_a_bias and sees_all and widest == 128:
            return (Row(None, "pingpong", WarpgroupChoice(128, 128, 2, 2)),)
        block_n = 112 if demands.adds_a_bias and not demands.walks and widest == 128 else 96
        return (Row(None, "warp_specialized", WarpgroupChoice(128, block_n, 2, 2)),)
    if demands.modified:
        return (Row(None, "warp_specialized", WarpgroupChoice(128, 112 if demands.capped else 96, 2, 2)),)
    return ()


def _of_scores(widest: int, demands: Demands) -> tuple[Row, ...]:
    """Where scores are modified, or seeded; none where tiles are those of plain ones."""
    if widest <= 64 and demands.modified and not demands.capped:
        return (Row(None, "warp_specialized", WarpgroupChoice(128, 128, 2, 2, q_stages=2)),)
    if not 96 < widest <= 128:
        return ()
    if demands.capped:
        return (
            Row(4096 if demands.bounded else 1024, "warp_specialized", WarpgroupChoice(128, 128, 2, 2)),
            Row(None, "warp_specialized", WarpgroupChoice(192, 80, 2, 3, rescale="last", q_stages=2)),
        )
    if demands.seeded and not demands.modified:
        long = WarpgroupChoice(128, 128, 2, 2)
        if not demands.bounded:
            long = replace(long, rescale="last", integer_maxima=True)
        return (
            Row(1024, "pingpong", WarpgroupChoice(128, 128, 2, 2)),
            Row(None, "warp_specialized", long),
        )
    if demands.modified and not demands.by_tanh:  # a third softmax hides what two leave in the open
        return (
            Row(1024, "pingpong", WarpgroupChoice(128, 128, 2, 2)),
            Row(None, "pingpong", WarpgroupChoice(192, 80, 2, 3, rescale="last", q_stages=2)),
        )
    return ()


def warpgroup_choices(best: WarpgroupChoice, arch: Arch) -> tuple[WarpgroupChoice, ...]:
    """Candidates for warp_specialized and pingpong where the spec fixes some of the numbers, from best to smallest."""
    part_cols = best.part_cols
    if not arch.emits:
        return (WarpgroupChoice(64, 64, 2, 2, part_cols=part_cols),)
    return (
        best,
        WarpgroupChoice(128, 64, 2, 2, out_over_q=True, part_cols=part_cols),
        WarpgroupChoice(64, 64, 2, 1, out_over_q=True, part_cols=part_cols),
    )


def choices(schedule: str, head_dim: int, demands: Demands, arch: Arch) -> tuple[Choice, ...]:
    """Candidates from best to smallest; lowering takes the first that passes the rules.

    fa2 at head_dim 64 and 128: benchmarks/results/tune_fa2.json (H200, 2026-11-21). The other head dims follow the
    nearest of the two that fits.
    """
    if not arch.has_mma_granularity:
        return (Choice(64, 64, 1 if schedule == "serial" else 2, 1),)
    if schedule == "serial":
        wide = (Choice(64, 64, 1, 4),) if head_dim <= 192 else ()
        return (*wide, Choice(64, 32, 1, 4), Choice(32, 32, 1, 2))
    if head_dim <= 64 and not demands.score_loads:
        return (Choice(128, 64, 2, 4), Choice(128, 64, 1, 4))
    needs_more = demands.lower or demands.walks or demands.modified
    if demands.score_loads or (head_dim > 64 and needs_more):  # 128 rows spill
        small = Choice(64, 32, 1, 4)
        return (small,) if head_dim > 128 and demands.score_loads else (Choice(64, 64, 1, 4), small)
    if 80 < head_dim <= 96:  # 128x64 spills 8 bytes (NVRTC 13.0.88)
        return (Choice(128, 48, 2, 4), Choice(64, 48, 1, 4))
    if head_dim <= 128:
        return (Choice(128, 64, 1, 4), Choice(64, 64, 1, 4), Choice(64, 32, 1, 4))
    return (
        Choice(128, 64, 1, 8, score_unroll=2),
        Choice(128, 32, 1, 8, score_unroll=2),
        Choice(64, 64, 1, 4, score_unroll=2),
        Choice(64, 32, 1, 4, score_unroll=2),
    )
