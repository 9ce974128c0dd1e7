"""The device functions by which a kernel asks the spec: which keys are seen, and what a score is.

What a spec declares is written behind a prefix, which ends where the name begins: `arg_` or, numbered, `term0_`. No
other identifier of an emitted text has such a prefix, so that no declared name is taken for another's, or for CUDA's.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from attngen.emit.environment import macros
from attngen.emit.lookups import leaves, lookup_functions
from attngen.emit.sheet_text import sink_reader
from attngen.emit.terms import score_terms
from attngen.emit.tile_text import blocks, rank_of_keys, seen, span, whole_span
from attngen.expr import (
    ALL_KEPT,
    SOME_KEPT,
    TRUE,
    Expr,
    Leaves,
    c_type,
    cuda_body,
    found_of,
    free_names,
    places_of,
    scalar,
    tensor_names,
    to_cuda,
    with_nodes,
)
from attngen.expr.arithmetic import minus, plus, times
from attngen.expr.tree import real
from attngen.plan import KEYS, QUERIES, KernelPlan, walk
from attngen.plan.steps import (
    TANH,
    AddToElements,
    AddToTable,
    HidePairs,
    LookUp,
    MaskScores,
    MaskScoresEach,
    ModifyScores,
    ReadTopScale,
    RecoverP,
    SeedScores,
    TakeRank,
    ZeroHidden,
)


def pair_functions(plan: KernelPlan) -> list[str]:
    """What the Steps of a plan call: lookups, bounds or classes of blocks of keys, and single pairs."""
    texts = (
        *_descales(plan),
        *((sink_reader(),) if plan.has_sink else ()),
        *lookup_functions(plan),
        *_block_ranges(plan),
        *_blocks(plan),
        *_ranks(plan),
        *_ahead(plan),
        *_pairs(plan),
    )
    return [str(text).strip("\n") for text in texts]


def _mask_macros() -> Any:
    return macros("mask.cuh.j2")


def _descales(plan: KernelPlan) -> Iterator[str]:
    of_scales = macros("scales.cuh.j2")
    yield from map(of_scales.descale, plan.scales)
    for each in plan.descales:
        yield of_scales.key_descale(each) if each.is_by_key else of_scales.cache_descale(each)
    tops = dict.fromkeys(step.v for step in walk(plan.worker.program) if isinstance(step, ReadTopScale))
    yield from (of_scales.largest(v) for v in tops if v.granule)


def _block_ranges(plan: KernelPlan) -> Iterator[str]:
    """Whether some, and whether all given blocks are kept that a tile lies in, where there may be several."""
    classes = plan.tile_classes
    read = tensor_names(classes.may) | tensor_names(classes.must) if classes else frozenset()
    if SOME_KEPT in read:
        yield _mask_macros().kept_blocks("some_kept", "|", "some")
    if ALL_KEPT in read:
        yield _mask_macros().kept_blocks("all_kept", "&", "each")


def _blocks(plan: KernelPlan) -> Iterator[str]:
    if plan.key_blocks is not None:
        lines = seen(plan.key_blocks, leaves(plan), plan.queries)
        if plan.key_blocks.axis is QUERIES:
            yield _mask_macros().query_blocks(lines, bool(plan.boundaries))
            return
        tells_visits = plan.scheduler.kind in ("heads", "pair_blocks")
        yield _mask_macros().key_blocks(
            lines, plan.key_blocks.last_is_masked, tells_visits, bool(plan.boundaries)
        )
        return
    assert plan.tile_classes is not None
    classes = plan.tile_classes
    may, must = (
        (span(plan.queries, "q_tile", expr), cuda_body([expr], leaves(plan)))
        for expr in (classes.may, classes.must)
    )
    walks_over_queries = plan.scheduler.kind == "key_blocks"
    yield _mask_macros().tile_classes(
        may, must, span(KEYS, "n", KEYS.last), whole_span(KEYS, "n"), walks_over_queries
    )
    if walks_over_queries:
        yield _mask_macros().walk_of_keys()
    if plan.scheduler.kind == "query_blocks":
        of_spans, sees_span = classes.may_of_spans, ""
        if of_spans is classes.may:
            sees_span = "may_see"
        elif of_spans is not None and of_spans is not TRUE:
            sees_span = "may_see_span"
            body = (span(plan.queries, "q_tile", of_spans), cuda_body([of_spans], leaves(plan)))
            yield _mask_macros().class_of_spans(sees_span, body)
        yield _mask_macros().walk(sees_span, blocks(KEYS), plan.scheduler.is_split)


def _ranks(plan: KernelPlan) -> Iterator[str]:
    """How many blocks of keys come before a tile's, where they add in one order."""
    steps = (step for role in plan.roles for step in walk(role.program))
    for rank in dict.fromkeys(step.rank for step in steps if isinstance(step, TakeRank)):
        yield _mask_macros().earlier_keys(rank_of_keys(rank, leaves(plan)))


