"""Times choices of the warpgroup schedules for modified scores: `python benchmarks/tune_scores.py OUT`.

bf16, head_dim 128, batch·seqlen = 16384, 16 heads. The winners go to attngen/lower/tiles.py, with this script's JSON in
benchmarks/results as the evidence. A choice that is wrong on a small odd shape is reported and not timed.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

import torch
from tune_warpgroups import LAST, SCHEDULES, W, label

import attngen
from attngen.arch import ARCHS
from attngen.check import bench
from attngen.check.accuracy import compare
from attngen.check.inputs import Shape, random_inputs
from attngen.lower.lower import build
from attngen.plan import assemble

HEAD_DIM, HEADS = 128, 16
SCORES = {
    "plain": ("score", {}),
    "alibi": ("score + alibi(slopes)", {"slopes": "f32[num_heads_q]"}),
    "softcap": ("softcap(score, 30.0)", {}),
    "both": ("softcap(score + alibi(slopes), 30.0)", {"slopes": "f32[num_heads_q]"}),
}
CHOICES = [
    W(128, 128, 2, 2),
    W(128, 128, 2, 2, q_stages=2, **LAST),
    W(128, 128, 2, 2, **LAST),
    W(192, 80, 2, 3, **LAST),
    W(192, 80, 2, 3, q_stages=2, **LAST),
    W(192, 80, 3, 3, **LAST),
]


def main(out: Path, lengths: list[int], rounds: int, target_ms: float) -> None:
    """Print and write one row per score, mask and length."""
    rows = []
    held = {"slopes": torch.exp2(-8.0 * torch.arange(1, HEADS + 1, device="cuda") / HEADS)}
    for mask in ("full", "causal"):
        for name, (score, tensors) in SCORES.items():
            problem = {"target": "sm_90a", "problem": {"head_dim": HEAD_DIM}}
            spec = attngen.load(problem | {"mask": mask, "score": score, "tensors": tensors})
            passed = {tensor: held[tensor] for tensor in tensors}
            kernels = {
                label(schedule, choice): attngen.Kernel(
                    spec, assemble((build(spec, ARCHS["sm_90a"], schedule, choice),))
                )
                for choice in CHOICES
                for schedule in SCHEDULES
            }
            with ThreadPoolExecutor(16) as pool:
                list(pool.map(lambda kernel: kernel.compiled, kernels.values()))
            small = random_inputs(Shape(2, HEADS, 2, 300, 515), HEAD_DIM, HEAD_DIM, torch.bfloat16, "cuda", 0)
            for choice, kernel in list(kernels.items()):
                result = kernel(*small, return_lse=True, **passed)
                given = {"score": spec.score_expr, "declared": passed}
                if not (accuracy := compare(*result, *small, spec.mask_expr, **given)).ok:
                    print("WRONG", choice, name, accuracy, flush=True)
                    del kernels[choice]
            for length in lengths:
                q, k, v = random_inputs(
                    bench.grid_shape(length, HEAD_DIM), HEAD_DIM, HEAD_DIM, torch.bfloat16, "cuda", 0
                )
                runs = {choice: partial(kernel, q, k, v, **passed) for choice, kernel in kernels.items()}
                samples = bench.measure(runs, rounds, target_ms)
                rows.append({"score": name, "mask": mask, "seqlen": length, "ms": samples})
                best = sorted((median(times), choice) for choice, times in samples.items())
                print(
                    name, mask, length, ", ".join(f"{choice} {ms:.3f}" for ms, choice in best[:6]), flush=True
                )
    bench.write_json(out / "tune_scores.json", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--target-ms", type=float, default=8.0)
    given = parser.parse_args()
    main(given.out, given.lengths, given.rounds, given.target_ms)
