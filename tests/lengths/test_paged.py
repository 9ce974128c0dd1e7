"""Keys in pages: each request is what it is with padded keys, bit for bit, wherever its pages lie."""

import math
from dataclasses import replace

import pytest
import torch

import attngen
from attngen.bind import bind, check_arguments
from attngen.check.cuts import NO_PAGE
from attngen.errors import ArgumentError
from attngen.plan.steps import LoadTile
from attngen.simulate import SimulationFault
from attngen.simulate.launches import run_call
from attngen.simulate.page_table import PageTable
from attngen.simulate.tile_source import Tile
from attngen.simulate.visits import SIMULATED_SMS, Member
from tests.lengths.batches import batch, compiled
from tests.lengths.paged_batches import paged

PAGES = (1, 3, 16, 64, 528)
MASKS = ("full", "causal", "window(5, 3)", "kv_idx % 3 != q_idx % 2", "kv_idx < limit[b]")


def lengths_around(page: int) -> tuple[int, ...]:
    """None, one, and those about a page and about two; no longer than the simulator is quick at."""
    return tuple(min(n, 90) for n in (0, 1, page - 1, page, page + 1, 2 * page + 1, 70))


@pytest.mark.parametrize("queries", ["dense", "ragged", "padded"])
@pytest.mark.parametrize("page", PAGES)
def test_pages_of_any_size_hold_what_padded_keys_are(page: int, queries: str) -> None:
    """In any order and either layout; NaN behind ends, in other pages and ahead of what counts reaches nobody."""
    seqlens_k = lengths_around(page)
    rows = (5,) * len(seqlens_k) if queries == "dense" else (1, 5, 0, 9, 3, 20, 8)
    of = batch(queries, "padded", rows, seqlens_k, unused=0, leftpad=2, poison=math.nan)
    of = replace(of, q=of.q.nan_to_num(0.5))
    cached = paged(of, page)
    kernel, dense = compiled("fa2", queries, "paged", "causal"), compiled("fa2", queries, "padded", "causal")
    expected, expected_lse = dense(of.q, of.k, of.v, return_lse=True, **of.lengths)
    assert expected.isfinite().all() and expected.any()
    out, lse = kernel(of.q, cached.k, cached.v, return_lse=True, **cached.passed)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    k, v = (x.transpose(1, 2).contiguous() for x in (cached.k, cached.v))
    assert torch.equal(kernel(of.q, k, v, layout="hnd", **cached.passed), expected)
    other = paged(of, page, seed=7)
    assert torch.equal(kernel(of.q, other.k, other.v, layout="nhd", **other.passed), expected)
    assert page == 528 or not torch.equal(other.passed["block_table"], cached.passed["block_table"])


@pytest.mark.parametrize("mask", MASKS)
def test_masks_mean_what_they_mean_of_padded_keys(mask: str) -> None:
    """Closed forms, walks, and masks that hide keys; with and without queries beyond the keys."""
    declared = {"limit": torch.tensor([3, 9, 40, 1], dtype=torch.int32)} if "limit" in mask else {}
    of = batch("ragged", "padded", (5, 1, 30, 4), (33, 0, 50, 2), poison=math.nan)
    cached = paged(of, 7)
    found = compiled("fa2", "ragged", "paged", mask, tokens=False)(
        cached.q, cached.k, cached.v, **cached.passed, **declared
    )
    expected = compiled("fa2", "ragged", "padded", mask, tokens=False)(
        of.q, of.k, of.v, **of.lengths, **declared
    )
    assert torch.equal(found, expected) and found.any()


