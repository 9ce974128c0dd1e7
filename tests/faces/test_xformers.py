"""`attngen.xformers` on the simulator: every bias against its pairs drawn out in f64, and what is refused."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import attngen
from attngen import xformers
from attngen.xformers import MASKS, MASKS_OF_SEQUENCES, memory_efficient_attention
from tests.faces.attention64 import assert_near, attention64, draw

SEQLEN_Q, SEQLEN_K = 9, 14
DENSE = ((2, SEQLEN_Q, 4, 32), (2, SEQLEN_K, 4, 32), (2, SEQLEN_K, 4, 16))
LENGTHS_Q, LENGTHS_K = (3, 6, 1), (4, 6, 5)


def seen(name: str, of_q: int, of_k: int) -> torch.Tensor:
    """The pairs that a bias shows, as xformers writes them out, for windows of 4 keys, or of 2 and 1."""
    row, key = torch.arange(of_q)[:, None], torch.arange(of_k)[None]
    is_bottom_right = not name.endswith(
        ("LowerTriangularMask", "WithTensorBias", "DiagonalCausalMask", "CausalLocalAttentionMask")
    )
    place = row + of_k - of_q if is_bottom_right else row
    found = torch.ones(of_q, of_k, dtype=torch.bool)
    if "Causal" in name or "Triangular" in name:
        found &= key <= place
        if "Local" in name:
            found &= key >= place - 3
    elif "Local" in name:
        found &= (key >= place - 2) & (key <= place + 1)
    return found


def object_of(name: str, **more: Any) -> Any:
    """An object of a class of that name, as of xformers, with all sizes that biases hold."""
    attributes = {"_window_size": 4, "window_left": 2, "window_right": 1, **more}
    found = type(name, (), {})()
    vars(found).update(attributes)
    return found


def test_the_signature_is_that_of_xformers() -> None:
    """Of xformers 0.0.33."""
    parameters = inspect.signature(memory_efficient_attention).parameters.values()
    assert [each.name for each in parameters] == [
        "query",
        "key",
        "value",
        "attn_bias",
        "p",
        "scale",
        "op",
        "output_dtype",
    ]
    assert [each.default for each in parameters][3:] == [None, 0.0, None, None, None]
    assert [each.name for each in parameters if each.kind is each.KEYWORD_ONLY] == ["op", "output_dtype"]


@pytest.mark.parametrize("name", MASKS)
def test_biases_of_dense_sequences(name: str) -> None:
    """By the name of their class, with gradients, and a tensor beside the triangle where there is one."""
    given = [x.requires_grad_() for x in draw(*DENSE)]
    exact = [x.detach().double().requires_grad_() for x in given]
    (added,) = draw((2, 4, SEQLEN_Q, SEQLEN_K), seed=2)
    bias = object_of(name, **({"_bias": added} if name.endswith("WithTensorBias") else {}))
    out = memory_efficient_attention(*given, bias)
    out64, _ = attention64(*exact, seen(name, SEQLEN_Q, SEQLEN_K), added if "TensorBias" in name else None)
    assert_near(out, out64)
    (dout,) = draw(out.shape, seed=1)
    found = torch.autograd.grad(out, given, dout)
    for x, y in zip(found, torch.autograd.grad(out64, exact, dout.double()), strict=True):
        assert_near(x, y, 1e-4)


@pytest.mark.parametrize("name", MASKS_OF_SEQUENCES)
def test_biases_that_cut_a_batch_into_sequences(name: str) -> None:
    """Each sequence is alone, and of padded keys those count that are said to."""
    q, k, v = draw((1, sum(LENGTHS_Q), 4, 32), (1, sum(LENGTHS_K), 4, 32), (1, sum(LENGTHS_K), 4, 16))
    used = (2, 6, 3) if "Padded" in name else LENGTHS_K
    infos = [xformers.SequenceInfo.from_seqlens(lengths, device="cpu") for lengths in (LENGTHS_Q, LENGTHS_K)]
    of_k = SimpleNamespace(**vars(infos[1]))
    if "Padded" in name:
        of_k.seqlen = torch.tensor(used, dtype=torch.int32)
    out = memory_efficient_attention(q, k, v, object_of(name, q_seqinfo=infos[0], k_seqinfo=of_k), scale=0.3)
    assert out.shape == (1, sum(LENGTHS_Q), 4, 16)
    for at_q, at_k, of_q, count in zip(
        *(info.seqstart.tolist() for info in infos), LENGTHS_Q, used, strict=False
    ):
        rows, keys = slice(at_q, at_q + of_q), slice(at_k, at_k + count)
        alone, _ = attention64(q[0, rows], k[0, keys], v[0, keys], seen(name, of_q, count), scale=0.3)
        assert_near(out[0, rows], alone)


def test_own_classes_have_those_names() -> None:
    """So that programs without xformers write what others do; sequences are made of lengths."""
    q, k, v = draw(*DENSE)
    out = memory_efficient_attention(q, k, v, xformers.LowerTriangularFromBottomRightMask())
    assert torch.equal(
        out, memory_efficient_attention(q, k, v, object_of("LowerTriangularFromBottomRightMask"))
    )
    for each in (xformers.LowerTriangularMask(), xformers.LocalAttentionFromBottomRightMask(2, 1)):
        assert_near(
            memory_efficient_attention(q, k, v, each),
            attention64(q, k, v, seen(type(each).__name__, SEQLEN_Q, SEQLEN_K))[0],
        )
    local = xformers.LowerTriangularFromBottomRightLocalAttentionMask(4)
    expected, _ = attention64(q, k, v, seen(type(local).__name__, SEQLEN_Q, SEQLEN_K))
    assert_near(memory_efficient_attention(q, k, v, local), expected)
    (tokens,) = draw((1, 10, 2, 32))
    for kind in (xformers.BlockDiagonalMask, xformers.BlockDiagonalCausalMask):
        bias = kind.from_seqlens(LENGTHS_Q, device="cpu")
        out = memory_efficient_attention(tokens, tokens, tokens, bias)
        first = tokens[0, :3]
        assert_near(out[0, :3], attention64(first, first, first, seen(kind.__name__, 3, 3))[0])


def test_tensors_are_added_with_their_gradient() -> None:
    """Of every pair, or 1 for all; without heads where query has none."""
    for shape in ((2, 4, SEQLEN_Q, SEQLEN_K), (2, 1, 1, SEQLEN_K), (1, 4, SEQLEN_Q, SEQLEN_K)):
        (added,) = draw(shape, seed=2)
        exact = added.double().requires_grad_()
        out = memory_efficient_attention(*draw(*DENSE), added.requires_grad_())
        out64, _ = attention64(*draw(*DENSE), bias=exact)
        assert_near(out, out64)
        (dout,) = draw(out.shape, seed=1)
        (found,), (expected,) = (
            torch.autograd.grad(out, added, dout),
            torch.autograd.grad(out64, exact, dout.double()),
        )
        assert_near(found, expected, 1e-4)
    q, k, v = draw((2, SEQLEN_Q, 32), (2, SEQLEN_K, 32), (2, SEQLEN_K, 16))
    (added,) = draw((2, SEQLEN_Q, SEQLEN_K), seed=2)
    out64, _ = attention64(q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2), bias=added[:, None])
    assert_near(memory_efficient_attention(q, k, v, added), out64[:, :, 0])


def test_heads_of_a_group_share_keys() -> None:
    """Five dimensions: what is expanded is read as it is, and with gradients each head has its own."""
    q, k, v = draw((2, SEQLEN_Q, 2, 3, 32), (2, SEQLEN_K, 2, 1, 32), (2, SEQLEN_K, 2, 1, 16))
    out64, _ = attention64(q.flatten(2, 3), k[:, :, :, 0], v[:, :, :, 0])
    shared = (k.expand(-1, -1, -1, 3, -1), v.expand(-1, -1, -1, 3, -1))
    out = memory_efficient_attention(q, *shared)
    assert_near(out, out64.unflatten(2, (2, 3)))
    leaves = [k.requires_grad_(), v.requires_grad_()]
    out = memory_efficient_attention(q, k.expand(-1, -1, -1, 3, -1), v.expand(-1, -1, -1, 3, -1))
    assert_near(out, out64.unflatten(2, (2, 3)))
    exact = [x.detach().double().requires_grad_() for x in leaves]
    out64, _ = attention64(q.flatten(2, 3), exact[0][:, :, :, 0], exact[1][:, :, :, 0])
    found, expected = torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(out64.sum(), exact)
    for x, y in zip(found, expected, strict=True):
        assert_near(x, y, 1e-4, is_zero=x is found[0])  # of a sum, keys have next to none


MISTAKES: dict[str, dict[str, Any]] = {
    "p: got 0.1": {"p": 0.1},
    "op: got": {"op": object()},
    "output_dtype: got torch.float64": {"output_dtype": torch.float64},
    "attn_bias: got BlockDiagonalGappyKeysMask": {"attn_bias": object_of("BlockDiagonalGappyKeysMask")},
    "attn_bias: got PagedBlockDiagonalPaddedKeysMask": {
        "attn_bias": object_of("PagedBlockDiagonalPaddedKeysMask")
    },
    "attn_bias: got dtype torch.bool": {"attn_bias": torch.ones(2, 4, 9, 14, dtype=torch.bool)},
    "attn_bias: got shape": {"attn_bias": torch.ones(2, 4, 9, 13)},
    "attn_bias._window_size: got None": {
        "attn_bias": object_of("LowerTriangularFromBottomRightLocalAttentionMask", _window_size=None)
    },
    "query: got batch 2": {"attn_bias": xformers.BlockDiagonalMask.from_seqlens((9, 9), device="cpu")},
    "key: got 3 dimensions": {"key": torch.zeros(2, 14, 32)},
    "value: got list": {"value": [1.0]},
    "key: got head_dim 40": {"key": torch.zeros(2, 14, 4, 40)},
    "scale: got nan": {"scale": float("nan")},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_told_by_the_names_of_the_call(message: str) -> None:
    """As ValueErrors."""
    arguments = dict(zip(("query", "key", "value"), draw(*DENSE), strict=True)) | MISTAKES[message]
    with pytest.raises(ValueError, match=f"argument {message}") as caught:
        memory_efficient_attention(**arguments)
    assert isinstance(caught.value, attngen.ArgumentError)
