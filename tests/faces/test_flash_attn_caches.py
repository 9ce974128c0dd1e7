"""Caches of FlashAttention's functions: pages, rotary tables, new keys of lengths of their own, and refusals."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import attngen
from attngen.api import _kernel_for
from attngen.check.cuts import NO_PAGE
from attngen.flash_attn import version2, version3, version4
from tests.faces.attention64 import assert_near, attention64, draw, starts

VERSIONS = {"2": (version2, "block_table"), "3": (version3, "page_table")}


def integers(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def in_pages(
    page: int, room: int, lengths: tuple[int, ...], *rows: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Caches of pages, shuffled, NaN where nothing counts, and their table.

    Args:
        page: rows of a page.
        room: pages of each sequence that the table names.
        lengths: keys of each sequence.
        rows: keys, values: (batch, seqlen, heads, head_dim).
    """
    pages = torch.randperm(2 * room * len(lengths), generator=torch.Generator().manual_seed(page))
    table = pages[: room * len(lengths)].view(len(lengths), room).int()
    caches = [torch.full((len(pages), page, *x.shape[2:]), math.nan) for x in rows]
    for cache, x in zip(caches, rows, strict=True):
        for b, length in enumerate(lengths):
            for key in range(length):
                cache[table[b, key // page], key % page] = x[b, key]
    return caches, table


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rows (seqlen, heads, head_dim) rotated by angles (seqlen or 1, rotary_dim / 2), in torch's complex numbers."""
    columns = 2 * cos.shape[-1]
    part = x[..., :columns]
    pairs = part.unflatten(-1, (-1, 2)) if interleaved else part.unflatten(-1, (2, -1)).transpose(-1, -2)
    by = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin).unsqueeze(1))
    made = by.flatten(-2) if interleaved else by.transpose(-1, -2).flatten(-2)
    return torch.cat([made, x[..., columns:]], -1)


