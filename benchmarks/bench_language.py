"""The figures of the expression language: `python benchmarks/bench_language.py --out DIR`.

bf16, head_dim 128, 16 heads: masks and scores at 16k against torch.compile'd FlexAttention with its block mask already
built, and from nothing to the first result; windows at 64k by visited tile; what scores cost over the plain kernel.
FlexAttention's functions are written as its users write them.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attngen
from attngen.check import timing
from attngen.check.inputs import Shape, random_inputs
from attngen.simulate import Sizes, visited_blocks

HEADS, HEAD_DIM, SEQLEN = 16, 128, 16384
DOCUMENTS = 16
BIASED_HEADS = 4
"""Flex counts the elements of a tensor in i32: a bias of 16 heads at 16k is past that, and it faults."""
NAMES = (
    "window",
    "document",
    "sorted document",
    "causal document",
    "causal sorted document",
    "prefix",
    "alibi",
    "softcap",
    "window and softcap",
    "bias",
)


@dataclass(frozen=True)
class Case:
    """A mask and a score, in both languages."""

    mask: str = "full"
    score: str = "score"
    tensors: Mapping[str, str] = field(default_factory=dict)
    sees: Callable[..., Any] | None = None
    modifies: Callable[..., Any] | None = None


def values(seqlen: int) -> dict[str, torch.Tensor]:
    """What the cases look up."""
    ids = torch.arange(seqlen, device="cuda", dtype=torch.int32) * DOCUMENTS // seqlen
    slopes = torch.exp2(-8.0 * torch.arange(1, HEADS + 1, device="cuda") / HEADS)
    bias = torch.randn(BIASED_HEADS, seqlen, seqlen, device="cuda", dtype=torch.bfloat16)
    return {"doc": ids[None], "slopes": slopes, "bias": bias}


def cases(held: Mapping[str, torch.Tensor]) -> dict[str, Case]:
    """What FlashAttention has not, or not together."""
    doc, slopes, bias = held["doc"][0], held["slopes"], held["bias"]

    def window(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q) & (q - k <= 1024)

    def soft(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return 30.0 * torch.tanh(score / 30.0)

    return {
        "window": Case("window(1024, 0)", sees=window),
        **{
            f"{causal}{in_order}document": Case(
                f"{causal and 'causal and '}document(doc)",
                tensors={"doc": f"i32[batch, seqlen_k]{in_order and ' sorted'}"},
                sees=lambda b, h, q, k, causal=causal: (
                    (doc[q] == doc[k]) & (k <= q) if causal else doc[q] == doc[k]
                ),
            )
            for causal in ("", "causal ")
            for in_order in ("", "sorted ")
        },
        "prefix": Case("prefix(4096)", sees=lambda b, h, q, k: (k < 4096) | (k <= q)),
        "alibi": Case(
            "causal",
            "score + alibi(slopes)",
            {"slopes": "f32[num_heads_q]"},
            lambda b, h, q, k: k <= q,
            lambda score, b, h, q, k: score + slopes[h] * (k - q),
        ),
        "softcap": Case("causal", "softcap(score, 30.0)", {}, lambda b, h, q, k: k <= q, soft),
        "window and softcap": Case("window(1024, 0)", "softcap(score, 30.0)", {}, window, soft),
        "bias": Case(
            "full",
            "score + bias[h, q_idx, kv_idx]",
            {"bias": "bf16[num_heads_q, seqlen_q, seqlen_k]"},
            None,
            lambda score, b, h, q, k: score + bias[h, q, k],
        ),
    }


def spec(case: Case) -> dict[str, Any]:
    """The case as a spec."""
    return {
        "target": "sm_90a",
        "problem": {"head_dim": HEAD_DIM},
        "mask": case.mask,
        "score": case.score,
        "tensors": dict(case.tensors),
    }


def against_flex(rounds: int, names: list[str]) -> list[dict[str, Any]]:
    """Time of a call; what flex compiles and its block mask are there before."""
    held = values(SEQLEN)
    rows = []
    for name, case in cases(held).items():
        if name not in names:
            continue
        ours, theirs = (make(case, held) for make in (attngen_run, flex_run))
        difference = (ours().float() - theirs().transpose(1, 2).float()).abs().max().item()
        samples = timing.measure({"attngen": ours, "flex": theirs}, rounds)
        ratio = median(samples["flex"]) / median(samples["attngen"])
        rows.append({"case": name, "seqlen": SEQLEN, "ms": samples, "difference": difference})
        print(
            f"{name}: {median(samples['attngen']):.3f} ms, {ratio:.2f} times as fast as flex; "
            f"largest difference {difference:.1e}",
            flush=True,
        )
    return rows


def attngen_run(case: Case, held: Mapping[str, torch.Tensor]) -> timing.Run:
    """The case with attngen."""
    return partial(attngen.compile(spec(case)), *tensors(case), **{name: held[name] for name in case.tensors})


def flex_function(case: Case) -> Callable[..., torch.Tensor]:
    """FlexAttention of (batch, heads, seqlen, head_dim) q, k and v, compiled for the case, block mask built."""
    torch.compiler.reset()
    seen = case.sees and create_block_mask(case.sees, None, None, SEQLEN, SEQLEN, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return partial(compiled, score_mod=case.modifies, block_mask=seen)


def flex_run(case: Case, held: Mapping[str, torch.Tensor]) -> timing.Run:
    """The case with FlexAttention."""
    return partial(flex_function(case), *(x.transpose(1, 2) for x in tensors(case)))


def tensors(case: Case) -> tuple[torch.Tensor, ...]:
    """q, k and v."""
    heads = BIASED_HEADS if "bias" in case.tensors else HEADS
    shape = Shape(1, heads, heads, SEQLEN, SEQLEN)
    return random_inputs(shape, HEAD_DIM, HEAD_DIM, torch.bfloat16, "cuda", 0)


def first_results(names: list[str]) -> list[dict[str, Any]]:
    """Seconds from `import torch` done to the first result, each in a process of its own with empty caches."""
    rows = []
    for name in names:
        row: dict[str, Any] = {"case": name}
        for maker in ("attngen_run", "flex_run"):
            with tempfile.TemporaryDirectory() as empty:
                caches = (
                    "ATTNGEN_CACHE_DIR",
                    "TORCHINDUCTOR_CACHE_DIR",
                    "TRITON_CACHE_DIR",
                    "CUDA_CACHE_PATH",
                )
                env = {**os.environ, **{cache: f"{empty}/{cache}" for cache in caches}}
                command = [sys.executable, __file__, "--first", maker, name]
                answer = subprocess.run(
                    command, env=env, capture_output=True, text=True, timeout=200, check=True
                )
                row[maker] = float(answer.stdout.split()[-1])
        rows.append(row)
        print(f"first result of {name}: {row['attngen_run']:.2f} s, flex {row['flex_run']:.2f} s", flush=True)
    return rows


def first_result(maker: str, name: str) -> None:
    """Print how long one takes from its source to its first result."""
    held = values(SEQLEN)
    case = cases(held)[name]
    torch.cuda.synchronize()
    start = time.perf_counter()
    {"attngen_run": attngen_run, "flex_run": flex_run}[maker](case, held)()
    torch.cuda.synchronize()
    print(time.perf_counter() - start)


def by_visited_tile(rounds: int) -> list[dict[str, Any]]:
    """64k: the time of a window and of a window with sinks by visited tile, and of the dense kernel by tile."""
    seqlen = 65536
    q, k, v = random_inputs(
        Shape(1, HEADS, HEADS, seqlen, seqlen), HEAD_DIM, HEAD_DIM, torch.bfloat16, "cuda", 0
    )
    masks = {
        "dense": "full",
        "window": "window(1024, 0)",
        "window and sinks": "window(1024, 0) or sinks(4) and causal",
    }
    kernels = {name: attngen.compile(spec(Case(mask))) for name, mask in masks.items()}
    samples = timing.measure({name: partial(kernel, q, k, v) for name, kernel in kernels.items()}, rounds)
    rows = []
    for name, kernel in kernels.items():
        plan, sizes = kernel.plan, Sizes(1, seqlen, seqlen, HEADS, HEADS)
        tiles = HEADS * sum(len(visited_blocks(plan, sizes, m)) for m in range(-(-seqlen // plan.block_m)))
        ns = median(samples[name]) * 1e6 / tiles
        rows.append({"case": name, "seqlen": seqlen, "tiles": tiles, "ms": samples[name], "ns_per_tile": ns})
        print(f"64k {name}: {tiles} tiles, {median(samples[name]):.3f} ms, {ns:.2f} ns a tile", flush=True)
    return rows


def over_plain(rounds: int) -> list[dict[str, Any]]:
    """What scores cost over the plain kernel, full and causal."""
    held = {"slopes": torch.exp2(-8.0 * torch.arange(1, HEADS + 1, device="cuda") / HEADS)}
    scores = {
        "plain": Case(),
        "alibi": Case(score="score + alibi(slopes)", tensors={"slopes": "f32[num_heads_q]"}),
        "softcap": Case(score="softcap(score, 30.0)"),
    }
    rows = []
    for seqlen in (4096, SEQLEN):
        shape = timing.grid_shape(seqlen, HEAD_DIM)
        q, k, v = random_inputs(shape, HEAD_DIM, HEAD_DIM, torch.bfloat16, "cuda", 0)
        for mask in ("full", "causal"):
            runs = {
                name: partial(
                    attngen.compile(spec(case) | {"mask": mask}),
                    q,
                    k,
                    v,
                    **{t: held[t] for t in case.tensors},
                )
                for name, case in scores.items()
            }
            samples = timing.measure(runs, rounds)
            plain = median(samples["plain"])
            cost = {name: median(times) / plain - 1 for name, times in samples.items()}
            rows.append({"mask": mask, "seqlen": seqlen, "ms": samples, "cost": cost})
            print(f"{mask} {seqlen}: alibi +{cost['alibi']:.1%}, softcap +{cost['softcap']:.1%}", flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parts", nargs="*", default=["scores", "windows", "flex", "first"])
    parser.add_argument("--cases", nargs="*", default=list(NAMES))
    parser.add_argument("--first", nargs=2, metavar=("MAKER", "CASE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.first:
        first_result(*given.first)
        sys.exit()
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "scores": lambda: over_plain(given.rounds),
        "windows": lambda: by_visited_tile(given.rounds),
        "flex": lambda: against_flex(given.rounds, given.cases),
        "first": lambda: first_results(["window"]),
    }
    results = {part: parts[part]() for part in given.parts}
    timing.write_json(given.out / "language.json", results.pop("flex", []), **results)
