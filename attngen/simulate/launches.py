"""Running a call on the CPU: launch after launch, programs block after block; for values, or only to count."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from attngen.bind import Bound, Given, bind, declared_by
from attngen.expr import GIVEN_BLOCKS
from attngen.plan import (
    BLOCK_MAP,
    ROWS_OF_HEADS,
    STEPS,
    Call,
    KernelPlan,
    Launch,
    MapBlocks,
    Step,
    Value,
    assemble,
    evaluate_formula,
)
from attngen.simulate import (
    simulated_cache,
    simulated_control,
    simulated_copies,
    simulated_declared,
    simulated_gemms,
    simulated_gradients,
    simulated_scales,
    simulated_shares,
    simulated_softmax,
    simulated_sums,
    simulated_sync,
)
from attngen.simulate.blocks import Block, KernelRun, scale_params
from attngen.simulate.device_memory import Addition, DeviceMemory, by_heads
from attngen.simulate.faults import SimulationFault
from attngen.simulate.function_names import function_name
from attngen.simulate.page_table import PageTable
from attngen.simulate.roles import Event, StepFunction
from attngen.simulate.simulated_sheets import SHEETS_SIMULATED
from attngen.simulate.threads import one_thread
from attngen.simulate.tile_lists import call_sizes
from attngen.simulate.tile_source import LOCKSTEP, TileSource, tiles
from attngen.simulate.traffic import Traffic
from attngen.simulate.visits import SIMULATED_SMS, Declared, Sizes, decoded
from attngen.torch_state import torch_defaults

_STEP_MODULES = (
    simulated_control,
    simulated_sync,
    simulated_copies,
    simulated_gemms,
    simulated_gradients,
    simulated_declared,
    simulated_sums,
    simulated_softmax,
    simulated_shares,
    simulated_scales,
    simulated_cache,
)


def _function_of(step: type[Step]) -> StepFunction:
    """The function that has the Step's name in the spelling of functions."""
    name = function_name(step)
    found: StepFunction = next(vars(module)[name] for module in _STEP_MODULES if name in vars(module))
    return found


STEPS_SIMULATED: dict[type[Step], StepFunction] = {step: _function_of(step) for step in STEPS}
"""What each Step does."""


