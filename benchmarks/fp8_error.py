"""What e4m3 inputs cost in accuracy: `python benchmarks/fp8_error.py --out DIR` writes DIR/fp8_error.json.

Two tables, of errors against fp64 on the bf16 inputs before they are quantised, full mask, sampled rows:

- scales: RMSE of every kind of scales, with and without the Hadamard matrix, and of bf16, at batch 1, heads·head_dim =
  2048, head_dim 64, 128 and 256, lengths 1024 to 16384, on N(0, 1) and on outliers. Source of the table:
  FlashAttention-3, arXiv 2407.08608, table 3, which does not state its sizes.
- growth: RMSE relative to that of the output, over keys, with O added up in true f32 and without, head_dim 128; on
  N(0, 1) and where 1 % of the keys, each like some queries, carry 90 % of the mass.

`--smoke`: both on the CPU, at sizes of a few seconds; the file is then fp8_error_smoke.json.
"""

import argparse
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import attngen
from attngen.check import timing
from attngen.check.inputs import Shape, random_inputs
from attngen.check.judging import Inputs
from attngen.cli.losses import rmse_of, sampled_rows

HEAD_DIM = 128
SCALES: Mapping[str, dict[str, Any]] = {
    "per_block, hadamard": {"scales": "per_block", "incoherent": "hadamard"},
    "per_block": {"scales": "per_block"},
    "per_tensor, hadamard": {"scales": "per_tensor", "incoherent": "hadamard"},
    "per_tensor": {"scales": "per_tensor"},
    "per_head": {"scales": "per_head"},
    "per_token": {"scales": "per_token"},
    "per_token, hadamard": {"scales": "per_token", "incoherent": "hadamard"},
    "bf16": {"inputs": "bf16"},
}
GROWTH: Mapping[str, dict[str, Any]] = {
    "promote auto": {"incoherent": "hadamard"},
    "promote 0": {"incoherent": "hadamard", "promote": 0},
    "per_tensor, promote auto": {"scales": "per_tensor"},
    "per_tensor, promote 0": {"scales": "per_tensor", "promote": 0},
    "bf16": {"inputs": "bf16"},
}
HEAVY_SHARE, HEAVY_MASS = 0.01, 0.9


@dataclass(frozen=True)
class Sizes:
    """What is run, and where."""

    device: str
    tables: tuple[tuple[int, Shape], ...]
    heads: int
    queries: int
    keys: tuple[int, ...]
    rows: int


TABLES = tuple(
    (head_dim, Shape(1, 2048 // head_dim, 2048 // head_dim, length, length))
    for head_dim in (64, 128, 256)
    for length in (1024, 4096, 16384)
)
FULL = Sizes("cuda", TABLES, 4, 512, tuple(2**n for n in range(12, 18)), 64)
SMOKE = Sizes("cpu", ((HEAD_DIM, Shape(1, 2, 1, 100, 300)),), 1, 64, (128, 512), 16)


def kernel(precision: dict[str, Any], head_dim: int = HEAD_DIM) -> attngen.Kernel:
    """Full attention of sm_90a; auto decides what the precision leaves open."""
    precision = {"inputs": "e4m3", **precision}
    return attngen.compile(
        {"target": "sm_90a", "problem": {"head_dim": head_dim}, "precision": precision, "mask": "full"}
    )


def heavy_keys(shape: Shape, device: str, seed: int = 0) -> Inputs:
    """N(0, 1), but all queries lean one way and every hundredth key, at random places, as far as gives it its mass.

    The other scores have mean 0 and variance 1, a weight of sqrt(e) each in the mean; so have the heavy ones beside
    their common part.
    """
    q, k, v = random_inputs(shape, HEAD_DIM, HEAD_DIM, torch.float32, seed=seed)
    odds = HEAVY_MASS / (1 - HEAVY_MASS) * (1 - HEAVY_SHARE) / HEAVY_SHARE
    lean = math.sqrt(math.log(odds)) * HEAD_DIM**0.25  # of both, so that their product, scaled, is log(odds)
    direction = torch.full((HEAD_DIM,), HEAD_DIM**-0.5)
    generator = torch.Generator().manual_seed(seed)
    heavy = torch.randperm(shape.seqlen_k, generator=generator)[: max(1, round(HEAVY_SHARE * shape.seqlen_k))]
    q -= (q @ direction)[..., None] * direction
    k -= (k @ direction)[..., None] * direction
    q += lean * direction
    k[:, heavy] += lean * direction
    return tuple(x.to(torch.bfloat16).to(device) for x in (q, k, v))  # type: ignore[return-value] # three


def of_scales(sizes: Sizes) -> list[dict[str, Any]]:
    """A row for each head_dim, length and kind of input."""
    rows = []
    for head_dim, shape in sizes.tables:
        with ThreadPoolExecutor() as pool:
            made = pool.map(partial(kernel, head_dim=head_dim), SCALES.values())
            kernels = dict(zip(SCALES, made, strict=True))
        for kind in ("randn", "outliers"):
            inputs = random_inputs(shape, head_dim, head_dim, torch.bfloat16, sizes.device, 0, kind=kind)
            found = rmse_of(kernels, inputs, rows=sampled_rows(shape.seqlen_q, 4 * sizes.rows))
            rows.append({"inputs": kind, "head_dim": head_dim, "shape": vars(shape), "rmse": found})
            text = ", ".join(f"{name} {error:.3e}" for name, error in found.items())
            print(f"head_dim {head_dim}, {shape}, {kind}: {text}", flush=True)
    return rows


def of_lengths(sizes: Sizes) -> list[dict[str, Any]]:
    """A row for each kind of input and number of keys."""
    kernels = {name: kernel(precision) for name, precision in GROWTH.items()}
    rows = []
    for keys in sizes.keys:
        shape = Shape(1, sizes.heads, sizes.heads, sizes.queries, keys)
        for kind in ("randn", "heavy keys"):
            if kind == "randn":
                inputs = random_inputs(shape, HEAD_DIM, HEAD_DIM, torch.bfloat16, sizes.device)
            else:
                inputs = heavy_keys(shape, sizes.device)
            found = rmse_of(kernels, inputs, rows=sampled_rows(shape.seqlen_q, sizes.rows), relative=True)
            rows.append({"inputs": kind, "keys": keys, "relative_rmse": found})
            text = ", ".join(f"{name} {error:.3e}" for name, error in found.items())
            print(f"{keys} keys, {kind}: {text}", flush=True)
    return rows


def main() -> None:
    """Run both and write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--smoke", action="store_true", help="small sizes, on the CPU")
    given = parser.parse_args()
    sizes = SMOKE if given.smoke else FULL
    path = given.out / f"fp8_error{'_smoke' if given.smoke else ''}.json"
    timing.write_json(path, of_scales(sizes), growth=of_lengths(sizes), head_dim_of_growth=HEAD_DIM)


if __name__ == "__main__":
    main()
