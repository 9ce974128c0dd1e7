"""Modules of training frameworks on one GPU, over stand-ins: out and gradients as near to f64 as two roundings."""

from collections.abc import Sequence

import pytest
import torch

from tests.faces.attention64 import attention64, draw, starts
from tests.faces.frameworks import VarlenMetadata, standing_in

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]
LENGTHS = (130, 1, 517, 64)


def drawn(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    return [x.to("cuda", torch.bfloat16).requires_grad_() for x in draw(*shapes, seed=seed)]


def assert_rounded(found: torch.Tensor, exact: torch.Tensor, bound: float = 2.0**-6) -> None:
    """No element further apart than bf16 rounds sums of the size that the largest has, once for P and once for O."""
    assert found.shape == exact.shape and exact.any()
    apart = (found.double() - exact).abs().max()
    assert float(apart) <= bound * max(1.0, float(exact.abs().max())), float(apart)


def assert_right(out: torch.Tensor, out64: torch.Tensor, inputs: Sequence[torch.Tensor]) -> None:
    """Out, and the gradients of all that it was made of, which out64 was made of as well."""
    assert_rounded(out, out64)
    (dout,) = drawn(tuple(out.shape), seed=1)
    found = torch.autograd.grad(out, inputs, dout.detach())
    for x, y in zip(found, torch.autograd.grad(out64, inputs, dout.detach().double()), strict=True):
        assert_rounded(x, y.double(), 2.0**-5)


@pytest.mark.parametrize("window", [(-1, 0), (100, 0)])
def test_torchtitans_inner_attention(window: tuple[int, int]) -> None:
    """Documents of packed tokens, heads grouped."""
    tokens = sum(LENGTHS)
    inputs = drawn((tokens, 8, 128), (tokens, 2, 128), (tokens, 2, 128))
    at = starts(*LENGTHS).to("cuda")
    with standing_in("attngen.torchtitan") as titan:
        module = titan.InnerAttention.Config(window_size=window).build()
        masks = VarlenMetadata(at, at, max(LENGTHS), max(LENGTHS))
        out = module(*inputs, attention_masks=masks, enable_gqa=True)
    made = []
    for rows in zip(*(x.split(LENGTHS) for x in inputs), strict=True):
        place = torch.arange(rows[0].shape[0], device="cuda")
        before = place[:, None] - place[None]
        seen = (before >= 0) & (before <= (window[0] if window[0] >= 0 else max(LENGTHS)))
        made.append(attention64(*rows, seen)[0])
    assert_right(out, torch.cat(made), inputs)
