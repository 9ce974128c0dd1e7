"""A role at work: a program as a coroutine, with the registers, the clock and what is in flight that are its own.

A blocking Step yields what it waits for. A role of several warpgroups runs once for each. What roles share, and who
resumes them, is in `blocks.py`; what each Step does, in the modules named in `run.py`.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from attngen.plan import Axis, BlockIndex, Cursor, Program, QueryRanks, RegTile, RegVec, Role, Step, View
from attngen.simulate.barriers import StageBarriers
from attngen.simulate.clocks import Clock, Stamp
from attngen.simulate.contributions import Source
from attngen.simulate.device_memory import NOTHING
from attngen.simulate.faults import Rule, SimulationFault
from attngen.simulate.shared_memory import Cell, Complaint
from attngen.simulate.tile_source import Tile
from attngen.simulate.visits import Visited, ceil_div, rows_of

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


@dataclass
class Position:
    """Where a role stands in a ring: the next stage, and the parity of the phase it waits for there."""

    stage: int
    phase: int


class RoleRun:
    """A role at work, or one warpgroup of it: its place in its program and its private state. Steps take one.

    Attributes:
        name: for messages: "consumer 1".
        warpgroup: which of the role's; `warps` are those that it has.
        has_all_rows: it has keys of its own, of all rows of a tile.
        tile: the tile it works on; `tile_number`, which one is next to be taken up.
        variables: what block indices may start from, loops' indices included.
        loops: names of the loops around the present Step, outermost first.
        walks: the blocks that each walk still comes to; `is_partial`, whether it masks the one it stands at.
        registers: values by place, (members, rows, cols) or (members, rows), f32, of this warpgroup's rows; of
            partial sums the total.
        clock: what all its threads know.
        leader: what its first thread knows beside, who issues stores and releases the stages that GEMMs alone read.
        contributions: of each accumulator of a gradient, how often it has which block in it.
        made_for: of each accumulator that is a product of a stored tile of pairs, the queries of those pairs.
        rank: the ranks and the block of queries at which it may add; None where it waits for its rank.
        sums_in_flight: something that it adds there may not stand in device memory.
        started: copies since the last commit, with the values that will land.
        groups: committed groups of copies in flight, oldest first.
        pages_found: the tile, and the first row of its block of keys, whose pages its lanes have looked up.
    """

    def __init__(self, block: "Block", role: Role, warpgroup: int) -> None:
        self.name = f"{role.name} {warpgroup}" if role.warpgroups > 1 else role.name
        self.program = role.program
        self.warpgroup, self.warpgroups = warpgroup, role.warpgroups
        self.warps = role.warps // role.warpgroups
        self.has_all_rows = block.call.plan.shares_keys
        self.block = block
        self.call = block.call
        self.device = block.call.device
        self.step: Step | None = None
        self.tile_number = block.first
        self.tile = block.tiles.of_block(block.first)
        self.variables: dict[str, int] = {}
        self.loops: list[str] = []
        self.registers: dict[str, torch.Tensor] = {}
        self.clock = Clock()
        self.leader = Clock()
        self.contributions: defaultdict[str, Counter[Source | None]] = defaultdict(Counter)
        self.made_for: dict[str, set[Source | None]] = {}
        self.rank: tuple[str, int] | None = None
        self.sums_in_flight = False
        self.started: list[tuple[Cell, torch.Tensor]] = []
        self.groups: deque[list[tuple[Cell, torch.Tensor]]] = deque()
        self.pages_found: tuple[Tile, int] | None = None
        self._is_one_thread = role.single_thread
        overlaid = [tile.overlays for tile in role.reg_tiles if tile.overlays]
        self._sharing = [tile for tile in role.reg_tiles if tile.overlays or tile in overlaid]
        self._epoch = 0
        self._fenced = Clock()  # what it knew at its last fence
        self._positions: dict[str, Position] = {}  # by the names of its cursors, which differ
        self._seen_by_some: set[str] = set()  # cursors at full stages that a slow thread may not have seen
        self._gemms_issued = 0
        self._owned_by_gemm: dict[str, int] = {}  # register place -> number of the GEMM
        self._stores_issued = 0
        self._written_by_first = 0
        self._stores_in_flight: list[str] = []  # the buffers they read
        self.walks: dict[str, deque[Visited]] = {}
        self.is_partial: dict[str, bool] = {}

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

    # ---- tiles and indices ------------------------------------------------------------------------------------------
    def start_tile(self, tile: Tile) -> None:
        """Take a tile up; its bounds become block indices."""
        plan = self.call.plan
        self.tile = tile
        self.walks.clear()
        self.variables = {
            "zero": 0,
            "m_max": ceil_div(tile.seqlen_q, plan.block_m),
            "n_end": ceil_div(tile.seqlen_k, plan.block_n),
        }
        if tile.n_block is not None:
            self.variables["n_block"] = tile.n_block
        if tile.m_block is not None:
            self.variables |= {"m_block": tile.m_block, **(tile.bounds._asdict() if tile.bounds else {})}

    def visits(self, m_block: int, n: int) -> bool:
        """Whether a block of rows of this tile's head visits a block of keys."""
        return n in self.call.visits.keys_of(m_block, self.tile.members[0])

    def index(self, block: BlockIndex) -> int:
        """The number a block index stands for here."""
        if block.base not in self.variables:
            raise self.fault("undefined index", f"{block.base} means nothing here", block.base)
        return self.variables[block.base] + block.offset

    def own_rows(self, rows: int) -> range:
        """Of that many rows, or columns, those that this warpgroup works on."""
        share = rows // self.warpgroups
        return range(self.warpgroup * share, (self.warpgroup + 1) * share)

    def block_rows(self, rows: int) -> int:
        """The rows of a block, of registers that have that many in all warpgroups."""
        return rows // self.warpgroups if self.has_all_rows else rows

    def rows_in_block(self, rows: int) -> range:
        """Of a block those rows that this warpgroup has, in registers that have so many in all."""
        return range(self.block_rows(rows)) if self.has_all_rows else self.own_rows(rows)

    def own_columns(self, registers: RegTile) -> range:
        """The columns of all rows that this warpgroup has in registers."""
        return range(self.warpgroup * registers.cols, (self.warpgroup + 1) * registers.cols)

    def keys_of_block(self, n: int, cols: int) -> range:
        """The keys that scores of so many columns are of, in a block of keys."""
        first = n * self.call.plan.block_n + (self.warpgroup * cols if self.has_all_rows else 0)
        return range(first, first + cols)

    @property
    def tile_numbers(self) -> list[int]:
        """The number of the tile of each of its heads."""
        return [self.call.tile_numbers[self.tile.m_block, member] for member in self.tile.members]

    @property
    def parts_of_tile(self) -> list[list[int]]:
        """Of each head of the tile the numbers of the tiles that share its rows, in the order of their keys.

        Where lengths lie the list may have had no room for the last of them.
        """
        call, heads = self.call, self.call.sizes.values[self.call.plan.listed_heads]
        found = []
        for number, member in zip(self.tile_numbers, self.tile.members, strict=True):
            first = number - member.part * heads
            found.append(list(range(first, len(call.tile_numbers), heads))[: member.parts])
        return found

    def count_part(self) -> bool:
        """Count the tile of each head among the parts of its rows; whether all of these have now been counted.

        Raises:
            SimulationFault: they have for one head, and not for another, although these run alike.
        """
        tickets, last = self.device.tickets, set()
        for parts in self.parts_of_tile:
            tickets[parts[0]] = (tickets[parts[0]] + 1) % len(parts)
            last.add(tickets[parts[0]] == 0)
        if len(last) > 1:
            raise self.fault("race", "of heads that run alike some have all parts, others not")
        return last.pop()

    def valid_extent(self, axis: Axis) -> int:
        """How much of the present block of queries, or of keys, is its own and exists."""
        letter, size = ("m", self.call.plan.block_m) if axis == "queries" else ("n", self.call.plan.block_n)
        block = self.variables.get(letter, self.variables.get(f"{letter}_block", 0))
        own = range(size) if self.has_all_rows else self.own_rows(size)
        length = self.tile.sequence(axis)[1]
        if axis == "queries":
            length = rows_of(self.call.plan, self.call.sizes, self.tile.members[0])
        return max(0, min(len(own), length - block * size - own.start))

    def names(self, dimensions: int) -> dict[str, Any]:
        """What an expression names of the tile and the call, broadcast to (members, ...) of so many dimensions."""
        batch, head, head_kv = (
            column.view(-1, *(1 for _ in range(dimensions - 1))) for column in self.tile.columns
        )
        return {
            "seqlen_q": self.tile.seqlen_q,
            "seqlen_k": self.tile.seqlen_k,
            **self.tile.starts,
            "b": batch,
            "h": head,
            "h_kv": head_kv,
            **self.call.sizes.declared.scalars,
        }

    def see_queries(self) -> None:
        """Take up the blocks of queries that see the tile's keys, for the head at hand."""
        if self.call.plan.key_blocks is not None:
            seen = self.call.visits.bounds_of(self.variables["n_block"], self.tile.members[0])
            self.variables |= dict(zip(("m_min", "m_full_begin", "m_full_end", "m_stop"), seen, strict=True))
        else:
            walk = self.call.visits.walk_of_keys(self.variables["n_block"], self.tile.members[0])
            self.tile = replace(self.tile, walk=walk)

    # ---- who knows what ---------------------------------------------------------------------------------------------
    @property
    def now(self) -> Stamp:
        """Of an ordinary access; those that follow the same meeting of its threads are one."""
        return Stamp(self.name, self._epoch)

    def meet(self) -> None:
        """All threads of the role know what each has done and knows."""
        self._seen_by_some.clear()
        self._epoch += 1
        self.clock.see(self.name, self._epoch)
        self.clock.join(self.leader)

    @property
    def leaders_clock(self) -> Clock:
        """What the first thread knows."""
        self.leader.join(self.clock)
        return self.leader

    def leave(self) -> Clock:
        """What its threads know and have done, for who waits until all have arrived; they do not meet one another."""
        self._epoch += 1
        clock = Clock()
        clock.join(self.leaders_clock)
        clock.see(self.name, self._epoch)
        return clock

    def position(self, cursor: Cursor | None) -> Position:
        """Where it stands in a ring."""
        if cursor is None:
            return Position(0, 0)
        found = self._positions.get(cursor.name)
        if found is None:
            found = self._positions[cursor.name] = Position(0, int(cursor.fills))
        return found

    def see_full(self, cursor: Cursor) -> None:
        """Some threads have seen the stage full, others may still have to look."""
        self._seen_by_some.add(cursor.name)

    def check_seen_by_all(self, cursor: Cursor) -> None:
        """Refuse to hand a stage back that may be filled anew before a slow thread has looked.

        Raises:
            SimulationFault: the threads have not met since.
        """
        if cursor.name in self._seen_by_some and not self._is_one_thread:
            name = self.stage_barriers(cursor).full.name
            raise self.fault("race", f"{name} is released, and not all threads have seen it full", name)

    def stage_barriers(self, cursor: Cursor) -> StageBarriers:
        """The mbarriers of the stage it stands at."""
        assert cursor.ring is not None
        copy = self.warpgroup if cursor.ring.copies > 1 else 0
        return self.block.rings[cursor.ring.name][copy * cursor.stages + self.position(cursor).stage]

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

    # ---- sums in one order ------------------------------------------------------------------------------------------
    def start_adding(self, ranks: QueryRanks, m: int) -> None:
        """Have something added to the sums of a block of queries from now on.

        Raises:
            SimulationFault: it is not at its rank there.
        """
        if self.rank != (ranks.name, m):
            raise self.fault(
                "race", f"block {m} is added to out of turn: {ranks} may say anything", ranks.name
            )
        self.sums_in_flight = True

    def pass_rank(self, ranks: QueryRanks, m: int) -> None:
        """Let the next one add to the sums of a block of queries.

        Raises:
            SimulationFault: it is not at its rank there, or its own sums may not stand there yet.
        """
        if self.rank != (ranks.name, m):
            raise self.fault("race", f"{ranks}[{m}] is counted up, whose rank nobody waited for", ranks.name)
        if self.sums_in_flight:
            raise self.fault(
                "race", f"{ranks}[{m}] is counted up, and what is added may be in flight", ranks.name
            )
        self.rank = None

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
                cell.fill(values, self.now)

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

    def fault(self, rule: Rule, message: str, place: str = "") -> SimulationFault:
        """A fault of the present Step, to raise."""
        where = "".join(f", {name} = {self.variables[name]}" for name in self.loops)
        return SimulationFault(rule, message, step=self.step, place=place, where=f"{self.tile}{where}")

    def _heed(self, complaint: Complaint | None, cell: Cell) -> None:
        if complaint:
            raise self.fault(*complaint, place=cell.name)
