"""Drawn keys in pages, and what the oracles read of them."""

import math
from dataclasses import replace

import pytest
import torch

from attngen.check.by_sequence import attention_by_sequence
from attngen.check.cuts import NO_PAGE, Cut
from attngen.check.inputs import MEMORY_LAYOUTS, MemoryLayout, Shape, random_inputs
from attngen.check.paging import as_padded
from attngen.check.reference import attention
from attngen.plan import Lengths

CUT = Cut("paged", (5, 0, 9, 16), skipped=(0, 3, 8, 0), tail=2, page=4)
PAGED, PADDED = Lengths("dense", "paged"), Lengths("dense", "padded")


def shape(keys: Cut) -> Shape:
    return Shape(4, 4, 2, 3, keys.size, None, keys)


def test_a_drawn_table_names_each_needed_page_once_and_no_other() -> None:
    """Pages that hold rows that count, of a pool of twice as many; what lies ahead of them and behind is nowhere."""
    table = CUT.block_table
    assert table.shape == (4, CUT.rows // 4) == (4, 5) and CUT.size == 20
    needed = [[0, 1], [], [2, 3, 4], [0, 1, 2, 3]]
    assert [(row != NO_PAGE).nonzero().flatten().tolist() for row in table] == needed
    pages = table[table != NO_PAGE].tolist()
    assert len(set(pages)) == 9 and max(pages) < CUT.pool_pages == 18 and pages != sorted(pages)
    assert CUT.arguments("k")["seqused_k"].tolist() == [5, 3, 17, 16]


@pytest.mark.parametrize("layout", MEMORY_LAYOUTS)
def test_caches_hold_what_counts_and_poison(layout: MemoryLayout) -> None:
    """Rows that count are those of padded keys of the same seed, in any memory; nothing else is of a randn."""
    drawn = random_inputs(shape(CUT), 8, 16, torch.float32, seed=5, layout=layout)
    padded = random_inputs(shape(replace(CUT, kind="padded", tail=3, page=0)), 8, 16, torch.float32, seed=5)
    _, k, v, passed = as_padded(PAGED, drawn[1], drawn[2], shape(CUT).arguments())
    assert drawn[1].shape == (18, 4, 2, 8) and k.shape == (4, 20, 2, 8) and "block_table" not in passed
    for found, expected, cache in ((k, padded[1], drawn[1]), (v, padded[2], drawn[2])):
        for b, (first, end) in enumerate(CUT.spans):
            if layout != "expanded" or cache is drawn[1]:
                assert torch.equal(found[b, first:end], expected[b, first:end])
        counted = cache.isfinite() & (cache != 6e4)
        assert counted.flatten(2).any(-1).sum() == sum(CUT.lengths)
        assert found[0, 5:].isnan().all()


def test_the_oracle_of_pages_is_that_of_padded_keys() -> None:
    """Whatever the table says behind ends; numbers that no table or cache has are the nearest that there are."""
    q, k, v = random_inputs(shape(CUT), 8, 16, torch.float64, seed=1)
    passed = shape(CUT).arguments()
    out, lse = attention_by_sequence(attention, PAGED, q, k, v, passed=passed)
    _, own_k, own_v, own = as_padded(PAGED, k, v, passed)
    expected = attention_by_sequence(
        attention, PADDED, q, own_k.nan_to_num(3.0), own_v.nan_to_num(3.0), passed=own
    )
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1]) and out.any()
    rows, last = (
        torch.tensor([3, -9, 77, 0]),
        torch.where(passed["block_table"] == 0, -5, passed["block_table"]),
    )
    lies = passed | {
        "cache_batch_idx": rows.int(),
        "seqused_k": torch.tensor([16, 0, 16, 5]).int(),
        "block_table": last,
    }
    lies["leftpad_k"] = torch.zeros(4).int()
    found, _ = attention_by_sequence(attention, PAGED, q[:, :1].expand(4, 3, 4, 8), k, v, passed=lies)
    same = q[:, :1].expand(4, 3, 4, 8)
    for request, row in enumerate((3, 0, 3, 0)):
        n = int(lies["seqused_k"][request])
        alone, _ = attention(same[request : request + 1], own_k[row : row + 1, :n], own_v[row : row + 1, :n])
        assert torch.equal(found[request], alone[0].double())
    assert math.isfinite(float(found.abs().sum()))
