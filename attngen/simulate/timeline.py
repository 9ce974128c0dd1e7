"""The timeline of one SM: who uses the copy engine, the tensor core and the exponential unit, when, in cycles.

The simulator's own Steps run, without values. A role's time is one more line of its clock (`clocks.py`), so whoever
meets at a barrier takes the later time, and no barrier knows of it. Before a Step its work is queued at the units it
needs; roles ask for units in the order of their times. A GEMM lasts from its issue to its WaitGemm, a copy until its
bytes are there. What it leaves out: bank conflicts, instruction caches, power, other SMs.

The warps of a role run as one: the four of `fa2` never drift apart here, as they may on a GPU.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from heapq import heapify, heapreplace
from typing import Any, Literal, get_args

from attngen.plan import KernelPlan, Plan, RegTile, RegVec, Role, Rows, Step, Tensor
from attngen.plan.steps import (
    Clear,
    CommitCopies,
    ConvertP,
    CopyTile,
    DrawTile,
    Exponentiate,
    FinishRows,
    IssueOutputGemm,
    IssueScoreGemm,
    LoadFragment,
    LoadRows,
    LoadTile,
    MaskScores,
    MaskScoresEach,
    NegateTile,
    OutputGemm,
    ReduceRows,
    RowMax,
    ScaleRows,
    ScoreGemm,
    StageTile,
    StoreFragment,
    StoreRows,
    StoreTile,
    SyncThreads,
    SyncWarpgroup,
    TakeTurn,
    TmaLoad,
    TmaStore,
    WaitCopies,
    WaitEmpty,
    WaitFull,
    WaitGemm,
    WaitStores,
)
from attngen.simulate.blocks import Block, Call
from attngen.simulate.costs import Costs, costs_of
from attngen.simulate.device_memory import DeviceMemory
from attngen.simulate.roles import RoleRun, Run, StepFunction, Wait
from attngen.simulate.run import STEPS_SIMULATED
from attngen.simulate.tiles import Sizes, Tile, TileSource, block_bounds, ceil_div, tiles

Unit = Literal["copy engine", "tensor core", "exponential unit", "arithmetic"]
UNITS: tuple[Unit, ...] = get_args(Unit)
"""What roles share. `arithmetic` stands for the issue of all other instructions; the copies of cp.async count as the
copy engine's, for it is the way from L2 that they share."""

TIME = "time"
"""The line of a clock that holds a role's time in cycles."""
SLICES = 8
"""Shared units serve a Step of the threads in so many turns, between which other roles have theirs: warp schedulers
change warps every cycle, and that is near enough."""
MOST_PAIRS = 256
"""Pairs of blocks in a tile up to which a whole head is simulated; a longer one is scaled from a shorter."""
SAMPLES = 3
"""Kinds of tiles that a prediction simulates; times of the others lie on lines between them."""


@dataclass(frozen=True)
class Interval:
    """A stretch of time.

    Attributes:
        unit: which unit is at work; None for what the role itself does or waits for.
        role: for which role: "consumer 1", with its block where several share the SM.
        step: class name of the Step that caused it: "Exponentiate".
        m_block: block of rows of the role's tile, None where a tile is a whole head.
        n: block of keys of the loop that the Step stands in, if any.
        begin, end: in cycles.
    """

    unit: Unit | None
    role: str
    step: str
    m_block: int | None
    n: int | None
    begin: int
    end: int


@dataclass(frozen=True)
class Timeline:
    """What happened on one SM.

    Attributes:
        name: of the plan.
        costs: the table it was worked out with.
        slots: blocks of threads that share the SM.
        tiles: that were worked on, by all of them.
        roles: their names, in the order of the plan.
        intervals: in no order; of one unit, or of one role without a unit, no two overlap.
        cycles: when the last of them ended.
    """

    name: str
    costs: Costs
    slots: int
    tiles: int
    roles: tuple[str, ...]
    intervals: tuple[Interval, ...]

    @cached_property
    def cycles(self) -> int:
        """When everything had ended."""
        return max((interval.end for interval in self.intervals), default=0)

    def busy(self, unit: Unit) -> int:
        """Cycles for which a unit was at work."""
        return sum(interval.end - interval.begin for interval in self.intervals if interval.unit == unit)

    def share(self, unit: Unit) -> float:
        """The same, of the whole time."""
        return self.busy(unit) / max(1, self.cycles)


