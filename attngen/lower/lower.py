"""From a spec and an arch to kernels that pass every rule, or an error that says which choice would."""

from dataclasses import replace
from typing import Any

from attngen.arch import Arch
from attngen.dtypes import BF16, E4M3, DType, dtype
from attngen.errors import PlanError
from attngen.expr import definitions, tile_classes, to_text
from attngen.lower import warpgroups
from attngen.lower.given import KNOBS, WARPGROUP_FIELDS, candidates, given, scale_kind, table
from attngen.lower.pairs import (
    can_seed,
    declarations_read_by,
    lookups_by_key,
    pair_params,
)
from attngen.lower.places import params, places
from attngen.lower.refusal import (
    diagnostics,
    wrong_dtypes,
    wrong_fields,
    wrong_inputs,
    wrong_target,
    wrong_weight,
)
from attngen.lower.scales import scales
from attngen.lower.tiles import Choice, WarpgroupChoice
from attngen.plan import KEYS, Call, KernelPlan, Quantizer, Role, Scheduler, assemble, seen_blocks
from attngen.plan.rules import verify
from attngen.schedules import SCHEDULES, Pairs, Scales
from attngen.spec import Spec

_SIZES = ("seqlen_q", "seqlen_k", "num_heads_q")
"""Sizes that every kernel has among its parameters."""


def lower(spec: Spec, arch: Arch) -> Call:
    """Decide every number of every kernel.

    Args:
        spec: what is wanted; values that are `auto` are chosen from `attngen.lower.tiles`.
        arch: where it shall run.

    Raises:
        PlanError: no legal kernel; what breaks which rule, with the nearest values that pass.
    """
    schedule = _schedule(spec, arch)
    if wrong := (
        *wrong_dtypes(spec, arch),
        *wrong_target(spec, arch, schedule),
        *wrong_inputs(spec, arch, schedule),
        *wrong_fields(spec, schedule),
        *wrong_weight(spec, arch),
    ):
        raise PlanError(wrong)
    if plans := _from_table(spec, arch):
        return assemble(plans)
    refused = []
    for choice in candidates(spec, arch, schedule):
        plan = build(spec, arch, schedule, choice)
        violations = verify(plan)
        if not violations:
            return assemble((plan,))
        refused.append(violations)

    def passes(knob: str, value: int) -> bool:
        others = candidates(spec, arch, schedule, {knob: value})
        return any(not verify(build(spec, arch, schedule, choice)) for choice in others)

    # The candidate that is nearest to legal; of several the smallest, whose costs no other undercuts.
    raise PlanError(diagnostics(spec, arch, min(reversed(refused), key=len), passes))


def _from_table(spec: Spec, arch: Arch) -> tuple[KernelPlan, ...]:
    """The kernels that measurement says are best, the one for any length last, where the spec leaves all to `auto`."""
    if not arch.wgmma or not arch.emits or given(spec, "kind", "order", *KNOBS.values(), *WARPGROUP_FIELDS):
        return ()
    rows = table(spec)
    *shorter, plan = (build(spec, arch, row.schedule, row.choice, row.up_to) for row in rows)
    return () if verify(plan) else (*(each for each in shorter if not verify(each)), plan)


def build(
    spec: Spec, arch: Arch, schedule: str, choice: Choice | WarpgroupChoice, up_to: int | None = None
) -> KernelPlan:
    """The kernel of a choice, whether or not it passes the rules; `up_to` as of `KernelPlan`."""
    head_dims = (spec.problem.head_dim.qk, spec.problem.head_dim.v)
    inputs = dtype(spec.precision.inputs)
    natural = BF16 if inputs is E4M3 else inputs
    output = natural if spec.precision.output == "auto" else dtype(spec.precision.output)
    pairs, kind = Pairs.of(spec.mask_expr, spec.score_expr), scale_kind(spec)
    mask = pairs.mask
    masks = [name for name, definition in definitions().items() if definition is mask]
    mask_name = masks[0] if masks else "masked"
    sizes = f"d{head_dims[0]}" if head_dims[0] == head_dims[1] else f"d{head_dims[0]}x{head_dims[1]}"
    digest = spec.digest()
    name = f"attn_fwd_{arch.token}_{inputs.name}_{sizes}_{mask_name}_{schedule}_{digest[:8]}"
    name += f"_k{up_to}" if up_to else ""
    common: dict[str, Any] = dict(
        name=name,
        spec_digest=digest,
        arch=arch,
        inputs=inputs,
        output=output,
        head_dim_qk=head_dims[0],
        head_dim_v=head_dims[1],
        mask=mask,
        mask_text=mask_name if masks else to_text(mask),
        score=spec.score_expr,
        score_factor=pairs.score_factor,
        tile_classes=None if pairs.visible else tile_classes(mask),
        declarations=declarations_read_by(spec.declarations, mask, pairs.score),
        schedule=schedule,
        block_m=choice.block_m,
        block_n=choice.block_n,
        stages=choice.stages,
        quantizer=Quantizer(name, arch, *head_dims, kind, _hadamard_seed(spec)) if kind else None,
        up_to=up_to,
    )
    if isinstance(choice, WarpgroupChoice):
        scaled = scales(kind, choice.block_m, choice.block_n, choice.stages) if kind else None
        if can_seed(inputs, head_dims[0]):
            pairs = pairs.seeded()
        return _warpgroup_plan(common, choice, arch, (inputs, output), head_dims, pairs, scaled)
    return _warp_plan(common, choice, arch, (inputs, output), head_dims, pairs)


