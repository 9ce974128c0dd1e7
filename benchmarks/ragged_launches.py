"""What a ragged call costs beside its attention: the launch that lists tiles, and the host.

A part of `bench_ragged.py`.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from blocks_and_sinks import HEAD_DIM, HEADS, compiled, normal
from figures import Figure, Point, Row

SEQUENCES, TOKENS = 1000, 65536
IN_GRAPH = 20
"""Launches of one captured graph."""
CALLS = 50
"""Calls of the host that are queued before the GPU is waited for: launches of lists too they are at most 100."""
RAGGED = {"queries": "ragged", "keys": "ragged"}


def starts(count: int, tokens: int, device: str) -> torch.Tensor:
    """Where so many sequences of random lengths begin, and the end of the last: i32, on the device."""
    cuts = sorted(random.Random(0).choices(range(tokens + 1), k=count - 1))
    return torch.tensor([0, *cuts, tokens], dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Listing:
    """The launch that lists the tiles of many sequences, by a CUDA graph of `IN_GRAPH` of them.

    Attributes:
        launch: makes a list.
    """

    launch: Callable[[], Any]

    def measure(self, rounds: int) -> Row:
        """Microseconds of device time for a launch."""
        self.launch()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(IN_GRAPH):
                self.launch()
        samples = []
        for _ in range(rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) / IN_GRAPH)
        us = median(samples) * 1e3
        figure = Figure(f"a launch among {IN_GRAPH} of a CUDA graph", us, at_most=4.0, unit=" us")
        return {"ms": {"list": samples}, "figures": [figure]}


@dataclass(frozen=True)
class OnHost:
    """What calls take of the host, on tensors that cost the GPU next to nothing.

    Attributes:
        calls: by name.
        figures: of the microseconds of each.
    """

    calls: dict[str, Callable[[], Any]]
    figures: Callable[[dict[str, float]], list[Figure]]

    def measure(self, rounds: int) -> Row:
        """Microseconds of the host for a call; none is waited for, and the queue of launches never gets full."""
        samples: dict[str, list[float]] = {name: [] for name in self.calls}
        for _ in range(3 * rounds):
            for name, call in self.calls.items():
                call()
                torch.cuda.synchronize()
                began = time.perf_counter()
                for _ in range(CALLS):
                    call()
                samples[name].append((time.perf_counter() - began) / CALLS * 1e3)
                torch.cuda.synchronize()
        figures = self.figures({name: median(times) * 1e3 for name, times in samples.items()})
        return {"ms": samples, "figures": figures}


def listing(device: str = "cuda") -> Listing:
    """The list of 1,000 sequences, causal."""
    cut = starts(SEQUENCES, TOKENS, device)
    q, k, v = normal(3, (TOKENS, HEADS, HEAD_DIM), device)
    kernel = compiled({"problem": {"head_dim": HEAD_DIM, **RAGGED}, "mask": "causal"}, q)
    return Listing(lambda: kernel.work(q, k, v, cu_seqlens_q=cut, cu_seqlens_k=cut))


def on_host(device: str = "cuda") -> OnHost:
    """A dense call, and a ragged one whose list was made before, or is made by it."""
    q, k, v = normal(3, (1, 64, 2, 64), device)
    rows = (q[0], k[0], v[0])
    dense = compiled({"problem": {"head_dim": 64}, "mask": "causal"}, q)
    ragged = compiled({"problem": {"head_dim": 64, **RAGGED}, "mask": "causal"}, q)
    cut = starts(2, 64, device)
    said = {"cu_seqlens_q": cut, "cu_seqlens_k": cut, "max_seqlen_q": 64, "max_seqlen_k": 64}
    work = ragged.work(*rows, **said)
    calls = {
        "dense": lambda: dense(q, k, v),
        "prepared ragged": lambda: ragged(*rows, work=work, **said),
        "ragged": lambda: ragged(*rows, **said),
    }

    def figures(us: dict[str, float]) -> list[Figure]:
        return [
            Figure(f"{name} beyond dense", us[name] - us["dense"], at_most=2.0, unit=" us")
            for name in ("prepared ragged", "ragged")
        ]

    return OnHost(calls, figures)


def of_launches() -> list[Point]:
    """The launch that lists, and the host."""
    return [Point(f"{SEQUENCES} sequences", listing), Point("host", on_host)]
