"""Sequences with lengths of their own: each is what a dense call of it alone is, bit for bit, and all else is 0."""

import math

import pytest
import torch

from attngen.errors import ArgumentError
from tests.lengths.batches import Batch, batch, compiled

SCHEDULES = ("serial", "fa2", "warp_specialized", "pingpong")
MASKS = ("full", "causal", "window(5, 3)", "kv_idx % 3 != q_idx % 2", "kv_idx < limit[b]")
SEQLENS_Q, SEQLENS_K = (5, 0, 13, 9, 1), (5, 7, 20, 0, 3)


def check_forward(schedule: str, mask: str, of: Batch, **declared: torch.Tensor) -> None:
    """Every sequence against a dense call; rows that no sequence uses are 0, with lse -inf."""
    out, lse = compiled(schedule, *of.kinds, mask)(
        of.q, of.k, of.v, return_lse=True, **of.lengths, **declared
    )
    dense = compiled(schedule, "dense", "dense", mask, tokens=False)
    for b, rows, keys in of.sequences():
        own = {name: x[b : b + 1] for name, x in declared.items()}
        expected, expected_lse = dense(
            of.q[rows][None], of.k[keys][None], of.v[keys][None], return_lse=True, **own
        )
        assert torch.equal(out[rows], expected[0])
        found = lse[:, rows] if of.kinds[0] == "ragged" else lse[rows[0]][:, rows[1]]
        assert torch.equal(found, expected_lse[0])
        out[rows] = math.nan
    unused = ~out.isnan().any(-1).any(-1)
    assert (out[unused] == 0).all()
    of_rows = lse if of.kinds[0] == "ragged" else lse.transpose(0, 1)
    assert of_rows[:, unused].isneginf().all()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_ragged_sequence_is_a_dense_call(schedule: str, mask: str) -> None:
    """Empty sequences, sequences without keys, rows of one block and of several, and a tail behind the last."""
    declared = {"limit": torch.tensor([3, 9, 11, 1, 2], dtype=torch.int32)} if "limit" in mask else {}
    check_forward(schedule, mask, batch("ragged", "ragged", SEQLENS_Q, SEQLENS_K, tail=3), **declared)


@pytest.mark.parametrize(
    "kinds", ["ragged dense", "dense ragged", "padded padded", "dense padded", "ragged padded"]
)
@pytest.mark.parametrize("schedule", ["fa2", "pingpong"])
def test_queries_and_keys_are_cut_each_in_its_way(schedule: str, kinds: str) -> None:
    """A batch of tensors of one length on one side, and lengths on the other."""
    queries, keys = kinds.split()
    rows = (9,) * 5 if queries == "dense" else SEQLENS_Q
    columns = (11,) * 5 if keys == "dense" else SEQLENS_K
    check_forward(schedule, "causal", batch(queries, keys, rows, columns))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_no_sequence_uses_may_hold_anything(schedule: str) -> None:
    """Rows and keys behind what is used, ahead of it and behind the last sequence are NaN, and reach nobody."""
    of = batch("ragged", "ragged", SEQLENS_Q, SEQLENS_K, unused=2, leftpad=3, tail=4, poison=math.nan)
    check_forward(schedule, "causal", of)
    check_forward(schedule, "full", batch("padded", "padded", SEQLENS_Q, SEQLENS_K, 2, 3, poison=math.inf))


def test_there_may_be_no_sequence_and_no_row() -> None:
    """A batch of none, tokens without a sequence, and sequences without rows."""
    kernel, none = compiled("fa2", "ragged", "ragged", "causal"), torch.zeros(1, dtype=torch.int32)
    x = torch.randn(3, 2, 16).to(torch.bfloat16)
    assert (kernel(x, x, x, cu_seqlens_q=none, cu_seqlens_k=none) == 0).all()
    empty = x[:0]
    assert kernel(empty, empty, empty, cu_seqlens_q=none, cu_seqlens_k=none).shape == (0, 2, 16)
    check_forward("fa2", "causal", batch("ragged", "ragged", (0, 0), (0, 4)))


def test_many_short_sequences_and_one_long() -> None:
    """A hundred of ten rows and one of three hundred."""
    seqlens = (*(10,) * 50, 300, *(10,) * 50)
    check_forward("pingpong", "causal", batch("ragged", "ragged", seqlens, seqlens))


@pytest.mark.parametrize("kinds", ["ragged ragged", "padded padded", "dense ragged"])
@pytest.mark.parametrize("schedule", ["fa2", "pingpong"])
@pytest.mark.parametrize("mask", ["full", "causal", "kv_idx % 3 != q_idx % 2"])
def test_gradients_are_those_of_dense_calls(schedule: str, mask: str, kinds: str) -> None:
    """Gradients of out and lse through autograd, bit for bit; 0 where nothing is used."""
    queries, keys = kinds.split()
    rows = (9,) * 5 if queries == "dense" else SEQLENS_Q
    of = batch(queries, keys, rows, SEQLENS_K, unused=0 if queries == "dense" else 2, tail=3)
    inputs = [x.requires_grad_() for x in (of.q, of.k, of.v)]
    out, lse = compiled(schedule, queries, keys, mask, True)(*inputs, return_lse=True, **of.lengths)
    make = torch.Generator().manual_seed(1)
    douts = [torch.randn(x.shape, generator=make).to(x.dtype) for x in (out, lse)]
    found = [x.clone() for x in torch.autograd.grad((out, lse), inputs, douts)]
    dense = compiled(schedule, "dense", "dense", mask, True)
    for _, rows_at, keys_at in of.sequences():
        alone = dense(of.q[rows_at][None], of.k[keys_at][None], of.v[keys_at][None], return_lse=True)
        dlse = douts[1][:, rows_at] if queries == "ragged" else douts[1][rows_at[0]][:, rows_at[1]]
        expected = torch.autograd.grad(alone, inputs, (douts[0][rows_at][None], dlse[None]))
        for gradient, own, at in zip(found, expected, (rows_at, keys_at, keys_at), strict=True):
            assert torch.equal(gradient[at], own[at])
            gradient[at] = 0.0
    assert all((gradient == 0).all() for gradient in found)


