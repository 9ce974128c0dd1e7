"""From a spec and an arch to a plan that passes every rule, or an error that says which choice would."""

from dataclasses import replace
from typing import Any

from attngen.arch import ARCHS, Arch
from attngen.dtypes import DType, dtype
from attngen.errors import Diagnostic, PlanError
from attngen.expr import LARGEST_TILE, KeyRange, definitions, key_range, to_text
from attngen.lower import warpgroups
from attngen.lower.places import key_blocks, params, places, workspaces
from attngen.lower.tiles import Choice, WarpgroupChoice, choices, warpgroup_choices, warpgroup_table
from attngen.plan import KernelPlan, Launch, Plan, Role, Scheduler, ceil_div, product
from attngen.plan.rules import Violation, verify
from attngen.schedules import SCHEDULES, WARPGROUP_SCHEDULES
from attngen.spec import Spec

_KNOBS = {
    "tile.block_m": "block_m",
    "tile.block_n": "block_n",
    "schedule.stages": "stages",
    "schedule.warps": "warps",
    "schedule.warpgroups": "warpgroups",
}
_WARP_FIELDS = ("warps",)
_WARPGROUP_FIELDS = ("warpgroups", "overlap", "persistent")


def lower(spec: Spec, arch: Arch) -> Plan:
    """Decide every number of a kernel.

    Args:
        spec: what is wanted; values that are `auto` are chosen from `attngen.lower.tiles`.
        arch: where it shall run.

    Raises:
        PlanError: no legal plan; one diagnostic for every rule broken, with the nearest values that pass.
    """
    if wrong := _wrong_dtypes(spec, arch):
        raise PlanError(wrong)
    if plan := _from_table(spec, arch):
        return plan
    schedule = _schedule(spec, arch)
    if wrong := (*_wrong_target(spec, arch, schedule), *_wrong_fields(spec, schedule)):
        raise PlanError(wrong)
    refused: tuple[Choice | WarpgroupChoice, tuple[Violation, ...]] | None = None
    for choice in candidates(spec, arch, schedule):
        plan = build(spec, arch, schedule, choice)
        violations = verify(plan)
        if not violations:
            return plan
        refused = refused or (choice, violations)
    assert refused is not None  # every schedule has candidates
    choice, violations = refused
    raise PlanError(tuple(_diagnostic(spec, arch, schedule, choice, violation) for violation in violations))


def _from_table(spec: Spec, arch: Arch) -> Plan | None:
    """The plan that measurement says is best, with those for shorter sequences, where the spec leaves all to `auto`."""
    if (
        not arch.wgmma
        or not arch.emits
        or _given(spec, "kind", "order", *_KNOBS.values(), *_WARPGROUP_FIELDS)
    ):
        return None
    rows = warpgroup_table(spec.problem.head_dim.qk, spec.problem.head_dim.v, _is_bounded(spec))
    *shorter, plan = (build(spec, arch, row.schedule, row.choice, row.up_to) for row in rows)
    return (
        None if verify(plan) else replace(plan, shorter=tuple(each for each in shorter if not verify(each)))
    )


def candidates(spec: Spec, arch: Arch, schedule: str) -> tuple[Choice | WarpgroupChoice, ...]:
    """What the tables offer, with what the spec says in its place."""
    head_dim = spec.problem.head_dim
    if schedule in WARPGROUP_SCHEDULES:
        offers = warpgroup_choices(head_dim.qk, head_dim.v, _is_bounded(spec), arch)
        return tuple(_with_given_warpgroups(offer, spec, arch) for offer in offers)
    return tuple(
        replace(offer, longest_first=_longest_first(spec), **_given(spec, *_KNOBS.values()))
        for offer in choices(schedule, max(head_dim.qk, head_dim.v), arch)
    )


def build(
    spec: Spec, arch: Arch, schedule: str, choice: Choice | WarpgroupChoice, up_to: int | None = None
) -> Plan:
    """The plan of a choice, whether or not it passes the rules; `up_to` as of `Plan`."""
    head_dims = (spec.problem.head_dim.qk, spec.problem.head_dim.v)
    inputs = dtype(spec.precision.inputs)
    output = inputs if spec.precision.output == "auto" else dtype(spec.precision.output)
    mask = spec.mask_expr
    visible = key_range(mask)
    masks = [name for name, definition in definitions().items() if definition is mask]
    mask_name = masks[0] if masks else "masked"
    sizes = f"d{head_dims[0]}" if head_dims[0] == head_dims[1] else f"d{head_dims[0]}x{head_dims[1]}"
    digest = spec.digest()
    name = f"attn_fwd_{arch.token}_{inputs.name}_{sizes}_{mask_name}_{schedule}_{digest[:8]}"
    name += f"_k{up_to}" if up_to else ""
    common: dict[str, Any] = dict(
        name=name,
        spec_name=spec.name,
        spec_digest=digest,
        arch=arch,
        inputs=inputs,
        output=output,
        head_dim_qk=head_dims[0],
        head_dim_v=head_dims[1],
        mask=mask,
        mask_text=mask_name if masks else to_text(mask),
        schedule=schedule,
        block_m=choice.block_m,
        block_n=choice.block_n,
        stages=choice.stages,
        up_to=up_to,
    )
    if isinstance(choice, WarpgroupChoice):
        return _warpgroup_plan(common, choice, arch, (inputs, output), head_dims, visible)
    return _warp_plan(common, choice, arch, (inputs, output), head_dims, visible)


