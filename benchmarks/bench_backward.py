"""The backward pass beside torch's cuDNN and FlashAttention-2: `python benchmarks/bench_backward.py --out DIR`.

All kernels of a pass, in one process, interleaved; inputs N(0, 1), batch·seqlen = 16384, heads·head_dim = 2048, 2.5
times the forward's FLOPs. With `--flex window document alibi softcap bias` instead masks and scores at 16k, head_dim
128, beside the backward pass of compiled FlexAttention, whose block mask is built before; of the bias there is a
gradient too. With `--gqa`, 32 heads of queries on 8 of keys beside 32 on 32. With `--host`, what calls take of the host
alone, on tensors that cost the GPU nothing. With `--fused` the kernel of five products, first held against fp64
with sums in any order, then with these and in one order beside the kernels of seven, cuDNN, and FlashAttention-4 if
there is one.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
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
from attngen.check.gradients import compare_gradients
from attngen.check.inputs import Shape, random_inputs
from attngen.lower import fused_gradients

LENGTHS = (1024, 4096, 16384)
PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
FACTOR = 2.5
"""FLOPs of a backward pass to those of the forward, by convention: five products for two."""
CHECKED = (
    *((length, length) for length in (1, 64, 113, 128, 203, 256, 1000, 1024, 2048)),
    *((113, 203), (256, 512), (512, 256)),
)
"""Lengths of queries and of keys."""
FUSED: dict[str, dict[str, Any]] = {
    "fused": {},
    "fused_no_turns": {"takes_turns": False},
    "fused_nothing_kept": {"kept_k": 0, "kept_v": 0},
}
"""The fused kernel as its table has it, and how much each choice is worth."""
MODIFIED = ("window", "document", "alibi", "softcap", "window and softcap", "bias")
"""Cases of `bench_language.py`."""


@contextmanager
def changed_tile(head_dim: int, **changes: Any) -> Iterator[None]:
    """Let the fused kernel be lowered otherwise than its table says."""
    own = fused_gradients.TILES[head_dim, "plain"]
    fused_gradients.TILES[head_dim, "plain"] = replace(own, **changes)
    try:
        yield
    finally:
        fused_gradients.TILES[head_dim, "plain"] = own


@contextmanager
def split() -> Iterator[None]:
    """Let no spec be lowered to the fused kernel."""
    own = fused_gradients.TILES.copy()
    fused_gradients.TILES.clear()
    try:
        yield
    finally:
        fused_gradients.TILES.update(own)


def kernel_of(head_dim: int, mask: str, deterministic: bool = True, name: str = "bench") -> attngen.Kernel:
    """A kernel with a backward pass."""
    spec = {
        "name": name,
        "problem": {"head_dim": head_dim},
        "mask": mask,
        "gradients": ["q", "k", "v"],
        "deterministic": deterministic,
    }
    return attngen.compile(spec, arch="sm_90a")


def backward_of(shape: Shape, head_dim: int, causal: bool) -> partial[Any]:
    """A backward pass by attngen, whose arguments are its inputs."""
    q, k, v = random_inputs(shape, head_dim, head_dim, torch.bfloat16, "cuda", 0)
    kernel = kernel_of(head_dim, "causal" if causal else "full")
    out, lse = kernel(q, k, v, return_lse=True)
    return partial(kernel.backward, torch.randn_like(q), q, k, v, out, lse)


def passes(head_dim: int, causal: bool, length: int) -> Iterator[tuple[str, timing.Run]]:
    """A backward pass of each contender on the same inputs."""
    run = backward_of(timing.grid_shape(length, head_dim), head_dim, causal)
    yield "attngen", run
    dout, q, k, v, *_ = run.args
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
        declared = {each: held[each].detach() for each in case.tensors}
        differentiated = [each for each in case.tensors if each == "bias"]
        kernel = attngen.compile(language.spec(case) | {"gradients": ["q", "k", "v", *differentiated]})
        out, lse = kernel(q, k, v, return_lse=True, **declared)
        dout = torch.randn_like(out)
        leaves = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
        leaves += [held[each].requires_grad_() for each in differentiated]
        made = language.flex_function(case)(*leaves[:3])
        runs = {
            "attngen": partial(kernel.backward, dout, q, k, v, out, lse, **declared),
            "flex": partial(torch.autograd.grad, made, leaves, dout.transpose(1, 2), retain_graph=True),
        }
        difference = max(
            distance(x if x.dim() == 3 else x.transpose(1, 2), y)
            for x, y in zip(runs["attngen"](), runs["flex"](), strict=True)
        )
        samples = timing.measure(runs, rounds, target_ms)
        rows.append({"case": name, "seqlen": language.SEQLEN, "ms": samples, "difference": difference})
        ratio = median(samples["flex"]) / median(samples["attngen"])
        print(
            f"{name}: {median(samples['attngen']):.3f} ms, {ratio:.2f} times as fast as flex; "
            f"gradients differ by {difference:.1e} of their norm",
            flush=True,
        )
    return rows


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The norm of what they differ by, over theirs; a head after another, since a bias is large."""
    differing = sum(float((x.float() - y.float()).norm() ** 2) for x, y in zip(ours, theirs, strict=True))
    return (differing / sum(float(y.float().norm() ** 2) for y in theirs)) ** 0.5


def of_groups(rounds: int, target_ms: float) -> list[dict[str, Any]]:
    """Milliseconds with heads of keys shared by four of queries, and with each its own."""
    rows = []
    for causal in (True, False):
        runs = {}
        for heads_kv in (8, 32):
            shape = Shape(batch=2, heads=32, heads_kv=heads_kv, seqlen_q=8192, seqlen_k=8192)
            runs[f"32:{heads_kv}"] = backward_of(shape, 128, causal)
        samples = timing.measure(runs, rounds, target_ms)
        rows.append({"head_dim": 128, "causal": causal, "seqlen": 8192, "ms": samples})
        text = ", ".join(f"{name} {median(times):.3f} ms" for name, times in samples.items())
        print(f"{'causal' if causal else 'full'}: {text}", flush=True)
    return rows