def test_declared_tensors_by_token_are_the_sequence_s_own() -> None:
    """`seg[kv_idx]` of tokens means what `seg[b, kv_idx]` means of a dense call; beyond the end it is the last."""
    of, make = batch("ragged", "ragged", SEQLENS_Q, SEQLENS_K), torch.Generator().manual_seed(0)
    seg = torch.randint(0, 3, (len(of.k),), generator=make, dtype=torch.int32)
    mask, by_batch = "seg[kv_idx + 1] == q_idx % 3", "seg[b, kv_idx + 1] == q_idx % 3"
    for schedule in ("fa2", "pingpong"):
        out = compiled(schedule, "ragged", "ragged", mask)(of.q, of.k, of.v, seg=seg, **of.lengths)
        dense = compiled(schedule, "dense", "dense", by_batch, tokens=False)
        for _, rows, keys in of.sequences():
            if out[rows].numel() and of.k[keys].numel():
                expected = dense(of.q[rows][None], of.k[keys][None], of.v[keys][None], seg=seg[keys][None])
                assert torch.equal(out[rows], expected[0])


def test_work_is_shared_by_calls_of_the_same_lengths() -> None:
    """A call given a list launches no kernel for it, with and without gradients; other lengths are refused."""
    of, kernel = (
        batch("ragged", "ragged", SEQLENS_Q, SEQLENS_K),
        compiled("fa2", "ragged", "ragged", "causal", True),
    )
    work = kernel.work(of.q, of.k, of.v, **of.lengths)
    expected = kernel(of.q, of.k, of.v, **of.lengths)
    assert torch.equal(kernel(of.q, of.k, of.v, work=work, **of.lengths), expected)
    q = of.q.clone().requires_grad_()
    assert torch.equal(kernel(q, of.k, of.v, work=work, **of.lengths), expected)
    of.lengths["cu_seqlens_q"][1] = 4
    with pytest.raises(ArgumentError, match="work of cu_seqlens_q with version 0"):
        kernel(of.q, of.k, of.v, work=work, **of.lengths)
    with pytest.raises(ArgumentError, match="argument work: got int, expected what kernel.work"):
        kernel(of.q, of.k, of.v, work=1, **of.lengths)  # type: ignore[arg-type]
    dense = compiled("fa2", "dense", "dense", "causal")
    with pytest.raises(ArgumentError, match="self: got a kernel of sequences of one length"):
        dense.work(of.q[None], of.k[None], of.v[None])
    with pytest.raises(ArgumentError, match="argument work: got TileTables, expected None"):
        dense(of.q[None], of.k[None], of.v[None], work=work)


@pytest.mark.parametrize("schedule", ["fa2", "pingpong"])
@pytest.mark.parametrize("kinds", ["ragged", "padded"])
@pytest.mark.parametrize("mask", ["full", "causal", "kv_idx % 3 != q_idx % 2"])
def test_what_no_sequence_uses_reaches_no_gradient(schedule: str, mask: str, kinds: str) -> None:
    """NaN behind every end, in inputs and in what comes from behind the kernel, changes no bit of a gradient."""
    clean, poisoned = (
        batch(kinds, kinds, SEQLENS_Q, SEQLENS_K, unused=2, leftpad=1, tail=3, poison=poison)
        for poison in (0.0, math.nan)
    )
    kernel, found = compiled(schedule, kinds, kinds, mask, True), []
    for of in (clean, poisoned):
        inputs = [x.requires_grad_() for x in (of.q, of.k, of.v)]
        out = kernel(*inputs, **of.lengths)
        dout = torch.where(of.q.isnan(), of.q, torch.ones_like(of.q)).detach()
        found.append(torch.autograd.grad(out, inputs, dout))
    for gradient, expected in zip(found[1], found[0], strict=True):
        assert expected.abs().max() > 0 and torch.equal(gradient, expected)


def test_work_is_of_lengths_alone() -> None:
    """Layers with biases of their own share a list; an optional length that comes or goes makes another."""
    of = batch("ragged", "ragged", SEQLENS_Q, SEQLENS_K)
    kernel = compiled("fa2", "ragged", "ragged", "kv_idx < limit[b]")
    limits = [torch.full((5,), n, dtype=torch.int32) for n in (3, 9)]
    work = kernel.work(of.q.requires_grad_(), of.k, of.v, limit=limits[0], seqused_q=None, **of.lengths)
    of.q.requires_grad_(False)
    for limit in limits:
        expected = kernel(of.q, of.k, of.v, limit=limit, **of.lengths)
        assert torch.equal(kernel(of.q, of.k, of.v, limit=limit, work=work, **of.lengths), expected)
    more = {"leftpad_k": torch.zeros(5, dtype=torch.int32)}
    with pytest.raises(
        ArgumentError, match="work made of cu_seqlens_q, cu_seqlens_k, expected work of .*leftpad_k"
    ):
        kernel(of.q, of.k, of.v, limit=limits[0], work=work, **of.lengths, **more)
    with pytest.raises(ArgumentError, match="argument tables: got TileTables, expected None"):
        kernel(of.q, of.k, of.v, limit=limits[0], tables=work, **of.lengths)
