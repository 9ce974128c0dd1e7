"""Measuring kernels and their peers in one process, interleaved: medians of device time, raw samples kept.

Protocol: randn inputs; every round runs each candidate once, `iterations` launches between two events; the median
over the rounds counts. FLOPs: 2·seqlen_q·seqlen_k·(head_dim_qk + head_dim_v)·heads·batch, halved for causal.
"""

import json
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from attngen.inputs import Shape

Run = Callable[[], Any]


@dataclass(frozen=True)
class Point:
    """One shape of a benchmark."""

    shape: Shape
    head_dim_qk: int
    head_dim_v: int
    causal: bool

    @property
    def flops(self) -> float:
        """Useful FLOPs of the forward, as the field counts them."""
        shape = self.shape
        full = 2 * shape.seqlen_q * shape.seqlen_k * (self.head_dim_qk + self.head_dim_v)
        return full * shape.heads * shape.batch / (2 if self.causal else 1)


def measure(
    candidates: Mapping[str, Run], rounds: int = 7, target_ms: float = 15.0
) -> dict[str, list[float]]:
    """Milliseconds per call, one sample a round for each candidate, interleaved.

    Raises:
        RuntimeError: from CUDA, where a candidate fails.
    """
    iterations = {}
    for name, run in candidates.items():
        run()
        once = _timed(run, 2)
        iterations[name] = max(2, min(50, int(target_ms / max(once, 1e-3))))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            samples[name].append(_timed(run, iterations[name]))
    return samples


def _timed(run: Run, iterations: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    run()
    start.record()
    for _ in range(iterations):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / iterations


def peers(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, names: Iterable[str]
) -> dict[str, Run]:
    """torch's attention back ends on (batch, seqlen, heads, head_dim) tensors; those that refuse are left out.

    Args:
        q: see attngen.Kernel; like k and v.
        k: see q.
        v: see q.
        causal: top-left and bottom-right agree, since lengths are equal.
        names: of "flash", "cudnn", "efficient".
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[2] != k.shape[2]

    def peer(name: str) -> Run:
        def run() -> torch.Tensor:
            with sdpa_kernel(backends[name]):
                return F.scaled_dot_product_attention(q_, k_, v_, is_causal=causal, enable_gqa=gqa)

        return run

    found = {}
    for name in names:
        try:
            peer(name)()
        except RuntimeError:
            continue
        found[name] = peer(name)
    return found


def summary(samples: Mapping[str, list[float]], flops: float) -> dict[str, float]:
    """TFLOPS of each candidate, from the median sample."""
    return {name: flops / median(times) / 1e9 for name, times in samples.items()}


def machine() -> dict[str, Any]:
    """GPU, clocks, power, versions and commit: what a figure depends on."""
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "cuda_bindings": version("cuda-bindings"),
        "commit": _output("git", "rev-parse", "HEAD"),
    }
    if torch.cuda.is_available():
        fields = "name,driver_version,clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
        answer = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
        facts |= dict(zip(fields.split(","), (part.strip() for part in answer.split(",")), strict=False))
    return facts


def write_json(path: Path, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write rows with the machine's facts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"machine": machine(), **more, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
