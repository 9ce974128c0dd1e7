"""Where roles meet: SyncThreads, the mbarriers of a ring, the named barriers of warpgroups.

A barrier counts arrivals. When all have come a phase is complete, and whoever waits for it knows what those who
arrived knew. No barrier here blocks anyone: a Step asks whether its phase is complete, and yields until it is.
"""

from collections.abc import Callable
from dataclasses import dataclass

from attngen.plan import Ring
from attngen.simulate.clocks import Clock


class Barrier:
    """A barrier of a block.

    Attributes:
        parties: arrivals that complete a phase.
        arrived: arrivals in the present phase.
        completed: phases that are complete.
        clock: what those who arrived in the last complete phase knew.
    """

    def __init__(self, parties: int) -> None:
        self.parties = parties
        self.arrived = 0
        self.completed = 0
        self.clock = Clock()
        self._gathered = Clock()

    def arrive(self, clock: Clock) -> None:
        """One more is here, who knows this much."""
        self._gathered.join(clock)
        self.arrived += 1
        if self.arrived == self.parties:
            self._all_have_arrived()

    def _all_have_arrived(self) -> None:
        self.completed += 1
        self.arrived = 0
        self.clock, self._gathered = self._gathered, Clock(self._gathered)


class Mbarrier(Barrier):
    """One of the two barriers of a stage of a ring: its phase completes when all have arrived and all bytes landed.

    A copy lands as late as it may: when somebody waits for it. Until then the phase is open.

    Attributes:
        name: for messages: "k[0]".
        landings: what completes the copies in flight, in order.
    """

    def __init__(self, name: str, parties: int) -> None:
        super().__init__(parties)
        self.name = name
        self.landings: list[Callable[[], None]] = []

    @property
    def awaits_bytes(self) -> bool:
        """Whether all have arrived and only bytes are missing."""
        return self.arrived == self.parties

    def announce(self, landing: Callable[[], None]) -> None:
        """Let the phase wait for a copy in flight."""
        self.landings.append(landing)

    def expect(self, landing: Callable[[], None], clock: Clock) -> None:
        """Arrive, and announce a copy in flight."""
        self.announce(landing)
        self.arrive(clock)

    def land(self) -> None:
        """Let the bytes land that are missing, if any are."""
        if self.awaits_bytes:
            for landing in self.landings:
                landing()
            self.landings.clear()
            self._gathered.see(copies_into(self.name), self.completed + 1)
            super()._all_have_arrived()

    def _all_have_arrived(self) -> None:
        if not self.landings:
            super()._all_have_arrived()


def copies_into(stage: str) -> str:
    """The line of the copies into a stage."""
    return f"the copy into {stage}"


class NamedBarrier(Barrier):
    """A hardware barrier, at which some wait and others only count.

    Attributes:
        waiting: those who wait in the present phase.
    """

    def __init__(self, parties: int) -> None:
        super().__init__(parties)
        self.waiting = 0

    @property
    def wakes_nobody(self) -> bool:
        """Whether one more arrival, by one who does not wait, would complete a phase for which nobody waits."""
        return self.waiting == 0 and self.arrived + 1 == self.parties

    def _all_have_arrived(self) -> None:
        self.waiting = 0
        super()._all_have_arrived()


@dataclass(frozen=True)
class StageBarriers:
    """What guards one stage of a ring."""

    full: Mbarrier
    empty: Mbarrier


def stage_barriers(ring: Ring, consumers: int) -> tuple[StageBarriers, ...]:
    """The mbarriers of every stage: its producer arrives at `full`, each consumer at `empty`.

    Of a ring of which each warpgroup has one those of the first come first, and one reader arrives at `empty`.
    """
    names = [
        stage_name(ring, stage) + (f" of warpgroup {copy}" if ring.copies > 1 else "")
        for copy in range(ring.copies)
        for stage in range(ring.stages)
    ]
    readers = consumers if ring.copies == 1 else 1
    return tuple(StageBarriers(Mbarrier(name, ring.loads), Mbarrier(name, readers)) for name in names)


def stage_name(ring: Ring, stage: int) -> str:
    """A stage in messages: "k[1]", or "q" where there is only one."""
    return f"{ring.name}[{stage}]" if ring.stages > 1 else ring.name
