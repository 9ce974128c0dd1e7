"""Counters from which persistent kernels draw their tiles: device memory that is 0 whenever no launch uses it.

A kernel leaves its counter at 0 (see `KernelEntry`), so nothing is reset here. Launches on one stream share a counter:
they follow one another, or wait for one another before they draw. A launch that is captured into a graph gets one of
its own, for the graph may run on any stream. Nobody says when a graph is gone, so such a counter is never handed out
again: 4 bytes a captured launch, of which there are as many as the GPU has memory for.
"""

import threading

import torch

from attngen.runtime.driver import zeroed_memory

SLOTS = 4096
"""Counters made at a time, per device."""


class TileCounters:
    """Hands out the address of a counter for each launch.

    Attributes:
        memory: (device, address) of what was made, SLOTS counters each.
    """

    def __init__(self) -> None:
        self.memory: list[tuple[int, int]] = []
        self._lock = threading.Lock()
        self._free: dict[int, list[int]] = {}
        self._of_stream: dict[tuple[int, int], int] = {}

    def prepare(self, device: int) -> None:
        """Have counters at hand, so that a launch seldom makes any."""
        with self._lock:
            self._fill(device)

    def address(self, device: int, stream: int) -> int:
        """The counter of a launch on that stream of that device, which are the current ones."""
        if torch._C._cuda_isCurrentStreamCapturing():
            return self._take(device)
        found = self._of_stream.get((device, stream))
        if found is None:
            found = self._of_stream.setdefault((device, stream), self._take(device))
        return found

    def _take(self, device: int) -> int:
        with self._lock:
            return self._fill(device).pop()

    def _fill(self, device: int) -> list[int]:
        """What is free, and that is never nothing; in the middle of a capture too."""
        free = self._free.setdefault(device, [])
        if not free:
            start = self._make(device)
            self.memory.append((device, start))
            free += range(start, start + 4 * SLOTS, 4)
        return free

    def _make(self, device: int) -> int:
        """Fresh counters; their zeros are there before any stream can use them."""
        return zeroed_memory(device, SLOTS)


COUNTERS = TileCounters()
"""Of this process."""
