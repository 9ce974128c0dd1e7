"""The kernels of a backward pass, beside the forward's: tiles, storage and parameters. Every number is chosen here."""

from dataclasses import replace
from typing import Any, Literal

from attngen.dtypes import F32
from attngen.expr import derivative, mask_of_pairs, shown_keys
from attngen.lower.block_tiles import fitted_loop
from attngen.lower.features import Features
from attngen.lower.params import declarations_read_by, expression_params, row_strides
from attngen.lower.rounding import round_up
from attngen.plan import (
    KEYS,
    QUERIES,
    ROWS_OF_K,
    ROWS_OF_O,
    ROWS_OF_Q,
    ROWS_OF_V,
    SCORES,
    Axis,
    BlockTables,
    Buffer,
    Cursor,
    Elements,
    KernelPlan,
    PairMatrix,
    Param,
    Program,
    RegTile,
    Role,
    Rows,
    Scheduler,
    Tensor,
    View,
    in_bf16,
    in_f32,
    seen_blocks,
)
from attngen.plan.steps import RowNumbers
from attngen.schedules.backward import (
    GradientPlaces,
    KeyGradientPlaces,
    OwnGradient,
    PairGradient,
    QueryGradientPlaces,
    key_gradients,
    query_gradients,
)
from attngen.schedules.key_loop import KeyLoop
from attngen.schedules.pairs import SCORE

WARPS = 4
ONE_KERNEL = 128
"""The most columns of a head of whose keys one kernel has registers for both gradients."""
OTHER_ROWS = {64: 64, 128: 32, 256: 32}
"""By the most columns of a head, rows of the side that kernels of dK and dV loop over; of wide heads that of dQ too."""
LSE_LOG2, DELTA = (Rows(name, "queries", is_padded=True) for name in ("lse_log2", "delta"))
_SIZES = ("seqlen_q", "seqlen_k", "num_heads_q", "group")


def gradient_plans(features: Features, forward: KernelPlan) -> tuple[KernelPlan, ...]:
    """The kernel of dQ, and that of dK and dV, or of wide heads one each.

    Of a tile the side that owns a gradient has 16 rows for each of four warps. The other is as long as NVRTC 13.0.88
    compiles without spills, causal and with a softcap under documents, at head_dim 32 to 256, or fitted to given
    blocks. On the simulator tiles are the forward's.
    """
    if not features.arch.has_mma_granularity:
        tile = forward.block_m, forward.block_n
        return _of_queries(features, forward, *tile), _of_keys(features, forward, *tile, ("dv", "dk"))
    widest = features.head_dim
    other = next(rows for columns, rows in OTHER_ROWS.items() if widest <= columns)
    rows, keys = other, 64 if widest <= ONE_KERNEL else other
    rows, keys = fitted_loop(rows, "queries", features), fitted_loop(keys, "keys", features)
    queries = _of_queries(features, forward, 64, keys)
    if widest <= ONE_KERNEL:
        return (queries, _of_keys(features, forward, rows, 64, ("dv", "dk")))
    return (queries, *(_of_keys(features, forward, rows, 64, (each,)) for each in ("dv", "dk")))


def _of_queries(features: Features, forward: KernelPlan, block_m: int, block_n: int) -> KernelPlan:
    """dQ; of wide heads a second stage would leave room for one block of threads on a multiprocessor."""
    stages = 2 if features.head_dim <= ONE_KERNEL else 1
    common, qk_cols, v_cols, _ = gradient_places(features, block_m, block_n, SCORES, stages)
    pair: PairGradient = common["pair"]
    dq = _gradient("dq", common["q"], "q", pair.ds, common["k"].at(common["read_at"]))
    at = QueryGradientPlaces(**common, keys=KeyLoop(features.pairs.visible), dq=dq)
    return replace(
        gradient_plan(features, forward, "query_gradients", at, (dq.staged,), dq.results),
        block_m=block_m,
        block_n=block_n,
        qk_cols=qk_cols,
        v_cols=v_cols,
        row_tiles=block_m // (features.arch.mma.m * WARPS),
        scheduler=Scheduler("query_blocks", longest_first=features.upper),
        roles=(gradient_role(at, query_gradients(at), (pair.s, pair.dp, pair.ds, dq.acc)),),
    )


