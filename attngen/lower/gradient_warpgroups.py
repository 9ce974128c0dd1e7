"""The kernels of a backward pass for warpgroups: tiles, rings, storage and parameters. Every number is chosen here."""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from attngen.dtypes import F32
from attngen.expr import Expr, free_names, most_blocks, nodes
from attngen.expr.arithmetic import FUNCTIONS
from attngen.lower.block_tiles import fitted_loop
from attngen.lower.features import Features
from attngen.lower.gradient_kernels import (
    DELTA,
    LSE_LOG2,
    ONE_KERNEL,
    backward_plan,
    numbers_of_pairs,
    pair_gradient,
    results_of,
)
from attngen.lower.params import row_strides
from attngen.lower.rounding import round_up
from attngen.lower.warpgroups import BUFFER_ALIGNMENT
from attngen.plan import (
    PANEL_BYTES,
    ROWS_OF_K,
    ROWS_OF_O,
    ROWS_OF_Q,
    ROWS_OF_V,
    SCORES,
    WARPGROUP_WARPS,
    Axis,
    Buffer,
    Cursor,
    KernelPlan,
    NamedBarriers,
    Param,
    Program,
    QuerySums,
    RegTile,
    RegVec,
    Ring,
    Role,
    Rows,
    Scheduler,
    Tensor,
    TensorMap,
    in_bf16,
)
from attngen.plan.hardware_rules import WARPGROUP_REGISTERS, RegisterShare
from attngen.plan.steps import Keep
from attngen.schedules.backward import OwnGradient
from attngen.schedules.fused_backward import Exchange
from attngen.schedules.key_loop import KeyLoop
from attngen.schedules.pairs import SCORE
from attngen.schedules.warpgroup_backward import (
    Stream,
    WarpgroupGradientPlaces,
    WarpgroupKeyPlaces,
    WarpgroupQueryPlaces,
    key_gradients,
    query_gradients,
)

WARPGROUPS = 2
OWNED = 64
"""Rows of a gradient that a warpgroup owns: those of one wgmma."""
COMMON, OWN = NamedBarriers("common", 1, WARPGROUPS, is_common=True), NamedBarriers("own", 2, 1)
WALKING = RegisterShare(232, 32, spare=24)
"""How registers are shared out where a producer walks over blocks of keys that come through a ring each."""

WALKING_IN_BLOCKS = replace(WALKING, producer=40)
"""How they are shared out where the block that it walks to may lie in several given ones."""


@dataclass(frozen=True)
class Tile:
    """How much a block of threads works on at a time.

    Attributes:
        block_m, block_n: queries and keys.
        stages, beside: of K and of V where dQ is owned, else of Q and of dO.
        dv_late: as of `WarpgroupKeyPlaces`.
    """

    block_m: int
    block_n: int
    stages: int
    beside: int
    dv_late: bool = False


Weight = Literal["plain", "arithmetic", "functions"]
"""What a score asks for besides the product: nothing, arithmetic, or functions such as tanh and lookups, of which many
are at work at a time and want registers."""
Kind = Literal["dq", "dk and dv", "dv", "dk"]
TILES: dict[Kind, dict[tuple[int, Weight], Tile]] = {
    "dq": {
        (64, "plain"): Tile(128, 128, 3, 3),
        (64, "arithmetic"): Tile(128, 64, 3, 3),
        (128, "plain"): Tile(128, 128, 2, 2),
        (128, "arithmetic"): Tile(128, 64, 3, 3),
        (192, "plain"): Tile(128, 96, 2, 1),
        (192, "functions"): Tile(128, 48, 3, 3),
        (256, "plain"): Tile(128, 64, 2, 1),
        (256, "functions"): Tile(128, 32, 2, 2),
    },
    "dk and dv": {
        (64, "plain"): Tile(128, 128, 3, 3, dv_late=True),
        (64, "arithmetic"): Tile(64, 128, 3, 3),
        (128, "plain"): Tile(64, 128, 3, 3),
        (128, "functions"): Tile(32, 128, 3, 3),
    },
    "dv": {
        (192, "plain"): Tile(64, 128, 3, 3),
        (192, "functions"): Tile(32, 128, 3, 3),
        (256, "plain"): Tile(64, 128, 3, 2),
        (256, "functions"): Tile(32, 128, 3, 3),
    },
    "dk": {
        (192, "plain"): Tile(64, 128, 2, 2),
        (192, "functions"): Tile(32, 128, 3, 3),
        (256, "plain"): Tile(64, 128, 2, 1),
        (256, "functions"): Tile(32, 128, 3, 3),
    },
}
"""By the most columns of a head and the least weight of a score: as large as NVRTC 13.0.88 compiles without spills, and
of these the fastest on an H200 (docs/performance.md)."""
WEIGHTS: tuple[Weight, ...] = get_args(Weight)