def _hadamard_seed(spec: Spec) -> int | None:
    return spec.precision.seed if spec.precision.incoherent == "hadamard" else None


def _warp_plan(
    common: dict[str, Any],
    choice: Choice,
    arch: Arch,
    dtypes: tuple[DType, DType],
    head_dims: tuple[int, int],
    pairs: Pairs,
) -> KernelPlan:
    """The kernel of a schedule that every warp runs alike."""
    schedule = common["schedule"]
    at = places(choice, arch, *dtypes, head_dims, pairs)
    if schedule == "serial":  # which keeps its maxima in device memory, and nothing that follows from them
        at = replace(at, softmax=replace(at.softmax, bounded_scores=False, integer_maxima=True))
    scratch = (at.o_acc, at.saved_max, at.saved_sum) if schedule == "serial" else ()
    return KernelPlan(
        **common,
        warps=choice.warps,
        qk_cols=at.q.cols,
        v_cols=at.v.cols,
        row_tiles=choice.block_m // (arch.mma.m * choice.warps),
        overlap=False,
        key_blocks=seen_blocks(pairs.visible, KEYS, last_is_masked=False),
        reads=(at.q_in, at.k_in, at.v_in),
        writes=(at.result, at.lse),
        scratch=scratch,
        scheduler=Scheduler("heads") if scratch else Scheduler("query_blocks", choice.longest_first),
        roles=(
            Role(
                "warps",
                choice.warps,
                SCHEDULES[schedule](at),
                at.reg_tiles,
                at.softmax.vectors,
                (at.load_at, at.read_at),
            ),
        ),
        buffers=(at.q, at.k, at.v, at.out),
        params=params(scratch, pair_params(pairs, common, _SIZES)),
        blocks_per_sm=choice.blocks_per_sm,
        smem_bytes=max(at.v.offset + at.v.size_bytes, at.out.size_bytes),
    )


def _warpgroup_plan(
    common: dict[str, Any],
    choice: WarpgroupChoice,
    arch: Arch,
    dtypes: tuple[DType, DType],
    head_dims: tuple[int, int],
    pairs: Pairs,
    scaled: Scales | None,
) -> KernelPlan:
    """The kernel of a schedule of a producer and consumer warpgroups."""
    by_key = lookups_by_key(common["score"], common["declarations"])
    at = warpgroups.places(choice, arch, *dtypes, head_dims, pairs, scaled, by_key)
    of_pairs = pair_params(pairs, common, ("batch", *_SIZES))
    worker, *_ = roles = warpgroups.roles(common["schedule"], choice, at)
    return KernelPlan(
        **common,
        warps=worker.warps,
        qk_cols=at.q.cols,
        v_cols=at.out.cols,
        row_tiles=1,
        overlap=choice.overlap,
        key_blocks=seen_blocks(pairs.visible, KEYS, last_is_masked=True),
        reads=(at.q_in, at.k_in, at.v_in),
        writes=(at.result, at.lse),
        scheduler=Scheduler("query_blocks", choice.longest_first, choice.persistent),
        roles=roles,
        **warpgroups.storage(choice, at),
        params=warpgroups.params(choice, at, of_pairs),
        blocks_per_sm=choice.blocks_per_sm,
        tensor_maps=warpgroups.tensor_maps(choice, at),
        scales=(scaled.q, scaled.k, scaled.v) if scaled else (),
    )


def _schedule(spec: Spec, arch: Arch) -> str:
    """The schedule the spec names, or the fastest that the target runs."""
    if spec.schedule.kind != "auto":
        return spec.schedule.kind
    if not arch.wgmma or not (arch.emits or scale_kind(spec)):
        return "fa2"
    return table(spec)[-1].schedule
