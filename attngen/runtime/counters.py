"""Counters of tiles that kernels draw, and of parts of tiles: device memory that is 0 whenever no launch uses it.

A kernel leaves its counters at 0 (see `KernelEntry`), so nothing is reset here. Launches on one stream share them:
they follow one another, or wait for one another before they count. A launch that is captured into a graph gets some of
its own, for the graph may run on any stream. Nobody says when a graph is gone, so such counters are never handed out
again: 4 bytes for a kernel that draws tiles, and for each tile of one whose keys are split.
"""

import threading

import torch

from attngen.runtime.driver import zeroed_memory

SLOTS = 4096
"""Counters made at a time, per device, where a launch does not take more."""


class TileCounters:
    """Hands out the address of as many counters as a launch needs.

    Attributes:
        memory: (device, address) of what was made, SLOTS counters or more each.
    """

    def __init__(self) -> None:
        self.memory: list[tuple[int, int]] = []
        self._lock = threading.Lock()
        self._free: dict[int, range] = {}
        self._of_stream: dict[tuple[int, int], range] = {}

    def prepare(self, device: int, count: int = 1) -> None:
        """Have counters at hand, so that a launch seldom makes any."""
        with self._lock:
            self._fill(device, count)

    def address(self, device: int, stream: int, count: int = 1) -> int:
        """Those of a launch on that stream of that device, which are the current ones."""
        if torch._C._cuda_isCurrentStreamCapturing():
            return self._take(device, count).start
        found = self._of_stream.get((device, stream))
        if found is None or len(found) < count:
            found = self._of_stream[device, stream] = self._take(device, count)
        return found.start

    def _take(self, device: int, count: int) -> range:
        with self._lock:
            free = self._fill(device, count)
            self._free[device] = free[count:]
            return free[:count]

    def _fill(self, device: int, count: int) -> range:
        """What is free, and that is never too little; in the middle of a capture too."""
        free = self._free.get(device, range(0))
        if len(free) < count:
            size = max(SLOTS, count)
            start = self._make(device, size)
            self.memory.append((device, start))
            free = self._free[device] = range(start, start + 4 * size, 4)
        return free

    def _make(self, device: int, count: int) -> int:
        """Fresh counters; their zeros are there before any stream can use them."""
        return zeroed_memory(device, count)


COUNTERS = TileCounters()
"""Of this process."""
