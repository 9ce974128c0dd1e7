"""Zeros that warpgroups write over rows of a stage that a copy has filled, each for itself, and who knows of them.

Zeros over zeros change nothing, so who writes them need not know of another's; who reads must know of zeros, whoever
wrote them, in every row where there are any.
"""

import torch

from attngen.simulate.clocks import Clock, Stamp


class Zeros:
    """The zeros of a cell: (heads or 1, rows), true where they are, by who wrote them."""

    def __init__(self) -> None:
        self._written: dict[str, tuple[Stamp, torch.Tensor]] = {}
        self._fenced: dict[str, tuple[Stamp, torch.Tensor]] = {}

    @property
    def rows(self) -> torch.Tensor | None:
        """Where there are zeros; None if nowhere."""
        return _together(list(self._written.values()))

    @property
    def stamps(self) -> list[Stamp]:
        """When each who wrote some did so."""
        return [stamp for stamp, _ in self._written.values()]

    def cover(self, rows: torch.Tensor) -> bool:
        """Whether there are zeros in all of these rows."""
        return _cover(self.rows, rows)

    def write(self, rows: torch.Tensor, stamp: Stamp) -> None:
        """Let there be zeros in these rows too."""
        before = self._written.get(stamp.line)
        self._written[stamp.line] = (stamp, rows if before is None else before[1] | rows)

    def fence(self, stamp: Stamp) -> None:
        """Let asynchronous reads see zeros that a line has written; of those fenced before the first fence counts."""
        written, fenced = self._written.get(stamp.line), self._fenced.get(stamp.line)
        if written and not (fenced and _cover(fenced[1], written[1])):
            self._fenced[stamp.line] = (stamp, written[1])

    def unknown_to(self, clock: Clock, line: str) -> str | None:
        """Who wrote zeros of which one who knows this much does not know, the reader's own `line` first; None if all
        are known.
        """
        if self.rows is None or _cover(_known(self._written, clock), self.rows):
            return None
        lines = [by for by, (stamp, _) in self._written.items() if not clock.knows(stamp)]
        return line if line in lines else lines[0]

    def are_fenced(self, clock: Clock) -> bool:
        """Whether one who knows this much knows of fences behind zeros in all rows."""
        return self.rows is None or _cover(_known(self._fenced, clock), self.rows)


def _known(of: dict[str, tuple[Stamp, torch.Tensor]], clock: Clock) -> torch.Tensor | None:
    return _together([each for each in of.values() if clock.knows(each[0])])


def _together(of: list[tuple[Stamp, torch.Tensor]]) -> torch.Tensor | None:
    found: torch.Tensor | None = None
    for _, rows in of:
        found = rows if found is None else found | rows
    return found


def _cover(zeros: torch.Tensor | None, rows: torch.Tensor) -> bool:
    return not bool((rows if zeros is None else rows & ~zeros).any())
