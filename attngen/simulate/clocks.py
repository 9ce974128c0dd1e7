"""Happens-before: who knows that what has happened.

What runs on a block of threads falls into lines: the ordinary accesses of a role, its GEMMs, its stores by the copy
engine, the copies into one stage. On a line one thing follows another; between lines only synchronisation orders. A
`Stamp` is a place on a line, a `Clock` says how far each line is known to have got. Two accesses of which neither is
known to the other when it begins may meet in any order, whatever order this run took.
Source: vector clocks, as in Flanagan and Freund, "FastTrack", PLDI 2009.
"""

from typing import NamedTuple


class Stamp(NamedTuple):
    """Something that happens: the one after `before` others of its line.

    Attributes:
        line: who does it, in words for messages.
    """

    line: str
    before: int


class Clock(dict[str, int]):
    """How many of each line's happenings have ended; of lines it does not name, none."""

    def knows(self, stamp: Stamp) -> bool:
        """Whether what the stamp means has ended."""
        return self.get(stamp.line, 0) > stamp.before

    def join(self, other: "Clock") -> None:
        """Know also what the other knows."""
        known = self.get
        for line, count in other.items():
            if count > known(line, 0):
                self[line] = count

    def see(self, line: str, count: int) -> None:
        """Know that the first `count` happenings of a line have ended."""
        self[line] = max(self.get(line, 0), count)
