"""Shared memory of one block: values, and who may touch them when.

A cell is what Steps touch as a whole: a stage of a buffer, or the rows of it that a warpgroup owns. It keeps the
stamps of its last accesses. To read it, one must know that what was written has been; to write it, that what was
read and written has been. A copy in flight owns its cells until it lands. Cells that share bytes share all this.

Ordinary stores and asynchronous reads (the copy engine's and wgmma's) go through different proxies: the threads that
stored must fence, and then meet, before anyone may start such a read.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

import torch

from attngen.dtypes import DType
from attngen.plan import PANEL_BYTES, Buffer, Program, Ring, walk
from attngen.plan.places import View
from attngen.simulate.barriers import stage_name
from attngen.simulate.clocks import Clock, Stamp
from attngen.simulate.contributions import Source
from attngen.simulate.faults import Rule
from attngen.simulate.zeros import Zeros

Complaint = tuple[Rule, str]
"""The broken rule, and how."""


class Cell:
    """A piece of shared memory: its values, rounded to the buffer's type and kept as f32, and its state.

    Attributes:
        name: of the stage: "k[1]", or "q" where there is only one.
        rows: of the stage.
        values: (members, rows, cols), None while nobody may count on them; of a ring's slot the number of a tile.
        valid_rows: rows that the last copy took from the sequence; the others are zero.
        source: what the last copy took; None of what threads stored.
        queries: of a tile of pairs that threads stored, or of products of such tiles, those that they are for.
        made_of: what a product is made of that threads stored, with how often it counts.
        copied_as: the format of what the last copy took, where that is another than the buffer's.
        in_flight: whether a copy into it has been started and has not landed.
        is_stored: whether ordinary stores wrote the values.
        fence: when the stores were fenced, if they were.
        rivals: cells that share bytes with it.
    """

    def __init__(self, name: str, rows: range = range(1), spans: tuple[tuple[int, int], ...] = ()) -> None:
        self.name = name
        self.rows = rows
        self.spans = spans
        self.values: torch.Tensor | int | None = None
        self.valid_rows = 0
        self.source: Source | None = None
        self.queries: set[Source | None] = set()
        self.made_of: Counter[Source | None] = Counter()
        self.copied_as: DType | None = None
        self.in_flight = False
        self.is_stored = False
        self.fence: Stamp | None = None
        self.rivals: tuple[Cell, ...] = ()
        self._reads: dict[str, int] = {}
        self._zeros = Zeros()
        self._write: Stamp | None = None
        self._lost_to = ""

    def objection_to_read(self, clock: Clock, line: str) -> Complaint | None:
        """Why one who knows this much may not read it now, if so; `line` is the reader's own."""
        if self.in_flight:
            return "race", f"{self.name} is read while a copy into it is in flight"
        if self.values is None:
            lost = f": {self._lost_to} has been written to its bytes" if self._lost_to else ""
            return "uninitialised read", f"{self.name} holds nothing{lost}"
        if self._write and not clock.knows(self._write):
            return "race", f"{self.name} is read; {_unordered(self._write.line, line, 'wrote')}"
        if who := self._zeros.unknown_to(clock, line):
            return "race", f"{self.name} is read; {_unordered(who, line, 'wrote zeros to')}"
        return None

    def objection_to_asynchronous_read(self, clock: Clock, fenced: Clock) -> Complaint | None:
        """Why the copy engine or wgmma may not read it, though threads might.

        Args:
            clock: what the reader knows.
            fenced: what it knew when it last fenced; that may be later than the stores, and by another than who stored.
        """
        if not self._zeros.are_fenced(clock):
            return (
                "not fenced",
                f"{self.name} holds zeros that threads stored, and who reads it knows of no fence",
            )
        if self.is_stored and self._write and fenced.knows(self._write):
            return None
        if self.is_stored and self.fence is None:
            return "not fenced", f"{self.name} holds what threads stored, and no FenceAsync followed"
        if self.is_stored and self.fence and not clock.knows(self.fence):
            return (
                "not fenced",
                f"{self.name} was stored and fenced, but the threads have not met since the fence",
            )
        return None

    def objection_to_write(self, clock: Clock, line: str) -> Complaint | None:
        """Why one who knows this much may not write it now, if so; `line` is the writer's own."""
        return self._objection_to_stores(clock, line, are_zeros=False)

    def _objection_to_stores(self, clock: Clock, line: str, are_zeros: bool) -> Complaint | None:
        for cell in (self, *self.rivals):
            shares = "" if cell is self else f" {cell.name}, whose bytes it shares,"
            if cell.in_flight:
                return "race", f"{self.name} is written while a copy into{shares or ' it'} is in flight"
            zeros = [] if are_zeros and cell is self else cell._zeros.stamps
            for verb, stamps in (
                ("read", cell._reads.items()),
                ("wrote", [*([cell._write] if cell._write else []), *zeros]),
            ):
                for stamp in stamps:
                    if not clock.knows(Stamp(*stamp)):
                        what = _unordered(stamp[0], line, verb, shares.removesuffix(",") or " it")
                        return "race", f"{self.name} is written; {what}"
        return None

    def objection_to_zeros(self, rows: torch.Tensor, clock: Clock, line: str) -> Complaint | None:
        """Why one who knows this much may not write zeros to some rows, (heads or 1, rows), if so.

        Where another has written zeros already nothing changes, not even for who reads meanwhile.
        """
        if self.in_flight:
            return "race", f"{self.name} is written while a copy into it is in flight"
        if self.values is None:
            return "uninitialised read", f"{self.name} holds nothing of which rows could become zeros"
        if not self._zeros.cover(rows):
            return self._objection_to_stores(clock, line, are_zeros=True)
        if self._write and not clock.knows(self._write):
            return "race", f"{self.name} is written; {_unordered(self._write.line, line, 'wrote')}"
        return None

    def zero(self, rows: torch.Tensor, stamp: Stamp) -> None:
        """Let some rows, (heads or 1, rows), be zeros, written then."""
        if not bool(rows.any()):
            return
        if isinstance(self.values, torch.Tensor) and self.values.numel():
            self.values = self.values.masked_fill(rows.unsqueeze(-1), 0.0)
        self._zeros.write(rows, stamp)

    def fence_zeros(self, stamp: Stamp) -> None:
        """Let asynchronous reads see the zeros that a line has written."""
        self._zeros.fence(stamp)

    def note_read(self, stamp: Stamp) -> None:
        """It is being read."""
        self._reads[stamp.line] = max(stamp.before, self._reads.get(stamp.line, 0))

    @property
    def readers(self) -> int:
        """How many have read what was last written."""
        return len(self._reads)

    def was_stored_by(self, line: str) -> bool:
        """Whether it holds what ordinary stores of that line wrote."""
        return self.is_stored and self._write is not None and self._write.line == line

    def take(self) -> None:
        """Make the bytes this cell's own: from now on nobody may count on what they held."""
        for cell in (self, *self.rivals):
            cell.values = cell.source = cell.copied_as = None
            cell._lost_to = "" if cell is self else self.name

    def fill(self, values: torch.Tensor | int, stamp: Stamp, is_stored: bool = False) -> None:
        """Let values appear, written then."""
        self.values, self._write, self._reads = values, stamp, {}
        self.in_flight, self.is_stored, self.fence = False, is_stored, None
        self._zeros = Zeros()