def test_scores_sinks_and_declared_tensors_go_with_pages() -> None:
    """A cap, a bias by key, a learned sink, several stages, memory of the caller's and lists that are shared."""
    spec = {
        "target": "simulator",
        "problem": {"head_dim": 16},
        "mask": "causal and keep[b, kv_idx]",
        "score": "softcap(score, 20.0) + bias[h, kv_idx]",
        "tensors": {"keep": "bool[batch, seqlen_k]", "bias": "f32[num_heads_q, length]"},
        "sink": "per_head",
        "tile": {"block_m": 8, "block_n": 8},
        "schedule": {"kind": "fa2", "stages": 3},
    }
    of = batch("dense", "padded", (5,) * 3, (33, 9, 17), poison=math.nan)
    cached, make = paged(of, 11), torch.Generator().manual_seed(3)
    keep = torch.rand(3, 44, generator=make) < 0.7
    declared = {"bias": torch.randn(4, 40, generator=make), "sink": torch.randn(4, generator=make)}
    kernels = [
        attngen.compile(spec | {"problem": {"head_dim": 16, "keys": keys}}) for keys in ("paged", "padded")
    ]
    passed = {**cached.passed, "keep": keep}
    passed["keep"] = torch.nn.functional.pad(keep, (0, 11 * passed["block_table"].shape[1] - 44))
    work = kernels[0].work(of.q, cached.k, cached.v, **passed, **declared)
    into = torch.full_like(of.q, math.nan)
    out, lse = kernels[0](
        of.q, cached.k, cached.v, out=into, work=work, return_lse=True, **passed, **declared
    )
    expected, expected_lse = kernels[1](
        of.q, of.k, of.v, return_lse=True, keep=keep[:, :33], **of.lengths, **declared
    )
    assert out is into and torch.equal(out, expected) and torch.equal(lse, expected_lse)


@pytest.mark.parametrize("split", ["auto", {"keys": 64}])
def test_keys_in_pages_may_be_cut_into_parts(split: object) -> None:
    """Each part looks up its own pages: the bits are those of padded keys that are cut alike."""
    of = batch("dense", "padded", (2,) * 4, (200, 0, 33, 64), poison=math.nan)
    cached = paged(of, 16)
    spec = {"target": "simulator", "mask": "causal", "split": split, "tile": {"block_m": 8, "block_n": 8}}
    outs = [
        attngen.compile(spec | {"problem": {"head_dim": 16, "keys": keys}})(
            of.q, k, v, return_lse=True, **passed
        )
        for keys, k, v, passed in (
            ("paged", cached.k, cached.v, cached.passed),
            ("padded", of.k, of.v, of.lengths),
        )
    ]
    assert all(map(torch.equal, *outs)) and outs[0][0].any()


def test_requests_may_use_other_rows_of_the_table() -> None:
    """`cache_batch_idx` says which; a table may have more rows, and any stride from row to row."""
    of = batch("dense", "padded", (3,) * 4, (20, 5, 0, 9), poison=math.nan)
    cached, kernel = paged(of, 4), compiled("fa2", "dense", "paged", "causal")
    expected = kernel(cached.q, cached.k, cached.v, **cached.passed)
    table = torch.full((6, 9), NO_PAGE, dtype=torch.int32)[:, :6]
    rows = torch.tensor([5, 0, 2, 3], dtype=torch.int32)
    table[rows.long()] = cached.passed["block_table"]
    found = kernel(
        cached.q, cached.k, cached.v, **cached.passed | {"block_table": table, "cache_batch_idx": rows}
    )
    assert torch.equal(found, expected) and found.any()


def test_layers_may_lie_between_one_another() -> None:
    """K and V are views of one tensor of layers, with strides of their own."""
    of = batch("dense", "padded", (3,) * 3, (20, 5, 9), poison=math.nan)
    cached, kernel = paged(of, 4), compiled("fa2", "dense", "paged", "full")
    pages = len(cached.k)
    layers = torch.full((pages, 3, 2, 2, 4, 16), math.nan, dtype=torch.bfloat16)  # K and V, heads before rows
    wide = torch.full((pages, 5, 2, 24), math.nan, dtype=torch.bfloat16)
    k, v = layers[:, 1, 0].transpose(1, 2), wide[:, 1:, :, 8:]
    k.copy_(cached.k), v.copy_(cached.v)
    found = kernel(cached.q, k, v, **cached.passed)
    assert torch.equal(found, kernel(cached.q, cached.k, cached.v, **cached.passed)) and found.any()
    assert torch.equal(
        kernel(cached.q, k.transpose(1, 2), v.transpose(1, 2), layout="hnd", **cached.passed), found
    )