@dataclass(frozen=True)
class Prediction:
    """How long a launch would take.

    Attributes:
        tile_cycles: what one more tile costs an SM, of the longest kind.
        cycles: of the whole launch, from its first block to its last.
        seconds: the same by the table's clock.
    """

    tile_cycles: float
    cycles: float
    seconds: float


def timeline(
    plan: Plan,
    seqlen_q: int,
    seqlen_k: int,
    batch: int = 1,
    heads: int = 1,
    heads_kv: int | None = None,
    *,
    costs: Costs | None = None,
    slots: int | None = None,
    steps: Mapping[type[Step], StepFunction] | None = None,
) -> Timeline:
    """The first tile of a launch on one SM, and where blocks are persistent the same once more.

    Args:
        plan: what runs.
        seqlen_q: of the call; like seqlen_k, batch, heads and heads_kv.
        seqlen_k: see seqlen_q.
        batch: see seqlen_q.
        heads: see seqlen_q.
        heads_kv: as many as heads where None.
        costs: the table to use; that of the plan's target where None.
        slots: blocks of threads that share the SM; as many as the plan asks for where None.
        steps: as of `simulate`.

    Raises:
        ToolchainError: there is no table for the target.
        SimulationFault: a program broke a rule, or no role can go on.
    """
    sizes = Sizes(batch, seqlen_q, seqlen_k, heads, heads if heads_kv is None else heads_kv)
    kernel = plan.kernel
    first = next(tiles(plan, kernel, sizes, 1), None)
    rounds = 2 if kernel.scheduler.persistent else 1
    found = _Multiprocessor(plan, sizes, costs or costs_of(plan.arch), slots or kernel.blocks_per_sm, steps)
    return found.run([] if first is None else [first] * rounds * found.slots)


