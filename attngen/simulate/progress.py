"""What a simulated call that takes long tells its user: what it will cost, and on a terminal how far it is.

It changes no value, and a call of a few seconds says nothing.
"""

import logging
import sys
from collections.abc import Callable
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Self

from attngen.simulate.traffic import Traffic

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

LONG = 10.0
"""Seconds from which on a call says what it will cost."""
SAMPLE = 1.0
"""Seconds that are measured before that."""
REDRAWN = 0.25
"""Seconds after which the bar is drawn anew."""

_log = logging.getLogger(__name__)


class Progress(Traffic):
    """The traffic of one call, which watches the clock; a context, at whose end the bar is gone.

    The one line is a warning of the logger `attngen.simulate.progress`, which Python writes to stderr unless the
    program has made other arrangements. The bar is for a stderr that is a terminal.
    """

    def __init__(self, total: Callable[[], int], clock: Callable[[], float] = monotonic) -> None:
        """Watch a call that executes `total()` FLOPs, which are counted only if it takes a while."""
        super().__init__()
        self._count_total = total
        self._clock = clock
        self._began: float | None = None
        self._flops_before = 0  # those of the first GEMM, for which the library is loaded
        self._next_look = 0.0
        self._bar: Bar | None = None
        self._has_told = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def count_gemm(self, times: int, padded: tuple[int, int, int], useful: tuple[int, int, int]) -> None:
        """Count `times` products of rows x cols, contracted over k, and look at the clock."""
        super().count_gemm(times, padded, useful)
        now = self._clock()
        if self._began is None:
            self._began, self._flops_before = now, self.flops
            self._next_look = now + SAMPLE
        elif now >= self._next_look:
            self._look(now - self._began)
            self._next_look = now + (REDRAWN if self._bar else SAMPLE)

    def _look(self, elapsed: float) -> None:
        """Tell what the call costs, as soon as it is known to take long; from then on draw the bar."""
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self.flops, refresh=True)
        if self._has_told:
            return
        total, rate = self._count_total(), (self.flops - self._flops_before) / elapsed
        if total < LONG * rate:
            return
        self._has_told = True
        _log.warning(
            "simulating %.0f GFLOPs on the CPU takes about %.0f s, at the %.1f GFLOP/s of the first %.1f s",
            total / 1e9,
            total / rate,
            rate / 1e9,
            elapsed,
        )
        if sys.stderr.isatty():
            self._bar = _bar(total)


def _bar(total: int) -> "Bar":
    """A bar on stderr, which is drawn when it is told to: no thread draws it."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    bar = Bar(console=Console(stderr=True), auto_refresh=False, transient=True)
    bar.add_task("simulating", total=total)
    bar.start()
    return bar
