"""Running the roles of one block: each role's program is a coroutine, and a small scheduler drives them.

A blocking Step yields what it waits for; the scheduler resumes a role when that has come. When every role
that is left waits, the block is deadlocked, and the fault says who waits for what.
"""

from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attngen.plan import BlockIndex, Cursor, KernelPlan, Plan, Program, RegTile, RegVec, Role, Step, View
from attngen.simulate.device_memory import NOTHING, DeviceMemory
from attngen.simulate.faults import Rule, SimulationFault
from attngen.simulate.shared_memory import Complaint, Stage, lay_out
from attngen.simulate.tiles import BlockBounds, Sizes, Tile, block_bounds, ceil_div


@dataclass(frozen=True)
class Wait:
    """What a role that cannot go on waits for."""

    what: str
    has_come: Callable[[], bool]


Run = Generator[Wait, None, None]
StepFunction = Callable[[Any, "RoleRun"], Run | None]
"""Runs one Step; a generator where it holds other Steps or may block."""


class Barrier:
    """What SyncThreads waits at: all roles of the block. `epoch` counts how often they have met."""

    def __init__(self, parties: int) -> None:
        self.parties = parties
        self.arrived = 0
        self.epoch = 0

    def arrive(self) -> None:
        """One more role is here; the last one opens the barrier."""
        self.arrived += 1
        if self.arrived == self.parties:
            self.arrived = 0
            self.epoch += 1


@dataclass(frozen=True)
class Call:
    """What one call fixes for all its blocks.

    Attributes:
        softmax_scale_log2: max(|softmax_scale|, FLT_MIN) * log2(e), rounded to f32.
        scale_is_negative: whether Q must be negated to make up for that.
        device: the tensors; without values in them the program is only counted.
        steps: the function of every Step.
        observer: called after every Step, or None.
    """

    plan: Plan
    sizes: Sizes
    softmax_scale_log2: float
    scale_is_negative: bool
    device: DeviceMemory
    steps: Mapping[type[Step], StepFunction]
    observer: "Callable[[Event], None] | None" = None


@dataclass(frozen=True)
class Event:
    """A Step has just been done.

    Attributes:
        step: which.
        tile: of the block that did it.
        indices: the loops around it, outermost first: {"m": 0, "n": 3}.
    """

    step: Step
    tile: Tile
    indices: dict[str, int]
    _role: "RoleRun"

    def value(self, place: RegTile | RegVec) -> torch.Tensor:
        """What a register place holds now: (rows, cols) or (rows,), f32."""
        return self._role.registers[place.name][0]


class Block:
    """One block of threads: its shared memory, its barrier and its roles."""

    def __init__(self, call: Call, kernel: KernelPlan, tile: Tile) -> None:
        self.call = call
        self.tiles = (tile,)
        self.stages = lay_out(kernel.buffers)
        self.barrier = Barrier(len(kernel.roles))
        self.rows_written: dict[tuple[str, int], int] = {}  # block m of a workspace -> epoch
        self.roles = [RoleRun(self, role) for role in kernel.roles]

    def run(self) -> None:
        """Run every role to its end.

        Raises:
            SimulationFault: a program broke a rule, or no role can go on.
        """
        programs = {role: role.run(role.program) for role in self.roles}
        waits: dict[RoleRun, Wait] = {}
        while programs:
            ready = [role for role in programs if role not in waits or waits[role].has_come()]
            if not ready:
                who = "; ".join(f"{role.name} waits for {wait.what}" for role, wait in waits.items())
                raise SimulationFault("deadlock", who, where=str(self.tiles[0]))
            for role in ready:
                waits.pop(role, None)
                try:
                    waits[role] = next(programs[role])
                except StopIteration:
                    del programs[role]
        for role in self.roles:
            role.finish()


