"""The simulator on the grid of lengths, head dims, heads, masks, dtypes and layouts that the GPU tests run."""

import pytest
import torch

import attngen
from attngen.accuracy import compare
from attngen.inputs import Shape, random_inputs

LONGEST = 217
"""Each length is capped at this: the CPU shall finish, and every case of a block's edge is still met."""
LENGTHS = [
    (1, 1),
    (64, 128),
    (113, 203),
    (239, 1),
    (799, 3),
    (128, 217),
    (1023, 1024),
    (1024, 1023),
    (4096, 4096),
]
HEAD_DIMS = [(32, 32), (40, 40), (64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128)]
HEADS = [(4, 4), (4, 1), (4, 2)]
LAYOUTS = ["contiguous", "strided", "bhsd", "offset"]
TORCH = {"f16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("dims", HEAD_DIMS, ids=lambda dims: f"d{dims[0]}x{dims[1]}")
@pytest.mark.parametrize("inputs", ["f16", "bf16"])
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("kind", ["fa2", "serial"])
def test_error_stays_in_its_bound(kind: str, mask: str, inputs: str, dims: tuple[int, int]) -> None:
    """The plan for sm_80, every length, MHA, MQA and GQA in turn: out and lse within the kernel's bound."""
    kernel = attngen.compile(
        {
            "problem": {"head_dim": {"qk": dims[0], "v": dims[1]}},
            "mask": mask,
            "precision": {"inputs": inputs},
            "schedule": {"kind": kind},
        },
        arch="sm_80",
    )
    bad = []
    for seed, lengths in enumerate(LENGTHS):
        turn = seed + HEAD_DIMS.index(dims)
        layout, (heads, heads_kv) = LAYOUTS[turn % len(LAYOUTS)], HEADS[turn % len(HEADS)]
        shape = Shape(1, heads, heads_kv, *(min(length, LONGEST) for length in lengths))
        q, k, v = random_inputs(shape, *dims, TORCH[inputs], "cpu", seed, layout=layout)
        out, lse = kernel(q, k, v, return_lse=True)
        accuracy = compare(out, lse, q, k, v, kernel.spec.mask_expr)
        if not accuracy.ok:
            bad.append(f"{shape} {layout}: {accuracy}")
    assert not bad, "\n".join(bad)