def _ahead(plan: KernelPlan) -> Iterator[str]:
    steps = {step.dst: step.lookup for step in walk(plan.worker.program) if isinstance(step, LookUp)}
    for tile, lookup in steps.items():
        *places, _ = places_of(lookup, leaves(plan))
        strides = [f"params.stride_{i}_of_{lookup.name}" for i in range(len(lookup.args))]
        steps_to_row = map("{} * {}".format, places, strides)
        yield _mask_macros().look_up(
            {
                "name": tile.name,
                "lookup": str(lookup),
                "tensor": f"arg_{lookup.name}",
                "row": " + ".join((f"params.arg_{lookup.name}", *steps_to_row)),
                "to_rows": " | ".join(strides[:-1]) or "0",
                "to_key": strides[-1],
                "size": leaves(plan).sizes[lookup.name][-1],
                "reads_rows": "q_idx" in free_names(lookup),
            }
        )


def _pairs(plan: KernelPlan) -> Iterator[str]:
    steps = {type(step): step for step in walk(plan.worker.program)}
    if terms := score_terms(plan):
        found = cuda_body(list(terms), leaves(plan))
        types = ("int" if each.type == "bool" else c_type(each) for each in terms)
        named = zip(terms.values(), types, found.results, strict=True)
        yield _mask_macros().terms(
            [{"name": name, "c_type": of, "value": value} for name, of, value in named], found
        )
    if isinstance(step := steps.get(SeedScores), SeedScores):
        leaf_of, known = _known_of_score(plan, terms)
        inverse = {**known.names, _INVERSE: "params.softmax_scale_inverse"}
        seed = _scaled(with_nodes(step.added, leaf_of), scalar(_INVERSE, "f32"))
        yield _mask_macros().seed(cuda_body([seed], replace(known, names=inverse)), bool(terms))
    if isinstance(step := steps.get(ModifyScores), ModifyScores):
        ahead = {lookup: tile.name for lookup, tile in step.looked_up}
        leaf_of, known = _known_of_score(plan, terms, ahead)
        scale = "" if step.scale else "params.softmax_scale"
        takes, score = "score", step.score
        if step.by_tanh:
            multiple, score = step.by_tanh
            takes = "tanh"
            known = replace(known, names={**known.names, TANH.name: takes, _SCALE: scale})
            whole = times(scalar(_SCALE, "f32"), multiple) if scale else multiple
            gain = "params.softmax_scale_log2" if step.is_tanh else "1.f"
            yield _mask_macros().tanh_of_score(to_cuda(whole, known), gain)
        if not step.is_tanh:
            body = cuda_body([with_nodes(score, leaf_of)], replace(known, score_scale=scale))
            yield _mask_macros().score(takes, body, bool(terms), list(ahead.values()))
    if isinstance(step := steps.get(MaskScores), MaskScores):
        bounds = (step.visible.lower, step.visible.upper)
        yield _mask_macros().row_bounds(*([to_cuda(key, leaves(plan)) for key in keys] for keys in bounds))
    recovered = [step for step in walk(plan.worker.program) if isinstance(step, RecoverP)]
    if recovered and recovered[0].score is not None:
        leaf_of, known = _known_of_score(plan, terms, key_step="")
        both = (recovered[0].score, recovered[0].slope or real(1.0))
        yield _mask_macros().score_and_slope(
            cuda_body([with_nodes(each, leaf_of) for each in both], known), bool(terms)
        )
    if isinstance(step := steps.get(AddToTable), AddToTable):
        yield _mask_macros().table_entry(cuda_body([step.entry], leaves(plan)))
    if isinstance(step := steps.get(AddToElements), AddToElements):
        places = places_of(step.read, leaves(plan))
        yield _mask_macros().element_read(str(step.read), places, step.dst.of)
    hiding = [step for step in walk(plan.worker.program) if isinstance(step, RecoverP | HidePairs)]
    for mask in dict.fromkeys(step.mask for step in hiding if step.mask is not None):
        yield _mask_macros().predicate(cuda_body([mask], leaves(plan)))
    if isinstance(step := steps.get(MaskScoresEach), MaskScoresEach):
        yield _mask_macros().predicate(cuda_body([step.mask], leaves(plan)))
    if isinstance(step := steps.get(ZeroHidden), ZeroHidden):
        yield _mask_macros().shown(cuda_body([step.shown], leaves(plan)), step.by_group)


_SCALE, _INVERSE = "scale of the score", "1 / softmax_scale"
"""Names that no text can write."""


def _known_of_score(
    plan: KernelPlan,
    terms: Mapping[Expr, str],
    ahead: Mapping[Expr, str] = MappingProxyType({}),
    key_step: str = "kv_step",
) -> tuple[dict[Expr, Expr], Leaves]:
    """What stands for the lookups of a score that have been done, and how its leaves are written."""
    operands = {**ahead, **{each: f"terms.{name}" for each, name in terms.items()}}
    leaf_of = {each: found_of(each) for each in operands}
    known = leaves(plan, exact=False, key_step=key_step)
    names = {leaf_of[each].name: operand for each, operand in operands.items()}
    return leaf_of, replace(known, names={**known.names, **names})


def _scaled(expr: Expr, factor: Expr) -> Expr:
    """An f32 times a factor, worked into what is the same for all pairs of a tile where a product has such a part."""
    if expr.op != "arith":
        return times(expr, factor)
    a, b = expr.args
    if expr.name in "+-":
        sides = (_scaled(a, factor), _scaled(b, factor))
        return plus(*sides) if expr.name == "+" else minus(*sides)
    if expr.name == "*":
        for part, other in ((a, b), (b, a)):
            if free_names(part).isdisjoint(("q_idx", "kv_idx")):
                return times(times(part, factor), other)
    return times(expr, factor)
