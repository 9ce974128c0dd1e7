"""What a run of torch costs: memory at its peak, by the allocators themselves, and time."""

from collections.abc import Callable
from itertools import accumulate
from statistics import median
from time import perf_counter
from typing import Any

import torch

from attngen.check.timing import measure

Run = Callable[[], Any]
ROUNDS = 5
LONG = 2.0
"""Seconds of rounds on a CPU, after which no further one begins."""


def peak_bytes(run: Run, device: torch.device) -> int:
    """The most memory that is allocated at once beyond what is there before: results, and all on the way to them.

    On a CPU torch's profiler lists allocations of the caller's thread, internal buffers too; on a GPU its allocator
    knows.
    """
    if device.type != "cuda":
        return max(accumulate(_allocations(run)), default=0)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _allocations(run: Run) -> list[int]:
    """Bytes of each allocation of a run on a CPU, in order; negative where memory goes back.

    The profiler that came after this one keeps no order of allocations, and writes on stderr.
    """
    from torch._C._autograd import _disable_profiler_legacy, _enable_profiler_legacy
    from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig

    config = ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig())
    _enable_profiler_legacy(config)
    try:
        run()
    finally:
        events = [event for thread in _disable_profiler_legacy() for event in thread]
    kind: Any = "memory_alloc"  # which the stub of torch takes for a number
    return [event.cpu_memory_usage() for event in events if event.kind() == kind]


def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Have what torch keeps for all products of a type, once it has made one, before memory is measured."""
    one = torch.ones(1, 16, 16, dtype=dtype, device=device)
    torch.bmm(one, one) @ one


def median_seconds(run: Run, device: torch.device) -> float:
    """The median time of a run that has run before: of the device alone where that is a GPU, else of the clock."""
    if device.type == "cuda":
        return median(measure({"": run}, ROUNDS)[""]) / 1e3
    samples: list[float] = []
    while len(samples) < ROUNDS and sum(samples) < LONG:
        began = perf_counter()
        run()
        samples.append(perf_counter() - began)
    return median(samples)
