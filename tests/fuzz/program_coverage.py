"""What cases meet in the programs of their plans, and what a run over all specs of a target is to meet.

Ranges of programs empty and not, walks, conditions: read from the plan and the arithmetic of its scheduler, without
running anything.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from attngen.arch import ARCHS
from attngen.check.inputs import KINDS, KINDS_WITH_SCALES
from attngen.fuzz.case import CALL_LAYOUTS, MEMORIES, Case
from attngen.fuzz.coverage import Met, met_by
from attngen.fuzz.properties import RULES
from attngen.fuzz.states import STATES
from attngen.fuzz.strategies import ORDERS
from attngen.plan import BlockIndex, KernelPlan, Range, evaluate_formula
from attngen.plan.hardware_rules import MOST_WARPGROUPS
from attngen.plan.steps import ForBlocks, When, walk
from attngen.quantize import SCALE_KINDS
from attngen.schedules import SCHEDULES, WARPGROUP_SCHEDULES
from attngen.simulate import Sizes, block_bounds, tiles, visited_blocks
from attngen.simulate.tile_source import LOCKSTEP
from attngen.simulate.visits import declared_values, first_head, walk_of

BLOCKS_PER_ROW = ("0", "1", "2", "many")
_KEY_RANGES = ("right", "full", "left")
RANGES = {
    "serial": ("rows", "keys"),
    "fa2": _KEY_RANGES,
    "warp_specialized": _KEY_RANGES,
    "pingpong": _KEY_RANGES,
}
"""Ranges of the computing role's program, by schedule."""
WALKS = ("no block", "some partial", "some full")
"""What a walk over blocks of keys comes to."""
CONDITIONS = ("scale is negative", "tile has blocks", "m sees n")
_WARPGROUP_CONDITIONS = ("last warpgroup",)
_SHOWN_HEAD_DIMS = ("32", "40", "64", "80", "96", "128", "192", "256", "192/128")


def expected(targets: Sequence[str]) -> Iterator[Met]:
    """What a run over all specs of these targets is to meet."""
    has_warpgroups = any(ARCHS[target].wgmma for target in targets)
    schedules = (*SCHEDULES, *(WARPGROUP_SCHEDULES if has_warpgroups else ()))
    yield from (("schedule", kind) for kind in schedules)
    yield from (("dtype", name) for name in dict.fromkeys(x for t in targets for x in ARCHS[t].input_dtypes))
    if any(ARCHS[target].has_mma_granularity for target in targets):
        yield from (("head_dim", dims) for dims in _SHOWN_HEAD_DIMS)
    yield from (("stages", str(stages)) for stages in (1, 2, 3, 4))
    yield from (("order", order) for order in ORDERS)
    yield from (
        ("mask", name) for name in ("full", "causal", "one range", "boundaries", "no closed form", "by head")
    )
    yield from (("score", kind) for kind in ("plain", "modified", "looks up"))
    yield from (("declared", kind) for kind in ("nothing", "scalars", "tensors"))
    yield from (("blocks per row", count) for count in BLOCKS_PER_ROW)
    ranges = [f"{kind} {name}" for kind in schedules for name in RANGES[kind]]
    yield from (("range", f"{name} filled") for name in ranges)
    yield from (("range", f"{name} empty") for name in ranges if name != "serial rows")  # nothing is launched
    yield from (("walk", f"{kind}: {found}") for kind in schedules if kind != "serial" for found in WALKS)
    conditions = (*CONDITIONS, *(_WARPGROUP_CONDITIONS if has_warpgroups else ()))
    yield from (("condition", f"{name}: {state}") for name in conditions for state in ("yes", "no"))
    if has_warpgroups:
        yield from (("warpgroups", str(count)) for count in range(1, MOST_WARPGROUPS + 1))
        yield from ((flag, state) for flag in ("overlap", "persistent") for state in ("yes", "no"))
        yield ("tiles per block", "1")
    if any(
        not ARCHS[target].has_mma_granularity for target in targets
    ):  # a GPU holds all tiles of most cases at once
        yield ("tiles per block", "many")
    for axis in ("seqlen_q", "seqlen_k"):
        yield (axis, "0")
        yield from (
            (axis, f"{unit}{beside}") for unit in ("8", "16", "block") for beside in (" - 1", "", " + 1")
        )
    yield from (("group", str(group)) for group in range(1, 9))
    yield from (("batch", batch) for batch in ("0", "1", "2", "3 and more"))
    yield from (("memory", memory) for memory in MEMORIES)
    yield from (("layout", layout) for layout in CALL_LAYOUTS)
    if any("e4m3" in ARCHS[target].input_dtypes for target in targets):
        yield from (("scales", kind) for kind in SCALE_KINDS)
        yield from (("incoherent", kind) for kind in ("none", "hadamard"))
        yield from (("promote", how) for how in ("never", "every block"))
        yield from (("inputs", kind) for kind in KINDS_WITH_SCALES)
    else:
        yield from (("inputs", kind) for kind in KINDS)
    yield from (("scale", sign) for sign in ("default", "positive", "zero", "negative"))
    yield from (("gradients", kind) for kind in ("none", "of out", "of out and lse"))
    yield from (("sums of gradients", order) for order in ("in one order", "in any order"))
    yield from (("property", name) for name, rule in RULES.items() if rule.lengths != "own")
    yield ("queries x keys", "dense x dense")
    yield from (("torch", state) for state in STATES)


