"""The kernel that adds up dQ beside dK and dV, for warpgroups: where it may stand, its tiles, storage and roles."""

from dataclasses import dataclass, replace
from typing import Literal

from attngen.dtypes import F32
from attngen.expr import derivative, free_names, weight
from attngen.lower.features import Features, is_capped_product
from attngen.lower.gradient_kernels import results_of
from attngen.lower.gradient_warpgroups import (
    OWN,
    WARPGROUPS,
    GradientStorage,
    Tile,
    common_plan,
    is_heavy,
    key_places,
)
from attngen.lower.rounding import round_up
from attngen.lower.warpgroups import TILE_SLOT_BYTES
from attngen.plan import (
    COUNTER,
    PANEL_BYTES,
    ROWS_OF_Q,
    SCORES,
    WARPGROUP_WARPS,
    Buffer,
    Cursor,
    FinishSums,
    KernelPlan,
    NamedBarriers,
    Param,
    Program,
    QueryRanks,
    QuerySums,
    RegTile,
    Ring,
    Role,
    Scheduler,
    Share,
)
from attngen.schedules.fused_backward import FusedPlaces, earlier_keys, fused_gradients
from attngen.schedules.pairs import SCORE
from attngen.schedules.warpgroup_backward import Stream

TURN = NamedBarriers("turn", OWN.first + WARPGROUPS, WARPGROUPS)
STAGES = 2
"""Of dS and of dQ on their way, and of Q and dO: shared memory has no room for a third."""


@dataclass(frozen=True)
class FusedTile(Tile):
    """What a block of threads works on at a time.

    Attributes:
        kept_k, kept_v: columns of K and of V that stay in registers.
        dq_over_s: dQ takes the registers of S.
        takes_turns, is_tight: as of `FusedPlaces`.
        is_slow_in_order: sums in one order take longer than split kernels do.
    """

    kept_k: int = 0
    kept_v: int = 0
    dq_over_s: bool = False
    takes_turns: bool = False
    is_tight: bool = False
    is_slow_in_order: bool = False


L2_BYTES = 50_000_000
"""Of an H100 and an H200. Source: NVIDIA H100 Tensor Core GPU Architecture, table 3."""
Score = Literal["plain", "light", "capped"]
"""The scaled product; a little arithmetic with it whose slope does not ask for it, such as ALiBi's; or a tanh of it and
scalars."""
LIGHTEST = 12
"""Most that a light score and its slope weigh together: what ALiBi's do."""
TILES: dict[tuple[int, Score], FusedTile] = {
    (64, "plain"): FusedTile(128, 128, STAGES, STAGES, kept_k=64, takes_turns=True),
    (96, "plain"): FusedTile(
        64, 128, STAGES, STAGES, kept_k=96, kept_v=96, dq_over_s=True, takes_turns=True, is_slow_in_order=True
    ),
    (96, "light"): FusedTile(64, 128, STAGES, STAGES, takes_turns=True, is_slow_in_order=True),
    (96, "capped"): FusedTile(64, 128, STAGES, STAGES, takes_turns=True, is_tight=True),
    (128, "plain"): FusedTile(
        64, 128, STAGES, STAGES, kept_k=64, kept_v=16, dq_over_s=True, takes_turns=True
    ),
    (128, "light"): FusedTile(64, 128, STAGES, STAGES, takes_turns=True),
    (128, "capped"): FusedTile(64, 128, STAGES, STAGES, takes_turns=True, is_tight=True),
}
"""By columns of a head and the score: such that a warpgroup makes 64 x 64 elements of dQ of a visit, its rows or its
columns; as much is kept as NVRTC 13.0.88 finds registers for without spills."""


def _tile(features: Features) -> FusedTile | None:
    """The tile for a spec; None where there is none."""
    score = features.pairs.score
    kind: Score = "plain" if score is SCORE else "light"
    if is_capped_product(score):
        kind = "capped"
    elif (
        is_heavy(score)
        or "score" in free_names(slope := derivative(score))
        or weight(score, slope) > LIGHTEST
    ):
        return None
    return TILES.get((features.head_dim, kind))


def why_split(features: Features, is_for_warpgroups: bool = True) -> str:
    """Why dQ has a kernel of its own, beside those of dK and dV; empty where one kernel adds it up.

    Args:
        features: of the spec.
        is_for_warpgroups: the attention kernel is.
    """
    if not (is_for_warpgroups and features.arch.emits):
        return "the attention kernel is not for warpgroups"
    columns = sorted({columns for columns, _ in TILES})
    if (features.head_dim_qk, features.head_dim_v) not in zip(columns, columns, strict=True):
        return f"one kernel for all is there for head_dim {', '.join(map(str, columns))}, of q, k and v alike"
    if features.visible_rows is None or features.blocks is not None:
        return "the queries that see a key are no range in closed form"
    if features.deterministic and earlier_keys(features.visible_rows) is None:
        return "deterministic: true, and no closed form says which keys add to dQ of a query earlier"
    tile = _tile(features)
    if tile is None:
        return "the score is worked out in registers that sums of dQ would take"
    if features.deterministic and tile.is_slow_in_order:
        return f"deterministic: true, and at head_dim {features.head_dim} sums of dQ in one order take longer"
    return ""


