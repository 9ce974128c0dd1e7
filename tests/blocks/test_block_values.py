"""Values with given blocks on the simulator: output, lse and gradients of every schedule against fp64, and by bits."""

from dataclasses import replace

import pytest
import torch

import attngen
from tests.blocks.block_cases import DIM, SCHEDULES, BlockCase, are_equal, complaints, lists_of, run

SIZES = {
    "equal to the tile": ((32, 32), (32, 32)),
    "larger": ((64, 96), (32, 32)),
    "smaller": ((16, 16), (32, 32)),
    "across tiles": ((24, 40), (32, 32)),
    "larger than all": ((4096, 4096), (32, 32)),
}
MASKS = ("full", "causal", "window(40, 9)", "kv_idx % 3 != 1 and causal")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sizes", SIZES)
def test_output_and_gradients_are_those_of_the_kept_pairs(sizes: str, schedule: str) -> None:
    """Within the bound of every kernel, whatever the sizes of blocks and tiles, with odd lengths and grouped heads."""
    blocks, tile = SIZES[sizes]
    case = BlockCase(schedule, blocks=blocks, tile=tile)
    assert complaints(case.kernel, case.inputs(), blocks=case.drawn()) == []


@pytest.mark.parametrize("schedule", ["serial", "fa2"])
def test_blocks_may_be_single_pairs(schedule: str) -> None:
    """A map of all pairs: a tile asks for each."""
    case = BlockCase(schedule, blocks=(1, 1), tile=(8, 8), lengths=(19, 14), batch=1, heads=(2, 1))
    assert complaints(case.kernel, case.inputs(), blocks=case.drawn()) == []


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mask", MASKS)
def test_the_mask_still_hides_what_it_hides_in_a_kept_block(mask: str, schedule: str) -> None:
    """Masks that are an interval and masks that are none, in tiles that lie in one block."""
    case = BlockCase(schedule, mask, blocks=(64, 32), lengths=(139, 107), heads=(2, 2))
    assert complaints(case.kernel, case.inputs(), blocks=case.drawn()) == []


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_a_map_of_all_blocks_is_as_good_as_none(mask: str, schedule: str) -> None:
    """Bit by bit, where no tile lies across blocks: the same tiles in the same order, and the same ones masked.

    Up to head_dim 64 a backward pass that walks has fewer rows in a tile than one that does not.
    """
    case = BlockCase(schedule, mask, blocks=(128, 128), lengths=(130, 270), heads=(2, 1), batch=1, dim=72)
    kept = torch.ones(case.map_shape, dtype=torch.bool)
    assert are_equal(run(case.kernel, case.inputs(), blocks=kept), run(case.without_blocks, case.inputs()))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_row_without_blocks_is_0_and_its_lse_is_minus_infinity(schedule: str) -> None:
    """As is every gradient where nothing is kept."""
    case = BlockCase(schedule)
    kept = case.drawn(share=0.9)
    kept[:, :, 1] = False
    out, lse, dq, *_ = run(case.kernel, case.inputs(), blocks=kept)
    rows = slice(32, 64)
    assert not out[:, rows].any() and (lse[:, :, rows] == -torch.inf).all() and not dq[:, rows].any()
    assert lse[:, :, 64:].isfinite().any() and out[:, 64:].any()
    out, lse, *gradients = run(case.kernel, case.inputs(), blocks=torch.zeros_like(kept))
    assert not any(x.any() for x in (out, *gradients)) and (lse == -torch.inf).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_map_for_all_batches_and_heads_is_that_map_repeated(schedule: str) -> None:
    """By sizes of 1 and by strides of 0 alike."""
    case = BlockCase(schedule, shared=(True, True))
    kept, inputs = case.drawn(), case.inputs()
    repeated = kept.expand(case.batch, case.heads[0], -1, -1)
    found = run(case.kernel, inputs, blocks=kept)
    assert are_equal(found, run(case.kernel, inputs, blocks=repeated))
    assert are_equal(found, run(case.kernel, inputs, blocks=repeated.contiguous()))


def test_a_map_may_have_any_strides() -> None:
    """Transposed, and in the middle of another tensor."""
    case = BlockCase()
    kept, inputs = case.drawn(), case.inputs()
    found = run(case.kernel, inputs, blocks=kept)
    transposed = kept.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    around = torch.ones(2, 4, kept.shape[2] + 2, 2 * kept.shape[3], dtype=torch.bool)
    inner = around[:, :, 1:-1, ::2].copy_(kept)
    assert are_equal(found, run(case.kernel, inputs, blocks=transposed))
    assert are_equal(found, run(case.kernel, inputs, blocks=inner))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_no_row_sees_reaches_nobody(schedule: str) -> None:
    """K and V of blocks that are kept in no row may be NaN: they are not loaded, forward or backward."""
    case = BlockCase(schedule, "full", blocks=(128, 128), lengths=(150, 400), heads=(2, 2), batch=1)
    kept = torch.ones(case.map_shape, dtype=torch.bool)
    kept[..., 1] = kept[..., 3] = False
    inputs = case.inputs()
    poisoned = inputs._replace(k=inputs.k.clone(), v=inputs.v.clone())
    for x in (poisoned.k, poisoned.v):
        x[:, 128:256] = x[:, 384:] = torch.nan
    found = run(case.kernel, poisoned, blocks=kept)
    assert all(x.isfinite().all() for x in found)
    assert are_equal(found, run(case.kernel, inputs, blocks=kept))