def test_numbers_that_lie_are_kept_within_the_table_and_the_cache() -> None:
    """Lengths, rows of the table and pages; `verify` says which is wrong, and finds nothing in what is right."""
    of = batch("dense", "padded", (3,) * 2, (8, 6))
    cached, kernel = paged(of, 4), compiled("fa2", "dense", "paged", "full")
    k, v = cached.k.nan_to_num(0.5), cached.v.nan_to_num(2.0)
    table = cached.passed["block_table"][:, :2].clone()
    rows = torch.tensor([1, 0], dtype=torch.int32)
    good = {**cached.passed, "block_table": table, "cache_batch_idx": rows}
    kernel.verify(of.q, k, v, **good)
    last = len(k) - 1
    wrong_page = table.clone()
    wrong_page[1, 0] = len(k)
    right_page = table.clone()
    right_page[1, 0] = last
    for lie, truth, said in (
        (
            {"seqused_k": [1000, -3]},
            {"seqused_k": [8, 0]},
            "seqused_k[0]: got 1000, expected 0 to 8, the keys that a row of block_table has room for",
        ),
        (
            {"cache_batch_idx": [9, -1]},
            {"cache_batch_idx": [1, 0]},
            "cache_batch_idx[0]: got 9, expected 0 to 1",
        ),
        (
            {"block_table": wrong_page},
            {"block_table": right_page},
            f"block_table[1, 0]: got {len(k)}, expected 0 to {last}: request 0 has keys in that page",
        ),
        ({"leftpad_k": [0, 77]}, {"leftpad_k": [0, 6]}, "leftpad_k[1]: got 77, expected 0 to 6"),
    ):
        found, expected = (
            {name: torch.as_tensor(x, dtype=torch.int32) for name, x in each.items()} for each in (lie, truth)
        )
        out = kernel(of.q, k, v, **good | found)
        assert torch.equal(out, kernel(of.q, k, v, **good | expected)) and out.any()
        with pytest.raises(ArgumentError) as caught:
            kernel.verify(of.q, k, v, **good | found)
        assert said in str(caught.value)
    stale = table.clone()
    stale[0, 1] = NO_PAGE  # of request 1, whose 4 keys are in the first page
    kernel.verify(of.q, k, v, **good | {"block_table": stale, "seqused_k": torch.tensor([8, 4]).int()})


def test_there_may_be_no_request_no_page_and_no_key() -> None:
    """A batch of none, tables without columns, and lengths of 0 beside a table that says nothing."""
    kernel = compiled("fa2", "dense", "paged", "causal")
    q, cache = torch.ones(2, 3, 4, 16).bfloat16(), torch.full((1, 4, 2, 16), math.nan).bfloat16()
    none, table = torch.zeros(2, dtype=torch.int32), torch.full((2, 3), NO_PAGE, dtype=torch.int32)
    for of_two in (table, table[:, :0]):
        out, lse = kernel(q, cache, cache, return_lse=True, block_table=of_two, seqused_k=none)
        assert not out.any() and lse.isneginf().all()
    assert kernel(q[:0], cache, cache, block_table=table[:0], seqused_k=none[:0]).shape == (0, 3, 4, 16)


def test_a_page_past_the_end_is_never_looked_up() -> None:
    """A copy that asks where rows behind a sequence's end lie is a fault, whatever the table says."""
    of = batch("dense", "padded", (3,) * 2, (9, 5))
    cached, kernel = paged(of, 4), compiled("fa2", "dense", "paged", "full")
    given = check_arguments(kernel.manifest, cached.q, cached.k, cached.v, declared=cached.passed)
    bound = bind(kernel.manifest, given, ("out",), SIMULATED_SMS)
    run_call(kernel.call, bound)

    def greedy(step: LoadTile, role: object) -> None:
        """Look the whole block up."""
        first = role.index(step.block) * step.dst.buffer.rows  # type: ignore[attr-defined]
        role.device._pages.places(role.tile, first, step.dst.buffer.rows)  # type: ignore[attr-defined]

    with pytest.raises(SimulationFault, match="looked up, of a sequence of"):
        run_call(kernel.call, bound, steps={LoadTile: greedy})


def test_where_a_row_lies_is_worked_out_for_each_head_of_a_tile() -> None:
    """Page and row of it, of each member's own request, from the first row that counts."""
    table = PageTable(torch.tensor([[4, 2, 9], [7, -1, 0]]), torch.tensor([1, 0]), pages=8, page_size=3)
    members = (Member(0, 0, 0, 1, 5, k_start=2), Member(1, 0, 0, 1, 5, k_start=2))
    page, row = table.places(Tile(0, None, None, members), 1, 4)
    assert page.tolist() == [[0, 0, 0, 0], [2, 2, 2, 7]] and row.tolist() == [[0, 1, 2, 0]] * 2
