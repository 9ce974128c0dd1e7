"""What `auto` stands for with e4m3 inputs: tile, slices of O and turns per head dim, scales and promotion."""

from attngen.lower.tiles import Demands, Row, WarpgroupChoice


def table_8bit(
    head_dim_qk: int, head_dim_v: int, demands: Demands, has_granules: bool, promotes: bool
) -> tuple[Row, ...]:
    """The rows for a head dim on sm_90a; head dims between follow the next larger.

    Source: benchmarks/results/tune_8bit.json (H200, 2026-11-21). Tiles are those that compile without spills.

    Args:
        head_dim_qk: of Q and K.
        head_dim_v: of V.
        demands: of the mask and the score.
        has_granules: blocks of keys have scales of their own, which take registers.
        promotes: O is added up in true f32, in slices of a half or a quarter where registers are scarce.
    """
    widest, half = max(head_dim_qk, head_dim_v), head_dim_v // 2
    is_plain = not (demands.modified or demands.walks)

    def late(block_m: int, block_n: int, part_cols: int, q_stages: int = 1) -> tuple[Row, ...]:
        """Turns passed when GEMMs have landed: 20 to 30 % over passing them at once, with wide tiles."""
        choice = WarpgroupChoice(
            block_m,
            block_n,
            2,
            block_m // 64,
            rescale="last",
            passes_late=True,
            q_stages=q_stages,
            part_cols=part_cols,
        )
        return (Row(None, "pingpong", choice),)

    def free(block_m: int, block_n: int, part_cols: int = 0) -> tuple[Row, ...]:
        choice = WarpgroupChoice(
            block_m,
            block_n,
            2,
            block_m // 64,
            rescale="last" if part_cols else "middle",
            out_over_q=widest > 128,
            part_cols=part_cols,
        )
        return (Row(None, "warp_specialized", choice),)

    if widest <= 64:
        if not is_plain:
            return free(128, 128, head_dim_v if promotes else 0)
        if not promotes:
            return free(192, 160)
        return free(192, 128, half) if has_granules else late(192, 128, head_dim_v)
    if widest <= 128:
        if not is_plain:
            return free(128, 128, half if promotes else 0)
        if not promotes:
            return free(128, 160) if has_granules else late(128, 224, 0)
        return late(128, 160, half) if has_granules else late(128, 192, half, q_stages=2)
    if not promotes:
        return free(128, 128 if is_plain else 64)
    quarter = head_dim_v // 32 * 8
    return free(128, 64, quarter) if has_granules or not is_plain else free(128, 96, quarter)
