"""Given blocks on a GPU: within the rule, lists as their map, all as none, captured, and no NaN of what is not kept."""

from dataclasses import replace

import pytest
import torch

from attngen.arch import arch_for_capability
from tests.blocks.block_cases import BlockCase, are_equal, complaints, lists_of, run
from tests.blocks.test_block_lists import SHAPES, wild_lists

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]


def target() -> str:
    return arch_for_capability(torch.cuda.get_device_capability()).name


def case_of(**changes: object) -> BlockCase:
    """A case for this GPU, tiles left open."""
    plain = BlockCase(
        "auto", blocks=(128, 128), tile=None, lengths=(700, 911), heads=(6, 2), dim=128, target=target()
    )
    return replace(plain, **changes)


CASES = (
    *({"mask": mask, "dim": dim} for mask in ("full", "causal") for dim in (64, 128, 256)),
    *({"blocks": blocks} for blocks in ((64, 64), (96, 96), (100, 72), (256, 384), (32, 32), (4096, 4096))),
    *({"shared": shared} for shared in ((True, False), (False, True), (True, True))),
    *({"lengths": lengths} for lengths in ((1, 1), (128, 1024), (1025, 127), (3000, 200))),
    {"mask": "window(200, 30) or sinks(4)"},
    {"schedule": "fa2"},
    {"schedule": "serial", "dim": 64},
    {"more": {"score": "softcap(score, 5.0)"}},
)


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_output_and_gradients_are_those_of_the_kept_pairs(changes: dict) -> None:
    """As on the simulator, by map; by lists the same bits; and again the same bits."""
    case = case_of(**changes)
    kernel, inputs, kept = case.kernel, case.inputs("cuda"), case.drawn().cuda()
    assert complaints(kernel, inputs, blocks=kept) == []
    found = run(kernel, inputs, blocks=kept)
    assert are_equal(found, run(kernel, inputs, blocks=lists_of(kept)))
    assert are_equal(found, run(kernel, inputs, blocks=kept))


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_a_map_of_all_blocks_is_as_good_as_none(mask: str) -> None:
    """Bit by bit, of one tile."""
    case = case_of(mask=mask, tile=(128, 128), schedule="warp_specialized")
    kept = torch.ones(case.map_shape, dtype=torch.bool, device="cuda")
    inputs = case.inputs("cuda")
    assert are_equal(run(case.kernel, inputs, blocks=kept), run(case.without_blocks, inputs))


def test_what_no_row_sees_reaches_nobody() -> None:
    """K and V of blocks that no row keeps may be NaN."""
    case = case_of(mask="full")
    kept = torch.ones(case.map_shape, dtype=torch.bool, device="cuda")
    kept[..., 1] = kept[..., 4] = False
    inputs = case.inputs("cuda")
    poisoned = inputs._replace(k=inputs.k.clone(), v=inputs.v.clone())
    for x in (poisoned.k, poisoned.v):
        x[:, 128:256] = x[:, 512:640] = torch.nan
    assert are_equal(run(case.kernel, poisoned, blocks=kept), run(case.kernel, inputs, blocks=kept))


@pytest.mark.parametrize("shape", SHAPES)
def test_lists_of_what_is_no_block_reach_nobody(shape: tuple[int, int, int, int]) -> None:
    """The map that the sheet makes of wild lists is the simulator's, by the outputs that it gives."""
    lengths = (shape[2] * 128, shape[3] * 128)
    case = case_of(batch=shape[0], heads=(shape[1], 1), lengths=lengths, mask="full", dim=64)
    counts, indices = wild_lists(shape, seed=1)
    places = torch.arange(shape[3]) < counts[..., None]
    is_block = places & (indices >= 0) & (indices < shape[3])
    kept = torch.zeros(*shape[:3], shape[3] + 1, dtype=torch.bool)
    kept = kept.scatter(-1, indices.where(is_block, shape[3]).long(), True)[..., :-1].cuda()
    inputs = case.inputs("cuda")
    expected = run(case.kernel, inputs, blocks=kept)
    assert are_equal(expected, run(case.kernel, inputs, blocks=(counts.cuda(), indices.cuda())))


def test_a_captured_call_reads_its_map_and_its_lists_anew() -> None:
    """A graph replays with what they hold then."""
    case = case_of()
    kernel, (q, k, v, _) = case.kernel, case.inputs("cuda")
    first, second = case.drawn(seed=1).cuda(), case.drawn(seed=2).cuda()
    for blocks, others in ((first.clone(), second), (lists_of(first), lists_of(second))):
        kernel(q, k, v, blocks=blocks)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = kernel(q, k, v, blocks=blocks)
        for held, now in zip(
            blocks if isinstance(blocks, tuple) else (blocks,),
            others if isinstance(others, tuple) else (others,),
            strict=True,
        ):
            held.copy_(now)
        graph.replay()
        assert torch.equal(out, kernel(q, k, v, blocks=second))
