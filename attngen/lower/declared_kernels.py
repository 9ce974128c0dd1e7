"""The kernels of gradients of what a spec declares, one each, and the sheets that add their rows up."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from attngen.dtypes import F32, dtype
from attngen.errors import Diagnostic
from attngen.expr import SINK, Expr, GradientSite, gradient_sites, weight
from attngen.expr.tree import real
from attngen.lower.features import Features
from attngen.lower.gradient_kernels import (
    ONE_KERNEL,
    WARPS,
    gradient_places,
    gradient_plan,
    gradient_role,
)
from attngen.plan import (
    SCORES,
    Axis,
    BlockTables,
    Elements,
    KernelPlan,
    PairMatrix,
    PrivateTable,
    RegVec,
    Rows,
    Scheduler,
    SumRows,
    SumSink,
    declared_shape,
    maximum,
)
from attngen.schedules.backward import PairGradient
from attngen.schedules.declared_gradients import (
    ElementSumPlaces,
    KeySumPlaces,
    PairSumPlaces,
    QuerySumPlaces,
    RowSums,
    TableSumPlaces,
    element_sums,
    key_sums,
    pair_sums,
    query_sums,
    table_sums,
)
from attngen.schedules.key_loop import KeyLoop
from attngen.spec import INPUTS, Spec

OWNED = 64
"""Rows of the side that owns what is summed, 16 a warp; of pairs, queries."""
OTHER = 32
"""Rows of the other side. At 64 NVRTC 13.0.88 spills where scores and slopes are long, as of softcap by a scalar."""

LARGEST_SHORT = 48
"""Most that a mask, a score and its slope weigh for blocks of 64 keys of pairs, by the same compiler."""


def declared_gradient_plans(
    features: Features, forward: KernelPlan
) -> Iterator[KernelPlan | SumRows | SumSink]:
    """For each declared name in `gradients`, in its order, what makes its gradient."""
    for name in features.gradients[len(INPUTS) :]:
        if name == SINK:
            yield SumSink(forward)
            continue
        (site,) = gradient_sites(features.score, name, features.declarations)
        if site.owner == "pair":
            yield _of_pairs(features, forward, site)
            continue
        if site.owner == "table" and _surplus(features, site):
            yield _of_elements(features, forward, site)
            continue
        make = {"key": _of_keys, "table": _of_tables}.get(site.owner, _of_queries)
        plan = make(features, forward, site)
        yield plan
        yield SumRows(plan, site, *plan.sums)


def wrong_tables(spec: Spec, features: Features) -> Iterator[Diagnostic]:
    """What is refused of gradients of lookups here and there: tables that do not fit, unless any order will do."""
    for name in (each for each in features.gradients[len(INPUTS) :] if each != SINK):
        (site,) = gradient_sites(features.score, name, features.declarations)
        if site.owner != "table" or not (surplus := _surplus(features, site)):
            continue
        path = next((path for path in spec.marks if _is_written(spec, path, name)), "gradients")
        if features.deterministic:
            must = "can not be summed in one order"
            rest = ", ".join(each for each in features.gradients if each != name)
            nearest: tuple[str, ...] = ("deterministic: false", f"gradients: [{rest}]")
        elif site.dtype == F32.name:
            continue
        else:
            must, surplus = "must be declared as f32", f"pairs add to it where it stands; {surplus}"
            nearest = (f"{name}: f32[{', '.join(map(str, site.dims))}]",)
        yield Diagnostic(
            message=f"the gradient of {name} {must}",
            rule="gradient-table",
            location=spec.locate(path),
            path=path,
            value=name,
            note=surplus,
            nearest=nearest,
        )


def _is_written(spec: Spec, path: str, name: str) -> bool:
    """Whether the value at a path of a spec is this name in its gradients."""
    mark = spec.marks[path]
    return path.startswith("gradients[") and mark.source.text[slice(*mark.value)].strip("'\"") == name


def _surplus(features: Features, site: GradientSite) -> str:
    """Why a block of threads has no room for a table for each of them; empty if it has."""
    if site.entries is None:
        return f"how many elements `{site.read}` finds is known in a call only: dimensions of its own must be numbers"
    *_, tiles = gradient_places(features, OWNED, OTHER, SCORES, stages=1)
    threads, limit = 32 * WARPS, features.arch.smem_bytes_per_block
    if tiles + 4 * threads * site.entries <= limit:
        return ""
    most = (limit - tiles) // (4 * threads)
    return f"{threads} threads have {limit - tiles} bytes for tables, of {most} elements each; it has {site.entries}"


def _of_pairs(features: Features, forward: KernelPlan, site: GradientSite) -> KernelPlan:
    """Blocks of both sides in one stage: with as many as fit at a time, one loads while another computes.

    Short expressions leave the registers for larger blocks of keys, of which Q and dO are read less often.
    """
    indices = tuple(index.name if index.op == "name" else max(0, int(index.value)) for index in site.indices)
    shape, extents = declared_shape(site.dims), site.extents
    longer = tuple(
        size if size == extent else maximum(size, extent) for size, extent in zip(shape, extents, strict=True)
    )
    heads: Literal["own", "group", "all"] = (
        "own" if "h" in indices else "group" if "h_kv" in indices else "all"
    )
    is_short = weight(features.mask, features.score, site.slope) <= LARGEST_SHORT
    block_n = 64 if is_short and features.head_dim <= ONE_KERNEL else OTHER
    common, sizes = _common(features, site, OWNED, block_n, SCORES, stages=1)
    pair: PairGradient = common["pair"]
    at = PairSumPlaces(
        **common,
        acc=replace(pair.s, name="acc"),
        result=PairMatrix(site.name, dtype(site.dtype), indices, longer, is_covered=shape == extents),
    )
    return replace(
        gradient_plan(features, forward, f"pair_sums_of_{site.name}", at, (), (at.result,)),
        **sizes,
        scheduler=Scheduler("pair_blocks", sums_batch="b" not in indices, sums_heads=heads),
        roles=(gradient_role(at, pair_sums(at), (pair.s, pair.dp, at.acc)),),
    )


def _of_queries(features: Features, forward: KernelPlan, site: GradientSite) -> KernelPlan:
    """A sum for each query, in the stages of the kernel of dQ."""
    stages = 2 if features.head_dim <= ONE_KERNEL else 1
    common, sizes = _common(features, site, OWNED, OTHER, SCORES, stages)
    sums = _row_sums(site, "queries")
    at = QuerySumPlaces(**common, keys=KeyLoop(features.pairs.visible), sums=sums)
    role = gradient_role(at, query_sums(at), (at.pair.s, at.pair.dp))
    return replace(
        gradient_plan(features, forward, f"query_sums_of_{site.name}", at, (), (sums.result,)),
        **sizes,
        scheduler=Scheduler("query_blocks", longest_first=features.upper),
        roles=(replace(role, reg_vecs=(sums.part, sums.total)),),
    )


def _of_tables(features: Features, forward: KernelPlan, site: GradientSite) -> KernelPlan:
    """A table for each block of queries; those of all threads stand behind one stage of tiles."""
    common, sizes = _common(features, site, OWNED, OTHER, SCORES, stages=1)
    assert site.entries is not None
    table = PrivateTable("table", site.entries, 32 * WARPS, sizes["smem_bytes"])
    at = TableSumPlaces(
        **common,
        keys=KeyLoop(features.pairs.visible),
        table=table,
        entry=site.entry,
        result=BlockTables(f"sums_of_{site.name}", site.entries, OWNED),
    )
    return replace(
        gradient_plan(features, forward, f"table_sums_of_{site.name}", at, (), (at.result,)),
        **(sizes | {"smem_bytes": sizes["smem_bytes"] + table.size_bytes}),
        scheduler=Scheduler("query_blocks", longest_first=features.upper),
        roles=(gradient_role(at, table_sums(at), (at.pair.s, at.pair.dp)),),
    )


def _of_elements(features: Features, forward: KernelPlan, site: GradientSite) -> KernelPlan:
    """Sums where elements stand, in the stages of the kernel of dQ."""
    stages = 2 if features.head_dim <= ONE_KERNEL else 1
    common, sizes = _common(features, site, OWNED, OTHER, SCORES, stages)
    result = Elements(site.name, declared_shape(site.dims))
    at = ElementSumPlaces(**common, keys=KeyLoop(features.pairs.visible), read=site.read, result=result)
    return replace(
        gradient_plan(features, forward, f"element_sums_of_{site.name}", at, (), (result,)),
        **sizes,
        scheduler=Scheduler("query_blocks", longest_first=features.upper),
        roles=(gradient_role(at, element_sums(at), (at.pair.s, at.pair.dp)),),
    )


def _of_keys(features: Features, forward: KernelPlan, site: GradientSite) -> KernelPlan:
    """A sum for each key, in the stages of the kernel of dK and dV."""
    visible = features.visible_rows
    stages = 2 if visible and features.head_dim <= ONE_KERNEL else 1
    common, sizes = _common(features, site, OTHER, OWNED, SCORES[::-1], stages)
    sums = _row_sums(site, "keys")
    at = KeySumPlaces(**common, visible=visible, sums=sums)
    role = gradient_role(at, key_sums(at), (at.pair.s, at.pair.dp))
    return replace(
        gradient_plan(features, forward, f"key_sums_of_{site.name}", at, (), (sums.result,)),
        **sizes,
        scheduler=Scheduler("key_blocks"),
        roles=(replace(role, reg_vecs=(sums.part, sums.total)),),
    )


def _common(
    features: Features, site: GradientSite, block_m: int, block_n: int, axes: tuple[Axis, ...], stages: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of `GradientPlaces`, and those of a plan that say sizes.

    The slope is that of the whole score, whose constant factor the others leave to the end.
    """
    fields, qk_cols, v_cols, smem_bytes = gradient_places(features, block_m, block_n, axes, stages)
    slope: Expr | None = None if site.slope is real(1.0) else site.slope
    fields["pair"] = replace(fields["pair"], p=None, slope=slope)
    sizes = dict(
        block_m=block_m,
        block_n=block_n,
        qk_cols=qk_cols,
        v_cols=v_cols,
        row_tiles=OWNED // (features.arch.mma.m * WARPS),
        smem_bytes=smem_bytes,
    )
    return fields, sizes


def _row_sums(site: GradientSite, axis: Axis) -> RowSums:
    part, total = RegVec("part", axis, OWNED, partial=True), RegVec("sums", axis, OWNED)
    return RowSums(part, total, Rows(f"sums_of_{site.name}", axis))
