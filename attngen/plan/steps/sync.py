"""Steps that wait, and those that let others go on."""

from dataclasses import dataclass

from attngen.plan.places import Cursor, NamedBarriers
from attngen.plan.steps.step import Step


@dataclass(frozen=True)
class SyncThreads(Step):
    """Wait for all threads of the block; orders their shared and device memory accesses."""

    def __str__(self) -> str:
        return "sync threads"


@dataclass(frozen=True)
class SyncWarp(Step):
    """Wait for the threads of the warp, which has a program to itself; orders their shared memory accesses."""

    def __str__(self) -> str:
        return "sync warp"


@dataclass(frozen=True)
class WaitFull(Step):
    """Wait until the stage that the cursor stands at has been filled.

    Attributes:
        together: the compiler is told that a warp's threads go on together, which keeps what follows in uniform
            registers but takes a vote: for waits outside the loops over keys.
    """

    cursor: Cursor
    together: bool = False

    def __str__(self) -> str:
        return f"wait until {self.cursor.name} is full"


@dataclass(frozen=True)
class WaitEmpty(Step):
    """Wait until every consumer has released the stage that the cursor stands at."""

    cursor: Cursor

    def __str__(self) -> str:
        return f"wait until {self.cursor.name} is empty"


@dataclass(frozen=True)
class Release(Step):
    """Hand the stage back to its producer; one thread arrives, or one of each warp where the ring asks for it."""

    cursor: Cursor

    def __str__(self) -> str:
        return f"release {self.cursor.name}"


@dataclass(frozen=True)
class Publish(Step):
    """Say that the warpgroup has stored its part of the stage that the cursor stands at, each warp for itself."""

    cursor: Cursor

    def __str__(self) -> str:
        return f"publish {self.cursor.name}"


@dataclass(frozen=True)
class TakeTurn(Step):
    """Wait for this warpgroup's turn to issue GEMMs."""

    turn: NamedBarriers

    def __str__(self) -> str:
        return "take turn"


@dataclass(frozen=True)
class PassTurn(Step):
    """Give the turn to the next warpgroup, without waiting."""

    turn: NamedBarriers

    def __str__(self) -> str:
        return "pass turn to the next warpgroup"


@dataclass(frozen=True)
class SyncWarpgroup(Step):
    """Wait for all threads of the warpgroup; orders their shared memory accesses."""

    barriers: NamedBarriers

    def __str__(self) -> str:
        return "sync warpgroup"


@dataclass(frozen=True)
class SyncWarpgroups(Step):
    """Wait for all threads of the role's warpgroups; orders their shared memory accesses."""

    barriers: NamedBarriers

    def __str__(self) -> str:
        return "sync all warpgroups"


@dataclass(frozen=True)
class FenceAsync(Step):
    """Let the copy engine and wgmma see what this thread's ordinary stores wrote to shared memory."""

    def __str__(self) -> str:
        return "fence: stores before asynchronous reads"


@dataclass(frozen=True)
class Advance(Step):
    """Move a cursor to the next stage of its ring."""

    cursor: Cursor

    def __str__(self) -> str:
        return f"advance {self.cursor.name}"