def _of_keys(
    features: Features, forward: KernelPlan, block_m: int, block_n: int, wanted: tuple[str, ...]
) -> KernelPlan:
    """dK, dV or both; without a closed form nobody knows which block of queries is the next, to load it ahead."""
    visible = features.visible_rows
    stages = 2 if visible and features.head_dim <= ONE_KERNEL else 1
    common, qk_cols, v_cols, _ = gradient_places(features, block_m, block_n, SCORES[::-1], stages)
    pair: PairGradient = common["pair"]
    pair = common["pair"] = replace(pair, p=pair.p if "dv" in wanted else None)
    gradients: list[OwnGradient] = []
    for name, beside, pairs, times in (("dv", "v", pair.p, "do"), ("dk", "k", pair.ds, "q")):
        if name in wanted and pairs is not None:
            behind = sum(each.staged.size_bytes for each in gradients)
            read = common[times].at(common["read_at"])
            gradients.append(_gradient(name, common[beside], "kv", pairs, read, behind))
    at = KeyGradientPlaces(**common, visible=visible, gradients=tuple(gradients))
    program = key_gradients(at)
    schedule = "key_gradients" if len(wanted) > 1 else f"{wanted[0]}_gradients"
    of_ds = (pair.dp, pair.ds) if "dk" in wanted else ()
    tiles = (pair.s, *((pair.p,) if pair.p else ()), *of_ds, *(each.acc for each in gradients))
    return replace(
        gradient_plan(
            features,
            forward,
            schedule,
            at,
            tuple(each.staged for each in gradients),
            tuple(result for each in gradients for result in each.results),
        ),
        block_m=block_m,
        block_n=block_n,
        qk_cols=qk_cols,
        v_cols=v_cols,
        row_tiles=block_n // (features.arch.mma.m * WARPS),
        scheduler=Scheduler("key_blocks"),
        roles=(gradient_role(at, program, tiles),),
    )


def _gradient(
    name: str, beside: Buffer, heads: Literal["q", "kv"], pairs: RegTile, times: View, offset: int = 0
) -> OwnGradient:
    """What is the gradient of a tile, staged from an offset on."""
    axes, rows, cols, valid = beside.axes, beside.rows, beside.cols, beside.valid_cols
    return OwnGradient(
        acc=RegTile(f"acc_{name}", F32, axes, rows, cols, valid, "accumulator"),
        pairs=pairs,
        times=times,
        staged=Buffer(name, F32, axes, rows, cols, valid, offset=offset, overlays="q"),
        results=results_of(name, beside, heads),
        is_scaled=name != "dv",
    )


def results_of(name: str, beside: Buffer, heads: Literal["q", "kv"]) -> tuple[Tensor, ...]:
    """Where the gradient of a tile goes: to a tensor of its format, or to one of f32."""
    return tuple(
        Tensor(each, dtype, beside.axes, beside.valid_cols, heads, optional=True)
        for each, dtype in ((name, beside.dtype), (in_f32(name), F32))
    )


def gradient_places(
    features: Features, block_m: int, block_n: int, axes: tuple[Axis, ...], stages: int
) -> tuple[dict[str, Any], int, int, int]:
    """The fields of `GradientPlaces`, padded columns of Q and of V, and bytes of shared memory.

    The side of `axes[0]` owns the gradient; the other is looped over, in that many stages.
    """
    inputs, step = features.inputs, features.arch.mma.k
    qk, v = features.head_dim_qk, features.head_dim_v
    qk_cols, v_cols = round_up(qk, step), round_up(v, step)
    of_queries, of_keys = (1, stages) if axes[0] == "queries" else (stages, 1)
    q = Buffer("q", inputs, ROWS_OF_Q, block_m, qk_cols, qk, of_queries)
    do = Buffer("do", inputs, ROWS_OF_O, block_m, v_cols, v, of_queries, q.size_bytes)
    k = Buffer("k", inputs, ROWS_OF_K, block_n, qk_cols, qk, of_keys, do.offset + do.size_bytes)
    v_buffer = Buffer("v", inputs, ROWS_OF_V, block_n, v_cols, v, of_keys, k.offset + k.size_bytes)
    names = {name: in_bf16(name) if features.scales else name for name in ("q", "k", "v")}
    fields = dict(
        pair=pair_gradient(features, axes, block_m, block_n, LSE_LOG2, DELTA),
        score_unroll=4,
        q=q,
        k=k,
        v=v_buffer,
        do=do,
        q_in=Tensor(names["q"], inputs, ROWS_OF_Q, qk, "q"),
        k_in=Tensor(names["k"], inputs, ROWS_OF_K, qk, "kv"),
        v_in=Tensor(names["v"], inputs, ROWS_OF_V, v, "kv"),
        do_in=Tensor("dout", inputs, ROWS_OF_O, v, "q"),
        load_at=Cursor("load_at", stages) if stages > 1 else None,
        read_at=Cursor("read_at", stages) if stages > 1 else None,
    )
    return fields, qk_cols, v_cols, v_buffer.offset + v_buffer.size_bytes