def warpgroup_gradient_plans(features: Features, forward: KernelPlan) -> tuple[KernelPlan, ...]:
    """The kernel of dQ, and that of dK and dV, or of wide heads, whose sums fill the registers, one each."""
    queries = _of_queries(features, forward, _tile("dq", features))
    if features.head_dim <= ONE_KERNEL:
        return (queries, _of_keys(features, forward, _tile("dk and dv", features), ("dv", "dk")))
    return (
        queries,
        _of_keys(features, forward, _tile("dv", features), ("dv",)),
        _of_keys(features, forward, _tile("dk", features), ("dk",)),
    )


def _tile(kind: Kind, features: Features) -> Tile:
    """The tile of the narrowest heads that are wide enough, and of the heaviest score that is not too heavy.

    The side that is looped over is fitted to given blocks.
    """
    tiles, score = TILES[kind], features.pairs.score
    hides_pairs = kind == "dk and dv" and features.visible_rows is None
    weight: Weight = "plain" if score is SCORE and not hides_pairs else "arithmetic"
    is_asked = _is_asked_for_blocks(kind, features)
    works_masks_out = features.walks and (is_asked or not features.masks_by_interval)
    if is_heavy(score) or is_asked or (works_masks_out and (kind in ("dq", "dk") or score is not SCORE)):
        weight = "functions"
    columns = min(columns for columns, _ in tiles if features.head_dim <= columns)
    lighter = WEIGHTS[WEIGHTS.index(weight) :: -1]
    found = next(tiles[columns, each] for each in lighter if (columns, each) in tiles)
    if kind == "dq":
        return replace(found, block_n=fitted_loop(found.block_n, "keys", features))
    return replace(found, block_m=fitted_loop(found.block_m, "queries", features))


def _is_asked_for_blocks(kind: Kind, features: Features) -> bool:
    """Whether the rows, or the keys, that a block of threads owns lie in several given blocks, so that pairs ask."""
    if features.blocks is None:
        return False
    owned = features.blocks[0 if kind == "dq" else 1]
    return features.asks_for_blocks or most_blocks(WARPGROUPS * OWNED, owned) > 1


def is_heavy(score: Expr) -> bool:
    """Whether functions are called for every pair, or tensors looked up."""
    of_pairs = {"q_idx", "kv_idx"}
    return any(
        FUNCTIONS[node.name].takes == "f32" if node.op == "call" else bool(of_pairs & free_names(node))
        for node in nodes(score)
        if node.op in ("call", "lookup")
    )


