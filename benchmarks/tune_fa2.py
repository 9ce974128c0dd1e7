"""Times tile choices of the fa2 schedule against torch's flash back end: `python benchmarks/tune_fa2.py OUT`.

The winners go to attngen/lower/tiles.py, with this script's JSON in benchmarks/results as the evidence.
"""

import sys
from functools import partial
from pathlib import Path

import torch

import attngen
from attngen.arch import ARCHS
from attngen.check import bench
from attngen.check.accuracy import compare
from attngen.check.inputs import Shape, random_inputs
from attngen.lower.lower import build
from attngen.lower.tiles import Choice
from attngen.plan import assemble

CHOICES = {
    64: [
        Choice(128, 64, 1, 4),
        Choice(128, 64, 2, 4),
        Choice(128, 128, 1, 4),
        Choice(128, 96, 1, 4),
        Choice(128, 64, 1, 4, blocks_per_sm=3),
        Choice(64, 64, 2, 4),
        Choice(128, 128, 1, 8),
    ],
    128: [
        Choice(128, 64, 1, 4),
        Choice(128, 64, 2, 4),
        Choice(128, 64, 1, 4, score_unroll=2),
        Choice(128, 32, 2, 4),
        Choice(128, 48, 2, 4),
        Choice(128, 128, 1, 8),
        Choice(64, 64, 2, 4),
        Choice(128, 64, 2, 8),
    ],
}


def main(out: Path, lengths: tuple[int, ...] = (1024, 4096, 16384)) -> None:
    """Print and write one row per head dim, mask and length."""
    rows = []
    for head_dim, choices in CHOICES.items():
        for causal in (False, True):
            spec = attngen.load(
                {
                    "target": "sm_90a",
                    "problem": {"head_dim": head_dim},
                    "mask": "causal" if causal else "full",
                    "schedule": {"kind": "fa2"},
                }
            )
            kernels = {
                str(tuple(choice.__dict__.values())): attngen.Kernel(
                    spec, assemble((build(spec, ARCHS["sm_90a"], "fa2", choice),))
                )
                for choice in choices
            }
            small = random_inputs(Shape(1, 6, 2, 113, 203), head_dim, head_dim, torch.bfloat16, "cuda", 1)
            for name, kernel in list(kernels.items()):
                result, lse = kernel(*small, return_lse=True)
                accuracy = compare(result, lse, *small, spec.mask_expr)
                if not accuracy.ok:
                    print("WRONG", head_dim, causal, name, accuracy, flush=True)
                    del kernels[name]
            for length in lengths:
                shape = bench.grid_shape(length, head_dim)
                q, k, v = random_inputs(shape, head_dim, head_dim, torch.bfloat16, "cuda", 0)
                runs = {name: partial(kernel, q, k, v) for name, kernel in kernels.items()}
                runs |= bench.peers(q, k, v, causal, ("flash", "cudnn"))
                samples = bench.measure(runs, rounds=5, target_ms=8)
                point = bench.Point(shape, head_dim, head_dim, causal)
                tflops = bench.summary(samples, point.flops)
                rows.append(dict(head_dim=head_dim, causal=causal, seqlen=length, tflops=tflops, ms=samples))
                print(head_dim, causal, length, {name: round(x) for name, x in tflops.items()}, flush=True)
    bench.write_json(out / "tune_fa2.json", rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
