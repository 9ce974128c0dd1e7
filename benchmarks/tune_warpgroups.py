"""Times choices of the warpgroup schedules against cuDNN, flash and cuBLAS: `python benchmarks/tune_warpgroups.py OUT`.

bf16, batch·seqlen = 16384, heads·head_dim = 2048. The winners go to attngen/lower/tiles.py, with this script's JSON in
benchmarks/results as the evidence. A choice that is wrong on a small odd shape is reported and not timed.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

import attngen
from attngen.arch import ARCHS
from attngen.check import bench
from attngen.check.accuracy import compare
from attngen.check.inputs import Shape, random_inputs
from attngen.lower.lower import build
from attngen.lower.tiles import WarpgroupChoice
from attngen.plan import assemble

W = WarpgroupChoice
FLAGS = ("rescale_votes", "passes_late", "out_over_q")
SCHEDULES = ("warp_specialized", "pingpong")
OVER_Q = {"out_over_q": True}
LAST: dict[str, Any] = {"rescale": "last"}
VOTES: dict[str, Any] = {"rescale": "last", "rescale_votes": True, "out_over_q": True}
CHOICES: dict[tuple[int, int], list[WarpgroupChoice]] = {
    (64, 64): [
        W(192, 128, 3, 3, q_stages=2),
        W(192, 128, 3, 3, q_stages=2, passes_late=True),
        W(192, 128, 3, 3, q_stages=2, **LAST),
        W(128, 128, 4, 2, q_stages=2),
        W(64, 128, 2, 1, q_stages=2, blocks_per_sm=2),
        W(64, 128, 2, 1, q_stages=2, blocks_per_sm=2, **LAST),
    ],
    (80, 80): [
        W(128, 128, 2, 2, q_stages=2),
        W(192, 96, 2, 3),
        W(192, 96, 2, 3, **LAST),
        W(192, 112, 2, 3),
    ],
    (96, 96): [
        W(128, 128, 2, 2, q_stages=2),
        W(192, 96, 2, 3),
        W(192, 96, 2, 3, **LAST),
    ],
    (128, 128): [
        W(128, 128, 2, 2),
        W(128, 128, 2, 2, q_stages=2),
        W(128, 128, 2, 2, **LAST),
    ],
    (192, 128): [W(128, 112, 2, 2), W(128, 112, 2, 2, **LAST), W(128, 128, 2, 2, **OVER_Q)],
    (192, 192): [
        W(128, 96, 2, 2, **OVER_Q),
        W(128, 96, 2, 2, **OVER_Q, **LAST),
        W(128, 80, 2, 2),
        W(128, 80, 2, 2, **LAST),
    ],
    (256, 256): [
        W(128, 80, 2, 2, **OVER_Q),
        W(128, 80, 2, 2, **VOTES),
        W(128, 64, 2, 2, **OVER_Q),
        W(128, 64, 2, 2, **VOTES),
    ],
}


def label(schedule: str, choice: WarpgroupChoice) -> str:
    """A name for a column: what differs from the defaults."""
    flags = [f for f in FLAGS if getattr(choice, f)]
    flags += [f"rescale_{choice.rescale}"] if choice.rescale != "middle" else []
    flags += [f"no_{f}" for f in ("overlap", "persistent", "longest_first") if not getattr(choice, f)]
    tile = f"{choice.block_m}x{choice.block_n}x{choice.stages}"
    flags += [f"{f}{getattr(choice, f)}" for f in ("q_stages", "blocks_per_sm") if getattr(choice, f) > 1]
    return "_".join([{"warp_specialized": "ws", "pingpong": "pp"}[schedule], tile, *flags])


def right(kernel: attngen.Kernel) -> bool:
    """Whether the kernel is within the bound on a small odd shape."""
    for seed, (seqlen_q, seqlen_k) in enumerate([(113, 203), (300, 515), (1, 1)]):
        shape = Shape(2, 6, 2, seqlen_q, seqlen_k)
        plan = kernel.plan
        q, k, v = random_inputs(shape, plan.head_dim_qk, plan.head_dim_v, torch.bfloat16, "cuda", seed)
        out, lse = kernel(q, k, v, return_lse=True)
        accuracy = compare(out, lse, q, k, v, kernel.spec.mask_expr)
        if not accuracy.ok:
            print("WRONG", kernel.plan.name, shape, accuracy, flush=True)
            return False
    return True


def main(out: Path, head_dims: list[int], lengths: list[int], rounds: int, target_ms: float) -> None:
    """Print and write one row per head dim, mask and length."""
    rows = []
    gemm = bench.cublas(torch.bfloat16)
    for dims in (dims for dims in CHOICES if dims[0] in head_dims):
        for mask in ("full", "causal"):
            head_dim = {"qk": dims[0], "v": dims[1]}
            spec = attngen.load({"target": "sm_90a", "problem": {"head_dim": head_dim}, "mask": mask})
            kernels = {
                label(schedule, choice): attngen.Kernel(
                    spec, assemble((build(spec, ARCHS["sm_90a"], schedule, choice),))
                )
                for choice in CHOICES[dims]
                for schedule in SCHEDULES
            }
            with ThreadPoolExecutor(16) as pool:
                list(pool.map(lambda kernel: kernel.compiled, kernels.values()))
            kernels = {name: kernel for name, kernel in kernels.items() if right(kernel)}
            for length in lengths:
                shape = bench.grid_shape(length, dims[0])
                q, k, v = random_inputs(shape, *dims, torch.bfloat16, "cuda", 0)
                runs = {name: partial(kernel, q, k, v) for name, kernel in kernels.items()}
                runs |= bench.peers(q, k, v, mask == "causal", ("cudnn",)) | {"cublas": gemm}
                samples = bench.measure(runs, rounds, target_ms)
                tflops = bench.summary(samples, bench.Point(shape, *dims, mask == "causal").flops)
                tflops["cublas"] = bench.tflops(samples["cublas"], bench.GEMM_FLOPS)
                rows.append(dict(head_dim=dims, mask=mask, seqlen=length, tflops=tflops, ms=samples))
                shown = {name: f"{x:.0f} ({x / tflops['cudnn']:.2f})" for name, x in tflops.items()}
                best = dict(sorted(shown.items(), key=lambda item: -tflops[item[0]]))
                print(*dims, mask, length, best, flush=True)
    bench.write_json(out / "tune_warpgroups.json", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 80, 96, 128, 192, 256])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--target-ms", type=float, default=15.0)
    given = parser.parse_args()
    main(given.out, given.head_dims, given.lengths, given.rounds, given.target_ms)