class GradientStorage:
    """Shared memory as it is given away: tiles on whole swizzles, numbers of rows behind them, then mbarriers."""

    def __init__(self, features: Features, tile: Tile, owns: Axis, keep: Keep = "evict_last") -> None:
        """Begin with nothing.

        Args:
            features: of the spec.
            tile: how much a block of threads works on.
            owns: the side whose gradients it owns.
            keep: what the L2 cache is to do with tensors.
        """
        self._features = features
        self._keep: Keep = keep
        self._tile = tile
        self._owns = owns
        self._end = 0
        self._more: list[tuple[Buffer, Ring]] = []

    def side(self, *tensors: tuple[str, tuple[Axis, ...], Rows | None]) -> tuple[Stream, ...]:
        """Tensors of queries, or of keys, on their way, by name, axes and numbers that come along.

        There is one stage where the block owns their side, else those of the tile. Of as many stages they share a ring.
        """
        made = [self._stream(*each) for each in tensors]
        first = made[0]
        if any(each.tile.stages != first.tile.stages for each in made):
            return tuple(made)
        ring = Ring(
            first.tile.name,
            first.tile.stages,
            loads=len(made),
            read_by_threads=any(each.beside for each in made),
        )
        fills, reads = (replace(cursor, ring=ring) for cursor in (first.fills, first.reads))
        return tuple(replace(each, fills=fills, reads=reads) for each in made)

    def _stream(self, name: str, axes: tuple[Axis, ...], numbers: Rows | None) -> Stream:
        features, tile = self._features, self._tile
        side, columns = axes
        head_dims = {"qk_columns": features.head_dim_qk, "v_columns": features.head_dim_v}
        stages = 1 if side == self._owns else tile.stages if columns == "qk_columns" else tile.beside
        rows, valid = tile.block_m if side == "queries" else tile.block_n, head_dims[columns]
        cols, at = (
            round_up(valid, features.arch.k_step(features.inputs)),
            round_up(self._end, BUFFER_ALIGNMENT),
        )
        panels = features.arch.emits
        found = Buffer(name, features.inputs, axes, rows, cols, valid, stages, at, in_panels=panels)
        self._end = found.offset + found.size_bytes
        beside = None
        if numbers and side != self._owns:
            beside = Buffer(numbers.name, F32, ("queries",), 1, rows, rows, stages, self._end)
            self._end += beside.size_bytes
        ring = Ring(name, stages, read_by_threads=beside is not None)
        fills, reads = (Cursor(f"{name}_at", stages, ring, fills) for fills in (True, False))
        value = "dout" if name == "do" else in_bf16(name) if features.scales else name
        tensor = Tensor(value, features.inputs, axes, valid, "q" if side == "queries" else "kv")
        return Stream(tensor, found, fills, reads, numbers if beside else None, beside, self._keep)

    def exchange(self, tile: Buffer, fills: Cursor, reads: Cursor) -> Exchange:
        """A tile that warpgroups store to, behind all others."""
        placed = replace(tile, offset=round_up(self._end, BUFFER_ALIGNMENT))
        self._end = placed.offset + placed.size_bytes
        assert fills.ring is not None
        self._more.append((placed, fills.ring))
        return Exchange(placed, fills, reads)

    def fields(self, gradients: tuple[OwnGradient, ...], streams: list[Stream]) -> dict[str, Any]:
        """The fields of `KernelPlan` that are shared memory."""
        rings = tuple(dict.fromkeys(each.reads.ring for each in streams if each.reads.ring))
        tiles = [buffer for each in streams for buffer in (each.tile, each.beside) if buffer]
        buffers = (*tiles, *(tile for tile, _ in self._more), *(each.staged for each in gradients))
        rings = (*rings, *(ring for _, ring in self._more))
        end = max(each.offset + each.size_bytes for each in buffers)
        smem_bytes = end + sum(ring.size_bytes for ring in rings)
        return dict(buffers=buffers, rings=rings, rings_offset=end, smem_bytes=smem_bytes)


def _of_queries(features: Features, forward: KernelPlan, tile: Tile) -> KernelPlan:
    """dQ of a block of queries, staged over Q."""
    storage = GradientStorage(features, tile, "queries")
    q, do = storage.side(("q", ROWS_OF_Q, None), ("do", ROWS_OF_O, None))
    k, v = storage.side(("k", ROWS_OF_K, None), ("v", ROWS_OF_V, None))
    numbers = tuple((RegVec(rows.name, "queries", tile.block_m), rows) for rows in (LSE_LOG2, DELTA))
    (lse, _), (delta, _) = numbers
    pair = pair_gradient(features, SCORES, tile.block_m, tile.block_n, lse, delta)
    gradient = own_gradient("dq", q, pair.ds, k)
    at = WarpgroupQueryPlaces(
        pair,
        q,
        k,
        v,
        do,
        (gradient,),
        OWN,
        COMMON,
        features.lengths,
        KeyLoop(features.pairs.visible),
        numbers,
    )
    return replace(
        common_plan(features, forward, "query_gradients", tile, at, query_gradients(at), storage),
        scheduler=Scheduler("query_blocks", longest_first=features.upper),
    )


def _of_keys(features: Features, forward: KernelPlan, tile: Tile, wanted: tuple[str, ...]) -> KernelPlan:
    """dK, dV or both of a block of keys."""
    storage = GradientStorage(features, tile, "keys")
    at = key_places(features, tile, wanted, storage)
    schedule = "key_gradients" if len(wanted) > 1 else f"{wanted[0]}_gradients"
    return replace(
        common_plan(features, forward, schedule, tile, at, key_gradients(at), storage),
        scheduler=Scheduler("key_blocks"),
    )


def key_places(
    features: Features, tile: Tile, wanted: tuple[str, ...], storage: GradientStorage
) -> WarpgroupKeyPlaces:
    """What a kernel of a block of keys may name; dV alone asks for neither V nor delta, and is staged over K."""
    visible, wants_dk = features.visible_rows, "dk" in wanted
    k, *rest = storage.side(("k", ROWS_OF_K, None), *((("v", ROWS_OF_V, None),) if wants_dk else ()))
    v = rest[0] if rest else None
    q, do = storage.side(("q", ROWS_OF_Q, LSE_LOG2), ("do", ROWS_OF_O, DELTA if wants_dk else None))
    lse, delta = (each.beside.at(each.reads) if each.beside else DELTA for each in (q, do))
    pair = pair_gradient(features, SCORES[::-1], tile.block_m, tile.block_n, lse, delta)
    gradients: tuple[OwnGradient, ...] = ()
    if "dv" in wanted and pair.p is not None:
        gradients = (own_gradient("dv", k, pair.p, do),)
    else:
        pair = replace(pair, p=None)
    if wants_dk:
        gradients = (*gradients, own_gradient("dk", k, pair.ds, q, gradients))
    return WarpgroupKeyPlaces(
        pair, q, k, v, do, gradients, OWN, COMMON, features.lengths, visible, tile.dv_late
    )


