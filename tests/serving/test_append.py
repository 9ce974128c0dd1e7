"""Appending to caches on the CPU: what is written where, what is not touched, rotations, scales, and bad arguments."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import attngen
from attngen.errors import ArgumentError
from tests.effort import examples
from tests.serving.append_cases import (
    E4M3,
    AppendCase,
    Before,
    append_cases,
    assert_appended,
    rows_first,
    with_cases,
)


def copies(case: AppendCase) -> dict[str, Tensor]:
    """What caches hold."""
    return {name: case.tensors[name].clone() for name in ("k_cache", "v_cache")}


@settings(max_examples=examples(2), deadline=None)
@with_cases
@given(append_cases())
def test_rows_stand_where_they_shall_and_nowhere_else(case: AppendCase) -> None:
    """Any layout, strides, pages in any order, formats and rotations; numbers that lie write nothing elsewhere."""
    before = Before.of(case)
    assert_appended(case, before, attngen.append(**case.tensors))


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
@pytest.mark.parametrize("cache", [torch.bfloat16, E4M3])
def test_pages_of_any_size_are_the_dense_cache(cache: torch.dtype, layout: str) -> None:
    """The same bits come to the same places, found by the table, and nothing comes elsewhere."""
    given = AppendCase(page=None, room=6, cache=cache, layout=layout, seed=3).tensors
    attngen.append(**given)
    for page in (1, 3, 8, 24):
        pages = 3 * 24 // page
        table = torch.randperm(pages, generator=torch.Generator().manual_seed(page)).view(3, -1).int()
        caches = {}
        for name, columns in (("k_cache", 16), ("v_cache", 24)):
            shape = (pages, page, 2, columns) if layout == "nhd" else (pages, 2, page, columns)
            caches[name] = torch.zeros(shape).to(cache)
        attngen.append(**{**given, **caches}, block_table=table)
        for name, x in caches.items():
            by_place = rows_first(x, layout)[table.long()].flatten(1, 2)  # (sequences, places, heads, bytes)
            dense = rows_first(given[name], layout)
            for b, used in enumerate(given["seqused_k"].tolist()):
                new = slice(used, used + 2)
                assert torch.equal(by_place[b, new], dense[b, new]) and by_place[b, new].any()
                by_place[b, new] = 0
            assert not by_place.any()


def test_appending_in_steps_is_appending_at_once() -> None:
    """Row by row, each call one more key, is the same bits as all rows in one call; q too, where it advances."""
    case = AppendCase(lengths=(5, 5, 5), room=4, cache=torch.float16, has_leftpad=True)
    given, fresh = case.tensors, copies(case)
    q = attngen.append(**given)
    steps, used = [], given["seqused_k"].clone()
    for i in range(5):
        new = {name: given[name][:, i : i + 1] for name in ("k_new", "v_new", "q")}
        steps.append(attngen.append(**{**given, **fresh, **new, "seqused_k": used}))
        used += 1
    assert torch.equal(torch.cat(steps, 1), q)
    for name, x in fresh.items():
        assert torch.equal(x.view(torch.uint8), given[name].view(torch.uint8))


def test_q_advances_only_where_it_shall() -> None:
    """All rows of a sequence at the place of the first new key, or each at that of its own."""
    case = AppendCase(rotation=(16, torch.float32, False))
    given = case.tensors
    q = given["q"]
    alike = q[:, :1].expand(q.shape).contiguous()
    stays = attngen.append(**{**given, "q": alike, "q_advances": False})
    moves = attngen.append(**{**given, "q": alike, "q_advances": True})
    assert torch.equal(stays[:, 0], stays[:, 1]) and torch.equal(stays[:, 0], moves[:, 0])
    assert not torch.equal(moves[:, 0], moves[:, 1])


def test_leftpad_moves_rotations_and_no_place() -> None:
    """With so many keys that do not count a key is rotated as one that stands so many places before."""
    case = AppendCase(room=6, seed=5)
    given = case.tensors
    caches = [copies(case) for _ in range(2)]
    pads = torch.tensor([1, 0, 2], dtype=torch.int32)
    used = torch.tensor([9, 4, 7], dtype=torch.int32)
    with_pads, without = (
        attngen.append(**{**given, **where, "seqused_k": used, **pad})
        for where, pad in zip(caches, ({"leftpad_k": pads}, {}), strict=True)
    )
    assert torch.equal(with_pads[1], without[1]) and not torch.equal(with_pads[0], without[0])
    earlier = attngen.append(**{**given, **copies(case), "seqused_k": used - pads})
    assert torch.equal(with_pads, earlier)
    assert all(
        torch.equal(x.isnan(), y.isnan()) for x, y in zip(*(each.values() for each in caches), strict=True)
    )
    assert torch.equal(caches[0]["v_cache"].view(torch.uint8), caches[1]["v_cache"].view(torch.uint8))


def test_what_is_appended_can_be_attended_to() -> None:
    """Decode step by step, rotated in the cache, is causal attention of rows that were rotated by hand."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 7, heads, 32, generator=draw) for heads in (4, 2, 2))
    angles = torch.rand(7, 16, generator=draw)
    rotary = (angles.cos(), angles.sin())
    caches = {name: torch.full((2, 8, 2, 32), torch.nan) for name in ("k_cache", "v_cache")}
    kernel = attngen.compile(
        {"problem": {"head_dim": 32, "keys": "padded"}, "precision": {"inputs": "f32"}, "mask": "causal"},
        arch="simulator",
    )
    steps = []
    for i in range(7):
        used = torch.full((2,), i, dtype=torch.int32)
        row = slice(i, i + 1)
        turned = attngen.append(k[:, row], v[:, row], **caches, seqused_k=used, rotary=rotary, q=q[:, row])
        steps.append(kernel(turned, *caches.values(), seqused_k=used + 1))
    by_angle = torch.complex(*rotary).view(1, 7, 1, 16)
    turned_q, turned_k = (
        torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (16, 2))) * by_angle).flatten(-2)
        for x in (q, k)
    )
    wanted = attngen.attention(turned_q, turned_k, v, "causal")
    torch.testing.assert_close(torch.cat(steps, 1), wanted, rtol=1e-5, atol=1e-5)