def fused_gradient_plans(features: Features, forward: KernelPlan) -> tuple[KernelPlan | FinishSums, ...]:
    """The kernel of dK, dV and sums of dQ, and the sheet that makes dQ of these."""
    tile = _tile(features)
    assert tile is not None
    storage = GradientStorage(features, tile, "keys", keep="evict_normal")
    keys = key_places(features, tile, ("dv", "dk"), storage)
    pairs_ring = Ring("ds", STAGES, read_by_threads=True, filled_by_threads=True, loads=WARPGROUPS)
    pairs = storage.exchange(
        Buffer("ds", features.inputs, SCORES, tile.block_m, tile.block_n, tile.block_n, STAGES, in_panels=True,
               shared_by="columns"),
        *_cursors(pairs_ring),
    )  # fmt: skip
    share: Share = "rows" if tile.block_m > forward.arch.wgmma.m else "columns"  # type: ignore[union-attr]
    cols = keys.q.tile.cols
    if share == "columns":  # each warpgroup's begin a panel of K, whose columns past the last hold zeros
        cols = round_up(cols, WARPGROUPS * PANEL_BYTES // features.inputs.bytes)
    of_dq = (F32, ROWS_OF_Q, tile.block_m, cols, keys.q.tile.valid_cols)
    products = storage.exchange(
        Buffer("dq", *of_dq, STAGES, shared_by=share),
        *_cursors(Ring("dq", STAGES, filled_by_threads=True, copies=WARPGROUPS)),
    )
    ranks = QueryRanks("dq_ranks", tile.block_m, WARPGROUPS) if features.deterministic else None
    sums = QuerySums("dq_sums", tile.block_m, cols, share, ranks)
    at = FusedPlaces(
        **vars(keys),
        pairs=pairs,
        products=products,
        dq=RegTile("acc_dq", *of_dq, "accumulator", share, keys.pair.s if tile.dq_over_s else None),
        sums=sums,
        kept_k=_kept(keys.k, tile.kept_k),
        kept_v=_kept(keys.v, tile.kept_v) if keys.v else None,
        turn=TURN if tile.takes_turns else None,
        is_tight=tile.is_tight,
    )
    programs = fused_gradients(at)
    plan = common_plan(features, forward, "fused_gradients", tile, at, programs, storage, (sums,))
    assert plan.key_blocks is not None
    plan = replace(
        plan,
        roles=_with_adder(plan.roles, at, programs["adder"]),
        scheduler=Scheduler("key_blocks", in_turn=bool(ranks), rows_at_hand=_rows_at_hand(features)),
        # dQ sums over the keys of a block: P of a key that does not exist is exp2(-lse), which may be infinite.
        key_blocks=plan.key_blocks.of_whole_blocks(),
    )
    if ranks:
        plan = replace(
            plan,
            params=(*plan.params, Param("tile_counter", "pointer", COUNTER)),
            smem_bytes=plan.smem_bytes + TILE_SLOT_BYTES,
        )
    return plan, FinishSums(plan, sums, results_of("dq", keys.q.tile, "q"))


def _cursors(ring: Ring) -> tuple[Cursor, Cursor]:
    """Where who fills the stages of a ring stands, and who reads them."""
    fills, reads = (
        Cursor(f"{ring.name}_{name}", ring.stages, ring, name == "fills") for name in ("fills", "reads")
    )
    return fills, reads


def _rows_at_hand(features: Features) -> int:
    """Rows of Q, dO and sums of dQ that the L2 cache holds; 0 where one head is to follow another.

    In any order heads are side by side where masks end, so that the longest tiles of several start first. In one order
    they are where rows do not begin later for later keys, so that blocks of a head start as far from each other as they
    have to wait, and in lists, where all heads would be otherwise.
    """
    visible = features.visible_rows
    assert visible is not None
    if features.deterministic:
        are_side_by_side = not visible.lower or not features.lengths.are_dense
    else:
        are_side_by_side = bool(visible.lower or visible.upper)
    row_bytes = features.head_dim * (2 * features.inputs.bytes + F32.bytes)
    return L2_BYTES // row_bytes if are_side_by_side else 0


def _kept(of: Stream, columns: int) -> RegTile | None:
    """The first columns of the rows of a tensor that a warpgroup owns, as A operand."""
    tile = of.tile
    if not columns:
        return None
    return RegTile(f"{tile.name}_kept", tile.dtype, tile.axes, tile.rows, columns, columns, "a_fragment")


def _with_adder(roles: tuple[Role, ...], at: FusedPlaces, program: Program) -> tuple[Role, ...]:
    """Consumers and producer, of whose warpgroup a warp for each consumer adds."""
    consumer, producer = roles
    cursors = (*consumer.cursors, at.pairs.fills, at.pairs.reads, at.products.fills)
    tiles = (*consumer.reg_tiles, at.dq, *(kept for kept in (at.kept_k, at.kept_v) if kept))
    return (
        replace(consumer, reg_tiles=tiles, cursors=cursors),
        replace(producer, warps=WARPGROUP_WARPS - WARPGROUPS),
        Role(
            "adder",
            WARPGROUPS,
            program,
            cursors=(at.products.reads,),
            warpgroups=WARPGROUPS,
            registers=producer.registers,
            single_thread=True,
        ),
    )
