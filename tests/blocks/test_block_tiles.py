"""Tiles in given blocks: their classes, how many are visited, what pairs are asked, and which sizes are chosen."""

from dataclasses import replace
from itertools import product

import pytest
import torch

import attngen
from attngen.errors import InternalError
from attngen.expr import (
    blocks_of_tile,
    evaluate,
    kept_block,
    mask_of_pairs,
    most_blocks,
    parse_mask,
    tensor_names,
    tile_classes,
)
from attngen.expr.logic import conjunction
from attngen.lower.block_tiles import fitted_size
from attngen.plan import PADDED_ROWS, KernelPlan, walk
from attngen.plan.assemble import assemble
from attngen.plan.steps import HidePairs, MaskScores, MaskScoresEach, RecoverP
from attngen.simulate import count
from tests.blocks.block_cases import SCHEDULES, BlockCase

LENGTHS = (300, 333)


@pytest.mark.parametrize("tile", [(32, 32), (64, 16), (48, 80), (128, 128), (7, 5)])
@pytest.mark.parametrize("blocks", [(32, 32), (64, 128), (16, 16), (96, 24), (100, 72), (1, 3), (512, 512)])
def test_classes_are_exact_whatever_the_sizes(blocks: tuple[int, int], tile: tuple[int, int]) -> None:
    """A tile may be visible where a pair of it is kept, and must be where all are: no more, no less."""
    mask = kept_block(*blocks)
    classes = tile_classes(mask, block_m=tile[0], block_n=tile[1])
    shape = [-(-length // block) for length, block in zip(LENGTHS, blocks, strict=True)]
    kept = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(1)) < 0.8
    kept[..., : (shape[0] + 1) // 2, : (shape[1] + 1) // 2] = True
    rows, keys = (torch.arange(-(-length // size)) for length, size in zip(LENGTHS, tile, strict=True))
    rows, keys = rows[:, None], keys[None, :]
    env = {"b": 0, "h": 0, "q_idx.first": rows * tile[0], "kv_idx.first": keys * tile[1]}
    env |= {"q_idx.last": (rows * tile[0] + tile[0]).clamp(max=LENGTHS[0]) - 1}
    env |= {"kv_idx.last": (keys * tile[1] + tile[1]).clamp(max=LENGTHS[1]) - 1}
    may, must = (
        torch.as_tensor(evaluate(each, env, {"blocks": kept})) for each in (classes.may, classes.must)
    )
    pairs = {"b": 0, "h": 0, "q_idx": torch.arange(LENGTHS[0])[:, None], "kv_idx": torch.arange(LENGTHS[1])}
    visible = torch.as_tensor(evaluate(mask, pairs, {"blocks": kept}))
    padding = (0, -LENGTHS[1] % tile[1], 0, -LENGTHS[0] % tile[0])
    found = []
    for value in (False, True):
        padded = torch.nn.functional.pad(visible, padding, value=value)
        found.append(padded.unflatten(1, (-1, tile[1])).unflatten(0, (-1, tile[0])))
    assert torch.equal(may, found[0].any(3).any(1)) and torch.equal(must, found[1].all(3).all(1))
    assert may.any() and must.any()


def test_how_many_blocks_a_tile_lies_in() -> None:
    """The most of any tile that begins at a multiple of its size, counted."""
    for tile, block in product(range(1, 40), repeat=2):
        firsts = range(0, tile * block, tile)
        assert most_blocks(tile, block) == max((i + tile - 1) // block - i // block + 1 for i in firsts)


def test_pairs_ask_for_a_block_only_in_tiles_that_lie_across() -> None:
    """In a tile that lies in one block the mask of pairs is the mask without the map, and may have a closed form."""
    causal = parse_mask("causal")
    mask = conjunction((kept_block(128, 128), causal))
    for tile in ((128, 128), (64, 32), (128, 1)):
        assert blocks_of_tile(mask, *tile) == (1, 1) and mask_of_pairs(mask, *tile) is causal
    for tile in ((256, 128), (96, 128), (128, 176)):
        assert mask_of_pairs(mask, *tile) is mask
    assert blocks_of_tile(causal, 64, 64) is None and mask_of_pairs(causal, 64, 64) is causal


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_step_asks_a_pair_what_its_tile_knows(schedule: str) -> None:
    """Forward and backward: of a causal mask rows have bounds, asked in partial tiles; no mask of pairs has a map."""
    call = BlockCase(schedule, blocks=(128, 128)).kernel.call
    asked = [
        step
        for plan in (*call.programs, *call.gradients)
        for step in walk(plan.worker.program)
        if isinstance(step, MaskScores | MaskScoresEach | RecoverP | HidePairs)
    ]
    masks = [step.mask for step in asked if isinstance(step, RecoverP | HidePairs) and step.mask is not None]
    assert any(isinstance(step, MaskScores) for step in asked) and masks
    assert not any(isinstance(step, MaskScoresEach) for step in asked)
    assert not any(tensor_names(mask) for mask in masks)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("blocks", [(32, 32), (64, 96)])
def test_as_many_tiles_are_visited_as_are_kept(blocks: tuple[int, int], schedule: str) -> None:
    """The products and the loads of K and V are those of the kept blocks, counted by running the programs."""
    case = BlockCase(schedule, "full", blocks=blocks, lengths=(192, 192), heads=(2, 2), batch=1)
    kept = case.drawn()
    every = torch.ones_like(kept)
    plan = case.kernel.plan
    found, of_all = (count(plan, 192, 192, 1, 2, declared={"blocks": x}) for x in (kept, every))
    in_tiles = kept.repeat_interleave(blocks[0] // 32, 2).repeat_interleave(blocks[1] // 32, 3)
    assert in_tiles.shape[2:] == (6, 6) and 0 < in_tiles.sum() < in_tiles.numel()
    assert found.flops * in_tiles.numel() == of_all.flops * int(in_tiles.sum())
    if schedule != "serial":  # which keeps a block of keys for all rows of a head
        assert found.read["k"] * in_tiles.numel() == of_all.read["k"] * int(in_tiles.sum())
        assert found.read["v"] * in_tiles.numel() == of_all.read["v"] * int(in_tiles.sum())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_backward_pass_skips_what_is_not_kept(schedule: str) -> None:
    """Each of its kernels multiplies as much as the kept blocks ask for, by rows and by columns of the map."""
    case = BlockCase(schedule, "full", blocks=(128, 128), lengths=(512, 640), heads=(2, 1), batch=1)
    kept = case.drawn()
    for plan in case.kernel.call.gradients:
        found, of_all = (
            count(plan, 512, 640, 1, 2, 1, declared={"blocks": x}) for x in (kept, torch.ones_like(kept))
        )
        assert found.flops * kept.numel() == of_all.flops * int(kept.sum()) > 0


@pytest.mark.parametrize(
    ("size", "step", "block", "expected"),
    [
        (176, 16, 128, 128),
        (128, 64, 128, 128),
        (192, 64, 128, 128),
        (80, 16, 128, 64),
        (192, 64, 64, 64),
        (128, 16, 96, 96),
        (128, 16, 32, 128),
        (80, 16, 32, 64),
        (48, 16, 128, 32),
        (128, 64, 100, 128),
        (128, 16, 4, 32),
        (128, 16, 1000, 128),
        (176, 16, 4096, 128),
    ],
)
def test_which_tile_is_chosen_for_blocks(size: int, step: int, block: int, expected: int) -> None:
    """A wide part of a block, else whole blocks, else what part there is: never larger than what is fast without."""
    assert fitted_size(size, step, block) == expected


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("gradients", [[], ["q", "k", "v"]])
def test_tiles_of_auto_lie_in_one_block_of_128(head_dim: int, gradients: list[str]) -> None:
    """On sm_90a, forward and backward; what the spec says of its tile is kept."""
    spec = {"problem": {"head_dim": head_dim}, "mask": "causal", "gradients": gradients}
    spec |= {"blocks": {"block_m": 128, "block_n": 128}}
    call = attngen.compile(spec, arch="sm_90a").call
    for plan in (*call.programs, *call.gradients):
        assert blocks_of_tile(plan.mask, plan.block_m, plan.block_n) == (1, 1), plan.name
    said = attngen.compile({**spec, "gradients": [], "tile": {"block_n": 48}}, arch="sm_90a").plan
    assert said.block_n == 48


@pytest.mark.parametrize("schedule", ["auto", "fa2"])
@pytest.mark.parametrize("blocks", [(96, 96), (48, 64), (100, 72), (24, 24), (384, 384)])
def test_backward_tiles_of_queries_lie_in_what_is_padded(blocks: tuple[int, int], schedule: str) -> None:
    """D and lse of a head have whole 128 rows: of a block of 96 the third would reach past those of 256."""
    case = BlockCase(schedule, blocks=blocks, tile=None, dim=64, target="sm_90a")
    tiles = {plan.block_m for plan in case.kernel.call.gradients if isinstance(plan, KernelPlan)}
    assert tiles and all(PADDED_ROWS % block_m == 0 for block_m in tiles)


def test_a_plan_that_reads_past_what_is_padded_is_refused() -> None:
    """Whoever chooses tiles."""
    call = BlockCase("auto", blocks=(128, 128), tile=None, dim=64, target="sm_90a").kernel.call
    of_96 = tuple(replace(plan, block_m=96) for plan in call.gradients if isinstance(plan, KernelPlan))
    with pytest.raises(InternalError, match="reads rows in blocks of 96, padded to 128"):
        assemble(call.programs, of_96)