def _warp_plan(
    common: dict[str, Any],
    choice: Choice,
    arch: Arch,
    dtypes: tuple[DType, DType],
    head_dims: tuple[int, int],
    visible: KeyRange | None,
) -> Plan:
    """The plan of a schedule that every warp runs alike."""
    name, schedule = common["name"], common["schedule"]
    at = places(choice, arch, *dtypes, head_dims, common["mask"], visible)
    spaces = workspaces(at) if schedule == "serial" else ()
    heads = product("batch", "num_heads_q")
    grid = heads if spaces else product(heads, ceil_div("seqlen_q", choice.block_m))
    kernel = KernelPlan(
        name=name,
        scheduler=Scheduler("heads") if spaces else Scheduler("query_blocks", choice.longest_first),
        roles=(
            Role(
                "warps",
                choice.warps,
                SCHEDULES[schedule](at),
                (at.acc_s, at.p, at.acc_o),
                (at.row_max, at.row_sum, at.alpha, at.total, at.inv_sum, at.row_lse),
                (at.load_at, at.read_at),
            ),
        ),
        buffers=(at.q, at.k, at.v, at.out),
        params=params(spaces),
        blocks_per_sm=choice.blocks_per_sm,
        smem_bytes=max(at.v.offset + at.v.size_bytes, at.out.size_bytes),
    )
    return Plan(
        **common,
        warps=choice.warps,
        qk_cols=at.q.cols,
        v_cols=at.v.cols,
        row_tiles=choice.block_m // (arch.mma.m * choice.warps),
        overlap=False,
        key_blocks=key_blocks(visible, last_is_masked=False),
        tensors=(at.q_in, at.k_in, at.v_in, at.result, *((at.o_acc,) if spaces else ())),
        rows=(at.lse, *((at.saved_max, at.saved_sum) if spaces else ())),
        kernels=(kernel,),
        workspaces=spaces,
        launches=(Launch(name, grid, grid),),
    )


def _warpgroup_plan(
    common: dict[str, Any],
    choice: WarpgroupChoice,
    arch: Arch,
    dtypes: tuple[DType, DType],
    head_dims: tuple[int, int],
    visible: KeyRange | None,
) -> Plan:
    """The plan of a schedule of a producer and consumer warpgroups."""
    name = common["name"]
    at = warpgroups.places(choice, arch, *dtypes, head_dims, common["mask"], visible)
    kernel = warpgroups.kernel(name, common["schedule"], choice, at)
    return Plan(
        **common,
        warps=kernel.worker.warps,
        qk_cols=at.q.cols,
        v_cols=at.v.cols,
        row_tiles=1,
        overlap=choice.overlap,
        key_blocks=key_blocks(visible, last_is_masked=True),
        tensors=(at.q_in, at.k_in, at.v_in, at.result),
        rows=(at.lse,),
        kernels=(kernel,),
        workspaces=(),
        launches=(warpgroups.launch(name, choice),),
    )


def _schedule(spec: Spec, arch: Arch) -> str:
    """The schedule the spec names, or the fastest that the target runs."""
    if spec.schedule.kind != "auto":
        return spec.schedule.kind
    if not arch.wgmma or not arch.emits:
        return "fa2"
    return warpgroup_table(spec.problem.head_dim.qk, spec.problem.head_dim.v, _is_bounded(spec))[-1].schedule


def _is_bounded(spec: Spec) -> bool:
    """Whether the mask has an upper bound in closed form."""
    visible = key_range(spec.mask_expr)
    return visible is not None and bool(visible.upper)


def _longest_first(spec: Spec) -> bool:
    """Whether the rows that see the most keys start first, unless the spec says.

    Then the last blocks to run are short: +6 to 10 % for fa2 on an H200 at 4k and more, head_dim 64 and 128, causal
    (benchmarks/results/tune_fa2.json). Without such a bound neighbours share K and V in L2 instead.
    """
    if spec.schedule.order != "auto":
        return spec.schedule.order == "heads"
    return _is_bounded(spec)


def _given(spec: Spec, *fields: str) -> dict[str, Any]:
    """The fields of a choice that the spec says, of those asked for."""
    values = {**spec.tile.__dict__, **spec.schedule.__dict__}
    return {field: values[field] for field in fields if field in values and values[field] != "auto"}


