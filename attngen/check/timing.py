"""Measuring kernels and their peers in one process, interleaved: medians of device time, raw samples kept.

Protocol: randn inputs; every round runs each candidate once, in another order, `iterations` launches between two
events; the median over the rounds counts. FLOPs: 2·seqlen_q·seqlen_k·(head_dim_qk + head_dim_v)·heads·batch, halved for
causal. Which specs are measured, and against what, is said elsewhere: in `cli/bench.py` and in benchmarks/.
"""

import json
import math
import os
import platform
import random
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F

from attngen.check.inputs import Shape
from attngen.errors import ToolchainError
from attngen.expr import SINK, TRUE, Expr, evaluate, free_names, parse_mask, parse_score

Run = Callable[[], Any]
PEERS = ("flash", "cudnn", "efficient", "flex")
"""What `peer` knows by name."""
CAUSAL = parse_mask("causal")
SCORE = parse_score("score")
"""The score that leaves every scaled product as it is."""

TOKENS = 16384
"""batch x seqlen of the field's grid. Source: FlashAttention-3, arXiv 2407.08608, section 4.1."""
WIDTH = 2048
"""heads x head_dim of the same grid: the hidden dimension of a model. Source: as of `TOKENS`."""
GEMM_SIZE = 8192
"""Rows and columns of the square GEMM that figures are related to."""
GEMM_FLOPS = 2 * GEMM_SIZE**3
"""Of one such GEMM, an addition and a multiplication counted each."""