def causal_of(rows: int, keys: int, first: int = 0) -> torch.Tensor:
    return torch.ones(rows, keys - first).tril(keys - rows - first).bool()


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("page", [16, 3, None])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("causal", [True, False])
def test_new_keys_are_rotated_appended_and_read(
    version: str, page: int | None, interleaved: bool, causal: bool
) -> None:
    """In pages and in contiguous caches, by rows that an index names, behind padding that moves no rotation."""
    face, table_name = VERSIONS[version]
    before, left, new, which = (17, 0, 30), (5, 0, 1), 3, (2, 0, 1)
    q, old_k, old_v, k, v = draw(
        (3, new, 4, 32), (3, 40, 2, 32), (3, 40, 2, 16), (3, new, 2, 32), (3, new, 2, 16)
    )
    angles = torch.arange(64, dtype=torch.float32)[:, None] * 100 ** -torch.arange(0, 1, 1 / 8)
    cos, sin = angles.cos(), angles.sin()
    passed: dict[str, Any] = {"cache_batch_idx": integers(*which)}
    own = [which.index(row) for row in range(3)]
    if page is None:
        caches = [x[own].clone() for x in (old_k, old_v)]
    else:
        caches, table = in_pages(page, -(-40 // page), before, old_k, old_v)
        passed[table_name] = table[own]
    passed |= {"cache_seqlens": integers(*before), "cache_leftpad": integers(*left), "causal": causal}
    passed |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
    out, lse = face.flash_attn_with_kvcache(q, *caches, k, v, **passed, return_softmax_lse=True)
    for b, (end, first) in enumerate(zip(before, left, strict=True)):
        at = slice(end, end + new)
        keys = torch.cat([old_k[b, :end], turned(k[b], cos[at], sin[at], interleaved)])
        values = torch.cat([old_v[b, :end], v[b]])
        of_q = at if causal else slice(end, end + 1)
        rows = turned(q[b], cos[of_q], sin[of_q], interleaved)
        seen = causal_of(new, end + new, first) if causal else None
        exact, exact_lse = attention64(rows, keys[first:], values[first:], seen)
        assert_near(out[b], exact)
        assert_near(lse[b], exact_lse)


def test_rotations_may_begin_elsewhere() -> None:
    """rotary_seqlens says where, ahead of places and behind them; ragged queries go with new keys cut alike."""
    q, k_cache, v_cache, k, v = draw((5, 4, 32), (2, 20, 2, 32), (2, 20, 2, 32), (5, 2, 32), (5, 2, 32))
    cut, before, turns = starts(4, 1), (7, 0), (2, 11)
    angles = torch.arange(20, dtype=torch.float32)[:, None] * torch.linspace(1, 0.1, 16)
    cos, sin = angles.cos(), angles.sin()
    old_k, old_v = k_cache.clone(), v_cache.clone()
    passed: dict[str, Any] = {"cu_seqlens_q": cut, "cu_seqlens_k_new": cut, "max_seqlen_q": 4, "causal": True}
    tables = {"rotary_cos": cos, "rotary_sin": sin, "rotary_seqlens": integers(*turns)}
    lengths = {"cache_seqlens": integers(*before)}
    out = version3.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **passed, **tables, **lengths)
    for b, (end, by) in enumerate(zip(before, turns, strict=True)):
        rows = slice(int(cut[b]), int(cut[b + 1]))
        count = rows.stop - rows.start
        at = slice(by, by + count)
        old_k[b, end : end + count] = turned(k[rows], cos[at], sin[at], True)
        old_v[b, end : end + count] = v[rows]
        keys, values = (x[b, : end + count] for x in (old_k, old_v))
        exact, _ = attention64(
            turned(q[rows], cos[at], sin[at], True), keys, values, causal_of(count, len(keys))
        )
        assert_near(out[rows], exact)
    assert_near(k_cache, old_k.double(), 1e-6)
    assert torch.equal(v_cache, old_v)


def test_new_keys_without_room_are_left_out() -> None:
    """Of dense and ragged new keys beside dense queries; a number says how many there are before."""
    q, k_cache, v_cache, k, v = draw(
        (2, 1, 4, 32), (2, 8, 2, 32), (2, 8, 2, 32), (2, 3, 2, 32), (2, 3, 2, 32)
    )
    old_k, old_v = k_cache.clone(), v_cache.clone()
    out = version3.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=6)
    old_k[:, 6:], old_v[:, 6:] = k[:, :2], v[:, :2]
    assert torch.equal(k_cache, old_k) and torch.equal(v_cache, old_v)
    assert_near(out, attention64(q, old_k, old_v)[0])
    cut = {"cu_seqlens_k_new": starts(5, 1), "cache_seqlens": integers(0, 3)}
    tokens = [x.flatten(0, 1) for x in (k, v)]
    out = version3.flash_attn_with_kvcache(q, k_cache, v_cache, *tokens, **cut)
    for b, (rows, end) in enumerate(((slice(0, 5), 5), (slice(5, 6), 4))):
        old_k[b, end - rows.stop + rows.start : end] = tokens[0][rows]
        old_v[b, end - rows.stop + rows.start : end] = tokens[1][rows]
        assert_near(out[b], attention64(q[b], old_k[b, :end], old_v[b, :end])[0])
    assert torch.equal(k_cache, old_k) and torch.equal(v_cache, old_v)