def own_gradient(
    name: str, beside: Stream, pairs: RegTile, times: Stream, behind: tuple[OwnGradient, ...] = ()
) -> OwnGradient:
    """A gradient of the rows of a tensor beside it, summed over pairs times another, staged behind others."""
    tile = replace(beside.tile, axes=(beside.tile.axes[0], times.tile.axes[1]))
    tile = replace(tile, cols=times.tile.cols, valid_cols=times.tile.valid_cols)
    offset = sum(each.staged.size_bytes for each in behind)
    return OwnGradient(
        acc=RegTile(f"acc_{name}", F32, tile.axes, tile.rows, tile.cols, tile.valid_cols, "accumulator"),
        pairs=pairs,
        times=times.here,
        staged=Buffer(
            name, F32, tile.axes, tile.rows, tile.cols, tile.valid_cols, offset=offset, overlays="k"
        ),
        results=results_of(name, tile, beside.tensor.heads),
        is_scaled=name != "dv",
    )


def common_plan(
    features: Features,
    forward: KernelPlan,
    schedule: str,
    tile: Tile,
    at: WarpgroupGradientPlaces,
    programs: dict[str, Program],
    storage: GradientStorage,
    sums: tuple[QuerySums, ...] = (),
) -> KernelPlan:
    """What all these kernels have in common."""
    streams = [each for each in (at.q, at.k, at.v, at.do) if each]
    ranks = (each.ranks for each in sums if each.ranks)
    plan = replace(
        backward_plan(features, forward, schedule, at.pair.s.axes[0], tile.block_m, tile.block_n),
        block_m=tile.block_m,
        block_n=tile.block_n,
        stages=tile.stages,
        qk_cols=at.q.tile.cols,
        v_cols=at.do.tile.cols,
        row_tiles=1,
        reads=tuple(each.tensor for each in streams),
        writes=(*(result for each in at.gradients for result in each.results), *sums, *ranks),
        warps=WARPGROUPS * WARPGROUP_WARPS,
        roles=common_roles(features, at, programs, streams),
        tensor_maps=tuple(
            TensorMap(each.tensor, each.tile.rows, PANEL_BYTES // each.tensor.dtype.bytes) for each in streams
        ),
        **storage.fields(at.gradients, streams),
    )
    maps = (Param(f"{each.tensor}_map", "tensor_map", f"{each.tensor}.map") for each in plan.tensor_maps)
    values = map(str, (*plan.read_rows, *plan.outputs, *plan.query_sums, *plan.query_ranks))
    pointers = (Param(value, "pointer", f"{value}.ptr") for value in values)
    strides = row_strides(map(str, plan.outputs))
    return replace(plan, params=(*maps, *pointers, *strides, *numbers_of_pairs(plan, at.pair)))


def common_roles(
    features: Features, at: WarpgroupGradientPlaces, programs: dict[str, Program], streams: list[Stream]
) -> tuple[Role, Role]:
    """Consumers first; a whole warp of the producer loads where its lanes class blocks together, else one thread."""
    pair, share = at.pair, WARPGROUP_REGISTERS[WARPGROUPS]
    if isinstance(at, WarpgroupQueryPlaces) and at.walks:
        share = WALKING if features.blocks is None else WALKING_IN_BLOCKS
    of_ds = (pair.dp, pair.ds) if any(each.pairs is pair.ds for each in at.gradients) else ()
    tiles = (pair.s, *((pair.p,) if pair.p else ()), *of_ds, *(each.acc for each in at.gradients))
    vectors = tuple(each for each in (pair.lse, pair.delta) if isinstance(each, RegVec))
    return (
        Role(
            "consumer",
            WARPGROUPS * WARPGROUP_WARPS,
            programs["consumer"],
            tiles,
            vectors,
            tuple(dict.fromkeys(each.reads for each in streams)),
            WARPGROUPS,
            share.consumer,
        ),
        Role(
            "producer",
            WARPGROUP_WARPS,
            programs["producer"],
            cursors=tuple(dict.fromkeys(each.fills for each in streams)),
            registers=share.producer,
            single_thread=not at.walks,
        ),
    )
