"""Where a role stands: in which tile, loops and rings, and what its threads know of what others have done."""

from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from attngen.plan import Axis, BlockIndex, Cursor, QueryRanks, RegTile, Role, Step
from attngen.simulate.barriers import StageBarriers
from attngen.simulate.clocks import Clock, Stamp
from attngen.simulate.faults import Rule, SimulationFault
from attngen.simulate.tile_source import Tile
from attngen.simulate.visits import Visited, ceil_div, rows_of

if TYPE_CHECKING:
    from attngen.simulate.blocks import Block


@dataclass
class Position:
    """Where a role stands in a ring: the next stage, and the parity of the phase it waits for there."""

    stage: int
    phase: int


class Standing:
    """Where a role stands, or one warpgroup of it.

    Attributes:
        name: for messages: "consumer 1".
        warpgroup: which of the role's; `warps` are those that it has.
        has_all_rows: it has keys of its own, of all rows of a tile.
        step: the one that it is at.
        tile: the tile it works on; `tile_number`, which one is next to be taken up.
        variables: what block indices may start from, loops' indices included.
        loops: names of the loops around the present Step, outermost first.
        walks: the blocks that each walk still comes to; `is_partial`, whether it masks the one it stands at.
        clock: what all its threads know.
        leader: what its first thread knows beside, who issues stores and releases the stages that GEMMs alone read.
        rank: the ranks and the block of queries at which it may add; None where it waits for its rank.
        sums_in_flight: something that it adds there may not stand in device memory.
    """

    def __init__(self, block: "Block", role: Role, warpgroup: int) -> None:
        self.name = f"{role.name} {warpgroup}" if role.warpgroups > 1 else role.name
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
        self.walks: dict[str, deque[Visited]] = {}
        self.is_partial: dict[str, bool] = {}
        self.clock = Clock()
        self.leader = Clock()
        self.rank: tuple[str, int] | None = None
        self.sums_in_flight = False
        self._is_one_thread = role.single_thread
        self._epoch = 0
        self._positions: dict[str, Position] = {}  # by the names of its cursors, which differ
        self._seen_by_some: set[str] = set()  # cursors at full stages that a slow thread may not have seen

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
        size = self.call.plan.block_m if axis == "queries" else self.call.plan.block_n
        own = range(size) if self.has_all_rows else self.own_rows(size)
        return max(0, min(len(own), self._left_of(axis, size) - own.start))

    @property
    def valid_rows_of_tile(self) -> int:
        """How many rows of the present block of queries exist, whoever has them."""
        size = self.call.plan.block_m
        return max(0, min(size, self._left_of("queries", size)))

    def _left_of(self, axis: Axis, size: int) -> int:
        """How much of the sequence the present block and all behind it have."""
        letter = "m" if axis == "queries" else "n"
        block = self.variables.get(letter, self.variables.get(f"{letter}_block", 0))
        length = self.tile.sequence(axis)[1]
        if axis == "queries":
            length = rows_of(self.call.plan, self.call.sizes, self.tile.members[0])
        return length - block * size

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

    # ---- faults ------------------------------------------------------------------------------------------------------
    def fault(self, rule: Rule, message: str, place: str = "") -> SimulationFault:
        """A fault of the present Step, to raise."""
        where = "".join(f", {name} = {self.variables[name]}" for name in self.loops)
        return SimulationFault(rule, message, step=self.step, place=place, where=f"{self.tile}{where}")