def gradient_plan(
    features: Features,
    forward: KernelPlan,
    schedule: str,
    at: GradientPlaces,
    staged: tuple[Buffer, ...],
    writes: tuple[Tensor | Rows | PairMatrix | BlockTables | Elements, ...],
) -> KernelPlan:
    """What both kernels have in common."""
    buffers = (at.q, at.do, at.k, at.v, *staged)
    plan = replace(
        backward_plan(features, forward, schedule, at.pair.s.axes[0], at.q.rows, at.k.rows),
        stages=max(at.q.stages, at.k.stages),
        warps=WARPS,
        reads=(at.q_in, at.k_in, at.v_in, at.do_in),
        writes=writes,
        buffers=buffers,
        smem_bytes=max(each.offset + each.size_bytes for each in buffers),
        rings=(),
        tensor_maps=(),
    )
    tensors = (*plan.reads, *plan.outputs)
    elements = [place for place in writes if isinstance(place, PairMatrix | Elements)]
    dense = (*tensors, *plan.read_rows, *plan.sums)
    pointers = (
        *(Param(name, "pointer", f"{name}.ptr") for name in map(str, dense)),
        *(Param(f"gradient_of_{each.of}", "pointer", f"{each.name}.ptr") for each in elements),
    )
    strides = (
        *row_strides(map(str, tensors)),
        *(
            Param(f"step_{i}_of_{each.of}", "i64", f"{each.name}.stride_{i}")
            for each in elements
            for i in range(len(each.shape))
        ),
    )
    return replace(plan, params=(*pointers, *strides, *numbers_of_pairs(plan, at.pair)))


def backward_plan(
    features: Features, forward: KernelPlan, schedule: str, tiles_of: Axis, block_m: int, block_n: int
) -> KernelPlan:
    """What every kernel of a backward pass has in common, partly with the forward's; its places are still that's.

    Tiles of queries go over the keys that they see, those of keys over the rows that see them.
    """
    is_of_queries = tiles_of == "queries"
    visible = features.pairs.visible if is_of_queries else features.visible_rows
    return replace(
        forward,
        direction="backward",
        name=f"{forward.name.replace('attn_fwd', 'attn_bwd')}_{schedule}",
        inputs=features.inputs,
        output=features.inputs,
        scales=(),
        score_factor=features.pairs.score_factor,
        tile_classes=None if visible else features.classes(block_m, block_n),
        key_blocks=seen_blocks(visible, KEYS if is_of_queries else QUERIES),
        declarations=declarations_read_by(features.declarations, features.mask, features.pairs.score),
        schedule=schedule,
        overlap=False,
        read_rows=(LSE_LOG2, DELTA),
        scratch=(),
        blocks_per_sm=1,
        quantizer=None,
        up_to=None,
    )


def pair_gradient(
    features: Features, axes: tuple[Axis, ...], block_m: int, block_n: int, lse: RowNumbers, delta: RowNumbers
) -> PairGradient:
    """What becomes of the products of a block of queries and one of keys; those of `axes[0]` own the gradient."""
    inputs, score = features.inputs, features.pairs.score
    sides = {"queries": block_m, "keys": block_n}
    rows, cols = (sides[axis] for axis in axes)
    return PairGradient(
        s=RegTile("acc_s", F32, axes, rows, cols, cols, "accumulator"),
        dp=RegTile("acc_dp", F32, axes, rows, cols, cols, "accumulator"),
        p=RegTile("p", inputs, axes, rows, cols, cols, "a_fragment") if axes != SCORES else None,
        ds=RegTile("ds", inputs, axes, rows, cols, cols, "a_fragment"),
        lse=lse,
        delta=delta,
        score=None if score is SCORE else score,
        slope=None if score is SCORE else derivative(score),
        mask=mask_of_pairs(features.mask_of(axes[0]), block_m, block_n),
        shown=shown_keys(features.mask),
    )


def gradient_role(at: GradientPlaces, program: Program, tiles: tuple[RegTile, ...]) -> Role:
    """The one role of a kernel that every warp runs alike."""
    return Role(
        "warps", WARPS, program, tiles, cursors=tuple(each for each in (at.load_at, at.read_at) if each)
    )


def numbers_of_pairs(plan: KernelPlan, pair: PairGradient) -> tuple[Param, ...]:
    """Fields of the parameter struct that are no places: sizes, scales, and what expressions read."""
    scales = (
        (Param("softmax_scale_log2", "f32", "product_log2"),)
        if pair.score is None
        else (
            Param("softmax_scale", "f32", "softmax_scale"),
            Param("softmax_scale_log2", "f32", "score_factor_log2"),
        )
    )
    return (
        *(Param(size, "i32", size) for size in ("batch", *_SIZES)),
        *scales,
        Param("gradient_scale", "f32", "gradient_scale"),
        Param("accumulates", "i32", "accumulates"),
        *expression_params(
            plan.declarations, plan.tables, plan.table_values, ("batch", *_SIZES), plan.boundaries
        ),
    )
