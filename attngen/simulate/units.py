"""The units of one SM that roles share: for whom each is at work, and from when on it is free. Time is in cycles.

A role's time is one more line of its clock (`clocks.py`), so whoever meets at a barrier takes the later time, and no
barrier knows of it. A unit serves in the order in which it is asked, and roles ask in the order of their times. How
much a Step asks for is in `charges.py`; bank conflicts, instruction caches and other SMs are nowhere.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from attngen.plan import Step
from attngen.plan.steps import Product
from attngen.simulate.costs import Costs
from attngen.simulate.roles import RoleRun, Run, Wait

Unit = Literal["copy engine", "tensor core", "exponential unit", "arithmetic"]
UNITS: tuple[Unit, ...] = get_args(Unit)
"""What roles share. `arithmetic` stands for the issue of all other instructions; the copies of cp.async count as the
copy engine's, for it is the way from L2 that they share."""

TIME = "time"
"""The line of a clock that holds a role's time in cycles."""
SLICES = 8
"""Shared units serve a Step of the threads in so many turns, between which other roles have theirs: warp schedulers
change warps every cycle, and that is near enough."""


@dataclass(frozen=True)
class Interval:
    """A stretch of time.

    Attributes:
        unit: which unit is at work; None for what the role itself does or waits for.
        role: for which role: "consumer 1", with its block where several share the SM.
        step: class name of the Step that caused it: "Exponentiate".
        acc: name of the accumulator, where that is a GEMM; empty for others.
        block: number of the block of keys of the loop that the Step stands in, or where a tile is a block of keys, of
            queries; None outside.
        begin, end: in cycles.
    """

    unit: Unit | None
    role: str
    step: str
    acc: str
    block: int | None
    begin: int
    end: int


def now(role: RoleRun) -> int:
    """A role's time."""
    return role.clock.get(TIME, 0)


def when_due(role: RoleRun) -> Wait:
    """Let all roles go first whose time is before this one's."""
    return Wait(lambda: "its time", lambda: True, due=now(role))


@dataclass
class InFlight:
    """When what a role has started will have ended: its GEMMs, its copies not committed, its groups, its stores."""

    gemms: list[int] = field(default_factory=list)
    copies: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    stores: list[int] = field(default_factory=list)


class Units:
    """The units of one SM, and what the roles on it have in flight.

    Attributes:
        costs: the table that charges are worked out with.
        in_flight: of each role that was ever admitted.
    """

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.in_flight: dict[RoleRun, InFlight] = {}
        self._free: dict[Unit, int] = dict.fromkeys(UNITS, 0)  # from when on it has nothing queued
        self._intervals: list[Interval] = []
        self._names: dict[RoleRun, str] = {}

    def admit(self, role: RoleRun, name: str, begin: int) -> None:
        """Let a role begin at a time; its intervals bear the name."""
        role.clock[TIME] = begin
        self.in_flight[role] = InFlight()
        self._names[role] = name

    @property
    def role_names(self) -> tuple[str, ...]:
        """Those of all roles so far, each once, in the order in which they came."""
        return tuple(dict.fromkeys(self._names.values()))

    @property
    def intervals(self) -> tuple[Interval, ...]:
        """What was noted so far; of a unit's, alike ones that follow each other without a gap are one."""
        return tuple(_joined(self._intervals))

    def note(self, unit: Unit | None, step: Step, role: RoleRun, begin: int, end: int) -> None:
        """Write an interval down, where it is not empty."""
        if end > begin:
            acc = step.acc.name if isinstance(step, Product) else ""
            block = role.variables.get("n", role.variables.get("m"))
            self._intervals.append(
                Interval(unit, self._names[role], type(step).__name__, acc, block, begin, end)
            )

    def queue(self, unit: Unit, cycles: float, step: Step, role: RoleRun) -> int:
        """Let a unit work for a role as soon as it has done what was queued before; when it will be done."""
        begin = max(now(role), self._free[unit])
        end = begin + math.ceil(cycles)
        self._free[unit] = end
        self.note(unit, step, role, begin, end)
        return end

    def queue_in_slices(self, work: Mapping[Unit, float], step: Step, role: RoleRun) -> Run:
        """Let units work for the threads of a role, who wait for each slice; others have turns in between."""
        for i in range(SLICES):
            yield when_due(role)
            slices = {unit: _slice(cycles, i) for unit, cycles in work.items()}
            ends = [self.queue(unit, cycles, step, role) for unit, cycles in slices.items() if cycles]
            role.clock[TIME] = max(ends, default=now(role))


def _slice(cycles: float, i: int) -> int:
    """The i-th of `SLICES` parts, whole cycles that add up to `cycles`, rounded up."""
    whole = math.ceil(cycles)
    return whole * (i + 1) // SLICES - whole * i // SLICES


def _joined(intervals: Iterable[Interval]) -> Iterable[Interval]:
    last: dict[tuple[Unit | None, str], Interval] = {}
    for new in intervals:
        lane = (new.unit, new.role)
        old = last.get(lane)
        if old is not None and new.unit and new == replace(old, begin=old.end, end=new.end):
            new = replace(new, begin=old.begin)
        elif old is not None:
            yield old
        last[lane] = new
    yield from last.values()
