"""The backward pass beside torch's cuDNN and FlashAttention-2: `python benchmarks/bench_backward.py --out DIR`.

All kernels of a pass, in one process, interleaved; inputs N(0, 1), batch·seqlen = 16384, heads·head_dim = 2048, 2.5
times the forward's FLOPs. With `--flex window document alibi softcap bias` instead masks and scores at 16k, head_dim
128, beside the backward pass of compiled FlexAttention, whose block mask is built before; of the bias there is a
gradient too. With `--gqa`, 32 heads of queries on 8 of keys beside 32 on 32. With `--host`, what calls take of the host
alone, on tensors that cost the GPU nothing. With `--check` the kernel of five products is held against fp64, sums in
any order. With `--beside`, sums in any order and in one beside the kernels of seven products, cuDNN, and
FlashAttention-4 if there is one, in any order and in one; calls of up to 1,024 tokens from CUDA graphs. With `--steps`
a forward and a backward pass through autograd, causal, beside the same peers.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
CHECKED = (
    *((length, length) for length in (1, 64, 113, 128, 203, 256, 1000, 1024, 2048)),
    *((113, 203), (256, 512), (512, 256)),
)
"""Lengths of queries and of keys."""
OURS = ("one order", "any order", "split")
"""Contenders that are attngen's."""
LONGEST_IN_GRAPH = 1024
"""Tokens up to which the host is as slow as the GPU, so that calls are timed from graphs."""
MODIFIED = ("window", "document", "alibi", "softcap", "window and softcap", "bias")
"""Cases of `bench_language.py`."""


@contextmanager
def split() -> Iterator[None]:
    """Let no spec be lowered to the fused kernel."""
    own = fused_gradients.TILES.copy()
    fused_gradients.TILES.clear()
    try:
        yield
    finally:
        fused_gradients.TILES.update(own)


def both_dims(text: str) -> tuple[int, int]:
    """The head dims of Q and K, and of V: `128`, or `192x128`."""
    qk, _, v = text.partition("x")
    return int(qk), int(v or qk)


def in_words(dims: tuple[int, int], causal: bool, length: int) -> str:
    """What a line of figures is of."""
    sizes = f"d{dims[0]}" if dims[0] == dims[1] else f"d{dims[0]}x{dims[1]}"
    return f"{sizes} {'causal' if causal else 'full'} {length}"


def kernel_of(
    dims: tuple[int, int], mask: str, deterministic: bool = True, name: str = "bench"
) -> attngen.Kernel:
    """A kernel with a backward pass."""
    qk, v = dims
    spec = {
        "name": name,
        "problem": {"head_dim": {"qk": qk, "v": v}},
        "mask": mask,
        "gradients": ["q", "k", "v"],
        "deterministic": deterministic,
    }
    return attngen.compile(spec, arch="sm_90a")


def backward_of(shape: Shape, dims: tuple[int, int], causal: bool) -> partial[Any]:
    """A backward pass by attngen, whose arguments are its inputs."""
    q, k, v = random_inputs(shape, *dims, torch.bfloat16, "cuda", 0)
    kernel = kernel_of(dims, "causal" if causal else "full")
    out, lse = kernel(q, k, v, return_lse=True)
    return partial(kernel.backward, torch.randn_like(out), q, k, v, out, lse)


def passes(dims: tuple[int, int], causal: bool, length: int) -> Iterator[tuple[str, timing.Run]]:
    """A backward pass of each contender on the same inputs."""
    run = backward_of(timing.grid_shape(length, dims[0]), dims, causal)
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
            runs[f"32:{heads_kv}"] = backward_of(shape, (128, 128), causal)
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
            kernel = kernel_of((head_dim, head_dim), mask, deterministic=False)
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


