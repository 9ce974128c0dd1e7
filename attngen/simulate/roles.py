"""A role at work: a program as a coroutine, with the registers and what is in flight that are its own.

A blocking Step yields what it waits for. A role of several warpgroups runs once for each. What roles share, and who
resumes them, is in `blocks.py`; what each Step does, in the modules named in `run.py`.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attngen.plan import Program, RegTile, RegVec, Role, Step, View
from attngen.simulate.clocks import Clock, Stamp
from attngen.simulate.contributions import Source
from attngen.simulate.device_memory import NOTHING
from attngen.simulate.shared_memory import Cell, Complaint
from attngen.simulate.standing import Standing
from attngen.simulate.tile_source import Tile

if TYPE_CHECKING:
    from attngen.simulate.blocks import Block


@dataclass(frozen=True)
class Wait:
    """What a role that cannot go on waits for.

    Attributes:
        what: says it in words, as it stands when asked.
        due: where time is simulated, when the role wants to go on; those that are due first go first.
    """

    what: Callable[[], str]
    has_come: Callable[[], bool]
    due: int = 0


Run = Generator[Wait, None, None]
StepFunction = Callable[[Any, "RoleRun"], Run | None]
"""Runs one Step; a generator where it holds other Steps or may block."""


@dataclass(frozen=True)
class Event:
    """A Step has just been done.

    Attributes:
        step: which.
        tile: of the block that did it.
        role: who did it.
        indices: the loops around it, outermost first: {"m": 0, "n": 3}.
    """

    step: Step
    tile: Tile
    role: "RoleRun"
    indices: dict[str, int]

    def value(self, place: RegTile | RegVec) -> torch.Tensor:
        """What a register place holds now: (rows, cols) or (rows,), f32; of a role of warpgroups its own rows."""
        return self.role.registers[place.name][0]


class RoleRun(Standing):
    """A role at work, or one warpgroup of it: its registers, and what it has in flight. Steps take one.

    Attributes:
        program: what it does.
        registers: values by place, (members, rows, cols) or (members, rows), f32, of this warpgroup's rows; of
            partial sums the total.
        contributions: of each accumulator of a gradient, how often it has which block in it.
        made_for: of each accumulator that is a product of a stored tile of pairs, the queries of those pairs.
        started: copies since the last commit, with the values that will land.
        groups: committed groups of copies in flight, oldest first.
        pages_found: the tile, and the first row of its block of keys, whose pages its lanes have looked up.
    """

    def __init__(self, block: "Block", role: Role, warpgroup: int) -> None:
        super().__init__(block, role, warpgroup)
        self.program = role.program
        self.registers: dict[str, torch.Tensor] = {}
        self.contributions: defaultdict[str, Counter[Source | None]] = defaultdict(Counter)
        self.made_for: dict[str, set[Source | None]] = {}
        self.started: list[tuple[Cell, torch.Tensor]] = []
        self.groups: deque[list[tuple[Cell, torch.Tensor]]] = deque()
        self.pages_found: tuple[Tile, int] | None = None
        overlaid = [tile.overlays for tile in role.reg_tiles if tile.overlays]
        self._sharing = [tile for tile in role.reg_tiles if tile.overlays or tile in overlaid]
        self._fenced = Clock()  # what it knew at its last fence
        self._gemms_issued = 0
        self._owned_by_gemm: dict[str, int] = {}  # register place -> number of the GEMM
        self._stores_issued = 0
        self._written_by_first = 0
        self._stores_in_flight: list[str] = []  # the buffers they read

    def run(self, program: Program) -> Run:
        """The Steps of a program, one after another."""
        steps, observer = self.call.steps, self.call.observer
        for step in program:
            self.step = step
            inner = steps[type(step)](step, self)
            if inner is not None:
                yield from inner
            if observer is not None:
                indices = {name: self.variables[name] for name in self.loops}
                if "visit.n" in self.variables:
                    indices["n"] = self.variables["visit.n"]
                observer(Event(step, self.tile, self, indices))

    # ---- registers --------------------------------------------------------------------------------------------------
    def read(self, place: RegTile | RegVec, partial: bool = False) -> torch.Tensor:
        """The values of a register place; `partial`: the Step takes each lane's own part of a sum."""
        if isinstance(place, RegVec) and place.partial != partial:
            kind = "one lane's part" if place.partial else "a whole value"
            raise self.fault("partial sum", f"{place} holds {kind} where the other is meant", place.name)
        self._check_not_owned(place, "read")
        if place.name not in self.registers:
            raise self.fault("uninitialised read", f"{place} was never written", place.name)
        return self.registers[place.name]

    def write(
        self, place: RegTile | RegVec, value: Callable[..., torch.Tensor], *operands: torch.Tensor | float
    ) -> torch.Tensor:
        """Write value(*operands) to a register place; where values are not wanted nothing is computed."""
        others = self._in_the_same_registers(place)
        for each in (place, *others):
            self._check_not_owned(each, "written")
        result = value(*operands) if self.device.holds_values else NOTHING
        for other in others:
            self.registers.pop(other.name, None)
        self.registers[place.name] = result
        return result

    def _in_the_same_registers(self, place: RegTile | RegVec) -> list[RegTile]:
        """The tiles whose values are lost where a place is written."""
        return [
            other
            for other in self._sharing
            if other.name != place.name
            and (other.overlays or other) == (getattr(place, "overlays", None) or place)
        ]

    def _check_not_owned(self, place: RegTile | RegVec, how: str) -> None:
        if place.name in self._owned_by_gemm:
            raise self.fault("race", f"{place} is {how}, and no WaitGemm has given it back", place.name)

    # ---- GEMMs in flight --------------------------------------------------------------------------------------------
    @property
    def _gemm_line(self) -> str:
        return f"a GEMM of {self.name}"

    def read_by_gemm(self, view: View) -> torch.Tensor:
        """An operand in shared memory, read until the GEMM that is about to be issued ends: (members, rows, cols)."""
        return self._read_asynchronously(view, self.clock, Stamp(self._gemm_line, self._gemms_issued))

    def issue_gemm(self, *registers: RegTile) -> None:
        """Start a GEMM, which owns these registers from now on."""
        self._owned_by_gemm |= dict.fromkeys((place.name for place in registers), self._gemms_issued)
        self._gemms_issued += 1

    def land_gemms(self, pending: int, lands: tuple[RegTile, ...]) -> None:
        """Wait for all GEMMs but the `pending` newest, and take back the registers that are named."""
        done = self._gemms_issued - pending
        for place in lands:
            if self._owned_by_gemm.get(place.name, -1) >= done:
                raise self.fault("race", f"{place} is taken back from a GEMM in flight", place.name)
            self._owned_by_gemm.pop(place.name, None)
        self._seen_by_some.clear()  # a GEMM is issued by all threads
        self.clock.see(self._gemm_line, done)

    # ---- stores in flight -------------------------------------------------------------------------------------------
    @property
    def _store_line(self) -> str:
        return f"a store of {self.name}"

    def read_by_store(self, view: View) -> torch.Tensor:
        """What the first thread has the copy engine write from now on: (members, rows, cols)."""
        values = self._read_asynchronously(
            view, self.leaders_clock, Stamp(self._store_line, self._stores_issued)
        )
        self._stores_issued += 1
        self._stores_in_flight.append(view.buffer.name)
        return values

    def land_stores(self) -> None:
        """The first thread waits until its stores have read shared memory."""
        self._stores_in_flight.clear()
        self.leader.see(self._store_line, self._stores_issued)

    # ---- shared memory ----------------------------------------------------------------------------------------------
    def cells(self, view: View) -> tuple[Cell, ...]:
        """The cells that a view means now."""
        parts = self.block.cells[view.buffer.name, self.position(view.cursor).stage]
        return parts[self.warpgroup : self.warpgroup + 1] if view.own_rows else parts

    def valid_rows(self, view: View) -> int:
        """How many of the view's rows were taken from the sequence."""
        found = [cell.valid_rows for cell in self.cells(view)]
        return sum(found) if view.buffer.shared_by == "rows" else max(found)

    def read_shared(self, view: View, for_update: bool = False) -> torch.Tensor:
        """The values of a stage, which other threads may have written: (members, rows, cols), f32.

        Args:
            view: which stage.
            for_update: each thread reads only what it is about to write.
        """
        for cell in self.cells(view):
            self._heed(cell.objection_to_read(self.clock, self.name), cell)
            if not for_update:
                cell.note_read(self.now)
        return self._values(view)

    def _read_asynchronously(self, view: View, clock: Clock, stamp: Stamp) -> torch.Tensor:
        for cell in self.cells(view):
            self._heed(cell.objection_to_read(clock, self.name), cell)
            self._heed(cell.objection_to_asynchronous_read(clock, self._fenced), cell)
            cell.note_read(stamp)
        return self._values(view)

    def _values(self, view: View) -> torch.Tensor:
        values = [cell.values for cell in self.cells(view) if isinstance(cell.values, torch.Tensor)]
        if len(values) == 1:
            return values[0]
        along = -2 if view.buffer.shared_by == "rows" else -1
        return torch.cat(values, dim=along if self.device.holds_values else 0)

    def write_shared(self, view: View, value: Callable[..., torch.Tensor], *operands: torch.Tensor) -> None:
        """Write value(*operands), already rounded to the buffer's type, by ordinary stores."""
        values = value(*operands) if self.device.holds_values else NOTHING
        for cell, part in self._divide(view, values):
            self._heed(cell.objection_to_write(self.clock, self.name), cell)
            cell.take()
            cell.fill(part, self.now, is_stored=True)
            if self._is_one_thread:
                self.meet()

    def zero_rows(self, view: View, rows: torch.Tensor) -> None:
        """Write zeros over some rows, (members or 1, rows), of a stage that a copy has filled, by ordinary stores."""
        for cell in self.cells(view):
            own = rows[:, cell.rows.start : cell.rows.stop]
            self._heed(cell.objection_to_zeros(own, self.clock, self.name), cell)
            cell.zero(own, self.now)

    def write_by_first_thread(self, view: View, value: Callable[..., torch.Tensor]) -> None:
        """Write value() by stores of the first thread, which knows of them at once."""
        values = value() if self.device.holds_values else NOTHING
        stamp = Stamp(f"the first thread of {self.name}", self._written_by_first)
        for cell, part in self._divide(view, values):
            self._heed(cell.objection_to_write(self.leaders_clock, self.name), cell)
            cell.take()
            cell.fill(part, stamp, is_stored=True)
        self._written_by_first += 1
        self.leader.see(stamp.line, self._written_by_first)

    def fence_stores(self) -> None:
        """Let asynchronous reads see what this role has stored, once its threads have met; its own, all it knows."""
        self._fenced.join(self.leaders_clock if self._is_one_thread else self.clock)
        for parts in self.block.cells.values():
            for cell in parts:
                if cell.was_stored_by(self.name):
                    cell.fence = self.now
                cell.fence_zeros(self.now)

    def start_copy(
        self, view: View, values: torch.Tensor, valid_rows: int, source: Source | None
    ) -> list[tuple[Cell, torch.Tensor]]:
        """Start an asynchronous copy: its cells belong to it until they are filled.

        Returns:
            what will land where.
        """
        parts = list(self._divide(view, values))
        for cell, _ in parts:
            self._heed(cell.objection_to_write(self.clock, self.name), cell)
            cell.take()
            cell.source = source
            cell.valid_rows = valid_rows
            if not view.buffer.is_transposed:
                cell.valid_rows = max(0, min(len(cell.rows), valid_rows - cell.rows.start))
            cell.in_flight = True
        return parts

    def land_copies(self, pending: int) -> None:
        """Wait for all groups of this thread's copies but the `pending` newest."""
        while len(self.groups) > pending:
            for cell, values in self.groups.popleft():
                cell.fill(values, self.now, is_stored=True)

    def _divide(self, view: View, values: torch.Tensor) -> Iterator[tuple[Cell, torch.Tensor]]:
        """The view's cells, each with its rows of the values."""
        cells = self.cells(view)
        if len(cells) == 1 or not self.device.holds_values:
            yield from ((cell, values) for cell in cells)
            return
        for cell in cells:
            yield cell, values[..., cell.rows.start : cell.rows.stop, :]

    # ---- the tile's number ------------------------------------------------------------------------------------------
    def publish_tile(self, takers: int) -> None:
        """Leave the number of the next tile where as many others find it; all must have taken the one before."""
        slot = self.block.tile_slot
        self._heed(slot.objection_to_write(self.clock, self.name), slot)
        if slot.values is not None and slot.readers < takers:
            message = f"{slot.name} is written, and {slot.readers} of {takers} have taken the number in it"
            raise self.fault("race", message, slot.name)
        slot.fill(self.tile_number, self.now)
        self.meet()

    def take_tile(self) -> None:
        """Read the number of the next tile."""
        slot = self.block.tile_slot
        self._heed(slot.objection_to_read(self.clock, self.name), slot)
        slot.note_read(self.now)
        assert isinstance(slot.values, int)
        self.tile_number = slot.values

    # ---- end and faults ---------------------------------------------------------------------------------------------
    def finish(self) -> None:
        """End the program.

        Raises:
            SimulationFault: something of its own is in flight.
        """
        self.step = None
        for cell, _ in (*self.started, *(copy for group in self.groups for copy in group)):
            raise self.fault(
                "never landed", f"the program ends with a copy into {cell.name} in flight", cell.name
            )
        for name in self._owned_by_gemm:
            raise self.fault("never landed", f"the program ends with a GEMM on {name} in flight", name)
        for name in self._stores_in_flight:
            raise self.fault("never landed", f"the program ends while a store may still read {name}", name)

    def _heed(self, complaint: Complaint | None, cell: Cell) -> None:
        if complaint:
            raise self.fault(*complaint, place=cell.name)
