"""From a spec and an arch to kernels that pass every rule, or an error that says which choice would."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

from attngen.arch import RESERVED_SMEM_BYTES, Arch
from attngen.errors import PlanError
from attngen.expr import definitions, to_text
from attngen.lower import warpgroups
from attngen.lower.cache_places import cache_params
from attngen.lower.choice import AnyChoice, Choice, WarpgroupChoice
from attngen.lower.decision import Decision
from attngen.lower.declared_kernels import declared_gradient_plans, wrong_tables
from attngen.lower.features import Features
from attngen.lower.fused_gradients import fused_gradient_plans, why_split
from attngen.lower.gradient_kernels import gradient_plans
from attngen.lower.gradient_warpgroups import warpgroup_gradient_plans
from attngen.lower.params import declarations_read_by, pair_params, params, part_params, with_lengths
from attngen.lower.refusal import SCHEDULE_OF_PAGES, diagnostics, faults_of, wrong
from attngen.lower.search import candidates, cheapest, nearest_first
from attngen.lower.storage import places
from attngen.lower.table import rows
from attngen.plan import (
    KEYS,
    Call,
    FinishSums,
    KernelPlan,
    Quantizer,
    Role,
    Scheduler,
    Split,
    assemble,
    seen_blocks,
    sink_params,
)
from attngen.plan.hardware_rules import Violation, takes_warpgroups, verify
from attngen.schedules import SCHEDULES
from attngen.spec import Spec

_SIZES = ("seqlen_q", "seqlen_k", "num_heads_q")
"""Sizes that every kernel has among its parameters."""


def lower(spec: Spec, arch: Arch) -> Call:
    """Decide every number of every kernel.

    Args:
        spec: what is wanted; values that are `auto` are chosen from the tables, or else by search.
        arch: where it shall run.

    Raises:
        PlanError: no legal kernel, whatever is chosen of what the spec leaves open; what breaks which rule, with the
            nearest values that pass.
    """
    features = Features.of(spec, arch)
    schedule = _schedule(features)
    if faults := (*wrong(spec, features, schedule), *wrong_tables(spec, features)):
        raise PlanError(faults)
    if plans := _from_table(features):
        return _assemble(features, plans)
    refused: list[tuple[Violation, ...]] = []
    plan = _first_legal(features, schedule, candidates(features, schedule), refused)
    if not plan and _first_legal(features, schedule, cheapest(features, schedule), refused):
        plan = _first_legal(features, schedule, nearest_first(features, schedule), [])
    if plan:
        return _assemble(features, (*_by_pieces(features), plan))

    @cache
    def passes(knob: str, value: int) -> bool:
        others = cheapest(features.saying(knob, value), schedule)
        return _first_legal(features, schedule, others, []) is not None

    # The choice that is nearest to legal; of several the last, whose costs no other undercuts.
    raise PlanError(diagnostics(spec, features, min(reversed(refused), key=faults_of), passes))


def _assemble(features: Features, plans: tuple[KernelPlan, ...]) -> Call:
    """The call of attention kernels, and of the backward pass where the spec asks for gradients."""
    if not features.gradients:
        return assemble(plans)
    forward = plans[-1]
    features = replace(
        features, inputs=forward.differentiated
    )  # of e4m3 ones, the format that they were made of
    backward = (*_of_inputs(features, forward), *declared_gradient_plans(features, forward))
    lengths = features.lengths
    return assemble(
        plans, (with_lengths(each, lengths) if isinstance(each, KernelPlan) else each for each in backward)
    )


def _of_inputs(features: Features, forward: KernelPlan) -> tuple[KernelPlan | FinishSums, ...]:
    """The kernels of dQ, dK and dV."""
    if not why_split(features, takes_warpgroups(forward)):
        return fused_gradient_plans(features, forward)
    of_inputs = warpgroup_gradient_plans if takes_warpgroups(forward) else gradient_plans
    return of_inputs(features, forward)


def _first_legal(
    features: Features, schedule: str, choices: Iterable[AnyChoice], refused: list[tuple[Violation, ...]]
) -> KernelPlan | None:
    """The kernel of the first choice that passes every rule; what the others break is added to `refused`."""
    for choice in choices:
        plan = build(features, schedule, choice)
        if not (violations := verify(plan)):
            return plan
        refused.append(violations)
    return None


def _schedule(features: Features) -> str:
    """The schedule the spec names, or the fastest that the target runs."""
    if features.kind != "auto":
        return features.kind
    if features.is_paged or features.cache:
        return SCHEDULE_OF_PAGES
    if features.splits or not features.arch.wgmma or not (features.arch.emits or features.scales):
        return "fa2"
    return rows(features)[-1].schedule


def _from_table(features: Features) -> tuple[KernelPlan, ...]:
    """The kernels that measurement says are best, the one for any length last, where the spec leaves all to `auto`."""
    arch = features.arch
    is_measured = not (features.splits or features.is_paged or features.cache)
    if not is_measured or not arch.wgmma or not arch.emits or features.kind != "auto" or features.given:
        return ()
    *shorter, plan = (build(features, row.schedule, row.choice, row.up_to) for row in rows(features))
    return () if verify(plan) else (*(each for each in shorter if not verify(each)), plan)


def _by_pieces(features: Features) -> tuple[KernelPlan, ...]:
    """The kernel that measurement says is best of those for warpgroups, for pages that the copy engine takes.

    There is none where a producer that looks up pages has no registers for what it looks up besides: NVRTC 13.0.88
    spills 4 to 60 bytes of kernels that read declared tensors, and of modified scores in heads of 256 columns.
    """
    arch, is_wide = features.arch, features.head_dim > warpgroups.WIDEST_WITH_TILE
    is_open = features.kind == "auto" and not (features.given or features.splits or features.cache)
    if not features.is_paged or not is_open or not arch.wgmma or not arch.emits:
        return ()
    if features.declarations.tensors or features.blocks or (is_wide and features.pairs.modifies_scores):
        return ()
    best = rows(features)[-1]
    plan = build(features, best.schedule, best.choice)
    return () if verify(plan) else (plan,)


def build(features: Features, schedule: str, choice: AnyChoice, up_to: int | None = None) -> KernelPlan:
    """The kernel of a choice, whether or not it passes the rules; `up_to` as of `KernelPlan`."""
    arch, inputs, mask, kind = features.arch, features.inputs, features.mask, features.scales
    head_dims = (features.head_dim_qk, features.head_dim_v)
    decided = Decision.of(features, schedule, choice)
    masks = [name for name, definition in definitions().items() if definition is mask]
    mask_name = masks[0] if masks else "masked"
    sizes = f"d{head_dims[0]}" if head_dims[0] == head_dims[1] else f"d{head_dims[0]}x{head_dims[1]}"
    formats = f"{inputs.name}_e4m3" if features.cache else inputs.name
    name = f"attn_fwd_{arch.token}_{formats}_{sizes}_{mask_name}_{schedule}_{features.digest[:8]}"
    name += f"_k{up_to}" if up_to else ""
    common: dict[str, Any] = dict(
        name=name,
        spec_digest=features.digest,
        arch=arch,
        inputs=inputs,
        output=features.output,
        head_dim_qk=head_dims[0],
        head_dim_v=head_dims[1],
        mask=mask,
        mask_text=mask_name if masks else to_text(mask),
        score=features.score,
        score_factor=features.pairs.score_factor,
        tile_classes=features.classes(choice.block_m, choice.block_n) if features.walks else None,
        declarations=declarations_read_by(features.declarations, mask, features.pairs.score),
        schedule=schedule,
        block_m=choice.block_m,
        block_n=choice.block_n,
        stages=choice.stages,
        quantizer=Quantizer(name, arch, *head_dims, kind, features.hadamard_seed) if kind else None,
        blocks_per_sm=choice.blocks_per_sm,
        up_to=up_to,
    )
    if isinstance(choice, WarpgroupChoice):
        plan = _warpgroup_plan(common, choice, features, decided)
    else:
        plan = _warp_plan(common, choice, features, decided)
    return with_lengths(plan, features.lengths)


def _warp_plan(common: dict[str, Any], choice: Choice, features: Features, decided: Decision) -> KernelPlan:
    """The kernel of a schedule that every warp runs alike."""
    schedule, arch = common["schedule"], features.arch
    at, of_sink = places(choice, features, decided), sink_params() if decided.has_sink else ()
    scratch = (at.o_acc, at.saved_max, at.saved_sum) if schedule == "serial" else ()
    parts = at.parts.places if at.parts else ()
    of_cache = cache_params(at.cache) if at.cache else ()
    buffers = (
        *(at.q, at.k, at.v),
        *((at.out,) if at.out else ()),
        *(at.cache.buffers if at.cache else ()),
        *((at.shares.left,) if at.shares else ()),
    )
    reg_tiles = (*at.reg_tiles, *((at.shares.joined,) if at.shares else ()))
    over_rows, over_keys = (1, choice.warps) if at.shares else (choice.warps, 1)
    smem_bytes = max(each.offset + each.size_bytes for each in buffers)
    fitting = max(1, arch.smem_bytes_per_sm // (smem_bytes + RESERVED_SMEM_BYTES))
    return KernelPlan(
        **common | {"blocks_per_sm": min(choice.blocks_per_sm, fitting)},
        warps=choice.warps,
        qk_cols=at.q.cols,
        v_cols=at.acc_o.cols,
        row_tiles=choice.block_m // (arch.mma.m * over_rows),
        overlap=False,
        key_blocks=seen_blocks(decided.pairs.visible, KEYS, are_of_part=features.splits),
        reads=(at.q_in, at.k_in, at.v_in),
        writes=(at.result, at.lse),
        scratch=scratch,
        scheduler=_scheduler(choice, features, bool(scratch)),
        split=_split(features, choice),
        parts=parts,
        roles=(
            Role(
                "warps",
                choice.warps,
                SCHEDULES[schedule](at),
                reg_tiles,
                (*at.softmax.vectors, *(at.cache.vectors if at.cache else ())),
                (at.read_at,) if at.shares else (at.load_at, at.read_at),
                warpgroups=over_keys,
            ),
        ),
        buffers=buffers,
        params=(
            *params(scratch, pair_params(decided.pairs, common, _SIZES)),
            *of_sink,
            *part_params(parts),
            *of_cache,
        ),
        smem_bytes=smem_bytes,
        descales=(at.cache.k, at.cache.v) if at.cache else (),
    )


LEAST_PART, START_OF_PART, START_OF_E4M3_PART, WAVES = 64, 192, 768, 4
"""Of `Split`: an H200's multiprocessor reads some 200 keys of head_dim 128 while a part begins and ends. Of e4m3 it
reads more, and parts behind a first wave cost it more: 64 requests of 4k take 131 us whole, 152 in halves."""


def _split(features: Features, choice: AnyChoice) -> Split | None:
    """How the keys of a tile are cut, if they are."""
    if not features.splits:
        return None
    start = START_OF_E4M3_PART if features.cache else START_OF_PART
    merged = choice.warpgroups if isinstance(choice, WarpgroupChoice) else None
    return Split(features.part_keys, LEAST_PART, start, merged, WAVES)


def _scheduler(choice: AnyChoice, features: Features, does_whole_heads: bool = False) -> Scheduler:
    if does_whole_heads:
        return Scheduler("heads")
    persistent = isinstance(choice, WarpgroupChoice) and choice.persistent
    splits, packs = features.splits, features.packs_group
    return Scheduler("query_blocks", choice.longest_first, persistent, is_split=splits, packs_group=packs)


def _warpgroup_plan(
    common: dict[str, Any], choice: WarpgroupChoice, features: Features, decided: Decision
) -> KernelPlan:
    """The kernel of a schedule of a producer and consumer warpgroups."""
    at, of_sink = warpgroups.places(choice, features, decided), sink_params() if decided.has_sink else ()
    of_pairs, scaled = pair_params(decided.pairs, common, ("batch", *_SIZES)), decided.scales
    worker, *_ = roles = warpgroups.roles(common["schedule"], choice, at)
    return KernelPlan(
        **common,
        warps=worker.warps,
        qk_cols=at.q.cols,
        v_cols=at.acc_o.cols,
        row_tiles=1,
        overlap=choice.overlap,
        key_blocks=seen_blocks(decided.pairs.visible, KEYS, last_is_masked=True, are_of_part=features.splits),
        reads=(at.q_in, at.k_in, at.v_in),
        writes=(at.result, at.lse),
        scheduler=_scheduler(choice, features),
        split=_split(features, choice),
        parts=at.parts.places if at.parts else (),
        roles=roles,
        **warpgroups.storage(choice, at),
        params=(
            *warpgroups.params(choice, at, of_pairs),
            *of_sink,
            *part_params(at.parts.places if at.parts else ()),
        ),
        tensor_maps=warpgroups.tensor_maps(choice, at),
        scales=(scaled.q, scaled.k, scaled.v) if scaled else (),
    )
