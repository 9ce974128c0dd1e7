"""The fused backward of sequences with lengths of their own, on a GPU: each a dense call, in one order and in any."""

from itertools import product

import pytest
import torch

from tests.gradients.cut_backward import KINDS, SEQLENS, CutBatch, Seqlens, assert_each_is_a_dense_call, fused

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]

MANY: Seqlens = (*((10, 10),) * 30, (2000, 2500), *((300, 40),) * 9, (0, 0))
"""Short ones, a long one among them."""


@pytest.mark.parametrize("seqlens", [SEQLENS, MANY], ids=["few", "many"])
@pytest.mark.parametrize(
    ("head_dim", "score", "deterministic"),
    [
        *product((64, 128), ("score",), (False, True)),
        (96, "score", False),
        (96, "softcap(score, 3.0)", True),
    ],
)
@pytest.mark.parametrize("mask", ["full", "causal", "window(100, 30)"])
@pytest.mark.parametrize("kinds", KINDS)
def test_each_sequence_is_a_dense_call(
    kinds: str, mask: str, head_dim: int, score: str, deterministic: bool, seqlens: Seqlens
) -> None:
    """Whatever lies beside it."""
    of = CutBatch(kinds, head_dim, seqlens, device="cuda")
    assert_each_is_a_dense_call(of, kinds, mask, head_dim, deterministic, score=score)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kinds", KINDS)
def test_each_sequence_is_a_dense_call_in_f16(kinds: str, head_dim: int) -> None:
    """As in bf16."""
    of = CutBatch(kinds, head_dim, MANY, "cuda", torch.float16)
    assert_each_is_a_dense_call(of, kinds, "causal", head_dim, True, precision={"inputs": "f16"})


@pytest.mark.parametrize("kinds", KINDS)
def test_gradients_are_added_to_those_that_are_given(kinds: str) -> None:
    """In rows that sequences have, once; others keep what they held."""
    of, kernel = CutBatch(kinds, 64, MANY, device="cuda"), fused(kinds)
    alone = of.gradients(kernel)
    out, lse = kernel(of.q, of.k, of.v, return_lse=True, **of.named)
    held = [torch.ones_like(x, dtype=torch.float32) for x in (of.q, of.k, of.v)]
    kernel.backward(of.dout, of.q, of.k, of.v, out, lse, grads=held, accumulate=True, **of.named)
    for made, added in zip(held, alone, strict=True):
        torch.testing.assert_close(made, added + 1, rtol=2.0**-20, atol=2.0**-20)


@pytest.mark.parametrize("kinds", KINDS[:2])
def test_the_same_bits_in_every_run(kinds: str) -> None:
    """Twenty times, on memory that others have used."""
    of, kernel = CutBatch(kinds, 128, MANY, device="cuda"), fused(kinds, head_dim=128)
    first = of.gradients(kernel)
    for _ in range(20):
        torch.full((4 * of.q.numel(),), float("nan"), device="cuda")  # freed at once, to be found again
        assert all(torch.equal(x, y) for x, y in zip(first, of.gradients(kernel), strict=True))


@pytest.mark.parametrize("starts", [(0, 200, 50, 310), (0, 0, 0, 310), (300, 200, 100, 0)], ids=str)
def test_lengths_that_lie_hold_nobody_up(starts: tuple[int, ...]) -> None:
    """Sequences that overlap share sums and counts: what comes of them is anything, and it comes."""
    kernel, cut = fused("ragged ragged"), torch.tensor(starts, dtype=torch.int32, device="cuda")
    q, k = (torch.randn(310, heads, 64, device="cuda").bfloat16() for heads in (4, 2))
    out, lse = kernel(q, k, k, return_lse=True, cu_seqlens_q=cut, cu_seqlens_k=cut)
    kernel.backward(q, q, k, k, out, lse, cu_seqlens_q=cut, cu_seqlens_k=cut)
    torch.cuda.synchronize()
