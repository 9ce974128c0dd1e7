"""Memory for values that a call may put where an earlier one had its own."""

import threading

import torch

MOST_STREAMS = 64
"""For which memory is kept; a program with more starts over."""


class KeptMemory(threading.local):
    """Memory for the kept values of calls, held for each thread, device and stream: the largest asked for so far.

    Calls of a stream follow one another, so one's values may take the place of another's; but another thread's kernels
    may come between the two of a call. A graph that is captured keeps memory of its own.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], torch.Tensor] = {}

    def on(self, device: int, stream: int, q: torch.Tensor, size: int, keeps: bool = True) -> torch.Tensor:
        """At least `size` bytes on q's device, whose current stream has that raw handle; held only if it `keeps` them.

        What torch.compile runs before it records it (mode="reduce-overhead") is allocated where the recording will be,
        and torch takes all of that back but the outputs.
        """
        if not keeps or torch._C._cuda_getDevice() != device or torch._C._cuda_isCurrentStreamCapturing():
            return q.new_empty(size, dtype=torch.uint8)  # of another device nobody asks whether it captures
        memory = self._kept.get((device, stream))
        if memory is None or memory.numel() < size:
            if len(self._kept) >= MOST_STREAMS:
                self._kept.clear()
            memory = self._kept[device, stream] = q.new_empty(size, dtype=torch.uint8)
        return memory