def test_e4m3_is_divided_rounded_and_ends_at_448() -> None:
    """By number, head, or sequence and head; infinities end too, NaN stays."""
    case = AppendCase(cache=E4M3, rotation=None, room=6, new=torch.float32, scales="both")
    given = case.tensors
    given["v_new"][0, 0, 0, :4] = torch.tensor([1e9, -1e9, torch.inf, torch.nan])
    attngen.append(**given)
    page, slot = divmod(int(given["seqused_k"][0]), 4)
    row = given["v_cache"][int(given["block_table"][0, page]), slot].float()
    assert row[0, :3].tolist() == [448, -448, 448] and row[0, 3].isnan()
    by = given["v_scale"][0].unsqueeze(-1)
    wanted = (given["v_new"][0, 0] / by).clamp(-448, 448).to(E4M3).float()
    assert torch.equal(row[1], wanted[1]) and torch.equal(row[0, 4:], wanted[0, 4:]) and row.any()


def arguments(**changes: Any) -> dict[str, Any]:
    """A paged call, changed; what is None is left out."""
    case = AppendCase()
    return {name: x for name, x in {**case.tensors, **changes}.items() if x is not None}


K, CACHE = AppendCase().tensors["k_new"], AppendCase().tensors["k_cache"]
COS, NUMBERS = torch.zeros(40, 8), torch.zeros(6, dtype=torch.int32)
REFUSED = [
    ({"layout": "dhn"}, "layout: got 'dhn', expected 'nhd' or 'hnd'"),
    ({"rotary_interleaved": 1}, "rotary_interleaved: got 1, expected True or False"),
    ({"k_new": 3}, "k_new: got int, expected a torch tensor"),
    ({"k_new": K.double()}, "k_new: got dtype torch.float64, expected torch.float16 or"),
    ({"v_new": K.float()}, "v_new: got torch.float32 on cpu, expected torch.bfloat16 on cpu"),
    ({"k_new": K[0]}, r"k_new: got 3 dimensions, expected 4: .*or 3 beside cu_seqlens_q"),
    ({"cu_seqlens_q": NUMBERS[:4]}, r"k_new: got 4 dimensions, expected 3: \(tokens"),
    ({"k_new": K[..., :12]}, "k_new: got head_dim 12, expected a multiple of 8, at least 8"),
    ({"k_new": K.mT.contiguous().mT}, "k_new: got stride 2 in the last dimension"),
    ({"k_new": K[:, :1]}, r"v_new: got shape \(3, 2, 2, 24\), expected \(3, 1, 2, 24\), as k_new has but"),
    ({"q": K[:, :1]}, r"q: got shape \(3, 1, 2, 16\), expected \(3, 2, 2, 16\), as k_new has but for heads"),
    ({"k_new": K.clone().requires_grad_()}, "k_new: got a tensor that requires grad"),
    ({"k_cache": CACHE.double()}, "k_cache: got dtype torch.float64, expected .*float8_e4m3fn"),
    ({"k_cache": CACHE[0]}, r"k_cache: got 3 dimensions, expected 4: \(pages, page, heads_kv, head_dim\)"),
    ({"k_cache": CACHE[:, :, :1]}, r"k_cache: .*\(19, 4, 1, 16\), expected .*\(19, 4, 2, 16\) = \(pages"),
    ({"k_cache": CACHE[:4]}, r"v_cache: .*\(19, 4, 2, 24\), expected .*\(4, 4, 2, 24\)"),
    ({"k_cache": CACHE.half()}, r"v_cache: got torch.bfloat16 of .*, expected torch.float16 of"),
    ({"layout": "hnd"}, r"k_cache: .*\(19, 4, 2, 16\), expected .*\(19, 2, 2, 16\) = \(pages, heads_kv"),
    (
        {"k_cache": CACHE[:, :0], "v_cache": torch.zeros(19, 0, 2, 24).bfloat16()},
        "k_cache: got pages of 0 rows",
    ),
    ({"k_cache": CACHE.to("meta")}, "k_cache: got device meta, expected cpu, the device of k_new"),
    ({"k_cache": CACHE[:1].expand(19, 4, 2, 16)}, "k_cache: got strides .*expected a tensor that does not"),
    (
        {"seqused_k": torch.zeros(3)},
        r"seqused_k: got torch.float32 of shape \(3,\) on cpu, expected torch.int32",
    ),
    ({"seqused_k": NUMBERS[:2]}, r"seqused_k: got .*\(2,\) on cpu, expected .*\(3,\) = \(batch,\)"),
    ({"seqused_k": NUMBERS[::2]}, r"seqused_k: got stride 2, expected 1 \(contiguous\)"),
    ({"leftpad_k": NUMBERS[:3].long()}, "leftpad_k: got torch.int64 of shape"),
    ({"cache_batch_idx": [0, 1, 2]}, "cache_batch_idx: got list, expected a torch tensor"),
    ({"block_table": torch.zeros(3, 3)}, r"block_table: got torch.float32 of 2 .*expected torch.int32 of 2"),
    ({"block_table": NUMBERS}, "block_table: got torch.int32 of 1 dimensions"),
    ({"block_table": NUMBERS.view(2, 3)}, "block_table: got 2 rows, expected 3, .*(?s:.*)cache_batch_idx"),
    ({"block_table": None}, "k_cache: got 19 sequences, expected 3, .*(?s:.*)hint: pass a block_table"),
    ({"rotary": COS}, "rotary: got a Tensor, expected two tensors: cosines and sines"),
    ({"rotary": (COS, COS.half())}, r"rotary\[1\]: got torch.float16 of 2 .*expected torch.bfloat16 or"),
    ({"rotary": (COS, COS[:7])}, r"rotary\[1\]: got .*\(7, 8\), expected .*\(40, 8\), as cosines are"),
    ({"rotary": (COS[:, :4], COS)}, r"rotary\[0\]: got rotary_dim 8, expected a multiple of 16 up to 16"),
    ({"rotary": (torch.zeros(9, 16),) * 2}, r"rotary\[0\]: got rotary_dim 32, expected .* up to 16"),
    ({"rotary": (COS[:0],) * 2}, r"rotary\[0\]: got 0 positions, expected one at least"),
    ({"rotary": None}, "q: got queries without rotary, expected None where nothing is rotated"),
    ({"k_scale": 2.0}, "k_scale: got a scale, expected None: a cache of torch.bfloat16 has none"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED, ids=[said[:40] for _, said in REFUSED])
def test_what_cannot_be_appended_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    """The argument, what it is, and what it must be; no cache has been written to."""
    given = arguments(**changes)
    before = {name: given[name].clone() for name in ("k_cache", "v_cache")}
    with pytest.raises(ArgumentError, match=f"argument {said}"):
        attngen.append(**given)
    for name, x in before.items():
        assert x.is_meta or torch.equal(x.view(torch.uint8), given[name].view(torch.uint8))


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        (0.0, "got 0.0, expected a number above 0"),
        (float("inf"), "got inf, expected a number above 0"),
        (1e39, r"got 1e\+39, expected a number above 0 that f32 has"),
        (True, "got True"),
        (torch.ones(3), r"got torch.float32 of shape \(3,\) on cpu, expected .* \(2,\) or \(3, 2\) on cpu"),
        (torch.ones(2).half(), "got torch.float16 of shape"),
    ],
    ids=str,
)
def test_scales_are_numbers_or_fit_heads(scale: Any, said: str) -> None:
    """Of a cache of e4m3."""
    with pytest.raises(ArgumentError, match=f"argument v_scale: {said}"):
        attngen.append(**{**replace(AppendCase(), cache=E4M3).tensors, "v_scale": scale})


def test_caches_share_memory_with_nothing_that_is_read() -> None:
    """K's cache is neither V's nor what is appended."""
    given = AppendCase(columns=(16, 16)).tensors
    with pytest.raises(ArgumentError, match="argument k_cache: got memory shared with v_cache"):
        attngen.append(**{**given, "v_cache": given["k_cache"]})
    with pytest.raises(ArgumentError, match="argument v_cache: got memory shared with k_new"):
        attngen.append(**{**given, "k_new": given["v_cache"][:3, :2], "v_new": given["v_new"]})