def test_blocks_go_with_a_score_and_declared_tensors() -> None:
    """Beside a mask that is classed by tables of extremes, by map and by lists."""
    case = BlockCase(
        "warp_specialized",
        "causal and document(doc)",
        more={"tensors": {"doc": "i32[batch, seqlen_k]"}, "score": "softcap(score, 5.0)"},
    )
    doc = (torch.arange(139, dtype=torch.int32) // 50).expand(2, -1)
    kept, inputs = case.drawn(share=0.8), case.inputs()
    assert complaints(case.kernel, inputs, blocks=kept, doc=doc) == []
    found = run(case.kernel, inputs, blocks=lists_of(kept), doc=doc)
    assert are_equal(found, run(case.kernel, inputs, blocks=kept, doc=doc))


def test_blocks_go_with_e4m3() -> None:
    """Whose inputs the call quantises; a map of all is none, and a map with holes keeps to the bound."""
    case = BlockCase(
        "warp_specialized", tile=(64, 64), blocks=(64, 64), dim=64, more={"precision": {"inputs": "e4m3"}}
    )
    kernel, inputs = case.kernel, case.inputs()
    q, k, v, _ = inputs
    kept = case.drawn()
    out, lse = kernel(q, k, v, return_lse=True, blocks=kept)
    accuracy = attngen.check.judging.judge(
        kernel.spec, kernel.plan, out, lse, q, k, v, declared={"blocks": kept}
    )
    assert accuracy.failures == ()
    operands = kernel.quantize(q, k, v)
    assert torch.equal(kernel(operands, blocks=lists_of(kept)), out)
    assert torch.equal(kernel(q, k, v, blocks=torch.ones_like(kept)), case.without_blocks(q, k, v))


@pytest.mark.parametrize("lengths", [(0, 70), (70, 0), (1, 1), (32, 64), (33, 65)])
def test_short_and_empty_sequences(lengths: tuple[int, int]) -> None:
    """A map of no rows, of no columns, of one block."""
    case = BlockCase(lengths=lengths)
    found = run(case.kernel, case.inputs(), blocks=torch.ones(case.map_shape, dtype=torch.bool))
    assert are_equal(found, run(case.without_blocks, case.inputs()))
    listed = lists_of(torch.ones(case.map_shape, dtype=torch.bool))
    assert are_equal(found, run(case.kernel, case.inputs(), blocks=listed))


def test_autograd_takes_maps_and_lists() -> None:
    """What torch differentiates is what `backward` returns."""
    case = BlockCase()
    kernel, (q, k, v, dout), kept = case.kernel, case.inputs(), case.drawn()
    *_, dq, dk, dv = run(kernel, case.inputs(), blocks=kept)
    for blocks in (kept, lists_of(kept)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        kernel(*leaves, blocks=blocks).backward(dout)
        assert are_equal(tuple(x.grad for x in leaves), (dq, dk, dv))


@pytest.mark.parametrize("schedule", ["fa2", "warp_specialized"])
def test_blocks_of_ragged_sequences_are_those_of_each_sequence(schedule: str) -> None:
    """Blocks are counted from where a sequence begins; the map has as many as the longest."""
    case = BlockCase(schedule, blocks=(16, 16), lengths=(70, 70), batch=3)
    kept = case.drawn(share=0.6)
    ragged = attngen.compile(
        {**case.spec, "problem": {"head_dim": DIM, "queries": "ragged", "keys": "ragged"}}
    )
    of_queries, of_keys = torch.tensor([0, 40, 40, 110]), torch.tensor([0, 50, 55, 125])
    tokens = replace(case, batch=1, lengths=(110, 125)).inputs()
    together = tokens._replace(**{name: x[0] for name, x in tokens._asdict().items()})
    found = run(
        ragged,
        together,
        blocks=lists_of(kept),
        cu_seqlens_q=of_queries.int(),
        cu_seqlens_k=of_keys.int(),
        max_seqlen_q=70,
        max_seqlen_k=70,
    )
    for i in (0, 2):
        rows, keys = (slice(*ends[i : i + 2].tolist()) for ends in (of_queries, of_keys))
        alone = tokens._replace(
            q=tokens.q[:, rows], k=tokens.k[:, keys], v=tokens.v[:, keys], dout=tokens.dout[:, rows]
        )
        m, n = (-(-(part.stop - part.start) // 16) for part in (rows, keys))
        out, lse, *gradients = run(case.kernel, alone, blocks=kept[i : i + 1, :, :m, :n])
        assert torch.equal(out[0], found[0][rows]) and torch.equal(lse[0], found[1][:, rows])
        for own, of_all, part in zip(gradients, found[2:], (rows, keys, keys), strict=True):
            assert torch.equal(own[0], of_all[part])
