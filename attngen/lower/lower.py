"""From a spec and an arch to a plan that passes every rule, or an error that says which choice would."""

from attngen.arch import Arch
from attngen.dtypes import dtype
from attngen.errors import Diagnostic, PlanError
from attngen.expr import KeyRange, definitions, key_range, to_text
from attngen.lower.places import key_blocks, params, places, workspaces
from attngen.lower.tiles import Choice, choices
from attngen.plan import KernelPlan, Launch, Plan, Role, Scheduler, ceil_div, product
from attngen.plan.rules import Violation, verify
from attngen.schedules import SCHEDULES
from attngen.spec import Spec

DEFAULT_SCHEDULE = "fa2"
_KNOBS = {
    "tile.block_m": "block_m",
    "tile.block_n": "block_n",
    "schedule.stages": "stages",
    "schedule.warps": "warps",
}


_LARGEST_TILE = 512
"""No tile beyond this fits any target; the search for a valid value ends here."""


def lower(spec: Spec, arch: Arch) -> Plan:
    """Decide every number of a kernel.

    Args:
        spec: what is wanted; values that are `auto` are chosen from `attngen.lower.tiles`.
        arch: where it shall run.

    Raises:
        PlanError: no legal plan; one diagnostic for every rule broken, with the nearest values that pass.
    """
    if spec.precision.inputs not in arch.input_dtypes:
        raise PlanError((_wrong_dtype(spec, arch),))
    schedule = DEFAULT_SCHEDULE if spec.schedule.kind == "auto" else spec.schedule.kind
    head_dim = max(spec.problem.head_dim.qk, spec.problem.head_dim.v)
    refused: tuple[Choice, tuple[Violation, ...]] | None = None
    for candidate in choices(schedule, head_dim, arch):
        choice = _with_given(candidate, spec)
        plan = build(spec, arch, schedule, choice)
        violations = verify(plan)
        if not violations:
            return plan
        refused = refused or (choice, violations)
    assert refused is not None  # every schedule has candidates
    choice, violations = refused
    raise PlanError(tuple(_diagnostic(spec, arch, schedule, choice, violation) for violation in violations))


def build(spec: Spec, arch: Arch, schedule: str, choice: Choice) -> Plan:
    """The plan of a choice, whether or not it passes the rules."""
    head_dims = (spec.problem.head_dim.qk, spec.problem.head_dim.v)
    inputs = dtype(spec.precision.inputs)
    output = inputs if spec.precision.output == "auto" else dtype(spec.precision.output)
    mask = spec.mask_expr
    visible = key_range(mask)
    at = places(choice, arch, inputs, output, head_dims, mask, visible)
    spaces = workspaces(at) if schedule == "serial" else ()
    masks = [name for name, definition in definitions().items() if definition is mask]
    mask_name = masks[0] if masks else "masked"
    sizes = f"d{head_dims[0]}" if head_dims[0] == head_dims[1] else f"d{head_dims[0]}x{head_dims[1]}"
    digest = spec.digest()
    name = f"attn_fwd_{arch.token}_{inputs.name}_{sizes}_{mask_name}_{schedule}_{digest[:8]}"
    heads = product("batch", "num_heads_q")
    kernel = KernelPlan(
        name=name,
        scheduler=_scheduler(schedule, visible),
        roles=(Role("warps", choice.warps, SCHEDULES[schedule](at)),),
        buffers=(at.q, at.k, at.v, at.out),
        reg_tiles=(at.acc_s, at.p, at.acc_o),
        reg_vecs=(at.row_max, at.row_sum, at.alpha, at.total, at.inv_sum, at.row_lse),
        cursors=(at.load_at, at.read_at),
        params=params(spaces),
        blocks_per_sm=choice.blocks_per_sm,
        smem_bytes=max(at.v.offset + at.v.size_bytes, at.out.size_bytes),
    )
    return Plan(
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
        warps=choice.warps,
        qk_cols=at.q.cols,
        v_cols=at.v.cols,
        row_tiles=choice.block_m // (arch.mma.m * choice.warps),
        key_blocks=key_blocks(visible),
        tensors=(at.q_in, at.k_in, at.v_in, at.result, *((at.o_acc,) if spaces else ())),
        rows=(at.lse, *((at.saved_max, at.saved_sum) if spaces else ())),
        kernels=(kernel,),
        workspaces=spaces,
        launches=(Launch(name, heads if spaces else product(heads, ceil_div("seqlen_q", choice.block_m))),),
    )


def _scheduler(schedule: str, visible: KeyRange | None) -> Scheduler:
    """Which tiles a block gets.

    Where later rows see more keys they start first, so that the last blocks to run are short: +6 to 10 % on an H200
    at 4k and more, head_dim 64 and 128, causal (benchmarks/results/tune_fa2.json). Without such a bound neighbours
    share K and V in L2 instead.
    """
    if schedule == "serial":
        return Scheduler("heads")
    return Scheduler("query_blocks", longest_first=visible is not None and bool(visible.upper))


def _with_given(choice: Choice, spec: Spec) -> Choice:
    """The candidate, with what the spec says in place of what the table does."""
    given = {
        "block_m": spec.tile.block_m,
        "block_n": spec.tile.block_n,
        "stages": spec.schedule.stages,
        "warps": spec.schedule.warps,
    }
    numbers = {key: value for key, value in given.items() if isinstance(value, int)}
    return Choice(**{**choice.__dict__, **numbers})


def _diagnostic(spec: Spec, arch: Arch, schedule: str, choice: Choice, broken: Violation) -> Diagnostic:
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


def _nearest(spec: Spec, arch: Arch, schedule: str, choice: Choice, broken: Violation) -> list[int]:
    """The next smaller and the next larger value of the knob that pass, where there are any."""
    field = _KNOBS[broken.path]
    step = {"block_m": arch.mma.m, "block_n": arch.mma.k}.get(field, 1)

    def passes(value: int) -> bool:
        changed = Choice(**{**choice.__dict__, field: value})
        return not verify(build(spec, arch, schedule, changed))

    below = min(broken.value - 1, _LARGEST_TILE) // step * step
    above = broken.value // step * step + step
    smaller = [value for value in range(below, 0, -step) if passes(value)][:1]
    return smaller + [value for value in range(above, _LARGEST_TILE, step) if passes(value)][:1]


def _wrong_dtype(spec: Spec, arch: Arch) -> Diagnostic:
    inputs = spec.precision.inputs
    return Diagnostic(
        message=f"precision.inputs = {inputs} is not to be had on {arch.name}",
        rule="input-dtype",
        location=spec.locate("precision.inputs"),
        path="precision.inputs",
        value=inputs,
        note=f"the matrix instruction of {arch.name} takes {' and '.join(arch.input_dtypes)}",
        nearest=arch.input_dtypes,
    )