@torch_defaults()
def simulate(
    plan: KernelPlan | Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    layout: str = "bshd",
    observer: Callable[[Event], None] | None = None,
    steps: Mapping[type[Step], StepFunction] | None = None,
    memory: Traffic | None = None,
    declared: Mapping[str, Any] | None = None,
    descales: Mapping[str, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention as one attention kernel does: same tiles, same order, same roundings.

    Args:
        plan: what to run, or the call of its kernel; the kernel that fills its tables runs before.
        q: (batch, seqlen_q, num_heads_q, head_dim_qk), the plan's input type, on the CPU; arguments have been
            checked by the caller.
        k: (batch, seqlen_k, num_heads_kv, head_dim_qk).
        v: (batch, seqlen_k, num_heads_kv, head_dim_v).
        softmax_scale: any finite number; 1/sqrt(head_dim_qk) where None.
        return_lse: whether to compute lse.
        layout: "bshd"; "bhsd" exchanges the seqlen and heads dimensions of q, k, v and out.
        observer: called after every Step; heads then run one by one.
        steps: functions to use instead of `STEPS_SIMULATED`'s, to see what a fault of theirs would do.
        memory: where to count FLOPs and bytes.
        declared: the scalars and tensors of the spec, by name.
        descales: of 8-bit q, k and v, by the names of `KernelPlan.scales`: (batch, heads), or (batch, heads, granules).
            v is then as `attngen.quantize.Operands` has it: transposed, and keys in the order of fragments.

    Returns:
        out: (batch, seqlen_q, num_heads_q, head_dim_v), the plan's output type.
        lse: (batch, num_heads_q, seqlen_q), f32, or None.

    Raises:
        SimulationFault: a program broke a rule.
    """
    call = plan if isinstance(plan, Call) else assemble((plan,))
    q, k = (x.transpose(1, 2) if layout == "bhsd" else x for x in (q, k))
    if layout == "bhsd" and not descales:
        v = v.transpose(1, 2)
    sizes = {
        "batch": q.shape[0],
        "seqlen_q": q.shape[1],
        "seqlen_k": k.shape[1],
        "num_heads_q": q.shape[2],
        "num_heads_kv": k.shape[2],
        "group": q.shape[2] // max(1, k.shape[2]),
    }
    passed, scalars = dict(declared or {}), call.manifest.scalars
    named = {value.name: passed[value.passed_as] for value in declared_by(call.manifest, passed)}
    if GIVEN_BLOCKS.name in passed:
        named[BLOCK_MAP] = passed[GIVEN_BLOCKS.name]
    given = Given(
        call.manifest.intakes[-1],
        sizes,
        {"q": q, "k": k, "v": v, **named, **(descales or {})},
        {scalar.name: passed.get(scalar.name, scalar.default) for scalar in scalars},
        {},
    )
    wanted = ("out", "lse") if return_lse else ("out",)
    bound = bind(call.manifest, given, wanted, SIMULATED_SMS, softmax_scale)
    made = run_call(call, bound, layout=layout, observer=observer, steps=steps, memory=memory)
    return made["out"], made.get("lse")


@torch_defaults()
@one_thread()
def run_call(
    call: Call,
    bound: Bound,
    kept: Mapping[str, torch.Tensor] | None = None,
    *,
    layout: str = "bshd",
    observer: Callable[[Event], None] | None = None,
    steps: Mapping[type[Step], StepFunction] | None = None,
    memory: Traffic | None = None,
) -> dict[str, torch.Tensor]:
    """Run what a call launches, and return the values that are wanted of it, by name.

    Args:
        call: the kernels.
        bound: what is launched, with the tensors that the call passes.
        kept: values that an earlier call has made, or to which this one adds.
        layout: of the output, as of `simulate`, like those that follow.
        observer: see layout.
        steps: see layout.
        memory: see layout.

    Raises:
        SimulationFault: a program broke a rule.
    """
    values = {**bound.given.tensors, **_allocate(bound, layout), **(kept or {})}
    declared = Declared(bound.given.scalars, bound.given.declared)
    sizes = replace(
        Sizes.of(bound.sizes, declared), softmax_scale=bound.softmax_scale, accumulates=bound.accumulates
    )
    for launch in bound.launches:
        kernel = call.kernel_of[launch.kernel]
        if not bound.grid(launch):
            continue
        if not isinstance(kernel, KernelPlan):
            values |= SHEETS_SIMULATED[type(kernel)](kernel, values, sizes)
            if isinstance(kernel, MapBlocks):
                tensors = {**declared.tensors, GIVEN_BLOCKS.name: values[BLOCK_MAP]}
                sizes = replace(sizes, declared=replace(declared, tensors=tensors))
            continue
        if sizes.has_no_output and kernel.direction == "forward":
            continue
        pages = PageTable.of(values, sizes.values) if kernel.lengths.is_paged("keys") else None
        run = KernelRun(
            kernel,
            _with_tables(kernel, sizes, values),
            scale_params(kernel, sizes.softmax_scale),
            DeviceMemory(by_heads(kernel, sizes, values), memory, (), kernel.lengths, sizes.group, pages),
            {**STEPS_SIMULATED, **(steps or {})},
            observer,
            bound.accumulates,
        )
        _launch(run, launch, lockstep=LOCKSTEP if observer is None else 1)
    outputs = {name for name in bound.wanted if _has_layout(bound.made[name].value)}
    return {
        name: _in_layout(values[name], layout) if name in outputs else values[name] for name in bound.wanted
    }


def _allocate(bound: Bound, layout: str) -> dict[str, torch.Tensor]:
    """The values that a call makes, in the order of their axes: NaN, or 0, until something is written."""
    made = {}
    for name, each in bound.made.items():
        has_layout = _has_layout(each.value)
        shape = [each.shape[i] for i in (0, 2, 1, 3)] if has_layout and layout == "bhsd" else each.stored
        fill = 0.0 if each.value.zeroed or not each.dtype.is_floating_point else math.nan
        whole = torch.full(shape, fill, dtype=torch.float32).to(each.dtype)
        made[name] = _in_layout(whole, layout) if has_layout else whole.expand(each.shape)
    return made


def _has_layout(value: Value) -> bool:
    """Whether the call's layout is this value's."""
    return value.source == "output" and value.axes == ROWS_OF_HEADS


def _in_layout(x: torch.Tensor, layout: str) -> torch.Tensor:
    """A tensor (batch, seqlen, heads, cols) in a layout, or back from it."""
    return x.transpose(1, 2) if layout == "bhsd" else x


def _with_tables(plan: KernelPlan, sizes: Sizes, values: Mapping[str, torch.Tensor]) -> Sizes:
    """The sizes of a call in which a kernel also finds the tables that were filled, and the list of its tiles."""
    tables = {end: values[name] for end, name in plan.table_values.items() if name in values}
    if plan.scheduler.is_listed:
        tables[plan.tile_list] = values[plan.tile_list]
    return sizes.with_tensors(tables)


@torch_defaults()
def count(
    plan: KernelPlan,
    seqlen_q: int,
    seqlen_k: int,
    batch: int = 1,
    heads: int = 1,
    heads_kv: int | None = None,
    *,
    return_lse: bool = False,
    declared: Mapping[str, Any] | None = None,
    tokens: tuple[int, int] = (0, 0),
) -> Traffic:
    """The FLOPs and bytes of an attention kernel, by running its programs without values.

    Heads that take the same way through the program are run once and counted as often as there are. Blocks of keys
    that depend on what `declared` does not hold are all visited; lengths of sequences and `tokens` as of `closed_form`.
    """
    sizes = call_sizes(plan, seqlen_q, seqlen_k, batch, heads, heads_kv, declared, tokens)
    traffic = Traffic()
    device = DeviceMemory(None, traffic, ("lse",) if return_lse else (), plan.lengths, sizes.group)
    if not sizes.has_no_output:
        launches = {launch.kernel: launch for launch in assemble((plan,)).manifest.launches}
        run = KernelRun(plan, sizes, scale_params(plan, 1.0), device, STEPS_SIMULATED)
        _launch(run, launches[plan.name], lockstep=batch * heads)
    return traffic


def _launch(run: KernelRun, launch: Launch, lockstep: int) -> None:
    """Run the blocks of a launch, and see that they wrote what the kernel is to write."""
    plan, sizes = run.plan, run.sizes
    grid, expected = (evaluate_formula(formula, sizes.values) for formula in (launch.grid, launch.tiles))
    source = TileSource(tiles(plan, sizes, lockstep), plan.scheduler.persistent, grid)
    is_short = source.heads < expected and plan.scheduler.is_listed  # blocks beyond the list's end do nothing
    is_grid_wrong = grid != expected and not source.is_drawn_from
    if (source.heads != expected and not is_short) or is_grid_wrong:
        message = f"{plan.name} is launched on {grid} blocks for {expected} tiles and has {source.heads}"
        raise SimulationFault("wrong grid", message)
    _run_blocks(run, source)
    for number, count in run.device.tickets.items():
        if count:
            raise SimulationFault("never reset", f"{count} parts of tile {number} are counted at the end")
    if message := run.device.not_added_once(plan, _additions(run)):
        raise SimulationFault("not once", message, place=plan.query_sums[0].name)
    if missing := run.device.unwritten(plan, decoded(plan, sizes)):
        name, m = missing
        raise SimulationFault(
            "never written", f"block {m} of {name} is not written once by every head", place=name
        )


def _additions(run: KernelRun) -> Iterator[Addition]:
    """What the visits of a launch add to sums."""
    if not run.plan.query_sums:
        return
    for block, member in decoded(run.plan, run.sizes):
        assert isinstance(block, int)
        for place in range(run.sizes.group):
            head = member._replace(head=member.head + place)
            for m in run.visits.rows_of(block, head):
                for warpgroup in range(run.plan.worker.warpgroups):
                    yield Addition(head.batch, head.head, m, block, warpgroup)


def _run_blocks(run: KernelRun, source: TileSource) -> None:
    """Run the blocks of a launch: those that may wait for each other in turns, as many as fit, else one after another.

    Raises:
        SimulationFault: a program broke a rule, or no block can go on.
    """
    at_a_time, waiting = 1, deque(range(source.blocks))
    if source.is_drawn_from:
        at_a_time = source.blocks
    elif run.plan.scheduler.in_turn:
        at_a_time = run.sizes.num_sms * run.plan.blocks_per_sm
    running: list[Block] = []
    while running or waiting:
        while waiting and len(running) < at_a_time:
            running.append(Block(run, source, waiting.popleft()))
        if not any([block.go_on() for block in running]):
            raise running[0].deadlock
        running = [block for block in running if not block.is_done]
    if source.counter:
        raise SimulationFault(
            "never reset", f"the tile counter of {run.plan.name} stands at {source.counter} at the end"
        )