def grid_shape(
    seqlen: int, head_dim: int, *, group: int = 1, tokens: int = TOKENS, width: int = WIDTH
) -> Shape:
    """The shape of a length on the field's grid, whose points all have about the same size.

    Args:
        seqlen: of queries and of keys.
        head_dim: that of Q and K.
        group: query heads that share a head of K and V.
        tokens: batch x seqlen; the batch is rounded down, and at least 1.
        width: heads x head_dim; the number of heads is rounded down, and at least 1.
    """
    heads = max(1, width // head_dim)
    return Shape(max(1, tokens // seqlen), heads, heads // group, seqlen, seqlen)


BACKWARD_FLOPS = 2.5
"""FLOPs of a backward pass to those of the forward, by the field's convention: five products for two."""


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
        full = 2 * shape.pairs * (self.head_dim_qk + self.head_dim_v)
        return full * shape.heads / (2 if self.causal else 1)

    @property
    def backward_flops(self) -> float:
        """FLOPs of the backward pass, as the field counts them."""
        return BACKWARD_FLOPS * self.flops


def measure(
    candidates: Mapping[str, Run], rounds: int = 7, target_ms: float = 15.0
) -> dict[str, list[float]]:
    """Milliseconds per call, one sample a round for each candidate, interleaved in an order that changes.

    The card's clock follows the power of the last tens of milliseconds, so whoever always came after the same candidate
    would gain or lose by it.

    Raises:
        RuntimeError: from CUDA, where a candidate fails.
    """
    iterations = {}
    for name, run in candidates.items():
        run()
        once = _timed(run, 2)
        iterations[name] = max(2, min(50, int(target_ms / max(once, 1e-3))))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order, generator = list(candidates), random.Random(0)
    for _ in range(rounds):
        generator.shuffle(order)
        for name in order:
            samples[name].append(_timed(candidates[name], iterations[name]))
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


def peer(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Expr,
    score: Expr = SCORE,
    declared: Mapping[str, Any] = MappingProxyType({}),
) -> Run:
    """One of `PEERS` on (batch, seqlen, heads, head_dim) tensors, already run once: what it compiles is compiled.

    Args:
        name: "flash", "cudnn" and "efficient" are back ends of torch's scaled_dot_product_attention, "flex" is
            torch.compile of flex_attention.
        q: see attngen.Kernel; like k and v.
        k: see q.
        v: see q.
        mask: flex takes any; the others take full, and causal where lengths are equal (theirs is top-left).
        score: flex takes any; the others take `SCORE`.
        declared: a value for each scalar and tensor that mask and score read; none takes a sink.

    Returns:
        A call that gives out as (batch, heads, seqlen, head_dim).

    Raises:
        ToolchainError: the peer is not present here, or does not take this problem.
    """
    with _absence_told(name):
        if SINK in declared:
            raise ValueError("it knows no learned sinks")
        flex = partial(_flex, declared=declared)
        run = flex(q, k, v, mask, score) if name == "flex" else _sdpa(name, q, k, v, mask, score)
        run()
    return run


def backward_peer(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    mask: Expr,
    score: Expr = SCORE,
    declared: Mapping[str, Any] = MappingProxyType({}),
) -> Run:
    """The backward pass of a `peer`, already run once: all its kernels, and none of the forward.

    Args:
        name: as of `peer`, like what follows; of declared tensors there are no gradients.
        q: see name.
        k: see name.
        v: see name.
        dout: the gradient of out, (batch, seqlen, heads, head_dim).
        mask: see name.
        score: see name.
        declared: see name.

    Returns:
        A call that gives the gradients of q, k and v.

    Raises:
        ToolchainError: the peer is not present here, or does not take this problem.
    """
    from torch._functorch import config

    q, k, v = leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
    # What is compiled may otherwise overwrite what a second differentiation of one graph reads.
    with config.patch(donated_buffer=False):
        out = peer(name, q, k, v, mask, score, declared)()
        run = partial(torch.autograd.grad, out, leaves, dout.transpose(1, 2), retain_graph=True)
        with _absence_told(name):
            run()
    return run


@contextmanager
def _absence_told(name: str) -> Iterator[None]:
    """Say that a peer does not take part, where torch or one of its compilers refuses."""
    try:
        yield
    except (RuntimeError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ToolchainError(
            f"{name} does not take part: {reason}", f"--against names the peers to measure: leave {name} out"
        ) from error


def peers(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, names: Iterable[str]
) -> dict[str, Run]:
    """Every `peer` of these names that is present."""
    found = {}
    for name in names:
        with suppress(ToolchainError):
            found[name] = peer(name, q, k, v, CAUSAL if causal else TRUE)
    return found


def _sdpa(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Expr, score: Expr) -> Run:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if mask is not TRUE and not (mask is CAUSAL and q.shape[1] == k.shape[1]):
        raise ValueError("it knows the masks full and, of equal lengths, causal")
    if score is not SCORE:
        raise ValueError("it knows no modified scores")
    backend = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }[name]
    q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
    is_causal, gqa = mask is CAUSAL, q.shape[2] != k.shape[2]

    def run() -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q_, k_, v_, is_causal=is_causal, enable_gqa=gqa)

    return run


def _flex(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Expr,
    score: Expr,
    declared: Mapping[str, Any],
) -> Run:
    """flex_attention as its users call it: compiled for the shape, with a block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    seqlen_q, seqlen_k, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]

    tensors = {name: x for name, x in declared.items() if isinstance(x, torch.Tensor)}
    sizes = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
    constants = sizes | {name: x for name, x in declared.items() if name not in tensors}

    def names(b: torch.Tensor, h: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor) -> dict[str, Any]:
        return {"b": b, "h": h, "h_kv": h // group, "q_idx": q_idx, "kv_idx": kv_idx, **constants}

    def sees(b: torch.Tensor, h: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor) -> torch.Tensor:
        if mask is CAUSAL:  # in flex's own i32, as its users write it; the language's reading is in i64
            return kv_idx <= q_idx + (seqlen_k - seqlen_q)
        seen = evaluate(mask, names(b, h, q_idx, kv_idx), tensors)
        return q_idx.new_ones((), dtype=torch.bool) & seen  # a mask that reads no index is a bool

    def modified(s: torch.Tensor, *indices: torch.Tensor) -> Any:
        return evaluate(score, names(*indices) | {"score": s}, tensors)

    block_mask = None
    if mask is not TRUE:
        read = free_names(mask)
        batch = q.shape[0] if "b" in read else None
        heads = q.shape[2] if read & {"h", "h_kv"} else None
        block_mask = create_block_mask(sees, batch, heads, seqlen_q, seqlen_k, device=q.device)
    q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
    # Past a number of shapes torch gives up compiling; it shall forget the others, and not run uncompiled.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    score_mod = None if score is SCORE else modified
    return partial(compiled, q_, k_, v_, score_mod, block_mask, enable_gqa=group > 1)


def cublas(dtype: torch.dtype) -> Run:
    """torch.mm, which is cuBLAS, on random square matrices of `GEMM_SIZE`, of `GEMM_FLOPS` a call.

    Args:
        dtype: of both factors, and of the product unless they are of 8 bits; then that is bf16.
    """
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device="cuda").to(dtype) for _ in range(2))
    if dtype.itemsize > 1:
        return partial(torch.mm, a, b)
    one = torch.ones((), device="cuda")
    return partial(torch._scaled_mm, a, b.t(), one, one, out_dtype=torch.bfloat16)


def tflops(times: Iterable[float], flops: float) -> float:
    """TFLOPS of one candidate, from the median of its samples in milliseconds."""
    return flops / median(times) / 1e9


def summary(samples: Mapping[str, list[float]], flops: float) -> dict[str, float]:
    """`tflops` of each candidate; all of them do the same work."""
    return {name: tflops(times, flops) for name, times in samples.items()}


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers, such as ratios of times; NaN where there are none."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def machine() -> dict[str, Any]:
    """GPU, clocks, power, versions, commit and tree: what a figure depends on."""
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "cuda_bindings": version("cuda-bindings"),
        "commit": _output("git", "rev-parse", "HEAD"),
        "tree": _tree(),
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


def _tree() -> str:
    """What git calls the files that stand here, committed or not: `git rev-parse COMMIT^{tree}` says it of a commit."""
    with TemporaryDirectory() as folder:
        objects = _output("git", "rev-parse", "--path-format=absolute", "--git-path", "objects")
        apart = {  # so that the repository stays as it is
            "GIT_INDEX_FILE": f"{folder}/index",
            "GIT_OBJECT_DIRECTORY": folder,
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": objects,
        }
        _output("git", "add", "--all", ":/", **apart)
        return _output("git", "write-tree", **apart)


def _output(*command: str, **environment: str) -> str:
    try:
        env = {**os.environ, **environment}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
