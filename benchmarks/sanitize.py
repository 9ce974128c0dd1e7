"""Small launches of every schedule and dtype, to run under compute-sanitizer: `python benchmarks/sanitize.py`.

head_dim 64 and 128, lengths (1, 1), (113, 203) and (128, 217), full and causal, GQA 3:1, lse asked for.
"""

import torch

import attngen
from attngen.accuracy import compare
from attngen.inputs import Shape, random_inputs

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
LENGTHS = ((1, 1), (113, 203), (128, 217))


def main() -> None:
    """Run and compare; print how many launches were right."""
    right = launched = 0
    for kind in ("fa2", "serial", "warp_specialized", "pingpong", "auto"):
        for inputs, dtype in DTYPES.items():
            for head_dim in (64, 128):
                for mask in ("full", "causal"):
                    kernel = attngen.compile(
                        {
                            "problem": {"head_dim": head_dim},
                            "precision": {"inputs": inputs},
                            "mask": mask,
                            "schedule": {"kind": kind},
                        }
                    )
                    for lengths in LENGTHS:
                        shape = Shape(1, 3, 1, *lengths)
                        q, k, v = random_inputs(shape, head_dim, head_dim, dtype, "cuda", 0)
                        out, lse = kernel(q, k, v, return_lse=True)
                        on_cpu = [x.cpu() for x in (out, lse, q, k, v)]
                        right += compare(*on_cpu, kernel.spec.mask_expr).ok
                        launched += 1
    print(f"{right} of {launched} launches right")


if __name__ == "__main__":
    main()