def _with_given_warpgroups(offer: WarpgroupChoice, spec: Spec, arch: Arch) -> WarpgroupChoice:
    """The candidate, with what the spec says; of block_m and warpgroups one follows from the other."""
    given = _given(spec, "block_m", "block_n", "stages", "warpgroups", "overlap", "persistent")
    if spec.schedule.order != "auto":
        given["longest_first"] = spec.schedule.order == "heads"
    assert arch.wgmma is not None
    if arch.emits and "block_m" in given and "warpgroups" not in given:
        given["warpgroups"] = max(1, given["block_m"] // arch.wgmma.m)
    if arch.emits and "warpgroups" in given and "block_m" not in given:
        given["block_m"] = given["warpgroups"] * arch.wgmma.m
    return replace(offer, **given)


def _diagnostic(
    spec: Spec, arch: Arch, schedule: str, choice: Choice | WarpgroupChoice, broken: Violation
) -> Diagnostic:
    """A broken rule, drawn where the spec says the value, with the nearest values that pass every rule."""
    return Diagnostic(
        message=f"{broken.path} = {broken.value} {broken.must}",
        rule=broken.rule,
        location=spec.locate(broken.path),
        path=broken.path,
        value=broken.value,
        note=broken.note,
        nearest=tuple(str(value) for value in _nearest(spec, arch, schedule, choice, broken)),
    )


def _nearest(
    spec: Spec, arch: Arch, schedule: str, choice: Choice | WarpgroupChoice, broken: Violation
) -> list[int]:
    """The next smaller and the next larger value of the knob that pass, where there are any."""
    field = _KNOBS[broken.path]
    step = {"block_m": arch.mma.m, "block_n": arch.mma.k}.get(field, 1)

    given = _given(spec, "block_m", "warpgroups")

    def passes(value: int) -> bool:
        changes: dict[str, Any] = {field: value}
        if isinstance(choice, WarpgroupChoice) and arch.wgmma and arch.emits:
            if field == "block_m" and "warpgroups" not in given:
                changes["warpgroups"] = max(1, value // arch.wgmma.m)
            if field == "warpgroups" and "block_m" not in given:
                changes["block_m"] = value * arch.wgmma.m
        return not verify(build(spec, arch, schedule, replace(choice, **changes)))

    below = min(broken.value - 1, LARGEST_TILE) // step * step
    above = broken.value // step * step + step
    smaller = [value for value in range(below, 0, -step) if passes(value)][:1]
    return smaller + [value for value in range(above, LARGEST_TILE + 1, step) if passes(value)][:1]


def _wrong_target(spec: Spec, arch: Arch, schedule: str) -> tuple[Diagnostic, ...]:
    if schedule not in WARPGROUP_SCHEDULES or arch.wgmma:
        return ()
    able = tuple(known.name for known in ARCHS.values() if known.wgmma)
    return (
        Diagnostic(
            message=f"schedule.kind = {schedule} is not to be had on {arch.name}",
            rule="schedule-target",
            location=spec.locate("schedule.kind"),
            path="schedule.kind",
            value=schedule,
            note=f"it is made of wgmma and the copy engine, which {' and '.join(able)} have",
            nearest=tuple(SCHEDULES),
        ),
    )


def _wrong_fields(spec: Spec, schedule: str) -> tuple[Diagnostic, ...]:
    """Fields that mean nothing to the schedule: they are not ignored in silence."""
    fields, others = (
        (_WARP_FIELDS, SCHEDULES)
        if schedule in WARPGROUP_SCHEDULES
        else (_WARPGROUP_FIELDS, WARPGROUP_SCHEDULES)
    )
    return tuple(
        Diagnostic(
            message=f"schedule.{field} = {str(value).lower()} means nothing to {schedule}",
            rule="schedule-field",
            location=spec.locate(f"schedule.{field}"),
            path=f"schedule.{field}",
            value=value,
            note=f"it is for {' and '.join(others)}",
            nearest=("auto",),
        )
        for field, value in _given(spec, *fields).items()
    )


def _wrong_dtypes(spec: Spec, arch: Arch) -> tuple[Diagnostic, ...]:
    """Formats that the target has no instructions for."""
    fields = (
        ("inputs", "input-dtype", f"the matrix instruction of {arch.name} takes {' and '.join(arch.dtypes)}"),
        ("output", "output-dtype", f"{arch.name} rounds the result to {' or '.join(arch.dtypes)}"),
    )
    return tuple(
        Diagnostic(
            message=f"precision.{field} = {value} is not to be had on {arch.name}",
            rule=rule,
            location=spec.locate(f"precision.{field}"),
            path=f"precision.{field}",
            value=value,
            note=note,
            nearest=arch.dtypes,
        )
        for field, rule, note in fields
        if (value := getattr(spec.precision, field)) not in ("auto", *arch.dtypes)
    )
