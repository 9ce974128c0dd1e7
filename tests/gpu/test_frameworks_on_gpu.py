"""Modules of training frameworks on one GPU, over stand-ins: out and gradients as near to f64 as two roundings."""

from collections.abc import Sequence

import pytest
import torch

from tests.faces.attention64 import attention64, draw, starts
from tests.faces.frameworks import (
    AttnMaskType,
    PackedSeqParams,
    TransformerConfig,
    VarlenMetadata,
    standing_in,
)

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]
LENGTHS = (130, 1, 517, 64)


def drawn(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    return [x.to("cuda", torch.bfloat16).requires_grad_() for x in draw(*shapes, seed=seed)]


def assert_rounded(found: torch.Tensor, exact: torch.Tensor, bound: float = 2.0**-6) -> None:
    """No element further apart than bf16 rounds sums of the size that the largest has, once for P and once for O."""
    assert found.shape == exact.shape and exact.any()
    found, exact = found.detach(), exact.detach()
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


@pytest.mark.parametrize("kind", ["causal", "padding_causal"])
def test_megatrons_core_attention(kind: str) -> None:
    """Dense, heads grouped, with padding that a tensor says, a bias and a learned offset."""
    length, batch, heads = 300, 2, 8
    inputs = drawn((length, batch, heads, 128), (length, batch, 2, 128), (length, batch, 2, 128))
    (bias,) = drawn((1, heads, length, length), seed=2)
    hidden = (torch.arange(length, device="cuda") >= torch.tensor([[300], [250]], device="cuda"))[
        :, None, None
    ]
    config = TransformerConfig(heads, 2, 128, attention_dropout=0.0, softmax_type="learnable")
    with standing_in("attngen.megatron") as megatron:
        module = megatron.CoreAttention(config, 1, AttnMaskType[kind], "self").cuda()
        out = module(*inputs, hidden if kind == "padding_causal" else None, attention_bias=bias)
    seen = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()
    out64, _ = attention64(
        *(x.transpose(0, 1) for x in inputs),
        seen & ~hidden if kind == "padding_causal" else seen,
        bias=bias,
        sink=module.softmax_offset,
    )
    # An offset's gradient is a sum over all rows and columns: its size is theirs.
    assert_right(out, out64.transpose(0, 1).flatten(2), [*inputs, bias, module.softmax_offset])


def test_megatrons_packed_sequences() -> None:
    """With gaps in memory, of which nothing is read: what stands there is not a number."""
    rooms = [length + 7 for length in LENGTHS]
    tokens = sum(rooms)
    inputs = drawn((tokens, 8, 64), (tokens, 8, 64), (tokens, 8, 64))
    used = torch.cat(
        [torch.arange(room) < length for room, length in zip(rooms, LENGTHS, strict=True)]
    ).cuda()
    for x in inputs:
        x.data[~used] = torch.nan
    at, padded = (starts(*each).to("cuda") for each in (LENGTHS, rooms))
    packed = PackedSeqParams("thd", at, at, padded, padded, max(LENGTHS), max(LENGTHS))
    with standing_in("attngen.megatron") as megatron:
        config = TransformerConfig(8, 8, 64, attention_dropout=0.0)
        module = megatron.CoreAttention(config, 1, AttnMaskType.padding_causal, "self")
        out = module(*inputs, None, packed_seq_params=packed)
    assert not out[~used].any()
    whole = [x.detach()[used].requires_grad_() for x in inputs]
    made = []
    for rows in zip(*(x.split(LENGTHS) for x in whole), strict=True):
        seen = torch.ones(rows[0].shape[0], rows[0].shape[0], dtype=torch.bool, device="cuda").tril()
        made.append(attention64(*rows, seen)[0].flatten(1))
    exact = torch.cat(made)
    assert_rounded(out[used], exact)
    (dout,) = drawn(tuple(exact.shape), seed=1)
    found = torch.autograd.grad(out[used], inputs, dout.detach())
    for x, y in zip(found, torch.autograd.grad(exact, whole, dout.detach().double()), strict=True):
        assert_rounded(x[used], y.double(), 2.0**-5)
