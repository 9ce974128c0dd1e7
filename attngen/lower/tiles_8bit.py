"""What `auto` stands for with e4m3 inputs: tile, slices of O and turns per head dim, scales and promotion."""

from typing import Literal

from attngen.lower.tiles import Demands, Row, WarpgroupChoice
from attngen.quantize import ScaleKind


def table_8bit(
    head_dim_qk: int, head_dim_v: int, demands: Demands, scales: ScaleKind, promote: int | Literal["auto"]
) -> tuple[Row, ...]:
    """The rows for a head dim on sm_90a; head dims between follow the next larger.

    Source: benchmarks/results/tune_8bit.json (H200, 2026-11-21). Tiles are those that compile without spills.

    Args:
        head_dim_qk: of Q and K.
        head_dim_v: of V.
        demands: of the mask and the score.
        scales: what shares one.
        promote: after how many blocks O is added up in true f32, in slices of a half or a quarter where registers are
            scarce. `auto` is 1 up to head_dim 128, where it costs nothing, and 0 beyond: there it costs a quarter of
            the speed, and at 128k keys without it the error is 1.04 times that at 4k (1.03 with it, head_dim 128).
    """
    widest, half, quarter = max(head_dim_qk, head_dim_v), _slice(head_dim_v, 2), _slice(head_dim_v, 4)
    has_granules, for_keys = scales in ("per_block", "per_token"), scales == "per_token"
    is_plain = not (demands.modified or demands.walks or demands.lower or for_keys)
    loads = demands.score_loads or demands.mask_loads or (for_keys and demands.modified)
    promotes = promote != 0 and (promote != "auto" or widest <= 128)
    if widest <= 64:
        if not is_plain:
            narrow = 64 if loads and for_keys else 96
            block_n = narrow if loads or demands.walks else 128
            return _free(128, block_n, head_dim_v if promotes else 0)
        if has_granules:
            return _free(192, 128, half) if promotes else _free(192, 160)
        if promotes:
            return _late(192, 128, head_dim_v)
        short = _late(192, 128, up_to=4096 if demands.bounded else 1024, integer_maxima=True)
        return short + _late(192, 160, integer_maxima=True)
    if widest <= 128:
        if not is_plain and promotes and not (has_granules or loads or demands.walks):
            return _late(128, 128, half if head_dim_v > 64 else head_dim_v, q_stages=1, stages=3)
        if not is_plain:
            block_n = 64 if loads else 96 if for_keys and demands.walks else 128
            return _free(128, block_n, half if promotes else 0)
        if has_granules and promotes:
            return _turns(128, 128, head_dim_v)
        if has_granules:
            return _free(128, 128, q_stages=2, stages=3, overlap=False)
        if promotes:
            short = _late(128, 128, head_dim_v, stages=4, up_to=4096, integer_maxima=demands.bounded)
            return short + _late(128, 192, half)
        short = _late(128, 128 if demands.bounded else 160, stages=3, up_to=4096, integer_maxima=True)
        return short + _late(128, 224, q_stages=1, integer_maxima=True)
    if not promotes and is_plain:
        return _free(128, 128, out_over_q=True, integer_maxima=not has_granules)
    if not promotes:
        return _free(128, 32 if loads else 64, out_over_q=True)
    if not is_plain:
        return _free(128, 32, quarter, out_over_q=True)
    return _free(128, 64 if has_granules else 96, quarter, out_over_q=True)


def _slice(cols: int, parts: int) -> int:
    """The narrowest slices that share out columns evenly and are one of so many parts of them or wider.

    Of what wgmma takes, a multiple of 8 columns; where head dims are not multiples of 16, any number.
    """
    step = 1 if cols % 16 else 8
    return next(width for width in range(step, cols + 1, step) if cols % width == 0 and width * parts >= cols)


def _late(
    block_m: int,
    block_n: int,
    part_cols: int = 0,
    q_stages: int = 2,
    stages: int = 2,
    up_to: int | None = None,
    integer_maxima: bool = False,
) -> tuple[Row, ...]:
    """Turns that are passed when the GEMMs have landed: what overlaps is the others' softmax, nothing of one's own."""
    choice = WarpgroupChoice(
        *(block_m, block_n, stages, block_m // 64),
        overlap=False,
        rescale="last",
        passes_late=True,
        q_stages=q_stages,
        part_cols=part_cols,
        integer_maxima=integer_maxima,
    )
    return (Row(up_to, "pingpong", choice),)


def _turns(block_m: int, block_n: int, part_cols: int) -> tuple[Row, ...]:
    """Turns that are passed when the GEMMs have been issued."""
    return (Row(None, "pingpong", WarpgroupChoice(block_m, block_n, 2, block_m // 64, part_cols=part_cols)),)


def _free(
    block_m: int,
    block_n: int,
    part_cols: int = 0,
    out_over_q: bool = False,
    q_stages: int = 1,
    stages: int = 2,
    overlap: bool = True,
    integer_maxima: bool = False,
) -> tuple[Row, ...]:
    """No turns."""
    choice = WarpgroupChoice(
        *(block_m, block_n, stages, block_m // 64),
        overlap=overlap,
        rescale="last" if part_cols else "middle",
        out_over_q=out_over_q,
        q_stages=q_stages,
        part_cols=part_cols,
        integer_maxima=integer_maxima,
    )
    return (Row(None, "warp_specialized", choice),)
