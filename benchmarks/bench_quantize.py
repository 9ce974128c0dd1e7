"""The figures of quantisation: `python benchmarks/bench_quantize.py --out DIR`.

GB/s of every kind of scale at 16k and 64k tokens, 16 heads and head dims 64, 128 and 256, with and without the Hadamard
matrix, and of packing e4m3 V; beside the bandwidth of torch's copy_ on as many elements, in the same rounds. Bytes: 2
read and 1 written for each element, and 2 read more where a pass before finds the maxima.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import attngen
from attngen.check import timing
from attngen.quantize import SCALE_KINDS, ScaleKind

HEADS = 16
TOKENS = ((1, 16384), (4, 16384))
"""batch and seqlen: 16k and 64k tokens."""
HEAD_DIMS = (64, 128, 256)
SEED = 1


def kernel_of(head_dim: int, scales: ScaleKind, seed: int | None) -> attngen.Kernel:
    """A kernel whose inputs are quantised so, compiled."""
    basis = {} if seed is None else {"incoherent": "hadamard", "seed": seed}
    precision = {"inputs": "e4m3", "scales": scales, **basis}
    return attngen.compile({"problem": {"head_dim": head_dim}, "precision": precision})


def candidates(
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> Iterator[tuple[str, timing.Run, int]]:
    """Name, call, and bytes that it must move."""
    q, _, v = tensors
    elements = sum(x.numel() for x in tensors)
    copied = torch.empty_like(torch.cat([x.flatten() for x in tensors]))
    yield "copy", partial(torch.empty_like(copied).copy_, copied), 4 * elements
    for scales in SCALE_KINDS:
        read = 4 if scales in ("per_tensor", "per_head") else 2
        for seed in (None, SEED):
            name = scales if seed is None else f"{scales}, hadamard"
            yield (
                name,
                partial(kernel_of(q.shape[-1], scales, seed).quantize, *tensors),
                (read + 1) * elements,
            )
    packed = v.to(torch.float8_e4m3fn)
    operands = kernel_of(q.shape[-1], "per_block", None).quantize(*tensors)
    pack = kernel_of(q.shape[-1], "per_block", None)._launcher.make
    yield "pack v", partial(pack, ("v",), operands.q, operands.k, packed), 2 * v.numel()


def measured(batch: int, seqlen: int, head_dim: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each candidate."""
    q, k, v = (
        torch.randn(batch, seqlen, HEADS, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)
    )
    found = {name: (run, moved) for name, run, moved in candidates((q, k, v))}
    samples = timing.measure({name: run for name, (run, _) in found.items()}, rounds)
    rates = {name: moved / median(samples[name]) / 1e6 for name, (_, moved) in found.items()}
    rows = []
    for name, rate in rates.items():
        share = rate / rates["copy"]
        point = {"batch": batch, "seqlen": seqlen, "head_dim": head_dim, "case": name}
        rows.append({**point, "ms": samples[name], "gb_per_s": rate, "of_copy": share})
        print(
            f"{batch} x {seqlen}, head_dim {head_dim}, {name}: {median(samples[name]):.4f} ms, "
            f"{rate:.0f} GB/s, {share:.0%} of copy_",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    rows = [
        row
        for batch, seqlen in TOKENS
        for head_dim in HEAD_DIMS
        for row in measured(batch, seqlen, head_dim, given.rounds)
    ]
    timing.write_json(given.out / "quantize.json", rows)
