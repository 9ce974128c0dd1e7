"""The fa2 schedule against torch's flash back end on the issue's grid: `python benchmarks/bench_fa2.py --out DIR`.

bf16, head_dim 64 and 128, full and causal, seqlen 1k to 16k, batch·seqlen = 16384, heads·head_dim = 2048.
"""

import argparse
from pathlib import Path

import torch

import attngen
from attngen.check import timing
from attngen.check.inputs import random_inputs


def main(out: Path) -> None:
    """Print a row a point, then the geometric mean and the worst point; write the raw samples."""
    rows, ratios = [], []
    for head_dim in (64, 128):
        for causal in (False, True):
            mask = "causal" if causal else "full"
            kernel = attngen.compile(
                {"problem": {"head_dim": head_dim}, "mask": mask, "schedule": {"kind": "fa2"}}
            )
            for seqlen in (1024, 2048, 4096, 8192, 16384):
                shape = timing.grid_shape(seqlen, head_dim)
                q, k, v = random_inputs(shape, head_dim, head_dim, torch.bfloat16, "cuda", 0)
                runs = {"attngen": lambda q=q, k=k, v=v, kernel=kernel: kernel(q, k, v)}
                runs |= timing.peers(q, k, v, causal, ("flash", "cudnn"))
                samples = timing.measure(runs)
                tflops = timing.summary(samples, timing.Point(shape, head_dim, head_dim, causal).flops)
                ratios.append(tflops["attngen"] / tflops["flash"])
                rows.append(
                    {
                        "head_dim": head_dim, "mask": mask, "seqlen": seqlen, "kernel": kernel.plan.name,
                        "cubin": kernel.compiled.digest, "tflops": tflops, "ms": samples,
                    }
                )  # fmt: skip
                shown = "  ".join(f"{name} {value:.0f}" for name, value in tflops.items())
                print(f"d{head_dim} {mask} {seqlen}: {shown}  x{ratios[-1]:.3f} of flash", flush=True)
    mean = timing.geometric_mean(ratios)
    print(f"geometric mean {mean:.3f} of flash, worst point {min(ratios):.3f}")
    timing.write_json(out / "fa2_vs_flash.json", rows, geometric_mean=mean, worst=min(ratios))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    main(parser.parse_args().out)