def met_in_program(case: Case, plan: KernelPlan) -> Iterator[Met]:
    """What one case meets; tiles, blocks and ranges only where there are rows to visit them."""
    yield from met_by(case, plan)
    if plan.scheduler.persistent:
        sizes = _sizes(plan, case)
        if drawn := sum(1 for _ in tiles(plan, sizes, LOCKSTEP)):
            blocks = evaluate_formula(plan.grid, sizes.values)
            yield ("tiles per block", "many" if drawn > blocks else "1")
    if case.shape.batch * case.shape.heads * case.shape.seqlen_q:
        yield from _met_by_blocks(plan, case)


def _sizes(plan: KernelPlan, case: Case) -> Sizes:
    """The sizes of the case's call, and what it passes."""
    shape = case.shape
    sizes = Sizes(shape.batch, shape.seqlen_q, shape.seqlen_k, shape.heads, shape.heads_kv)
    return replace(sizes, declared=declared_values(plan, sizes, case.declared("cpu")))


def _met_by_blocks(plan: KernelPlan, case: Case) -> Iterator[Met]:
    """Blocks per row, ranges and conditions, over all blocks of rows of the first head."""
    shape = case.shape
    sizes = _sizes(plan, case)
    steps = list(walk(plan.worker.program))
    ranges = {step.range for step in steps if isinstance(step, ForBlocks)}
    conditions: set[str] = {step.condition for step in steps if isinstance(step, When)}
    m_max, n_end = -(-shape.seqlen_q // plan.block_m), -(-shape.seqlen_k // plan.block_n)
    head = first_head(plan, sizes)
    for m_block in range(m_max):
        visited = len(visited_blocks(plan, sizes, [m_block], head)[0])
        yield ("blocks per row", BLOCKS_PER_ROW[min(max(visited, 0), 3)])
        if plan.key_blocks is None and plan.schedule != "serial":
            yield from (("walk", f"{plan.schedule}: {found}") for found in _met_by_walk(plan, sizes, m_block))
        bounds = block_bounds(plan, sizes, [m_block], head)[0]._asdict() if plan.key_blocks else {}
        variables = {"zero": 0, "m_max": m_max, "n_end": n_end, "m_block": m_block, **bounds}
        for range_ in ranges:
            state = "filled" if _runs(range_, variables) else "empty"
            yield ("range", f"{plan.schedule} {range_.name} {state}")
        for state in _states(conditions, visited, n_end, plan.worker.warpgroups):
            yield ("condition", state)
    if "scale is negative" in conditions:
        yield ("condition", f"scale is negative: {'yes' if (case.softmax_scale or 0) < 0 else 'no'}")


def _met_by_walk(plan: KernelPlan, sizes: Sizes, m_block: int) -> Iterator[str]:
    """The kinds of blocks that a walk comes to, or that it comes to none."""
    found = {
        "some partial" if block.is_partial else "some full"
        for block in walk_of(plan, sizes, m_block, first_head(plan, sizes))
    }
    yield from found or {"no block"}


def _runs(range_: Range, variables: dict[str, int]) -> bool:
    def value(index: BlockIndex) -> int:
        return variables[index.base] + index.offset

    return value(range_.hi) > value(range_.lo)


def _states(conditions: set[str], visited: int, n_end: int, warpgroups: int) -> Iterator[str]:
    if "tile has blocks" in conditions:
        yield f"tile has blocks: {'yes' if visited > 0 else 'no'}"
    if "last warpgroup" in conditions:
        yield "last warpgroup: yes"
        if warpgroups > 1:
            yield "last warpgroup: no"
    if "m sees n" in conditions:
        if visited > 0:
            yield "m sees n: yes"
        if visited < n_end:
            yield "m sees n: no"