def contenders(dims: tuple[int, int], causal: bool, length: int) -> dict[str, timing.Run]:
    """Backward passes on equal inputs: in one order, in any, of seven products, and of peers; all agree."""
    runs = dict(passes(dims, causal, length))
    ordered = runs.pop("attngen")
    runs.pop("flash", None)
    assert isinstance(ordered, partial)
    dout, q, k, v, out, lse = ordered.args
    mask = "causal" if causal else "full"
    runs["one order"] = ordered
    free = kernel_of(dims, mask, deterministic=False, name="free")
    if len(free.call.gradients) == 1:
        with split():
            apart = kernel_of(dims, mask, name="split")
        assert len(apart.call.gradients) > 1
        runs["any order"] = partial(free.backward, dout, q, k, v, out, lse)
        runs["split"] = partial(apart.backward, dout, q, k, v, out, lse)
    for name, in_one_order in (("fa4", False), ("fa4, one order", True)):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with taking_part(name):
            made = fa4(*leaves, causal, in_one_order)
            run = partial(torch.autograd.grad, made, leaves, dout, retain_graph=True)
            run()
            runs[name] = run
    agree(runs)
    if length > LONGEST_IN_GRAPH:
        return runs
    graphs: dict[str, timing.Run] = {}
    for name, run in runs.items():
        with taking_part(name):
            graphs[name] = in_graph(run)
    return graphs


@contextmanager
def taking_part(name: str) -> Iterator[None]:
    """Say so where a peer does not, which tells it by any of these errors; what is ours has to."""
    try:
        yield
    except (ImportError, RuntimeError, AssertionError, NotImplementedError) as error:
        if name in OURS:
            raise
        print(f"{name} does not take part: {str(error).partition(chr(10))[0]}", flush=True)


def fa4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, in_one_order: bool) -> torch.Tensor:
    """FlashAttention-4's result."""
    from flash_attn.cute.interface import flash_attn_func

    made = flash_attn_func(q, k, v, causal=causal, deterministic=in_one_order)
    return made[0] if isinstance(made, tuple) else made


def agree(runs: dict[str, timing.Run]) -> None:
    """End where gradients differ from cuDNN's, or without it from the first contender's, by more than rounding."""
    names = list(runs)
    reference = "cudnn" if "cudnn" in runs else names[0]
    wanted = [in_rows(x, reference) for x in runs[reference]()]
    for name in names:
        apart = max(distance(in_rows(x, name), y) for x, y in zip(runs[name](), wanted, strict=True))
        if not apart < 0.02:
            raise SystemExit(
                f"gradients of {name} differ from those of {reference} by {apart:.1e} of their norm"
            )


def in_rows(x: torch.Tensor, name: str) -> torch.Tensor:
    """A gradient as (batch, seqlen, heads, head_dim)."""
    return x.transpose(1, 2) if name == "cudnn" else x