def check_fused() -> list[dict[str, Any]]:
    """Gradients of the fused kernel by the error rule: equal and unequal lengths beside the edges of tiles, groups."""
    rows = []
    for head_dim in (128, 64):
        for mask in ("full", "causal", "window(200, 60)"):
            kernel = kernel_of(head_dim, mask, deterministic=False)
            assert [plan.schedule for plan in kernel.call.gradients] == ["fused_gradients"]
            print(f"checking d{head_dim} {mask}", flush=True)
            for seqlen_q, seqlen_k in CHECKED:
                shape = Shape(batch=2, heads=2, heads_kv=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
                q, k, v = random_inputs(shape, head_dim, head_dim, torch.bfloat16, "cuda", 0)
                dout = torch.randn_like(q)
                out, lse = kernel(q, k, v, return_lse=True)
                for _ in range(3):  # what one run leaves in memory must not help the next
                    got = kernel.backward(dout, q, k, v, out, lse)
                verdict = compare_gradients(got, q, k, v, dout, kernel.spec.mask_expr, out=out, lse=lse)
                failures = list(verdict.failures)
                rows.append(
                    {
                        "head_dim": head_dim,
                        "mask": mask,
                        "lengths": [seqlen_q, seqlen_k],
                        "failures": failures,
                    }
                )
                if failures:
                    print(
                        f"WRONG d{head_dim} {mask} {seqlen_q}x{seqlen_k}: {failures}\n{verdict}", flush=True
                    )
    wrong = sum(bool(row["failures"]) for row in rows)
    print(f"gradients of the fused kernel: {len(rows)} calls, {wrong} of them wrong", flush=True)
    return rows


def fused_contenders(head_dim: int, causal: bool, length: int) -> dict[str, timing.Run]:
    """The fused kernel and its variants, those of seven products, which agree with them, and peers on equal inputs."""
    runs = dict(passes(head_dim, causal, length))
    ordered = runs.pop("attngen")
    runs.pop("flash", None)
    assert isinstance(ordered, partial)
    dout, q, k, v, out, lse = ordered.args
    with split():
        kernel = kernel_of(head_dim, "causal" if causal else "full", name="split")
    assert len(kernel.call.gradients) > 1
    unfused = partial(kernel.backward, dout, q, k, v, out, lse)
    found: dict[str, timing.Run] = {"split": unfused, **runs, "fused_ordered": ordered}
    for name, changes in FUSED.items():
        with changed_tile(head_dim, **changes):
            kernel = kernel_of(head_dim, "causal" if causal else "full", deterministic=False, name=name)
        found[name] = partial(kernel.backward, dout, q, k, v, out, lse)
    for name in (*FUSED, "fused_ordered"):
        apart = max(distance(x, y) for x, y in zip(found[name](), unfused(), strict=True))
        if not apart < 0.02:
            raise SystemExit(f"{name} differs from the split kernels by {apart:.1e} of their norm")
    with suppress(ImportError, RuntimeError):
        from flash_attn.cute.interface import flash_attn_func

        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        made = flash_attn_func(*leaves, causal=causal)
        made = made[0] if isinstance(made, tuple) else made
        run = partial(torch.autograd.grad, made, leaves, dout, retain_graph=True)
        run()
        found["fa4"] = run
    return found


def beside_fused(lengths: list[int], rounds: int, target_ms: float) -> list[dict[str, Any]]:
    """TFLOPS of the fused kernel and of its contenders at head_dim 128."""
    rows = []
    for causal in (False, True):
        for length in lengths:
            runs = fused_contenders(128, causal, length)
            samples = timing.measure(runs, rounds, target_ms)
            point = timing.Point(timing.grid_shape(length, 128), 128, 128, causal)
            tflops = {name: FACTOR * point.flops / median(times) / 1e9 for name, times in samples.items()}
            rows.append(
                {"head_dim": 128, "causal": causal, "seqlen": length, "tflops": tflops, "ms": samples}
            )
            text = ", ".join(f"{name} {value:.0f}" for name, value in tflops.items())
            print(f"d128 {'causal' if causal else 'full'} {length}: {text}", flush=True)
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


def host_microseconds(calls: int = 50, rounds: int = 25) -> dict[str, float]:
    """The median time of a call on the host: none is waited for, and the queue of launches never gets full."""
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
    parser.add_argument("--gqa", action="store_true", help="time shared heads of keys, and nothing else")
    parser.add_argument(
        "--fused", action="store_true", help="check and time the fused kernel, and nothing else"
    )
    parser.add_argument("--host", action="store_true", help="time calls on the host, and nothing else")
    given = parser.parse_args()
    if given.flex:
        rows = beside_flex(given.flex, given.rounds, given.target_ms)
        timing.write_json(given.out / "backward_flex.json", rows)
        return
    if given.gqa:
        timing.write_json(given.out / "backward_gqa.json", of_groups(given.rounds, given.target_ms))
        return
    if given.fused:
        checked = check_fused()
        rows = beside_fused(given.lengths, given.rounds, given.target_ms)
        timing.write_json(given.out / "backward_fused.json", rows, checked=checked)
        if any(row["failures"] for row in checked):
            raise SystemExit("some gradients are wrong")
        return
    if given.host:
        found = host_microseconds()
        for name, microseconds in found.items():
            print(f"{name}: {microseconds:.1f} us")
        timing.write_json(given.out / "backward_host.json", [], microseconds=found)
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
