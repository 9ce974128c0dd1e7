"""Counters from which persistent kernels draw their tiles: device memory that is 0 whenever no launch uses it.

A kernel leaves its counter at 0 (see `KernelEntry`), so nothing is reset here. Launches on one stream follow one
another and share a counter; a launch that is captured into a graph gets one of its own, for the graph may run on any
stream.
"""

import threading

import torch

SLOTS = 4096
"""Counters made at a time, per device."""


class TileCounters:
    """Hands out the address of a counter for each launch."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: dict[int, list[int]] = {}
        self._of_stream: dict[tuple[int, int], int] = {}
        self._memory: list[torch.Tensor] = []

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
            free = self._free.setdefault(device, [])
            if not free and torch._C._cuda_isCurrentStreamCapturing():
                slot = torch.zeros(1, dtype=torch.int32, device=device)  # zeroed by the graph itself
                self._memory.append(slot)
                return slot.data_ptr()
            if not free:
                free += self._make(device)
            return free.pop()

    def _make(self, device: int) -> list[int]:
        """Fresh counters; their zeros are there before any stream can use them."""
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(side):
            slots = torch.zeros(SLOTS, dtype=torch.int32, device=device)
        side.synchronize()
        self._memory.append(slots)
        return [slots.data_ptr() + 4 * i for i in range(SLOTS)]


COUNTERS = TileCounters()
"""Of this process."""