def in_graph(run: timing.Run) -> timing.Run:
    """The replay of a call, captured on the stream on which its tensors were made, where autograd goes back to them."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        run()
    return graph.replay


def beside(
    all_dims: list[tuple[int, int]], lengths: list[int], rounds: int, target_ms: float
) -> list[dict[str, Any]]:
    """TFLOPS of `contenders`."""
    rows = []
    for dims in all_dims:
        for causal in (False, True):
            for length in lengths:
                with torch.cuda.stream(torch.cuda.Stream()):  # the default one cannot be captured
                    runs = contenders(dims, causal, length)
                    samples = timing.measure(runs, rounds, target_ms)
                flops = timing.Point(timing.grid_shape(length, dims[0]), *dims, causal).backward_flops
                rows.append(figures_of(dims, causal, length, samples, flops))
                del runs
    return rows


def figures_of(
    dims: tuple[int, int], causal: bool, length: int, samples: dict[str, list[float]], flops: float
) -> dict[str, Any]:
    """A row of figures, which is printed."""
    tflops = timing.summary(samples, flops)
    text = ", ".join(f"{name} {value:.0f}" for name, value in tflops.items())
    print(f"{in_words(dims, causal, length)}: {text}", flush=True)
    return {"head_dims": dims, "causal": causal, "seqlen": length, "tflops": tflops, "ms": samples}


def training_steps(lengths: list[int], rounds: int, target_ms: float) -> list[dict[str, Any]]:
    """TFLOPS of a forward and a backward pass through autograd, head_dim 128, causal."""
    rows, dims = [], (128, 128)
    for length in lengths:
        shape = timing.grid_shape(length, dims[0])
        q, k, v = leaves = [
            x.requires_grad_() for x in random_inputs(shape, *dims, torch.bfloat16, "cuda", 0)
        ]
        dout = torch.randn_like(q)
        ordered, free = kernel_of(dims, "causal"), kernel_of(dims, "causal", deterministic=False)

        def by_cudnn() -> torch.Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                heads_first = (x.transpose(1, 2) for x in leaves)  # noqa: B023
                return scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)

        forwards: dict[str, timing.Run] = {
            "one order": partial(ordered, q, k, v),
            "any order": partial(free, q, k, v),
            "cudnn": by_cudnn,
            "fa4": partial(fa4, q, k, v, True, False),
        }
        runs: dict[str, timing.Run] = {}
        for name, forward in forwards.items():
            with taking_part(name):
                forward()
                runs[name] = lambda of=forward: torch.autograd.grad(of(), leaves, dout)  # noqa: B023
        samples = timing.measure(runs, rounds, target_ms)
        flops = timing.Point(shape, *dims, True).flops * (1 + timing.BACKWARD_FLOPS)
        rows.append(figures_of(dims, True, length, samples, flops))
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
    parser.add_argument(
        "--head-dims", type=both_dims, nargs="+", default=[(d, d) for d in (64, 128, 192, 256)]
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--target-ms", type=float, default=15.0)
    parser.add_argument("--flex", nargs="+", choices=MODIFIED, help="these cases, and nothing else")
    parser.add_argument("--gqa", action="store_true", help="time shared heads of keys, and nothing else")
    parser.add_argument("--check", action="store_true", help="check the fused kernel, and nothing else")
    parser.add_argument(
        "--beside", action="store_true", help="time orders of sums and FlashAttention-4 beside"
    )
    parser.add_argument("--steps", action="store_true", help="time training steps, and nothing else")
    parser.add_argument("--host", action="store_true", help="time calls on the host, and nothing else")
    given = parser.parse_args()
    if given.flex:
        rows = beside_flex(given.flex, given.rounds, given.target_ms)
        timing.write_json(given.out / "backward_flex.json", rows)
        return
    if given.gqa:
        timing.write_json(given.out / "backward_gqa.json", of_groups(given.rounds, given.target_ms))
        return
    if given.check:
        checked = check_fused()
        timing.write_json(given.out / "backward_checked.json", checked)
        if any(row["failures"] for row in checked):
            raise SystemExit("some gradients are wrong")
        return
    if given.beside:
        rows = beside(given.head_dims, given.lengths, given.rounds, given.target_ms)
        timing.write_json(given.out / "backward_beside.json", rows)
        return
    if given.steps:
        rows = training_steps(given.lengths, given.rounds, given.target_ms)
        timing.write_json(given.out / "backward_steps.json", rows)
        return
    if given.host:
        found = host_microseconds()
        for name, microseconds in found.items():
            print(f"{name}: {microseconds:.1f} us")
        timing.write_json(given.out / "backward_host.json", [], microseconds=found)
        return
    rows = []
    for dims in given.head_dims:
        for causal in (True, False):
            for length in given.lengths:
                runs = dict(passes(dims, causal, length))
                samples = timing.measure(runs, given.rounds, given.target_ms)
                flops = timing.Point(timing.grid_shape(length, dims[0]), *dims, causal).backward_flops
                rows.append(figures_of(dims, causal, length, samples, flops))
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