@pytest.mark.parametrize("page", [16, 3])
def test_ragged_queries_read_pages(page: int) -> None:
    """By flash_attn 2, by 4, and as torch has it: each the bits of the same lengths said otherwise."""
    lengths, rows = (33, 0, 7), (4, 2, 1)
    q, k, v = draw((7, 4, 32), (3, 40, 2, 32), (3, 40, 2, 16))
    (k_pages, v_pages), table = in_pages(page, -(-40 // page), lengths, k, v)
    for b, length in enumerate(lengths):
        table[b, -(-length // page) :] = NO_PAGE
    used, cut = integers(*lengths), starts(*rows)
    out, lse, _ = version2.flash_attn_varlen_func(
        q, k_pages, v_pages, cut, starts(*lengths), 4, 40,
        causal=True, softcap=3.0, block_table=table, return_attn_probs=True,
    )  # fmt: skip
    for b, length in enumerate(lengths):
        at = slice(int(cut[b]), int(cut[b + 1]))
        exact, exact_lse = attention64(
            q[at], k[b, :length], v[b, :length], causal_of(rows[b], length), softcap=3.0
        )
        assert_near(out[at], exact, is_zero=not length)
        assert_near(lse[:, at], exact_lse, is_zero=not length)
    asked: dict[str, Any] = {"cu_seqlens_q": cut, "max_seqlen_q": 4, "causal": True, "softcap": 3.0}
    for said in ({"seqused_k": used}, {"cu_seqlens_k": starts(*lengths)}):
        found, _ = version4.flash_attn_varlen_func(q, k_pages, v_pages, page_table=table, **said, **asked)
        assert torch.equal(found, out)
    read = version4.flash_attn_varlen_func(
        q[None, :3], k_pages.nan_to_num(0.5), v_pages.nan_to_num(0.5), page_table=table[:1].clamp(max=0)
    )
    exact, _ = attention64(
        q[:3],
        *(x.nan_to_num(0.5)[table[0].clamp(max=0).long()].flatten(0, 1) for x in (k_pages, v_pages)),
    )
    assert_near(read[0][0], exact)
    options: dict[str, Any] = {"block_table": table, "seqused_k": used, "window_size": (-1, 0)}
    same = attngen.varlen_attn(q, k_pages, v_pages, cut, None, 4, 40, enable_gqa=True, **options)
    plain = version2.flash_attn_varlen_func(
        q, k_pages, v_pages, cut, starts(*lengths), 4, 40, causal=True, block_table=table
    )
    assert torch.equal(same, plain) and same.any()
    said_by_starts = options | {"seqused_k": None}
    assert torch.equal(
        attngen.varlen_attn(
            q, k_pages, v_pages, cut, starts(*lengths), 4, 40, enable_gqa=True, **said_by_starts
        ),
        same,
    )


def test_few_queries_split_keys_in_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a row of the table has room for many keys, whatever a page holds; torch's num_splits=1 forbids it."""
    splits = []

    def seen(*wanted: Any) -> attngen.Kernel:
        splits.append(wanted[-1])
        return _kernel_for(*wanted)

    monkeypatch.setattr("attngen.api._kernel_for", seen)
    lengths = (600, 5)
    q, k, v = draw((2, 1, 4, 32), (2, 600, 2, 32), (2, 600, 2, 32))
    caches, table = in_pages(16, 38, lengths, k, v)
    used = integers(*lengths)
    out = version2.flash_attn_with_kvcache(q, *caches, cache_seqlens=used, block_table=table)
    for b, length in enumerate(lengths):
        assert_near(out[b], attention64(q[b], k[b, :length], v[b, :length])[0])
    which = integers(1, 0)
    alone = version2.flash_attn_with_kvcache(q, k, v, cache_seqlens=used.flip(0), cache_batch_idx=which)
    assert_near(alone[0], attention64(q[0], k[1, :5], v[1, :5])[0])
    whole = version2.flash_attn_with_kvcache(q, *caches, cache_seqlens=used, block_table=table, num_splits=1)
    assert_near(whole, out.double())
    options: dict[str, Any] = {"block_table": table, "seqused_k": used, "enable_gqa": True}
    for num_splits in (None, 1):
        tokens = attngen.varlen_attn(
            q[:, 0], *caches, starts(1, 1), None, 1, 600, num_splits=num_splits, **options
        )
        assert_near(tokens[:, None], out.double())
    assert splits == [16, 16, 0, 16, 0]
    paged = {"cu_seqlens_q": starts(1, 1), "max_seqlen_q": 1, "seqused_k": used, "page_table": table}
    for said in ({"num_splits": 0}, {}):
        tokens, _ = version4.flash_attn_varlen_func(q[:, 0], *caches, **paged, **said)
        assert_near(tokens[:, None], out.double())
    assert splits[5:] == [16, 0]


@pytest.mark.parametrize(
    ("queries", "pages", "head_dim", "rows"),
    [
        (4, 100, 32, 16),
        (5, 100, 32, 16),
        (8, 4000, 32, 16),
        (8, 60000, 32, 32),
        (5, 60000, 160, 16),
        (9, 60000, 32, 0),
    ],
)
def test_rows_of_tiles_follow_queries_and_room_for_keys(
    queries: int, pages: int, head_dim: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than 16 rows are one tile where keys would come from memory twice; what a table has room for decides."""
    asked = []

    def seen(*wanted: Any) -> attngen.Kernel:
        asked.append(wanted[-1])
        raise StopIteration

    monkeypatch.setattr("attngen.api._kernel_for", seen)
    q, cache = torch.zeros(2, queries, 8, head_dim).bfloat16(), torch.zeros(3, 16, 2, head_dim).bfloat16()
    table = torch.zeros(2, pages, dtype=torch.int32)
    with pytest.raises(StopIteration):
        version2.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=integers(5, 7), block_table=table)
    assert asked == [rows]


def test_lengths_may_be_one_number_or_all_that_there_is_room_for() -> None:
    """In pages and contiguous; an index may be of 64 bits."""
    q, k, v = draw((2, 3, 4, 32), (3, 12, 2, 32), (3, 12, 2, 32))
    caches, table = in_pages(4, 3, (12, 12, 12), k, v)
    which = torch.tensor([2, 0])
    for length in (7, None):
        said: dict[str, Any] = {"cache_seqlens": length, "cache_batch_idx": which}
        exact, _ = attention64(q, k[which, :length], v[which, :length])
        assert_near(version2.flash_attn_with_kvcache(q, k, v, **said), exact)
        assert_near(version3.flash_attn_with_kvcache(q, *caches, page_table=table, **said), exact)


PAGES: dict[str, torch.Tensor] = {"k_cache": torch.ones(4, 2, 2, 32), "v_cache": torch.ones(4, 2, 2, 32)}
NEW: dict[str, Any] = {"k": torch.ones(1, 1, 2, 32), "v": torch.ones(1, 1, 2, 32), "cache_seqlens": 1}
ANGLES = torch.ones(8, 8)
TABLES = {"rotary_cos": ANGLES, "rotary_sin": ANGLES}
TABLE = torch.zeros(1, 2, dtype=torch.int32)
MISTAKES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "block_table: got int, expected a torch tensor": (version2.flash_attn_with_kvcache, {"block_table": 3}),
    "page_table: got 1 dimensions": (version3.flash_attn_with_kvcache, {"page_table": TABLE[0]}),
    "page_table: got dtype torch.int64": (version3.flash_attn_with_kvcache, {"page_table": TABLE.long()}),
    "page_table: got dtype torch.int64, expected": (
        version3.flash_attn_with_kvcache,
        {"page_table": TABLE.long(), **NEW},
    ),
    "page_table: got 2 rows": (version3.flash_attn_with_kvcache, {"page_table": TABLE.repeat(2, 1)}),
    "block_table: got 2 rows": (version2.flash_attn_with_kvcache, {"block_table": TABLE.repeat(2, 1), **NEW}),
    "k_cache: got pages of 0 rows": (
        version2.flash_attn_with_kvcache,
        {"block_table": TABLE, "k_cache": torch.ones(4, 0, 2, 32), "v_cache": torch.ones(4, 0, 2, 32)},
    ),
    "rotary_cos: got Tensor, expected None where no keys": (version2.flash_attn_with_kvcache, TABLES),
    "rotary_sin: got NoneType": (version2.flash_attn_with_kvcache, {**NEW, "rotary_cos": ANGLES}),
    "rotary_cos: got rotary_dim 6": (
        version2.flash_attn_with_kvcache,
        {**NEW, "rotary_cos": ANGLES[:, :3], "rotary_sin": ANGLES[:, :3]},
    ),
    "rotary_interleaved: got 3": (
        version2.flash_attn_with_kvcache,
        {**NEW, **TABLES, "rotary_interleaved": 3},
    ),
    r"q: got shape \(1, 3, 4, 32\), expected \(1, 1, 4, 32\), as k has but for heads": (
        version2.flash_attn_with_kvcache,
        {**NEW, **TABLES, "q": torch.ones(1, 3, 4, 32)},
    ),
    "rotary_seqlens: got Tensor, expected None": (
        version3.flash_attn_with_kvcache,
        {**NEW, "rotary_seqlens": TABLE[0, :1]},
    ),
    "rotary_seqlens: got torch.float32": (
        version3.flash_attn_with_kvcache,
        {**NEW, **TABLES, "rotary_seqlens": torch.ones(1)},
    ),
    "cu_seqlens_k_new: got None, expected the tensor": (
        version3.flash_attn_with_kvcache,
        {**NEW, **TABLES, "q": torch.ones(1, 4, 32), "cu_seqlens_q": starts(1)},
    ),
    "cu_seqlens_k_new: got Tensor, expected None": (
        version3.flash_attn_with_kvcache,
        {"cu_seqlens_k_new": starts(1)},
    ),
    "cu_seqlens_k_new: got 2 sequences, expected 1": (
        version3.flash_attn_with_kvcache,
        {**NEW, "k": torch.ones(1, 2, 32), "v": torch.ones(1, 2, 32), "cu_seqlens_k_new": starts(1, 0)},
    ),
    "k: got 4 dimensions": (version3.flash_attn_with_kvcache, {**NEW, "cu_seqlens_k_new": starts(1)}),
    "k: got 3 heads of 32 columns": (version2.flash_attn_with_kvcache, {**NEW, "k": torch.ones(1, 1, 3, 32)}),
    "k_descale: got Tensor": (version3.flash_attn_with_kvcache, {"k_descale": torch.ones(1, 2)}),
    "alibi_slopes: got a tensor that requires grad": (
        version2.flash_attn_with_kvcache,
        {"block_table": TABLE, "alibi_slopes": torch.ones(4).requires_grad_()},
    ),
    "alibi_slopes: got a tensor that requires grad, expected": (
        version2.flash_attn_with_kvcache,
        {**NEW, "alibi_slopes": torch.ones(4).requires_grad_()},
    ),
    "alibi_slopes: got shape": (version2.flash_attn_with_kvcache, {**NEW, "alibi_slopes": torch.ones(5)}),
    "softmax_scale: got nan": (version2.flash_attn_with_kvcache, {**NEW, "softmax_scale": math.nan}),
    "return_softmax_lse: got 1": (version2.flash_attn_with_kvcache, {**NEW, "return_softmax_lse": 1}),
    "k_cache: got 2 heads, expected a divisor of q's 3": (
        version2.flash_attn_with_kvcache,
        {**NEW, "q": torch.ones(1, 1, 3, 32)},
    ),
    "q: got .*columns|head_dim": (version2.flash_attn_with_kvcache, {**NEW, "q": torch.ones(1, 1, 4, 64)}),
    "block_table: got .*stride": (
        version2.flash_attn_with_kvcache,
        {**NEW, "block_table": TABLE.repeat(1, 2)[:, ::2]},
    ),
    "k: got 2 sequences, expected 1, as q has": (
        version2.flash_attn_with_kvcache,
        {**NEW, "k": torch.ones(2, 1, 2, 32), "v": torch.ones(2, 1, 2, 32)},
    ),
    "q: got a tensor that requires grad": (
        version2.flash_attn_varlen_func,
        {"block_table": TABLE, "q": torch.ones(1, 4, 32).requires_grad_()},
    ),
    "k: got a tensor that requires grad": (
        version4.flash_attn_varlen_func,
        {"page_table": TABLE, "k": torch.ones(4, 2, 2, 32).requires_grad_()},
    ),
    "page_table: got 3 dimensions": (version4.flash_attn_varlen_func, {"page_table": TABLE[None]}),
    "block_table: got 3 dimensions": (version2.flash_attn_varlen_func, {"block_table": TABLE[None]}),
    "cu_seqlens_k: got NoneType": (
        version2.flash_attn_varlen_func,
        {"block_table": TABLE, "cu_seqlens_k": None},
    ),
    "max_seqlen_k: got 'x'": (
        version2.flash_attn_varlen_func,
        {"block_table": TABLE, "max_seqlen_k": "x"},
    ),
    "max_seqlen_k: got -5": (
        version4.flash_attn_varlen_func,
        {"page_table": TABLE, "cu_seqlens_k": None, "max_seqlen_k": -5},
    ),
    "max_k: got None": (attngen.varlen_attn, {"block_table": TABLE, "max_k": None}),
    "value: got 3 dimensions, expected 4": (
        attngen.varlen_attn,
        {"block_table": TABLE, "value": torch.ones(1, 2, 32)},
    ),
    "cu_seq_k: got None, expected a tensor, or seqused_k": (
        attngen.varlen_attn,
        {"block_table": TABLE, "cu_seq_k": None},
    ),
    "key: got a tensor that requires grad": (
        attngen.varlen_attn,
        {"block_table": TABLE, "key": torch.ones(4, 2, 2, 32).requires_grad_()},
    ),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_told_by_the_names_of_the_call(message: str) -> None:
    """And nothing is written where they are."""
    function, wrong = MISTAKES[message]
    caches = {name: x.clone() for name, x in PAGES.items()}
    if function is attngen.varlen_attn:
        given: dict[str, Any] = {
            "query": torch.ones(1, 4, 32),
            "key": caches["k_cache"],
            "value": caches["v_cache"],
        }
        given |= {"cu_seq_q": starts(1), "cu_seq_k": starts(3), "max_q": 1, "max_k": 3, "enable_gqa": True}
    elif "varlen" in function.__name__:
        given = {"q": torch.ones(1, 4, 32), "k": caches["k_cache"], "v": caches["v_cache"]}
        given |= {"cu_seqlens_q": starts(1), "cu_seqlens_k": starts(3), "max_seqlen_q": 1, "max_seqlen_k": 3}
    else:
        given = {"q": torch.ones(1, 1, 4, 32), **caches}
        if not {"block_table", "page_table"} & set(wrong):
            given |= {name: x[:1] for name, x in caches.items()}
    with pytest.raises(attngen.ArgumentError, match=f"argument {message}"):
        function(**given | wrong)
    assert all(torch.equal(x, PAGES[name]) for name, x in caches.items())
