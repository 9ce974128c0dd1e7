"""Kernels for the GPU tests: of every schedule that this GPU runs, and many compiled at a time."""

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import attngen
from attngen.runtime.counters import COUNTERS, SLOTS, TileCounters

WARPGROUP_KINDS = ("warp_specialized", "pingpong")
KINDS = ("fa2", "serial", *WARPGROUP_KINDS)
HANG_SECONDS = 20
"""No test keeps the GPU busy for a tenth of that between two looks."""
COMPILERS = 8


@dataclass(frozen=True)
class Wanted:
    """A kernel; `schedule` and `tile` are more fields of its spec."""

    kind: str
    mask: str = "causal"
    inputs: str = "bf16"
    dims: tuple[int, int] = (64, 64)
    schedule: Mapping[str, Any] = field(default_factory=dict)
    tile: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> dict[str, Any]:
        return {
            "problem": {"head_dim": {"qk": self.dims[0], "v": self.dims[1]}},
            "mask": self.mask,
            "precision": {"inputs": self.inputs},
            "tile": dict(self.tile),
            "schedule": {"kind": self.kind, **self.schedule},
        }

    def compile(self) -> attngen.Kernel:
        return attngen.compile(self.spec)


def runs_here(kind: str) -> bool:
    return kind not in WARPGROUP_KINDS or torch.cuda.get_device_capability() == (9, 0)


def skip_unless_runs_here(kind: str) -> None:
    """Skip the test where the GPU does not run the schedule."""
    if not runs_here(kind):
        pytest.skip(f"{kind} needs Hopper")


def kernel(kind: str, *rest: Any, **more: Any) -> attngen.Kernel:
    """One kernel, `rest` as of `Wanted`; the test is skipped where the GPU does not run the schedule."""
    skip_unless_runs_here(kind)
    return Wanted(kind, *rest, **more).compile()


def compile_all(wanted: Sequence[Wanted]) -> list[attngen.Kernel]:
    """All of them, several at a time."""
    return compile_specs([each.spec for each in wanted])


def compile_specs(specs: Sequence[Mapping[str, Any]]) -> list[attngen.Kernel]:
    """Kernels of specs, several compiled at a time."""
    with ThreadPoolExecutor(COMPILERS) as pool:
        return list(pool.map(attngen.compile, specs))


def wait_for_gpu() -> None:
    """Synchronise, or fail where a kernel hangs: torch's own wait could not be interrupted."""
    done = torch.cuda.Event()
    done.record()
    deadline = time.monotonic() + HANG_SECONDS
    while not done.query():
        assert time.monotonic() < deadline, f"a kernel has not ended after {HANG_SECONDS} s"
        time.sleep(0.001)


def counters_are_zero(counters: TileCounters = COUNTERS) -> bool:
    """Whether every tile counter of this process is; nothing may be running."""
    from cuda.bindings import driver

    for device, address in counters.memory:
        found = ctypes.create_string_buffer(b"\xff" * (4 * SLOTS), 4 * SLOTS)
        with torch.cuda.device(device):
            (code,) = driver.cuMemcpyDtoH(ctypes.addressof(found), address, 4 * SLOTS)
        assert int(code) == 0, code
        if any(found.raw):
            return False
    return True


def captured(call: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of a call, and where it leaves what the call gives."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    return graph, found
