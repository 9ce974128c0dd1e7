"""The fused backward of sequences with lengths of their own: each is a dense call, and nothing beside it counts."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import attngen
from attngen.bind import Given, bind, check_arguments
from attngen.plan import GRADIENTS_INTAKE, PADDED_ROWS, FinishSums, PrepareRows, in_f32, padded_start
from attngen.simulate import SimulationFault
from attngen.simulate.launches import run_call
from attngen.simulate.simulated_sheets import finish_sums
from attngen.simulate.tile_lists import call_sizes
from attngen.simulate.visits import Sizes, decoded
from attngen.spec_call import GRADIENTS
from tests.gradients.cut_backward import (
    HEADS,
    HEADS_KV,
    KINDS,
    CutBatch,
    assert_each_is_a_dense_call,
    fused,
    gradients_in_f32,
)
from tests.gradients.sheets_on_cpu import as_registers, run_on_cpu
from tests.gradients.test_backward_programs import plans_without_one
from tests.gradients.test_fused_backward import assert_compiles


def given_to(kernel: attngen.Kernel, of: CutBatch) -> Given:
    """What a backward pass is given, the forward's results included."""
    out, lse = kernel(of.q, of.k, of.v, return_lse=True, **of.named)
    named = {**of.named, "dout": of.dout, "out": out, "lse": lse}
    return check_arguments(kernel.manifest, of.q, of.k, of.v, None, {}, "bshd", named, GRADIENTS_INTAKE)


@pytest.mark.matrix
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("mask", ["full", "causal", "window(100, 30)"])
@pytest.mark.parametrize("kinds", KINDS)
def test_each_sequence_is_a_dense_call(kinds: str, mask: str, head_dim: int, deterministic: bool) -> None:
    """Whatever lies beside it."""
    assert_each_is_a_dense_call(CutBatch(kinds, head_dim), kinds, mask, head_dim, deterministic)


def test_there_may_be_no_sequence() -> None:
    """All tokens are nobody's, and their gradients 0."""
    kernel, none = fused("ragged ragged"), torch.zeros(1, dtype=torch.int32)
    x, y = (torch.full((150, heads, 64), math.nan, dtype=torch.bfloat16) for heads in (HEADS, HEADS_KV))
    found = gradients_in_f32(kernel, x, y, y, x, cu_seqlens_q=none, cu_seqlens_k=none)
    assert not any(gradient.any() for gradient in found)


@pytest.mark.parametrize("kinds", KINDS[:2])
def test_the_same_bits_on_any_number_of_multiprocessors(kinds: str) -> None:
    """With one block at a time, two or three every block comes to its rank."""
    kernel = fused(kinds)
    given, wanted = given_to(kernel, CutBatch(kinds)), tuple(map(in_f32, GRADIENTS))
    made = [run_call(kernel.call, bind(kernel.call.manifest, given, wanted, count)) for count in (1, 2, 3)]
    assert all(torch.equal(each[name], made[0][name]) for each in made for name in wanted)


@pytest.mark.parametrize("starts", [(0, 200, 50, 310), (0, 0, 0, 310), (300, 200, 100, 0)], ids=str)
def test_lengths_that_lie_hold_nobody_up(starts: tuple[int, ...]) -> None:
    """Sequences that overlap share sums and counts: what comes of them is anything, and it comes."""
    kernel, cut = fused("ragged ragged"), torch.tensor(starts, dtype=torch.int32)
    q, k = (torch.randn(310, heads, 64).bfloat16() for heads in (HEADS, HEADS_KV))
    gradients_in_f32(kernel, q, k, k, q, cu_seqlens_q=cut, cu_seqlens_k=cut)


def test_tiles_of_a_head_are_listed_with_its_last_keys_first() -> None:
    """As who waits for its rank counts on; the simulator runs tiles in turn in that order whatever the list says."""
    (plan,), of = fused("ragged ragged").call.gradients, CutBatch("ragged ragged")
    tokens = (len(of.q), len(of.k))
    listed: dict[tuple[int, int], list[int]] = {}
    for block, member in decoded(plan, call_sizes(plan, 300, 300, 4, HEADS, HEADS_KV, of.named, tokens)):
        if member.seqlen_q:
            listed.setdefault((member.batch, member.head), []).append(block)
    assert any(len(blocks) > 1 for blocks in listed.values())
    assert all(blocks == list(range(len(blocks)))[::-1] for blocks in listed.values())


