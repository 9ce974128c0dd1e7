"""Shared memory of one block: values, and who may touch them when.

Only SyncThreads orders the warps of a block. Between two of them, an epoch, each warp may be anywhere; so
what was written in an epoch may not be read in it, and what was read or written may not be written in it. A
copy in flight owns its buffer until the wait that covers it; then it has landed for the waiting thread only,
and counts as written in the epoch of that wait. Buffers that share bytes share all this.
"""

import torch

from attngen.plan import Buffer
from attngen.simulate.faults import Rule

Complaint = tuple[Rule, str]
"""The broken rule, and how."""


class Stage:
    """One stage of a buffer: its values, rounded to the buffer's type and kept as f32, and its state.

    Attributes:
        values: (members, rows, cols), None while nobody may count on them.
        valid_rows: rows that the last copy took from the sequence; the others are zero.
        in_flight: whether a copy into it has been started and not waited for.
        read_in, written_in: the last epoch in which it was.
        rivals: stages that share bytes with it.
    """

    def __init__(self, buffer: Buffer, number: int) -> None:
        self.name = f"{buffer.name}[{number}]" if buffer.stages > 1 else buffer.name
        self.begin = buffer.offset + number * buffer.stage_bytes
        self.end = self.begin + buffer.stage_bytes
        self.values: torch.Tensor | None = None
        self.valid_rows = 0
        self.in_flight = False
        self.read_in = self.written_in = -1
        self.rivals: tuple[Stage, ...] = ()
        self._lost_to = ""

    def objection_to_read(self, epoch: int) -> Complaint | None:
        """Why it may not be read now, if it may not."""
        if self.in_flight:
            return "race", f"{self.name} is read while a copy into it is in flight"
        if self.values is None:
            lost = f": {self._lost_to} has been written to its bytes" if self._lost_to else ""
            return "uninitialised read", f"{self.name} holds nothing{lost}"
        if self.written_in == epoch:
            return "race", f"{self.name} is read, and was written since the last SyncThreads"
        return None

    def objection_to_write(self, epoch: int) -> Complaint | None:
        """Why it may not be written now, if it may not."""
        for stage in (self, *self.rivals):
            shares = "" if stage is self else f", whose bytes {self.name} shares,"
            if stage.in_flight:
                return "race", f"{self.name} is written while a copy into {stage.name}{shares} is in flight"
            if epoch in (stage.read_in, stage.written_in):
                how = "read" if stage.read_in == epoch else "written"
                return (
                    "race",
                    f"{self.name} is written; {stage.name}{shares} was {how} since the last SyncThreads",
                )
        return None

    def take(self) -> None:
        """Make the bytes this stage's own: from now on nobody may count on what they held."""
        for stage in (self, *self.rivals):
            stage.values = None
            stage._lost_to = "" if stage is self else self.name

    def fill(self, values: torch.Tensor, epoch: int) -> None:
        """Let values appear, written in this epoch."""
        self.values = values
        self.written_in = epoch


def lay_out(buffers: tuple[Buffer, ...]) -> dict[tuple[str, int], Stage]:
    """The stages of a block's buffers by (name, number), uninitialised."""
    stages = {(buffer.name, i): Stage(buffer, i) for buffer in buffers for i in range(buffer.stages)}
    for stage in stages.values():
        others = (other for other in stages.values() if other is not stage)
        stage.rivals = tuple(o for o in others if o.begin < stage.end and stage.begin < o.end)
    return stages
