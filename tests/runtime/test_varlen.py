"""`attngen.varlen_attn`, shaped like torch's; where torch's own runs, tests/gpu holds both side by side."""

import inspect
import math
from typing import Any, NamedTuple

import pytest
import torch

import attngen
from attngen.errors import ArgumentError

LENGTHS_Q, LENGTHS_K = (5, 0, 9, 3), (7, 4, 9, 0)


class Aux(NamedTuple):
    """As torch's AuxRequest."""

    lse: bool = False


def starts(lengths: tuple[int, ...]) -> torch.Tensor:
    """Where sequences begin, and where the last one ends."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def inputs(
    heads: int = 4, heads_kv: int = 4, tail: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Any, ...]:
    """query, key and value with rows behind the last sequence, and the five arguments that follow."""
    generator = torch.Generator().manual_seed(0)
    rows, keys = sum(LENGTHS_Q) + tail, sum(LENGTHS_K) + tail
    sizes = ((rows, heads, 8), (keys, heads_kv, 8), (keys, heads_kv, 8))
    tensors = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return (*tensors, starts(LENGTHS_Q), starts(LENGTHS_K), max(LENGTHS_Q), max(LENGTHS_K))


def expected(
    query: Any,
    key: Any,
    value: Any,
    left: int = -1,
    right: int = -1,
    used: tuple[int, ...] = LENGTHS_K,
    scale: float = 8**-0.5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and lse by torch's own matrix products, sequence by sequence."""
    group = query.shape[1] // key.shape[1]
    out, lse = (
        torch.zeros(query.shape, dtype=torch.float64),
        torch.full((query.shape[1], query.shape[0]), -math.inf).double(),
    )
    at_q, at_k = starts(LENGTHS_Q).tolist(), starts(LENGTHS_K).tolist()
    for b, (rows, keys) in enumerate(zip(LENGTHS_Q, used, strict=True)):
        q = query[at_q[b] : at_q[b] + rows].double().transpose(0, 1)
        k, v = (
            x[at_k[b] : at_k[b] + keys].double().transpose(0, 1).repeat_interleave(group, 0)
            for x in (key, value)
        )
        place, j = torch.arange(rows)[:, None] + keys - rows, torch.arange(keys)
        seen = torch.ones(rows, keys, dtype=torch.bool)
        seen &= (j >= place - left) if left >= 0 else seen
        seen &= (j <= place + right) if right >= 0 else seen
        scores = (scale * q @ k.mT).masked_fill(~seen, -math.inf)
        out[at_q[b] : at_q[b] + rows] = (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(0, 1)
        lse[:, at_q[b] : at_q[b] + rows] = scores.logsumexp(-1)
    return out, lse


def test_the_signature_is_torchs() -> None:
    """Names, order and defaults, so that a call of one is a call of the other."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    theirs, ours = (inspect.signature(each).parameters for each in (varlen.varlen_attn, attngen.varlen_attn))
    assert list(ours) == list(theirs)
    assert {name: (each.default, each.kind) for name, each in ours.items()} == {
        name: (each.default, each.kind) for name, each in theirs.items()
    }


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 0), (3, 1), (-1, 2), (1, -1)])
def test_each_sequence_attends_to_itself(window: tuple[int, int]) -> None:
    """Full, causal and windows, from the bottom right; rows behind the sequences are 0 and -inf."""
    given = inputs()
    out, lse = attngen.varlen_attn(*given, window_size=window, return_aux=Aux(lse=True))
    ref, ref_lse = expected(*given[:3], *window)
    torch.testing.assert_close(out.double(), ref, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), ref_lse, rtol=1e-5, atol=1e-5)
    assert out[-2:].abs().sum() == 0 and lse[:, -2:].isneginf().all() and out.abs().sum() > 1


def test_groups_of_heads_scale_and_keys_that_count() -> None:
    """Two heads of keys serve four; a scale of one's own; seqused_k leaves out keys, whatever they hold."""
    query, key, value, *rest = inputs(4, 2)
    key[5:7], value[5:7] = math.nan, math.inf
    used = (5, 4, 9, 0)
    numbers = torch.tensor(used, dtype=torch.int32)
    out = attngen.varlen_attn(query, key, value, *rest, enable_gqa=True, scale=0.7, seqused_k=numbers)
    ref, _ = expected(query, key, value, used=used, scale=0.7)
    torch.testing.assert_close(out.double(), ref, rtol=1e-5, atol=1e-5)


def test_gradients_flow() -> None:
    """Those of autograd through torch's own products, and 0 behind the sequences."""
    query, key, value, *rest = inputs()
    leaves = [x.requires_grad_() for x in (query, key, value)]
    dout = torch.randn(query.shape, generator=torch.Generator().manual_seed(1))
    out = attngen.varlen_attn(query, key, value, *rest, window_size=(-1, 0))
    got = torch.autograd.grad(out, leaves, dout)
    wanted = torch.autograd.grad(expected(query, key, value, -1, 0)[0], leaves, dout.double())
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert got[0][-2:].abs().sum() == 0 and got[1].abs().sum() > 1


def test_a_kernel_is_made_once() -> None:
    """A second call of the same kind, with other lengths, compiles nothing."""
    from attngen import api

    given = inputs(dtype=torch.bfloat16)
    attngen.varlen_attn(*given)
    before = api._kernel_for.cache_info()
    attngen.varlen_attn(*given[:3], starts((4, 4)), starts((4, 4)), 4, 4)
    after = api._kernel_for.cache_info()
    assert (after.misses, after.hits) == (before.misses, before.hits + 1)


@pytest.mark.parametrize(
    ("changed", "argument", "text"),
    [
        ({"block_table": torch.zeros(4, 2, dtype=torch.int32)}, "key", "4: (pages, page, heads, head_dim)"),
        ({"num_splits": 4}, "num_splits", "None or 1"),
        ({"cu_seq_k": None}, "cu_seq_k", "a tensor"),
        ({"window_size": (-2, 0)}, "window_size", "each -1 or the number"),
        ({"window_size": 3}, "window_size", "(left, right)"),
        ({"key": torch.zeros(22, 2, 8)}, "key", "enable_gqa"),
        ({"query": torch.zeros(1, 19, 4, 8)}, "query", "3: (tokens, heads, head_dim)"),
        ({"cu_seq_q": torch.zeros(5)}, "cu_seq_q", "pass cu_seq_q.to(torch.int32)"),
        ({"cu_seq_k": starts((4, 4, 4))}, "cu_seq_k", "as cu_seq_q has 4 sequences"),
        ({"max_k": -1}, "max_k", "longest"),
        ({"scale": "two"}, "scale", "number"),
        ({"value": torch.zeros(22, 4, 8, device="meta")}, "value", "the device of query"),
        ({"window_size": (1.5, 0)}, "window_size", "each -1 or the number"),
        ({"window_size": (2**31, 0)}, "window_size", "at most 1,073,741,312"),
        ({"return_aux": True}, "return_aux", "AuxRequest(lse=True)"),
    ],
)
def test_what_is_not_served_is_refused_by_name(changed: dict[str, Any], argument: str, text: str) -> None:
    """With what would be, or with what it comes."""
    names = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
    with pytest.raises(ArgumentError) as caught:
        attngen.varlen_attn(**dict(zip(names, inputs(), strict=True)) | changed)
    assert caught.value.argument == argument and text in str(caught.value)


def test_one_split_is_what_there_is() -> None:
    """num_splits=1 asks for results that do not depend on other sequences, which is so."""
    given = inputs()
    assert torch.equal(attngen.varlen_attn(*given, num_splits=1), attngen.varlen_attn(*given))
