"""`attngen.varlen_attn` beside torch's own function of that name, on one GPU; needs a torch that has it."""

import inspect
from typing import Any

import pytest
import torch

import attngen
from attngen.check.distances import distance

varlen = pytest.importorskip("torch.nn.attention.varlen")
pytestmark = pytest.mark.gpu

LENGTHS = (1, 130, 0, 517, 64, 3)
HEADS, HEAD_DIM = 8, 128
TAKEN = inspect.signature(varlen.varlen_attn).parameters
"""Before torch 2.12 heads of keys are not shared."""
HEADS_KV = 2 if "enable_gqa" in TAKEN else HEADS


def arguments(**more: Any) -> dict[str, Any]:
    """What both functions take: sequences one after another, two heads of keys for eight where torch shares them."""
    generator = torch.Generator("cuda").manual_seed(0)
    starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    sizes = {"query": HEADS, "key": HEADS_KV, "value": HEADS_KV}
    tensors = {
        name: torch.randn(
            sum(LENGTHS), heads, HEAD_DIM, generator=generator, device="cuda", dtype=torch.float32
        )
        .to(torch.bfloat16)
        .requires_grad_()
        for name, heads in sizes.items()
    }
    longest = {"max_q": max(LENGTHS), "max_k": max(LENGTHS)}
    return {**tensors, "cu_seq_q": starts, "cu_seq_k": starts, **longest, **more}


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), *([(96, 0)] if "window_size" in TAKEN else [])])
def test_results_are_as_near_as_two_roundings(window: tuple[int, int]) -> None:
    """Out and gradients differ by a few units of bf16, lse by what f32 loses; in the shape that torch returns."""
    given = arguments(window_size=window, return_aux=varlen.AuxRequest(lse=True))
    shared = {"enable_gqa": True} if HEADS_KV != HEADS else {}
    ours, lse = attngen.varlen_attn(**given, **shared)
    if "window_size" not in TAKEN:
        given["is_causal"] = {(-1, -1): False, (-1, 0): True}[given.pop("window_size")]
    theirs, their_lse = varlen.varlen_attn(**given, **shared)
    assert lse.shape == their_lse.shape == (HEADS, sum(LENGTHS))
    assert float(distance(ours.double(), theirs.double()).max()) <= 2.0**-6 * float(theirs.abs().max())
    assert float(distance(lse.double(), their_lse.double()).max()) <= 1e-3
    leaves = [given[name] for name in ("query", "key", "value")]
    dout = torch.randn(ours.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(
        ours.dtype
    )
    got, wanted = (torch.autograd.grad(out, leaves, dout) for out in (ours, theirs))
    for mine, other in zip(got, wanted, strict=True):
        assert float(distance(mine.double(), other.double()).max()) <= 2.0**-5 * float(other.abs().max())
        assert mine.abs().sum() > 0