def test_every_zero_over_neighbours_is_needed() -> None:
    """Without those over any of the four tensors, or their fence, a gradient is NaN, or the simulator faults."""
    of, left_out = CutBatch("ragged ragged"), []
    for mask in ("full", "causal"):
        kernel = fused("ragged ragged", mask)
        given, (plan,) = given_to(kernel, of), kernel.call.gradients
        spare = set()
        for missing, shorter in plans_without_one(plan):
            _, _, step = missing.partition("past the end of ")
            if not step or not any(word in step for word in (": zero ", ": fence")):
                continue
            kernels = tuple(shorter if each is plan else each for each in kernel.call.kernels)
            call = replace(kernel.call, kernels=kernels)
            try:
                made = run_call(call, bind(call.manifest, given, GRADIENTS, 2))
            except SimulationFault:
                continue
            if not any(made[name].isnan().any() for name in GRADIENTS):
                spare.add(missing)
        left_out.append(spare)
    assert set.intersection(*left_out) == set()


# ---- what is emitted ------------------------------------------------------------------------------------------------
@pytest.mark.matrix(most=2)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("mask", ["full", "causal", "window(100, 30)"])
@pytest.mark.parametrize("kinds", KINDS[:2])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_kernels_compile_without_spills(
    head_dim: int, kinds: str, mask: str, deterministic: bool, nvdisasm: None
) -> None:
    """What is listed and waited for leaves products in flight; nothing is touched before a kernel has waited."""
    assert_compiles(fused(kinds, mask, head_dim, deterministic=deterministic))


CUTS = ((0, 70, 70, 300), (5, 75, 140), (130, 131, 300), (200,), (0,))
"""Where sequences begin among `TOKENS`, and where the last ends."""
TOKENS = 310


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("starts", CUTS, ids=str)
def test_the_text_that_finishes_sums(starts: tuple[int, ...], head_dim: int, accumulates: bool) -> None:
    """By g++: the rows of every sequence, zeros in those of none, wherever they lie, and nothing behind all tokens."""
    (sheet,) = (
        each
        for each in fused("ragged ragged", head_dim=head_dim).call.kernels
        if isinstance(each, FinishSums)
    )
    batch, heads = len(starts) - 1, 3
    padded = (-(-TOKENS // PADDED_ROWS) + batch) * PADDED_ROWS
    sums = torch.randn(heads, padded, head_dim, generator=torch.Generator().manual_seed(0))
    used = torch.zeros(padded, dtype=torch.bool)
    for b, (first, end) in enumerate(pairwise(starts)):
        at = padded_start(first, b)
        used[at : at + end - first] = True
    sums[:, ~used] = 0.0  # as kernels leave rows that no sequence has
    cut, held = torch.tensor(starts, dtype=torch.int32), torch.ones(TOKENS + 9, heads, head_dim).bfloat16()
    sizes = Sizes(batch, 300, 1, heads, heads, softmax_scale=0.25, accumulates=accumulates, tokens_q=TOKENS)
    expected = finish_sums(sheet, {"dq_sums": sums, "dq": held[:TOKENS], "cu_seqlens_q": cut}, sizes)["dq"]
    made, numbers = held.clone(), {"batch": batch, "tokens_q": TOKENS, "num_heads_q": heads}
    numbers |= {"gradient_scale": 0.25, "accumulates": accumulates}
    values = {"dq_sums": as_registers(sums[None], sheet)[0], "dq": made, "cu_seqlens_q": cut}
    run_on_cpu(sheet, values, numbers)
    assert torch.equal(made[:TOKENS], expected)
    assert torch.equal(made[TOKENS:], held[TOKENS:])


def test_the_text_that_prepares_rows_clears_all_sums() -> None:
    """By g++: every element and every count of every head is 0, those of padding too."""
    kernel = fused("ragged ragged")
    (sheet,) = (each for each in kernel.call.kernels if isinstance(each, PrepareRows))
    sums, ranks = sheet.cleared
    heads, starts = 3, torch.tensor([5, 75, 75, 140], dtype=torch.int32)
    padded = (-(-TOKENS // PADDED_ROWS) + 3) * PADDED_ROWS
    x = torch.ones(TOKENS, heads, 64, dtype=torch.bfloat16)
    values = {"out": x, "dout": x, "lse": torch.zeros(heads, TOKENS), "cu_seqlens_q": starts}
    values |= {each: torch.empty(heads, padded) for each in sheet.writes}
    values |= {sums.name: torch.full((heads, padded, 64), math.nan)}
    counts = heads * padded // ranks.block_m * ranks.owners
    memory = values[ranks.name] = torch.full((counts + 64,), 7, dtype=torch.int32)
    run_on_cpu(sheet, values, {"batch": 3, "tokens_q": TOKENS, "num_heads_q": heads})
    assert (values[sums.name] == 0).all()
    assert not memory[:counts].any() and (memory[counts:] == 7).all()
