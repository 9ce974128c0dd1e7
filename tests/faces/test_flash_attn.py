"""`attngen.flash_attn` on the simulator: f64 results for every option, and its own layouts."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attngen.flash_attn import version2, version3, version4
from tests.faces.attention64 import assert_near, attention64, draw, starts

SEQLEN_Q, SEQLEN_K = 21, 34
SHAPES = ((2, SEQLEN_Q, 4, 24), (2, SEQLEN_K, 2, 24), (2, SEQLEN_K, 2, 16))
PLACE = torch.arange(SEQLEN_Q)[:, None] + SEQLEN_K - SEQLEN_Q
KEY = torch.arange(SEQLEN_K)[None]


def inputs(requires_grad: bool = False) -> list[torch.Tensor]:
    return [x.requires_grad_(requires_grad) for x in draw(*SHAPES)]


def window(left: int | None, right: int | None) -> torch.Tensor:
    seen = torch.ones(SEQLEN_Q, SEQLEN_K, dtype=torch.bool)
    seen = seen if left is None else seen & (PLACE - left <= KEY)
    return seen if right is None else seen & (PLACE + right >= KEY)


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
OPTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "causal": (version2.flash_attn_func, {"causal": True}, {"seen": window(None, 0)}),
    "scale": (version2.flash_attn_func, {"softmax_scale": 0.3}, {"scale": 0.3}),
    "window": (version2.flash_attn_func, {"window_size": (5, 2)}, {"seen": window(5, 2)}),
    "window before": (version3.flash_attn_func, {"window_size": (5, -1)}, {"seen": window(5, None)}),
    "window behind": (version3.flash_attn_func, {"window_size": (-7, 3)}, {"seen": window(None, 3)}),
    "window and causal": (
        version2.flash_attn_func,
        {"window_size": (4, 9), "causal": True},
        {"seen": window(4, 0)},
    ),
    "None is no bound": (version4.flash_attn_func, {"window_size": (None, 3)}, {"seen": window(None, 3)}),
    "numbers below 0": (version4.flash_attn_func, {"window_size": (-2, 6)}, {"seen": window(-2, 6)}),
    "no window": (version4.flash_attn_func, {"window_size": (-4, 1)}, {}),
    "softcap": (version3.flash_attn_func, {"softcap": 2.0}, {"softcap": 2.0}),
    "chunks": (version3.flash_attn_func, {"attention_chunk": 8}, {"seen": PLACE // 8 == KEY // 8}),
    "slopes and softcap": (
        version2.flash_attn_func,
        {"alibi_slopes": SLOPES, "softcap": 2.0},
        {"bias": -SLOPES[:, None, None] * (PLACE - KEY).abs(), "softcap": 2.0},
    ),
    "slopes of a batch": (
        version2.flash_attn_func,
        {"alibi_slopes": torch.stack([SLOPES, SLOPES.flip(0)]), "causal": True},
        {
            "bias": -torch.stack([SLOPES, SLOPES.flip(0)])[:, :, None, None] * (PLACE - KEY).abs(),
            "seen": window(None, 0),
        },
    ),
    "sink": (version4.flash_attn_func, {"learnable_sink": 4 * SLOPES}, {"sink": 4 * SLOPES}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_mean_what_they_mean_there(option: str) -> None:
    """Out, lse and gradients, that of lse too, in f64; heads of 24 and 16 columns are padded."""
    function, asked, meant = OPTIONS[option]
    given, exact = inputs(requires_grad=True), inputs(requires_grad=True)
    wants = "return_lse" if function is version4.flash_attn_func else "return_attn_probs"
    out, lse, *empty = function(*given, **asked, **{wants: True})
    assert [x.numel() for x in empty] == [0] * (function is version2.flash_attn_func)
    out64, lse64 = attention64(*exact, **meant)
    assert_near(out, out64)
    assert_near(lse, lse64)
    dout, dlse = draw(out.shape, lse.shape, seed=1)
    found = torch.autograd.grad([out, lse], given, [dout, dlse])
    expected = torch.autograd.grad([out64, lse64], exact, [dout.double(), dlse.double()])
    for x, y in zip(found, expected, strict=True):
        assert_near(x, y.double(), 5e-5)


def test_slopes_and_sinks_have_gradients() -> None:
    """Those of alibi_slopes and of learnable_sink, in f64."""
    bias = -(PLACE - KEY).abs()
    for function, name in (
        (version2.flash_attn_func, "alibi_slopes"),
        (version4.flash_attn_func, "learnable_sink"),
    ):
        given, exact = SLOPES.clone().requires_grad_(), SLOPES.double().requires_grad_()
        made = function(*inputs(), **{name: given})
        out = made if isinstance(made, torch.Tensor) else made[0]
        meant = {"bias": exact[:, None, None] * bias} if name == "alibi_slopes" else {"sink": exact}
        out64, _ = attention64(*inputs(), **meant)
        (dout,) = draw(out.shape, seed=1)
        (found,) = torch.autograd.grad(out, given, dout)
        (expected,) = torch.autograd.grad(out64, exact, dout.double())
        assert_near(found, expected, 1e-4)


def test_flash_attention_4_returns_lse_where_it_does() -> None:
    """Where it is asked for, or something requires grad; None otherwise."""
    assert version4.flash_attn_func(*inputs())[1] is None
    assert version4.flash_attn_func(*inputs(requires_grad=True))[1] is not None
    out, lse = version4.flash_attn_func(*inputs(), return_lse=True)
    assert lse is not None and lse.shape == (2, 4, SEQLEN_Q) and out.shape == (2, SEQLEN_Q, 4, 16)


def test_packed_tensors_are_their_parts() -> None:
    """To the bit, and their gradient is those of their parts."""
    (qkv,) = draw((2, 19, 3, 2, 32))
    qkv.requires_grad_()
    parts = qkv.detach().unbind(2)
    out = version2.flash_attn_qkvpacked_func(qkv, causal=True)
    assert torch.equal(out, version2.flash_attn_func(*parts, causal=True))
    assert torch.equal(out, version3.flash_attn_qkvpacked_func(qkv, causal=True))
    assert torch.equal(out, version2.flash_attn_kvpacked_func(parts[0], qkv[:, :, 1:], causal=True))
    (found,) = torch.autograd.grad(out.sum(), qkv)
    exact = [x.clone().requires_grad_() for x in parts]
    attention64(*exact, seen=torch.ones(19, 19).tril().bool())[0].sum().backward()
    assert_near(found, torch.stack([x.grad for x in exact], 2).double(), 5e-5)
    (heads,) = draw((2, 19, 8, 32))
    out = version3.flash_attn_qkvpacked_func(heads, num_heads_q=4)
    assert torch.equal(out, version3.flash_attn_func(heads[:, :, :4], heads[:, :, 4:6], heads[:, :, 6:]))


def test_sequences_of_any_lengths_are_dense_calls() -> None:
    """Of each sequence, with lse (heads, tokens), in every form; a bound on a device is not read."""
    lengths_q, lengths_k = (7, 0, 20), (9, 4, 25)
    cut = {"cu_seqlens_q": starts(*lengths_q), "cu_seqlens_k": starts(*lengths_k)}
    (q, kv) = draw((27, 4, 32), (38, 2, 2, 32))
    k, v = kv.unbind(1)
    bounds = {"max_seqlen_q": 20, "max_seqlen_k": torch.tensor(25, device="meta")}
    asked: dict[str, Any] = {"causal": True, "window_size": (6, -1), "softcap": 3.0}
    out, lse, _ = version2.flash_attn_varlen_func(q, k, v, **cut, **bounds, **asked, return_attn_probs=True)
    assert lse.shape == (4, 27)
    for at_q, at_k, of_q, of_k in zip(*cut.values(), lengths_q, lengths_k, strict=False):
        rows, keys = slice(at_q, at_q + of_q), slice(at_k, at_k + of_k)
        if of_q:
            alone = (x[None] for x in (q[rows], k[keys], v[keys]))
            one, one_lse, _ = version2.flash_attn_func(*alone, **asked, return_attn_probs=True)
            assert torch.equal(out[rows], one[0]) and torch.equal(lse[:, rows], one_lse[0])
    assert torch.equal(out, version2.flash_attn_varlen_kvpacked_func(q, kv, **cut, **bounds, **asked))
    assert torch.equal(out, version3.flash_attn_varlen_func(q, k, v, **cut, **bounds, **asked))
    asked["window_size"] = (6, None)
    assert torch.equal(out, version4.flash_attn_varlen_func(q, k, v, **cut, **bounds, **asked)[0])
    (qkv,) = draw((27, 3, 2, 32))
    whole = version2.flash_attn_varlen_qkvpacked_func(qkv, starts(7, 20), 20, causal=True)
    same = version2.flash_attn_varlen_func(*qkv.unbind(1), starts(7, 20), starts(7, 20), 20, 20, causal=True)
    assert torch.equal(whole, same) and whole.any()


def test_rows_that_are_not_used_are_0() -> None:
    """seqused of ragged and of padded sequences, dense queries beside padded keys among them."""
    q, k, v = draw((2, 6, 2, 32), (2, 9, 2, 32), (2, 9, 2, 32))
    used = torch.tensor([4, 9], dtype=torch.int32)
    out, _ = version4.flash_attn_varlen_func(q, k, v, seqused_k=used)
    for b in range(2):
        alone, _ = attention64(q[b], k[b, : used[b]], v[b, : used[b]])
        assert_near(out[b], alone)
    rows = torch.tensor([6, 2], dtype=torch.int32)
    part, _ = version4.flash_attn_varlen_func(q, k, v, seqused_q=rows, seqused_k=used)
    assert torch.equal(part[0], out[0]) and torch.equal(part[1, :2], out[1, :2]) and not part[1, 2:].any()
    tokens = [x.flatten(0, 1) for x in (q, k, v)]
    cut = (starts(6, 6), starts(9, 9), 6, 9)
    ragged = version3.flash_attn_varlen_func(*tokens, *cut, seqused_q=rows, seqused_k=used)
    assert torch.equal(ragged.view(2, 6, 2, 32), part)


@pytest.mark.parametrize("function", [version2.flash_attn_with_kvcache, version3.flash_attn_with_kvcache])
def test_a_cache_is_written_and_read(function: Callable[..., Any]) -> None:
    """New keys go behind those of a sequence, whose place in the cache is given; what is before leftpad has no part."""
    q, k_cache, v_cache, k, v = draw(
        (2, 3, 4, 32), (3, 40, 2, 32), (3, 40, 2, 16), (2, 3, 2, 32), (2, 3, 2, 16)
    )
    before, which, left = (torch.tensor(each, dtype=torch.int32) for each in ([17, 30], [2, 0], [5, 0]))
    old_k, old_v = k_cache.clone(), v_cache.clone()
    places = {"cache_seqlens": before, "cache_batch_idx": which, "cache_leftpad": left}
    out, lse = function(q, k_cache, v_cache, k, v, **places, causal=True, return_softmax_lse=True)
    for b, (end, of, first) in enumerate(zip(before.tolist(), which.tolist(), left.tolist(), strict=True)):
        old_k[of, end : end + 3], old_v[of, end : end + 3] = k[b], v[b]
        keys = slice(first, end + 3)
        seen = torch.ones(3, end + 3 - first).tril(end - first).bool()
        exact, exact_lse = attention64(q[b], old_k[of, keys], old_v[of, keys], seen)
        assert_near(out[b], exact)
        assert_near(lse[b], exact_lse)
    assert torch.equal(k_cache, old_k) and torch.equal(v_cache, old_v)
    whole = function(q, k_cache[:2], v_cache[:2])
    assert_near(whole, attention64(q, k_cache[:2], v_cache[:2])[0])
    some = function(q, k_cache[:2], v_cache[:2], cache_seqlens=11, window_size=(3, 1), softcap=2.0)
    seen = (torch.arange(11) - torch.arange(3)[:, None] - 8).sub(-1).abs() <= 2
    assert_near(some, attention64(q, k_cache[:2, :11], v_cache[:2, :11], seen, softcap=2.0)[0])


def test_queries_of_a_cache_may_be_ragged() -> None:
    """With cu_seqlens_q, as FlashAttention-3 has it."""
    q, k_cache, v_cache = draw((5, 4, 32), (2, 20, 2, 32), (2, 20, 2, 32))
    used = torch.tensor([20, 7], dtype=torch.int32)
    cut = {"cu_seqlens_q": starts(4, 1), "max_seqlen_q": 4, "cache_seqlens": used}
    out = version3.flash_attn_with_kvcache(q, k_cache, v_cache, **cut, causal=True)
    seen = torch.ones(4, 20).tril(16).bool()
    assert_near(out[:4], attention64(q[:4], k_cache[0], v_cache[0], seen)[0])
    assert_near(out[4:], attention64(q[4:], k_cache[1, :7], v_cache[1, :7])[0])


def test_blocks_that_are_not_listed_have_no_part() -> None:
    """Block-sparse tensors by FlashAttention-4's names, both kinds of lists, under a causal mask, with gradients."""
    kept = torch.tensor([[[[1, 0, 1], [0, 1, 1]]]], dtype=torch.bool)
    counts = kept.sum(-1, dtype=torch.int32)
    indices = torch.tensor([[[[0, 2, 0], [1, 2, 0]]]], dtype=torch.int32)
    listed = SimpleNamespace(
        mask_block_cnt=counts - 1,
        mask_block_idx=indices,
        full_block_cnt=torch.ones_like(counts),
        full_block_idx=indices.roll(-1, -1),
        block_size=(16, 16),
    )
    seen = kept[0, 0].repeat_interleave(16, 0).repeat_interleave(16, 1)[:SEQLEN_Q, :SEQLEN_K] & window(
        None, 0
    )
    given, exact = inputs(requires_grad=True), inputs(requires_grad=True)
    out, _ = version4.flash_attn_func(*given, causal=True, block_sparse_tensors=listed)
    out64, _ = attention64(*exact, seen=seen)
    assert_near(out, out64)
    found, expected = torch.autograd.grad(out.sum(), given), torch.autograd.grad(out64.sum(), exact)
    for x, y in zip(found, expected, strict=True):
        assert_near(x, y.double(), 5e-5)
    with pytest.raises(ValueError, match="argument block_sparse_tensors: got block_size None"):
        version4.flash_attn_func(
            *inputs(), block_sparse_tensors=SimpleNamespace(**{**vars(listed), "block_size": None})
        )
