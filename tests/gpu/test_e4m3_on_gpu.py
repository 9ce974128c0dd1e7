"""Kernels of e4m3 inputs on a GPU, from 16-bit tensors to the output, against the rule for 8-bit operands."""

from itertools import product

import pytest
import torch
from kernels import compile_specs, skip_unless_runs_here

from attngen.inputs import Kind, Shape
from attngen.judging import draw, judge
from attngen.quantize import SCALE_KINDS

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]

LENGTHS = ((1, 1), (1, 300), (113, 203), (300, 1000), (1000, 300), (2048, 4096))


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_scales_are_right(head_dim: int, mask: str) -> None:
    """Every kind of scales, in either basis, on normal, outlying and spanning inputs, promoted: within every line."""
    skip_unless_runs_here("warp_specialized")
    specs = [
        {
            "problem": {"head_dim": head_dim},
            "precision": {"inputs": "e4m3", "scales": scales, "incoherent": incoherent},
            "mask": mask,
        }
        for scales, incoherent in product(SCALE_KINDS, ("none", "hadamard"))
    ]
    kinds: tuple[Kind, ...] = ("randn", "outliers", "spans")
    bad = []
    for made in compile_specs(specs):
        for seed, (lengths, kind) in enumerate(product(LENGTHS, kinds)):
            q, k, v = draw(made.plan, Shape(2, 4, 2, *lengths), "cuda", seed, kind=kind)
            out, lse = made(q, k, v, return_lse=True)
            verdict = judge(made.spec, made.plan, out, lse, q, k, v)
            by_operands = made(made.quantize(q, k, v))
            assert isinstance(by_operands, torch.Tensor) and torch.equal(by_operands, out)
            if not verdict.ok:
                bad.append(f"{made.plan.name}, {lengths}, {kind}: {verdict}")
    assert not bad, "\n".join(bad)
