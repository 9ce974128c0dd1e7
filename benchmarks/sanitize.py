"""Small launches of every schedule, for compute-sanitizer: `python benchmarks/sanitize.py [plain] [language] [fp8]`.

Lengths (1, 1), (113, 203) and (128, 217), GQA 3:1, lse asked for. `plain`: f16 and bf16, head_dim 64 and 128, full and
causal. `language`: walks, modified scores, declared tensors and tables of extremes, head_dim 64. `fp8`: e4m3, quantised
by the call, every kind of scales, promoted and not, head_dim 64.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attngen
from attngen.check.declared_inputs import declared_inputs
from attngen.check.inputs import Shape
from attngen.check.judging import draw, judge
from attngen.quantize import SCALE_KINDS

KINDS = ("fa2", "serial", "warp_specialized", "pingpong", "auto")
KINDS_OF_E4M3 = ("warp_specialized", "pingpong")
LENGTHS = ((1, 1), (113, 203), (128, 217))
LANGUAGE: tuple[dict[str, Any], ...] = (
    {"mask": "window(100, 0) or sinks(4)", "score": "softcap(score, 2.0)"},
    {"mask": "document(doc) and causal", "tensors": {"doc": "i32[batch, seqlen_k]"}},
    {"mask": "prefix(9)", "score": "score + alibi(slopes)", "tensors": {"slopes": "f32[num_heads_q]"}},
    {
        "score": "score + bias[h, q_idx, kv_idx]",
        "tensors": {"bias": "bf16[num_heads_q, seqlen_q, seqlen_k]"},
    },
)


def plain() -> Iterator[dict[str, Any]]:
    """Specs without the language."""
    for inputs in ("f16", "bf16"):
        for head_dim in (64, 128):
            for mask in ("full", "causal"):
                yield {"problem": {"head_dim": head_dim}, "precision": {"inputs": inputs}, "mask": mask}


def language() -> Iterator[dict[str, Any]]:
    """Specs of walks, scores and tables."""
    for fields in LANGUAGE:
        yield {"problem": {"head_dim": 64}, **fields}


def fp8() -> Iterator[dict[str, Any]]:
    """Specs of e4m3 inputs: kinds of scales, promotion, a mask and a score."""
    for scales in SCALE_KINDS:
        for promote, incoherent, fields in ((0, "hadamard", LANGUAGE[0]), (1, "none", {"mask": "causal"})):
            precision = {"inputs": "e4m3", "scales": scales, "promote": promote, "incoherent": incoherent}
            yield {"problem": {"head_dim": 64}, "precision": precision, **fields}


def is_right(kernel: attngen.Kernel, shape: Shape) -> bool:
    """Run, and hold the result against the reference on the CPU."""
    spec, plan = kernel.spec, kernel.plan
    q, k, v = draw(plan, shape, "cuda")
    declared = declared_inputs(spec.declarations, shape, "cuda")
    out, lse = kernel(q, k, v, return_lse=True, **declared)
    passed = {name: x.cpu() if hasattr(x, "cpu") else x for name, x in declared.items()}
    on_cpu = [x.cpu() for x in (out, lse, q, k, v)]
    return judge(spec, plan, *on_cpu, declared=passed, by_gpu=True).ok


def main() -> None:
    """Run and compare; print how many launches were right."""
    sets = {"plain": plain, "language": language, "fp8": fp8}
    right = launched = 0
    for name in sys.argv[1:] or sets:
        kinds = KINDS_OF_E4M3 if name == "fp8" else KINDS
        specs = [{**fields, "schedule": {"kind": kind}} for fields in sets[name]() for kind in kinds]
        with ThreadPoolExecutor() as pool:
            kernels = list(pool.map(attngen.compile, specs))
        for kernel in kernels:
            for lengths in LENGTHS:
                right += is_right(kernel, Shape(1, 3, 1, *lengths))
                launched += 1
    print(f"{right} of {launched} launches right")


if __name__ == "__main__":
    main()
