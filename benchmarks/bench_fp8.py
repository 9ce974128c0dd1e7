"""The figures of e4m3: `python benchmarks/bench_fp8.py --out DIR`.

`auto` specs in one process with cuDNN's e4m3 forward, cuBLAS's e4m3 GEMM and attngen's own bf16: head_dim 64, 128, 256,
full and causal, 2k to 16k (batch·seqlen = 16384, heads·head_dim = 2048). Operands are e4m3 with one scale a tensor, V
row by row: laying it out is inside attngen's time. Then bf16 in and out, quantised by every call. Errors are against
fp64 on the bf16 tensors, on sampled rows, relative to the output's norm.
"""

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cudnn_fp8 import cudnn_fp8

import attngen
from attngen.check import timing
from attngen.check.inputs import random_inputs
from attngen.check.reference import attention_chunked
from attngen.expr import parse_mask
from attngen.quantize import Operands, quantize, unpack_values

LENGTHS = (2048, 4096, 8192, 16384)
SAMPLED = 64
KINDS = ("per_tensor", "per_block")


@dataclass(frozen=True)
class Case:
    """A kernel of the table."""

    head_dim: int
    mask: str
    scales: str = ""
    promote: int | str = "auto"
    incoherent: str = "none"

    @property
    def spec(self) -> dict[str, Any]:
        """As a spec; without scales that of bf16."""
        precision = {
            "inputs": "e4m3",
            "scales": self.scales,
            "promote": self.promote,
            "incoherent": self.incoherent,
        }
        return {
            "target": "sm_90a",
            "problem": {"head_dim": self.head_dim},
            "mask": self.mask,
            "precision": precision if self.scales else {"inputs": "bf16"},
        }


def grid() -> Iterator[tuple[int, str]]:
    """Head dims and masks."""
    for mask in ("full", "causal"):
        for head_dim in (64, 128, 256):
            yield head_dim, mask


def compiled(cases: list[Case]) -> dict[Case, attngen.Kernel]:
    """The kernels, compiled side by side."""
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(cases, pool.map(lambda case: attngen.compile(case.spec), cases), strict=True))


def relative_error(out: torch.Tensor, tensors: tuple[torch.Tensor, ...], mask: str) -> float:
    """RMSE of sampled rows over the reference's root mean square."""
    rows = torch.linspace(0, out.shape[1] - 1, SAMPLED).long().tolist()
    right, _ = attention_chunked(*tensors, parse_mask(mask), rows=rows)
    return ((out[:, rows].double() - right).square().mean() / right.square().mean()).sqrt().item()


def rows_of(operands: Operands) -> dict[str, torch.Tensor]:
    """The operands as e4m3 tensors of the usual layout, with descales."""
    return {
        "q": operands.q,
        "k": operands.k,
        "v": unpack_values(operands.v, operands.seqlen_k),
        "q_descale": operands.q_descale,
        "k_descale": operands.k_descale,
        "v_descale": operands.v_descale,
    }


def against_cudnn(rounds: int) -> list[dict[str, Any]]:
    """The grid, e4m3 in."""
    results, gemm = [], timing.cublas(torch.float8_e4m3fn)
    for head_dim, mask in grid():
        promoted, plain, bf16 = cases = [
            Case(head_dim, mask, "per_tensor"),
            Case(head_dim, mask, "per_tensor", 0),
            Case(head_dim, mask),
        ]
        kernels = compiled(cases)
        for seqlen in LENGTHS:
            shape = timing.grid_shape(seqlen, head_dim)
            tensors = random_inputs(shape, head_dim, head_dim, torch.bfloat16, "cuda", 0)
            given = rows_of(quantize(*tensors, "per_tensor"))
            single = [given[f"{name}_descale"].flatten()[:1].clone() for name in "qkv"]
            runs: dict[str, timing.Run] = {
                "attngen": partial(kernels[promoted], **given),
                "promotion off": partial(kernels[plain], **given),
                "bf16": partial(kernels[bf16], *tensors),
                "cudnn": cudnn_fp8(given["q"], given["k"], given["v"], single, mask == "causal"),
            }
            errors = {name: relative_error(run(), tensors, mask) for name, run in runs.items()}
            samples = timing.measure(runs | {"cublas": gemm}, rounds)
            flops = (
                4 * seqlen * seqlen * head_dim * shape.heads * shape.batch / (2 if mask == "causal" else 1)
            )
            tflops = timing.summary(samples, flops) | {
                "cublas": timing.tflops(samples["cublas"], timing.GEMM_FLOPS)
            }
            point = {"head_dim": head_dim, "mask": mask, "seqlen": seqlen}
            results.append({**point, "tflops": tflops, "errors": errors, "ms": samples})
            print(
                f"d{head_dim} {mask} {seqlen}: "
                + ", ".join(f"{name} {x:.0f} ({x / tflops['cudnn']:.3f})" for name, x in tflops.items())
                + "; errors "
                + ", ".join(f"{name} {x:.4f}" for name, x in errors.items()),
                flush=True,
            )
    return results


def end_to_end(rounds: int) -> list[dict[str, Any]]:
    """bf16 in and out at 16k, quantised by the call, beside attngen's bf16 kernel."""
    results, seqlen = [], 16384
    for head_dim, mask in ((128, "full"), (128, "causal")):
        cases = {
            f"{scales}, {incoherent}, promote {promote}": Case(head_dim, mask, scales, promote, incoherent)
            for scales in KINDS
            for incoherent in ("none", "hadamard")
            for promote in ("auto", 0)
        } | {"bf16": Case(head_dim, mask)}
        kernels = compiled(list(cases.values()))
        tensors = random_inputs(
            timing.grid_shape(seqlen, head_dim), head_dim, head_dim, torch.bfloat16, "cuda", 0
        )
        samples = timing.measure({n: partial(kernels[case], *tensors) for n, case in cases.items()}, rounds)
        bf16 = median(samples["bf16"])
        results.append({"head_dim": head_dim, "mask": mask, "seqlen": seqlen, "ms": samples})
        for name, times in samples.items():
            print(
                f"d{head_dim} {mask} {seqlen} {name}: {median(times):.3f} ms, {bf16 / median(times):.3f} of bf16's rate"
            )
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=9)
    given_ = parser.parse_args()
    found = against_cudnn(given_.rounds)
    ratios = {
        name: timing.geometric_mean(row["tflops"][name] / row["tflops"]["cudnn"] for row in found)
        for name in ("attngen", "promotion off")
    }
    print("geometric means against cuDNN:", {name: round(x, 3) for name, x in ratios.items()})
    ends = end_to_end(given_.rounds)
    timing.write_json(given_.out / "fp8.json", found, end_to_end=ends, geometric_means=ratios)
