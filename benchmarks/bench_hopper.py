"""The figures of the Hopper schedules: `python benchmarks/bench_hopper.py --out DIR`.

`auto` specs against cuDNN and cuBLAS in one process: the grid of head_dim 64, 128, 256 (batch·seqlen = 16384,
heads·head_dim = 2048), other head dims, GQA, f16, shapes off the grid. The numbers to beat are in docs/performance.md.
"""

import argparse
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import attngen
from attngen.check import timing
from attngen.check.inputs import Shape, random_inputs

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class Problem:
    """One line of the table."""

    group: str
    dims: tuple[int, int]
    mask: str
    shape: Shape
    inputs: str = "bf16"

    @property
    def kernel(self) -> tuple[tuple[int, int], str, str]:
        """What its kernel depends on."""
        return self.dims, self.mask, self.inputs

    def __str__(self) -> str:
        s = self.shape
        heads = f"{s.heads}" if s.heads == s.heads_kv else f"{s.heads}:{s.heads_kv}"
        lengths = f"{s.seqlen_q}" if s.seqlen_q == s.seqlen_k else f"{s.seqlen_q} x {s.seqlen_k}"
        dims = f"d{self.dims[0]}" if self.dims[0] == self.dims[1] else f"d{self.dims[0]}x{self.dims[1]}"
        return f"{dims} {self.mask} {lengths}, batch {s.batch}, heads {heads}, {self.inputs}"


def problems(lengths: Iterable[int]) -> Iterator[Problem]:
    """The grid first, then what is beside it."""
    for mask in ("full", "causal"):
        for d in (64, 128, 256):
            for length in lengths:
                yield Problem("grid", (d, d), mask, timing.grid_shape(length, d))
        for dims in ((80, 80), (96, 96), (192, 192), (192, 128)):
            for length in (4096, 16384):
                yield Problem("other head dims", dims, mask, timing.grid_shape(length, dims[0]))
        yield Problem("GQA", (128, 128), mask, timing.grid_shape(4096, 128, group=8))
        yield Problem("f16", (128, 128), mask, timing.grid_shape(4096, 128), "f16")
        yield Problem("off the grid", (128, 128), mask, Shape(5, 24, 24, 3000, 3000))
        yield Problem("off the grid", (128, 128), mask, Shape(4, 24, 4, 4096, 4096))
        yield Problem("off the grid", (128, 128), mask, Shape(3, 16, 16, 4096, 4096))
        yield Problem("off the grid", (128, 128), mask, Shape(4, 16, 16, 2048, 6144))


def visible_pairs(problem: Problem) -> float:
    """Pairs of rows and keys of one head that count: all, or those a bottom-right causal mask shows."""
    rows, keys = problem.shape.seqlen_q, problem.shape.seqlen_k
    if problem.mask == "full":
        return rows * keys
    return rows * keys / 2 if rows == keys else rows * (keys - rows) + rows * rows / 2


def flops(problem: Problem) -> float:
    """As the field counts them."""
    shape = problem.shape
    return 2 * visible_pairs(problem) * sum(problem.dims) * shape.heads * shape.batch


def main(out: Path, rounds: int, target_ms: float, lengths: list[int]) -> None:
    """Print a line a problem and the means of the classes; write the raw samples."""
    todo = list(problems(lengths))
    specs = {
        problem.kernel: {
            "target": "sm_90a",
            "problem": {"head_dim": {"qk": problem.dims[0], "v": problem.dims[1]}},
            "mask": problem.mask,
            "precision": {"inputs": problem.inputs},
        }
        for problem in todo
    }
    with ThreadPoolExecutor(8) as pool:
        kernels = dict(zip(specs, pool.map(attngen.compile, specs.values()), strict=True))
    gemms = {inputs: timing.cublas(dtype) for inputs, dtype in DTYPES.items()}
    rows = []
    for problem in todo:
        q, k, v = random_inputs(problem.shape, *problem.dims, DTYPES[problem.inputs], "cuda", 0)
        kernel = kernels[problem.kernel]
        runs: dict[str, timing.Run] = {"attngen": partial(kernel, q, k, v)}
        is_square = problem.shape.seqlen_q == problem.shape.seqlen_k
        if problem.mask == "full" or is_square:  # torch's causal is top-left
            runs |= timing.peers(q, k, v, problem.mask == "causal", ("cudnn",))
        samples = timing.measure(runs | {"cublas": gemms[problem.inputs]}, rounds, target_ms)
        tflops = timing.summary(samples, flops(problem))
        tflops["cublas"] = timing.tflops(samples["cublas"], timing.GEMM_FLOPS)
        served = kernel.serving(k)
        rows.append(
            {
                "group": problem.group, "problem": str(problem), "head_dim": problem.dims, "mask": problem.mask,
                "seqlen": problem.shape.seqlen_k, "kernel": served.name,
                "cubin": kernel.modules[served.module].compiled.digest,
                "tflops": tflops, "ms": samples,
            }
        )  # fmt: skip
        ratios = "  ".join(
            f"{tflops['attngen'] / tflops[p]:.3f} of {p}" for p in ("cudnn", "cublas") if p in tflops
        )
        print(f"{problem.group}: {problem}: {tflops['attngen']:.0f} TFLOPS  {ratios}", flush=True)
    grid = [(row["head_dim"][0], row["mask"], row["tflops"]) for row in rows if row["group"] == "grid"]
    ratio = [(f"d{d} {mask}", t["attngen"] / t["cudnn"]) for d, mask, t in grid]
    means = {name: timing.geometric_mean(x for n, x in ratio if n == name) for name, _ in ratio}
    means["all"] = timing.geometric_mean(x for _, x in ratio)
    print("geometric means against cuDNN:", {name: round(mean, 3) for name, mean in means.items()})
    timing.write_json(out / "hopper.json", rows, geometric_means=means)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--target-ms", type=float, default=15.0)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    given = parser.parse_args()
    main(given.out, given.rounds, given.target_ms, given.lengths)