def _unordered(who: str, me: str, did: str, what: str = " it") -> str:
    if who == me:
        return f"other threads {did}{what}, and have not met this one since"
    return f"{who} {did}{what}, and nothing orders the two"


Cells = dict[tuple[str, int], tuple[Cell, ...]]
"""The cells of a block's buffers, by name and stage, in the order of their rows."""


def lay_out(buffers: tuple[Buffer, ...], parts: dict[str, int]) -> Cells:
    """The cells of a block's buffers, uninitialised.

    Args:
        buffers: where they are.
        parts: into how many equal parts the rows of a buffer are divided; 1 where it is not named.
    """
    cells = {
        (buffer.name, stage): tuple(_cells(buffer, stage, parts.get(buffer.name, 1)))
        for buffer in buffers
        for stage in range(buffer.stages)
    }
    every = [cell for part in cells.values() for cell in part]
    for cell in every:
        cell.rivals = tuple(other for other in every if other is not cell and _share_bytes(cell, other))
    return cells


def _cells(buffer: Buffer, stage: int, parts: int) -> Iterable[Cell]:
    begin = buffer.offset + stage * buffer.stage_bytes
    if parts > 1 and buffer.shared_by == "columns":  # whole panels, or registers in whatever order
        part = buffer.stage_bytes // parts
        for first in range(begin, begin + buffer.stage_bytes, part):
            yield Cell(
                stage_name(Ring(buffer.name, buffer.stages), stage),
                range(buffer.rows),
                ((first, first + part),),
            )
        return
    pitch = PANEL_BYTES if buffer.in_panels else buffer.stage_bytes // buffer.rows
    panels = range(0, buffer.stage_bytes, pitch * buffer.rows)
    name = stage_name(Ring(buffer.name, buffer.stages), stage)
    rows = buffer.rows // parts
    for first in range(0, buffer.rows, rows):
        spans = ((begin + at + first * pitch, begin + at + (first + rows) * pitch) for at in panels)
        yield Cell(name, range(first, first + rows), tuple(spans))


def _share_bytes(a: Cell, b: Cell) -> bool:
    return any(x[0] < y[1] and y[0] < x[1] for x in a.spans for y in b.spans)


def divided_buffers(program: Program) -> Iterator[str]:
    """Names of the buffers of which a program touches a warpgroup's own rows."""
    views = (place for step in walk(program) for place in vars(step).values() if isinstance(place, View))
    return (view.buffer.name for view in views if view.own_rows)