def predict(
    plan: Plan,
    seqlen_q: int,
    seqlen_k: int,
    batch: int = 1,
    heads: int = 1,
    heads_kv: int | None = None,
    *,
    costs: Costs | None = None,
    slots: int | None = None,
) -> Prediction:
    """How long a whole launch takes; arguments as of `timeline`.

    What one more tile costs is the time of two rounds less that of one, for up to `SAMPLES` kinds of tiles by their
    pairs of blocks. Tiles go in the launch's order to whoever is free first.
    """
    sizes = Sizes(batch, seqlen_q, seqlen_k, heads, heads if heads_kv is None else heads_kv)
    costs, slots = costs or costs_of(plan.arch), slots or plan.kernel.blocks_per_sm
    launch = [(tile, _pairs(plan, sizes, tile)) for tile in tiles(plan, plan.kernel, sizes, batch * heads)]
    kinds = {pairs: tile for tile, pairs in launch}
    if not kinds:
        return Prediction(0, 0, 0)
    known = sorted(kinds)
    sampled = sorted({known[i * (len(known) - 1) // (SAMPLES - 1)] for i in range(SAMPLES)})
    timed = [_tile_cycles(plan, sizes, kinds[pairs], costs, slots) for pairs in sampled]
    one_more = {pairs: _between(pairs, sampled, [more for more, _ in timed]) for pairs in known}
    ends = [0.0] * (costs.num_sms * slots)
    heapify(ends)
    for tile, pairs in launch:
        for _ in tile.members:
            heapreplace(ends, ends[0] + one_more[pairs] * slots)
    cycles = max(ends) + timed[-1][1]
    return Prediction(one_more[known[-1]], cycles, cycles / costs.clock_hz)


def _tile_cycles(plan: Plan, sizes: Sizes, tile: Tile, costs: Costs, slots: int) -> tuple[float, float]:
    """What one more such tile costs, and how much longer the first takes."""
    scale = 1.0
    if tile.m_block is None:  # a whole head: a shorter one, so that it does not take minutes
        pairs, shorter = _pairs(plan, sizes, tile), sizes
        while _pairs(plan, shorter, tile) > MOST_PAIRS:
            lengths = max(1, shorter.seqlen_q // 2), max(1, shorter.seqlen_k // 2)
            shorter = Sizes(1, *lengths, sizes.group, 1)
        scale, sizes = pairs / max(1, _pairs(plan, shorter, tile)), shorter
    one = Tile(tile.m_block, tile.bounds, tile.members[:1])
    once, twice = (
        _Multiprocessor(plan, sizes, costs, slots).run([one] * slots * rounds).cycles * scale
        for rounds in (1, 2)
    )
    return (twice - once) / slots, max(0.0, 2 * once - twice)


def _pairs(plan: Plan, sizes: Sizes, tile: Tile) -> int:
    """How many pairs of a block of rows and a block of keys a tile is made of."""
    if tile.bounds is not None:
        return tile.bounds.n_max - tile.bounds.n_min
    rows = range(ceil_div(sizes.seqlen_q, plan.block_m))
    bounds = (block_bounds(plan, sizes, m, tile.members[0]) for m in rows)
    return sum(bound.n_max - bound.n_min for bound in bounds)


def _between(x: int, xs: list[int], ys: list[float]) -> float:
    """Where the lines through the points have x, which lies among the xs."""
    i = bisect_left(xs, x)
    if xs[i] == x:
        return ys[i]
    share = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
    return ys[i - 1] + share * (ys[i] - ys[i - 1])


# ---- the SM ---------------------------------------------------------------------------------------------------------
def now(role: RoleRun) -> int:
    """A role's time."""
    return role.clock.get(TIME, 0)


@dataclass
class _InFlight:
    """When what a role has started will have ended: its GEMMs, its copies not committed, its groups, its stores."""

    gemms: list[int] = field(default_factory=list)
    copies: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    stores: list[int] = field(default_factory=list)


class _Multiprocessor:
    """The units of one SM, and the blocks of threads that share them.

    Attributes:
        free: from when on each unit has nothing queued.
    """

    def __init__(
        self,
        plan: Plan,
        sizes: Sizes,
        costs: Costs,
        slots: int,
        steps: Mapping[type[Step], StepFunction] | None = None,
    ) -> None:
        self.plan, self.costs, self.slots = plan, costs, slots
        self.free: dict[Unit, int] = dict.fromkeys(UNITS, 0)
        self.intervals: list[Interval] = []
        self.in_flight: dict[RoleRun, _InFlight] = {}
        self._names: dict[RoleRun, str] = {}
        simulated = {**STEPS_SIMULATED, **(steps or {})}
        timed = {kind: self._timed(kind, function) for kind, function in simulated.items()}
        self._call = Call(plan, sizes, 1.0, False, DeviceMemory(plan, sizes, None, None), timed)

    def run(self, work: list[Tile]) -> Timeline:
        """Let the slots work on these tiles."""
        kernel = self.plan.kernel
        source = TileSource(work, kernel.scheduler.persistent, self.slots)
        waiting = list(range(source.blocks))
        running: list[tuple[int, Block]] = [(slot, self._start(kernel, source, waiting.pop(0), slot, 0))
                                            for slot in range(min(self.slots, source.blocks))]  # fmt: skip
        while running:
            slot, block = min(running, key=lambda pair: pair[1].due)
            block.go_on()
            if block.is_done:
                running.remove((slot, block))
                if waiting:
                    begin = max(map(now, block.roles)) + self.costs.block_start
                    running.append((slot, self._start(kernel, source, waiting.pop(0), slot, begin)))
        roles, intervals = tuple(dict.fromkeys(self._names.values())), tuple(_joined(self.intervals))
        return Timeline(self.plan.name, self.costs, self.slots, len(work), roles, intervals)

    def _start(self, kernel: KernelPlan, source: TileSource, number: int, slot: int, begin: int) -> Block:
        block = Block(self._call, kernel, source, number)
        for role in block.roles:
            role.clock[TIME] = begin
            self.in_flight[role] = _InFlight()
            self._names[role] = role.name if self.slots == 1 else f"block {slot}, {role.name}"
        return block

    def _timed(self, kind: type[Step], function: StepFunction) -> StepFunction:
        """The Step, at its cost: its work first, then what it does; a meeting moves the role's time."""
        charge = CHARGES.get(kind)
        if charge is None:
            return function
        latency = self.costs.barrier_latency if kind in MEETINGS else 0

        def run(step: Any, role: RoleRun) -> Run:
            begin = now(role)
            goes_on = yield from charge(self, step, role)
            inner = function(step, role)
            if inner is not None:
                yield from inner
            role.clock[TIME] = now(role) + latency if goes_on is None else goes_on
            self._note(None, step, role, begin, now(role))

        return run

    def _note(self, unit: Unit | None, step: Step, role: RoleRun, begin: int, end: int) -> None:
        if end > begin:
            m_block, n = role.tile.m_block, role.variables.get("n")
            name = type(step).__name__
            self.intervals.append(Interval(unit, self._names[role], name, m_block, n, begin, end))

    # ---- units ------------------------------------------------------------------------------------------------------
    def queue(self, unit: Unit, cycles: float, step: Step, role: RoleRun) -> int:
        """Let a unit work for a role as soon as it has done what was queued before; when it will be done."""
        begin = max(now(role), self.free[unit])
        end = begin + math.ceil(cycles)
        self.free[unit] = end
        self._note(unit, step, role, begin, end)
        return end

    def in_slices(self, step: Step, role: RoleRun, work: Mapping[Unit, float]) -> Run:
        """Let units work for the threads of a role, who wait for each slice; others have turns in between."""
        for i in range(SLICES):
            yield when_due(role)
            slices = {unit: _slice(cycles, i) for unit, cycles in work.items()}
            ends = [self.queue(unit, cycles, step, role) for unit, cycles in slices.items() if cycles]
            role.clock[TIME] = max(ends, default=now(role))

    def schedulers(self, role: RoleRun) -> float:
        """The share of the SM's four schedulers on which the role has a warp."""
        of: Role = next(r for r in self.plan.kernel.roles if r.program is role.program)
        return min(4, of.warps // of.warpgroups) / 4

    def transfer(self, size: int) -> float:
        """Cycles in which so many bytes pass between L2 and shared memory or registers."""
        return size / self.costs.copy_bytes


def _slice(cycles: float, i: int) -> int:
    """The i-th of `SLICES` parts, whole cycles that add up to `cycles`, rounded up."""
    whole = math.ceil(cycles)
    return whole * (i + 1) // SLICES - whole * i // SLICES


def when_due(role: RoleRun) -> Wait:
    """Let all roles go first whose time is before this one's."""
    return Wait(lambda: "its time", lambda: True, due=now(role))


def _joined(intervals: Iterable[Interval]) -> Iterable[Interval]:
    """The intervals, of which those that follow one another without a gap and are alike have become one."""
    last: dict[tuple[Unit | None, str], Interval] = {}
    for new in intervals:
        lane = (new.unit, new.role)
        old = last.get(lane)
        alike = old is not None and old.end == new.begin and new.unit is not None
        if old is not None and alike and (old.step, old.m_block, old.n) == (new.step, new.m_block, new.n):
            new = Interval(*(*lane, new.step, new.m_block, new.n, old.begin, new.end))
        elif old is not None:
            yield old
        last[lane] = new
    yield from last.values()


# ---- what Steps cost ------------------------------------------------------------------------------------------------
Charge = Callable[[_Multiprocessor, Any, RoleRun], Generator[Wait, None, int | None]]
"""Queues the work of a Step. It leaves the role's time where the Step takes effect; where the role itself goes on
earlier, it returns that time."""
Paid = Generator[Wait, None, int | None]


def _elements(place: RegTile | RegVec, role: RoleRun) -> int:
    """Of a place, those that the role's own rows have."""
    return place.rows // role.warpgroups * (place.cols if isinstance(place, RegTile) else 1)


def _threads(sm: _Multiprocessor, step: Any, role: RoleRun) -> Paid:
    """Steps on registers: slots of the schedulers, for exponentials the unit beside."""
    place: RegTile | RegVec = getattr(step, _OPERAND[type(step)])
    costs, elements, share = sm.costs, _elements(place, role), sm.schedulers(role)
    work: dict[Unit, float] = {
        "arithmetic": elements * costs.lane_slots.get(type(step), 1) / (costs.lanes * share)
    }
    if isinstance(step, Exponentiate):
        work["exponential unit"] = elements / (costs.exponentials * share)
    yield from sm.in_slices(step, role, work)
    latency = costs.reduction_latency if isinstance(step, RowMax | ReduceRows) else costs.step_latency
    return now(role) + (latency if not isinstance(step, Clear) else 0)


_OPERAND: dict[type[Step], str] = {
    Clear: "dst",
    MaskScores: "s",
    MaskScoresEach: "s",
    RowMax: "s",
    Exponentiate: "s",
    ConvertP: "s",
    ScaleRows: "o",
    ReduceRows: "part",
    FinishRows: "row_sum",
}
"""The operand whose elements a Step on registers works through."""


def _gemm_cycles(sm: _Multiprocessor, step: Any, role: RoleRun) -> float:
    depth = step.b.buffer.rows if isinstance(step, OutputGemm | IssueOutputGemm) else step.a.buffer.cols
    flops: int = 2 * _elements(step.acc, role) * depth
    bits: int = step.b.buffer.dtype.bits
    return flops * bits / (16 * sm.costs.flops_of_16_bit)


def _issue_gemm(sm: _Multiprocessor, step: Any, role: RoleRun) -> Paid:
    yield when_due(role)
    sm.in_flight[role].gemms.append(sm.queue("tensor core", _gemm_cycles(sm, step, role), step, role))
    return now(role) + sm.costs.gemm_issue


def _wait_gemm(sm: _Multiprocessor, step: WaitGemm, role: RoleRun) -> Paid:
    gemms = sm.in_flight[role].gemms
    done, gemms[:] = gemms[: len(gemms) - step.pending], gemms[len(gemms) - step.pending :]
    return max([now(role), *(end + sm.costs.gemm_latency for end in done)])
    yield


def _synchronous_gemm(sm: _Multiprocessor, step: Any, role: RoleRun) -> Paid:
    cycles = _gemm_cycles(sm, step, role) / (sm.costs.mma_share * sm.schedulers(role))
    yield from sm.in_slices(step, role, {"tensor core": cycles})
    return now(role) + sm.costs.gemm_latency


def _meet(sm: _Multiprocessor, step: Step, role: RoleRun) -> Paid:
    return None
    yield


# ---- copies
def _tma_load(sm: _Multiprocessor, step: TmaLoad, role: RoleRun) -> Paid:
    """The role arrives at `full` on behalf of the bytes: with the time when they are there."""
    yield when_due(role)
    goes_on = now(role) + sm.costs.copy_issue
    end = sm.queue("copy engine", sm.transfer(step.dst.buffer.stage_bytes), step, role)
    role.clock[TIME] = end + sm.costs.copy_latency
    return goes_on


def _load_tile(sm: _Multiprocessor, step: LoadTile, role: RoleRun) -> Paid:
    size = step.dst.buffer.stage_bytes
    slots = size / 16 * sm.costs.chunk_slots
    yield from sm.in_slices(step, role, {"arithmetic": slots / (sm.costs.lanes * sm.schedulers(role))})
    yield when_due(role)
    end = sm.queue("copy engine", sm.transfer(size), step, role)
    sm.in_flight[role].copies.append(end + sm.costs.copy_latency)
    return None


def _commit_copies(sm: _Multiprocessor, step: CommitCopies, role: RoleRun) -> Paid:
    state = sm.in_flight[role]
    state.groups.append(max([now(role), *state.copies]))
    state.copies.clear()
    return None
    yield


def _wait_copies(sm: _Multiprocessor, step: WaitCopies, role: RoleRun) -> Paid:
    groups = sm.in_flight[role].groups
    done, groups[:] = groups[: len(groups) - step.pending], groups[len(groups) - step.pending :]
    return max([now(role), *done])
    yield


def _tma_store(sm: _Multiprocessor, step: TmaStore, role: RoleRun) -> Paid:
    yield when_due(role)
    size = step.src.buffer.stage_bytes // role.warpgroups
    sm.in_flight[role].stores.append(sm.queue("copy engine", sm.transfer(size), step, role))
    return now(role) + sm.costs.copy_issue


def _wait_stores(sm: _Multiprocessor, step: WaitStores, role: RoleRun) -> Paid:
    stores = sm.in_flight[role].stores
    end = max([now(role), *stores])
    stores.clear()
    return end
    yield


def _shared(sm: _Multiprocessor, step: CopyTile | StageTile | NegateTile, role: RoleRun) -> Paid:
    """Threads write to shared memory, which has no lane of its own."""
    buffer = step.tile.buffer if isinstance(step, NegateTile) else step.dst.buffer
    share = role.warpgroups if isinstance(step, StageTile) else 1
    return now(role) + math.ceil(buffer.stage_bytes / share / sm.costs.shared_bytes) + sm.costs.step_latency
    yield


def _device(sm: _Multiprocessor, size: int, waits: bool, step: Step, role: RoleRun) -> Paid:
    """Threads load from or store to device memory; nobody waits for a store."""
    yield when_due(role)
    end = sm.queue("copy engine", sm.transfer(size), step, role)
    return end + (sm.costs.memory_latency if waits else 0)


def _fragment(
    sm: _Multiprocessor, step: LoadFragment | StoreFragment | LoadRows | StoreRows, role: RoleRun
) -> Paid:
    is_load = isinstance(step, LoadFragment | LoadRows)
    place: Tensor | Rows = step.src if isinstance(step, LoadFragment | LoadRows) else step.dst
    if isinstance(place, Rows) and not role.device.wants(place):
        return None
    registers = step.dst if isinstance(step, LoadFragment | LoadRows) else step.src
    return (yield from _device(sm, 4 * _elements(registers, role), is_load, step, role))


def _store_tile(sm: _Multiprocessor, step: StoreTile, role: RoleRun) -> Paid:
    return (yield from _device(sm, step.src.buffer.stage_bytes, False, step, role))


def _draw_tile(sm: _Multiprocessor, step: DrawTile, role: RoleRun) -> Paid:
    role.clock[TIME] = now(role) + sm.costs.memory_latency
    return None
    yield


MEETINGS = (WaitFull, WaitEmpty, TakeTurn, SyncThreads, SyncWarpgroup)
"""Steps that end at the later of two times: the role's, and that of those it waits for."""

CHARGES: dict[type[Step], Charge] = {
    **dict.fromkeys(_OPERAND, _threads),
    **dict.fromkeys((IssueScoreGemm, IssueOutputGemm), _issue_gemm),
    **dict.fromkeys((ScoreGemm, OutputGemm), _synchronous_gemm),
    **dict.fromkeys(MEETINGS, _meet),
    **dict.fromkeys((CopyTile, StageTile, NegateTile), _shared),
    **dict.fromkeys((LoadFragment, StoreFragment, LoadRows, StoreRows), _fragment),
    WaitGemm: _wait_gemm,
    TmaLoad: _tma_load,
    LoadTile: _load_tile,
    CommitCopies: _commit_copies,
    WaitCopies: _wait_copies,
    TmaStore: _tma_store,
    WaitStores: _wait_stores,
    StoreTile: _store_tile,
    DrawTile: _draw_tile,
}
"""What each Step costs; those that are missing (control, Release, Advance, ...) cost nothing."""
