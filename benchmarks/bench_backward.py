"""The backward pass beside torch's cuDNN and FlashAttention-2: `python benchmarks/bench_backward.py --out DIR`.

All kernels of a pass, in one process, interleaved; inputs N(0, 1), batch·seqlen = 16384, heads·head_dim = 2048, 2.5
times the forward's FLOPs. With `--flex window document alibi softcap` instead masks and scores at 16k, head_dim 128,
beside the backward pass of compiled FlexAttention, whose block mask is built before. With `--host`, what calls take of
the host alone, on tensors that cost the GPU nothing.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import bench_language as language
import torch
from torch._functorch import config as functorch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import attngen
from attngen.check import timing
from attngen.check.inputs import random_inputs

LENGTHS = (1024, 4096, 16384)
PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
FACTOR = 2.5
"""FLOPs of a backward pass to those of the forward, by convention: five products for two."""
MODIFIED = ("window", "document", "alibi", "softcap", "window and softcap")
"""Cases of `bench_language.py` whose declared tensors want no gradient."""


def passes(head_dim: int, causal: bool, length: int) -> Iterator[tuple[str, timing.Run]]:
    """A backward pass of each contender on the same inputs."""
    shape = timing.grid_shape(length, head_dim)
    q, k, v = random_inputs(shape, head_dim, head_dim, torch.bfloat16, "cuda", 0)
    dout = torch.randn_like(q)
    kernel = attngen.compile(
        {
            "problem": {"head_dim": head_dim},
            "mask": "causal" if causal else "full",
            "gradients": ["q", "k", "v"],
        },
        arch="sm_90a",
    )
    out, lse = kernel(q, k, v, return_lse=True)
    yield "attngen", partial(kernel.backward, dout, q, k, v, out, lse)
    leaves = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
    for name, backend in PEERS.items():
        try:
            with sdpa_kernel(backend):
                made = scaled_dot_product_attention(*leaves, is_causal=causal)
        except RuntimeError as error:
            print(f"{name} does not take part: {error}")
            continue
        yield name, partial(torch.autograd.grad, made, leaves, dout.transpose(1, 2), retain_graph=True)


def beside_flex(names: list[str], rounds: int, target_ms: float) -> list[dict[str, Any]]:
    """Milliseconds of backward passes of the language's masks and scores, and of FlexAttention's."""
    functorch.donated_buffer = False  # else a compiled backward pass runs once
    held, rows = language.values(language.SEQLEN), []
    for name in names:
        case = language.cases(held)[name]
        q, k, v = language.tensors(case)
        declared = {each: held[each] for each in case.tensors}
        kernel = attngen.compile(language.spec(case) | {"gradients": ["q", "k", "v"]})
        out, lse = kernel(q, k, v, return_lse=True, **declared)
        dout = torch.randn_like(out)
        leaves = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
        made = language.flex_function(case)(*leaves)
        runs = {
            "attngen": partial(kernel.backward, dout, q, k, v, out, lse, **declared),
            "flex": partial(torch.autograd.grad, made, leaves, dout.transpose(1, 2), retain_graph=True),
        }
        ours, theirs = (run() for run in runs.values())
        pairs = zip(ours, theirs, strict=True)
        difference = max(((x - y.transpose(1, 2)).norm() / y.norm()).item() for x, y in pairs)
        samples = timing.measure(runs, rounds, target_ms)
        rows.append({"case": name, "seqlen": language.SEQLEN, "ms": samples, "difference": difference})
        ratio = median(samples["flex"]) / median(samples["attngen"])
        print(
            f"{name}: {median(samples['attngen']):.3f} ms, {ratio:.2f} times as fast as flex; "
            f"gradients differ by {difference:.1e} of their norm",
            flush=True,
        )
    return rows


class Nothing(torch.autograd.Function):
    """What autograd itself takes for a function of three inputs: it allocates and launches nothing."""

    @staticmethod
    def forward(ctx, q, k, v):  # noqa: D102
        ctx.save_for_backward(q, k, v)
        return q.new_empty(q.shape)

    @staticmethod
    def backward(ctx, dout):  # noqa: D102
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


def host_microseconds(calls: int = 300, rounds: int = 9) -> dict[str, float]:
    """The median time of a call on the host: none is waited for, and the queue of launches is emptied in between."""
    q, k, v = (torch.randn(1, 64, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    dout, spec = (
        torch.randn_like(q),
        {"problem": {"head_dim": 64}, "mask": "causal", "gradients": ["q", "k", "v"]},
    )
    kernel = attngen.compile(spec)
    out, lse = kernel(q, k, v, return_lse=True)
    sums = [torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)]
    measured: dict[str, Callable[[], object]] = {
        "forward": lambda: kernel(q, k, v),
        "forward, recorded": lambda: kernel(*leaves),
        "backward": lambda: kernel.backward(dout, q, k, v, out, lse),
        "backward, added to f32": lambda: kernel.backward(
            dout, q, k, v, out, lse, grads=sums, accumulate=True
        ),
        "forward and backward by autograd": lambda: torch.autograd.grad(kernel(*leaves), leaves, dout),
        "autograd alone": lambda: torch.autograd.grad(Nothing.apply(*leaves), leaves, dout),
    }
    found: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(rounds):
        for name, call in measured.items():
            call()
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(calls):
                call()
            found[name].append((time.perf_counter() - began) / calls * 1e6)
            torch.cuda.synchronize()
    return {name: median(times) for name, times in found.items()}


def main() -> None:
    """Print and write TFLOPS, and each contender's geometric mean against cuDNN."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128, 192, 256])
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--target-ms", type=float, default=15.0)
    parser.add_argument("--flex", nargs="+", choices=MODIFIED, help="these cases, and nothing else")
    parser.add_argument("--host", action="store_true", help="time calls on the host, and nothing else")
    given = parser.parse_args()
    if given.flex:
        rows = beside_flex(given.flex, given.rounds, given.target_ms)
        timing.write_json(given.out / "backward_flex.json", rows)
        return
    if given.host:
        for name, microseconds in host_microseconds().items():
            print(f"{name}: {microseconds:.1f} us")
        return
    rows = []
    for head_dim in given.head_dims:
        for causal in (True, False):
            for length in given.lengths:
                runs = dict(passes(head_dim, causal, length))
                samples = timing.measure(runs, given.rounds, given.target_ms)
                point = timing.Point(timing.grid_shape(length, head_dim), head_dim, head_dim, causal)
                tflops = {name: FACTOR * point.flops / median(times) / 1e9 for name, times in samples.items()}
                rows.append(
                    {
                        "head_dim": head_dim,
                        "causal": causal,
                        "seqlen": length,
                        "tflops": tflops,
                        "ms": samples,
                    }
                )
                text = ", ".join(f"{name} {value:.0f}" for name, value in tflops.items())
                print(f"d{head_dim} {'causal' if causal else 'full'} {length}: {text}", flush=True)
                del runs
    summary = {
        f"over {peer}": timing.geometric_mean(
            row["tflops"]["attngen"] / row["tflops"][peer] for row in rows if peer in row["tflops"]
        )
        for peer in PEERS
    }
    print(summary)
    timing.write_json(given.out / "backward.json", rows, summary=summary)


if __name__ == "__main__":
    main()