class RoleRun:
    """A role at work: where it stands in its program, and its private state. Every Step function takes one.

    Attributes:
        tile: the tile it works on.
        variables: what block indices may start from, loops' indices included.
        loops: names of the loops around the present Step, outermost first.
        registers: values by place, (members, rows, cols) or (members, rows), f32; of partial sums the total.
        cursors: the stage each cursor stands at.
        started: copies since the last commit, with the values that will land.
        groups: committed groups of copies in flight, oldest first.
    """

    def __init__(self, block: Block, role: Role) -> None:
        self.name = role.name
        self.program = role.program
        self.block = block
        self.call = block.call
        self.device = block.call.device
        self.step: Step | None = None
        self.tile = block.tiles[0]
        self.variables: dict[str, int] = {}
        self.loops: list[str] = []
        self.registers: dict[str, torch.Tensor] = {}
        self.cursors: dict[Cursor, int] = {}
        self.started: list[tuple[Stage, torch.Tensor]] = []
        self.groups: deque[list[tuple[Stage, torch.Tensor]]] = deque()
        self._bounds: dict[int, BlockBounds] = {}

    def run(self, program: Program) -> Run:
        """The Steps of a program, one after another."""
        steps, observer = self.call.steps, self.call.observer
        for step in program:
            self.step = step
            inner = steps[type(step)](step, self)
            if inner is not None:
                yield from inner
            if observer is not None:
                observer(Event(step, self.tile, {name: self.variables[name] for name in self.loops}, self))

    def start_tile(self, tile: Tile) -> None:
        """Take a tile up; its bounds become block indices."""
        sizes, plan = self.call.sizes, self.call.plan
        self.tile = tile
        self.variables = {
            "zero": 0,
            "m_max": ceil_div(sizes.seqlen_q, plan.block_m),
            "n_end": ceil_div(sizes.seqlen_k, plan.block_n),
        }
        if tile.bounds is not None and tile.m_block is not None:
            self.variables |= {"m_block": tile.m_block, **tile.bounds._asdict()}

    def bounds(self, m_block: int) -> BlockBounds:
        """The blocks of keys that a block of rows of this tile's head visits."""
        if m_block not in self._bounds:
            self._bounds[m_block] = block_bounds(
                self.call.plan, self.call.sizes, m_block, self.tile.members[0]
            )
        return self._bounds[m_block]

    def index(self, block: BlockIndex) -> int:
        """The number a block index stands for here."""
        if block.base not in self.variables:
            raise self.fault("undefined index", f"{block.base} means nothing here", block.base)
        return self.variables[block.base] + block.offset

    @property
    def valid_query_rows(self) -> int:
        """Rows of the present block of queries that exist."""
        block = self.variables.get("m", self.variables.get("m_block", 0))
        return max(0, min(self.call.plan.block_m, self.call.sizes.seqlen_q - block * self.call.plan.block_m))

    # ---- registers ------------------------------------------------------------------------------------
    def read(self, place: RegTile | RegVec, partial: bool = False) -> torch.Tensor:
        """The values of a register place; `partial`: the Step takes each lane's own part of a sum."""
        if isinstance(place, RegVec) and place.partial != partial:
            kind = "one lane's part" if place.partial else "a whole value"
            raise self.fault("partial sum", f"{place} holds {kind} where the other is meant", place.name)
        if place.name not in self.registers:
            raise self.fault("uninitialised read", f"{place} was never written", place.name)
        return self.registers[place.name]

    def write(
        self, place: RegTile | RegVec, value: Callable[..., torch.Tensor], *operands: torch.Tensor | float
    ) -> torch.Tensor:
        """Write value(*operands) to a register place; where values are not wanted nothing is computed."""
        result = value(*operands) if self.device.holds_values else NOTHING
        self.registers[place.name] = result
        return result

    # ---- shared memory --------------------------------------------------------------------------------
    def stage(self, view: View) -> Stage:
        """The stage that a view means now."""
        number = self.cursors.get(view.cursor, 0) if view.cursor else 0
        return self.block.stages[view.buffer.name, number]

    def read_shared(self, view: View, for_update: bool = False) -> torch.Tensor:
        """The values of a stage, which other threads may have written: (members, rows, cols), f32.

        Args:
            view: which stage.
            for_update: each thread reads only what it is about to write.
        """
        stage, epoch = self.stage(view), self.block.barrier.epoch
        self._heed(stage.objection_to_read(epoch), stage)
        if not for_update:
            stage.read_in = epoch
        assert stage.values is not None
        return stage.values

    def write_shared(self, view: View, value: Callable[..., torch.Tensor], *operands: torch.Tensor) -> None:
        """Write value(*operands), already rounded to the buffer's type, by ordinary stores."""
        stage, epoch = self.stage(view), self.block.barrier.epoch
        self._heed(stage.objection_to_write(epoch), stage)
        stage.take()
        stage.fill(value(*operands) if self.device.holds_values else NOTHING, epoch)

    def start_copy(self, view: View, values: torch.Tensor, valid_rows: int) -> None:
        """Start an asynchronous copy; the values land at the wait that covers its group."""
        stage = self.stage(view)
        self._heed(stage.objection_to_write(self.block.barrier.epoch), stage)
        stage.take()
        stage.valid_rows, stage.in_flight = valid_rows, True
        self.started.append((stage, values))

    def land_copies(self, pending: int) -> None:
        """Wait for all groups but the `pending` newest."""
        while len(self.groups) > pending:
            for stage, values in self.groups.popleft():
                stage.in_flight = False
                stage.fill(values, self.block.barrier.epoch)

    def finish(self) -> None:
        """End the program.

        Raises:
            SimulationFault: copies are in flight.
        """
        self.step = None
        for stage, _ in (*self.started, *(copy for group in self.groups for copy in group)):
            raise self.fault(
                "never landed", f"the program ends with a copy into {stage.name} in flight", stage.name
            )

    # ---- faults ---------------------------------------------------------------------------------------
    def fault(self, rule: Rule, message: str, place: str = "") -> SimulationFault:
        """A fault of the present Step, to raise."""
        where = "".join(f", {name} = {self.variables[name]}" for name in self.loops)
        return SimulationFault(rule, message, step=self.step, place=place, where=f"{self.tile}{where}")

    def _heed(self, complaint: Complaint | None, stage: Stage) -> None:
        if complaint:
            raise self.fault(*complaint, place=stage.name)
