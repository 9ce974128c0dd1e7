"""FLOPs and bytes: counted by running the program, by formula, and by hand."""

import time

import pytest
import torch
from small_plans import KINDS, VARIANTS, Variant, lowered

from attngen.dtypes import BF16
from attngen.simulate import Traffic, closed_form, count, simulate, standard_algorithm

SHAPES = [(1, 1), (9, 17), (17, 9), (16, 32), (40, 40), (23, 5), (5, 0), (0, 5)]


@pytest.mark.matrix
@pytest.mark.parametrize(
    "mask", ["full", "causal", "kv_idx > q_pos - 6 and kv_idx <= q_pos + 1", "kv_idx != q_idx"]
)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_counted_equals_the_formula(variant: Variant, mask: str) -> None:
    """The executed program costs what the formula says, place by place, for every shape."""
    for inputs in ("f32", "bf16"):
        plan = variant.plan(mask, block_n=4, inputs=inputs, head_dim=4, head_dim_v=2)
        for seqlen_q, seqlen_k in SHAPES:
            for return_lse in (False, True):
                sizes = (seqlen_q, seqlen_k, 2, 6, 3)
                expected = closed_form(plan, *sizes, return_lse=return_lse)
                found = count(plan, *sizes, return_lse=return_lse)
                found.read = {name: n for name, n in found.read.items() if n}
                found.written = {name: n for name, n in found.written.items() if n}
                assert found == expected


@pytest.mark.parametrize("mask", ["kv_idx < 5 * h and kv_idx > 3 * b", "kv_idx % 8 <= q_idx * h"])
@pytest.mark.parametrize("schedule", KINDS)
def test_the_formula_knows_heads_that_see_other_keys(schedule: str, mask: str) -> None:
    """Of a mask that asks for the head every head counts for itself."""
    plan = lowered(schedule, mask, 2, block_m=4, block_n=4)
    for seqlen_q, seqlen_k in ((9, 17), (5, 0)):
        found = count(plan, seqlen_q, seqlen_k, 2, 6, 3, return_lse=True)
        expected = closed_form(plan, seqlen_q, seqlen_k, 2, 6, 3, return_lse=True)
        assert (found.flops, found.useful_flops) == (expected.flops, expected.useful_flops)
        assert (found.bytes_read, found.bytes_written) == (expected.bytes_read, expected.bytes_written)


@pytest.mark.parametrize("schedule", KINDS)
def test_counting_equals_simulating(schedule: str) -> None:
    """A run with values counts what a run without them counts."""
    plan = lowered(schedule, "causal", 2, block_m=8, block_n=4, head_dim=4)
    traffic = Traffic()
    q, kv = torch.ones(2, 9, 6, 4), torch.ones(2, 17, 3, 4)
    simulate(plan, q, kv, kv, memory=traffic, return_lse=True)
    assert traffic == count(plan, 9, 17, 2, 6, 3, return_lse=True)


def test_by_hand() -> None:
    """One head, 8 queries, 6 keys, blocks of 4 x 4, bf16, head dim 4: the numbers worked out on paper."""
    plan = lowered("fa2", "full", 1, block_m=4, block_n=4, inputs="bf16", head_dim=4)
    found = count(plan, 8, 6)
    # 2 x 2 blocks, each two products of 2 * 4 * 4 * 4 FLOPs. Of 8 x 8 pairs of rows and keys 8 x 6 exist.
    assert (found.flops, found.useful_flops) == (2 * 2 * 2 * 128, 8 * 6 * 2 * (4 + 4))
    # Q once, K and V for each of the two blocks of queries; 4 columns of 2 bytes.
    assert found.read == {"q": 64, "k": 96, "v": 96} and found.written == {"out": 64}
    assert (found.bytes_read, found.bytes_written, found.bytes_moved) == (256, 64, 320)
    serial = count(lowered("serial", "full", 1, block_m=4, block_n=4, inputs="bf16", head_dim=4), 8, 6)
    # K and V once; Q at each of 2 visits; O in f32 at each visit and at the end.
    assert serial.flops == found.flops
    assert {name: serial.read[name] for name in "qkv"} == {"q": 128, "k": 48, "v": 48}
    assert serial.read["o_acc"] == 3 * 8 * 4 * 4 and serial.written["o_acc"] == 3 * 8 * 4 * 4


def test_standard_algorithm() -> None:
    """S and P go to device memory and come back: 4 * seqlen_q * seqlen_k elements beside Q, K, V and O."""
    traffic = standard_algorithm(BF16, 64, 32, 128, 256, batch=2, heads=3)
    own = 128 * 64 + 256 * 64 + 256 * 32 + 128 * 32
    assert traffic.bytes_moved == 2 * 3 * 2 * (4 * 128 * 256 + own)
    assert traffic.flops == traffic.useful_flops == 2 * 3 * 2 * 128 * 256 * (64 + 32)


@pytest.mark.matrix(most=2)
@pytest.mark.parametrize("schedule", KINDS)
def test_counting_is_fast(schedule: str) -> None:
    """16k queries and keys of many heads are counted in seconds, as `explain` needs."""
    plan = lowered(schedule, "causal", 2, block_m=128, block_n=64, inputs="bf16", head_dim=64)
    start = time.process_time()
    assert count(plan, 16384, 16384, 1, 16).flops == closed_form(plan, 16384, 16384, 1, 16).flops
    assert time.process_time() - start < 20
