"""The arithmetic of the scheduler against every pair of query and key, one by one."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_plans import lowered

from attngen.expr import evaluate, name, parse_mask, scale, sub
from attngen.plan import Definitions, Scheduler, evaluate_formula
from attngen.simulate import BlockBounds, Sizes, block_bounds, simulate, tiles, visited_blocks
from attngen.simulate.tile_source import TileSource
from attngen.simulate.visits import Member, first_head, walk_of

MASKS = [
    "full",
    "causal",
    "kv_idx > q_pos - 6 and kv_idx <= q_pos + 1",
    "kv_idx == q_idx",
    "kv_idx >= q_pos",
    "false",
]


def full_blocks(bounds: BlockBounds) -> set[int]:
    return set(range(bounds.n_full_begin, bounds.n_full_end))


@pytest.mark.parametrize("schedule", ["fa2", "warp_specialized"])
@pytest.mark.parametrize("mask", MASKS)
def test_bounds_hold_every_visible_pair(schedule: str, mask: str) -> None:
    """Blocks not visited show no pair, full ones every pair; of full and causal the outermost show some.

    Where the program peels the last block off and masks it, that block alone is no longer counted as full.
    """
    tree = parse_mask(mask)
    for block_m, block_n in ((4, 4), (8, 3), (3, 8)):
        fields = {"warpgroups": 1} if schedule == "warp_specialized" else {}
        plan = lowered(schedule, mask, 1, block_m=block_m, block_n=block_n, fields=fields)
        unpeeled = replace(plan, key_blocks=replace(plan.key_blocks, last_is_masked=False))
        for seqlen_q in (1, 4, 9, 13):
            for seqlen_k in (0, 1, 3, 8, 11, 24):
                sizes = Sizes(1, seqlen_q, seqlen_k, 1, 1)
                for m in range(-(-seqlen_q // block_m)):
                    rows = range(m * block_m, min((m + 1) * block_m, seqlen_q))

                    def sees(
                        n: int, rows: range = rows, sizes: Sizes = sizes, block_n: int = block_n
                    ) -> list[bool]:
                        return [
                            j < sizes.seqlen_k
                            and bool(evaluate(tree, {"q_idx": i, "kv_idx": j, **sizes.values}))
                            for i in rows
                            for j in range(n * block_n, (n + 1) * block_n)
                        ]

                    bounds = block_bounds(plan, sizes, [m], first_head(plan, sizes))[0]
                    n_end = -(-seqlen_k // block_n)
                    assert (
                        0 <= bounds.n_min <= bounds.n_full_begin <= bounds.n_full_end <= bounds.n_max <= n_end
                    )
                    every = block_bounds(unpeeled, sizes, [m], first_head(plan, sizes))[0]
                    last = every.n_max - 1 if schedule == "warp_specialized" else every.n_max
                    assert full_blocks(bounds) == full_blocks(every) - {last}
                    assert (bounds.n_min, bounds.n_max) == (every.n_min, every.n_max)
                    for n in range(n_end):
                        visited = bounds.n_min <= n < bounds.n_max
                        assert visited or not any(sees(n))
                        if bounds.n_full_begin <= n < bounds.n_full_end:
                            assert all(sees(n))
                    if bounds.n_max > bounds.n_min and mask in ("full", "causal"):
                        assert any(sees(bounds.n_min)) and any(sees(bounds.n_max - 1))


def test_every_head_and_block_of_rows_has_one_tile() -> None:
    """The tiles of a launch are all (block of rows, batch, head), once, whether stacked or alone."""
    plan = lowered("fa2", "causal", 1, block_m=4)
    sizes = Sizes(2, 9, 9, 6, 2)
    every = sorted((m, b, h, h // 3) for m in range(3) for b in range(2) for h in range(6))
    for lockstep in (1, 5, 64):
        found = [
            (tile.m_block, *member[:3]) for tile in tiles(plan, sizes, lockstep) for member in tile.members
        ]
        assert sorted(found) == every  # type: ignore[type-var]


def test_heads_that_see_other_keys_are_not_stacked() -> None:
    """A mask that asks for the head has its bounds worked out head by head."""
    plan = lowered("fa2", "kv_idx < 4 * h", 1, block_m=4, block_n=4)
    found = {tile.members[0].head: tile.bounds for tile in tiles(plan, Sizes(1, 4, 12, 3, 3))}
    assert [found[h].n_max for h in range(3)] == [0, 1, 2]  # type: ignore[union-attr]
    assert block_bounds(plan, Sizes(1, 4, 12, 3, 3), [0], Member(0, 2, 2, 4, 12))[0].n_max == 2


@pytest.mark.parametrize("schedule", ["serial", "fa2", "warp_specialized"])
@pytest.mark.parametrize("mask", ["kv_idx < 4 * h", "kv_idx % 8 < 4 * h", "kv_idx <= q_idx + 2 * b"])
def test_heads_are_stacked_where_they_take_one_way(schedule: str, mask: str) -> None:
    """Heads of one tile visit the same blocks, alike full or not; heads of two tiles of the same rows do not."""
    fields = {"warpgroups": 1} if schedule == "warp_specialized" else {}
    plan = lowered(schedule, mask, 1, block_m=4, block_n=4, fields=fields)
    sizes = Sizes(3, 9, 12, 6, 2)

    def way(m: int, member: Member) -> Any:
        if plan.key_blocks is None and schedule != "serial":
            return walk_of(plan, sizes, m, member)
        classed = visited_blocks if schedule == "serial" else block_bounds
        return classed(plan, sizes, [m], member)[0]

    ways: Counter[object] = Counter()
    for tile in tiles(plan, sizes):
        rows = range(3) if tile.m_block is None else (tile.m_block,)
        found = {tuple(way(m, member) for m in rows) for member in tile.members}
        assert len(found) == 1
        ways[tile.m_block, found.pop()] += 1
    assert set(ways.values()) == {1}


@pytest.mark.parametrize("resident", [1, 2, 7, 100])
@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_persistent_blocks_draw_every_tile_once(count: int, resident: int) -> None:
    """Blocks that draw in turn, after the tile of their own number, get every tile once and leave the counter 0."""
    plan = lowered("warp_specialized", "full", 2, block_m=2)
    source = TileSource(tiles(plan, Sizes(1, 2 * count, 4, 1, 1)), True, resident)
    assert source.blocks == min(count, resident)
    taken, at_work = [], list(range(source.blocks))
    while at_work:
        number = at_work.pop(0)
        if (tile := source.tile(number)) is not None:
            taken.append(tile.m_block)
            at_work.append(source.draw())
    assert sorted(taken) == list(range(count))  # type: ignore[type-var]
    assert source.counter == 0


@pytest.mark.parametrize("kind", ["query_blocks", "heads"])
def test_a_launch_has_as_many_tiles_as_are_decoded(kind: str) -> None:
    """The grid's formula, which a manifest holds, counts what the decoding's expression counts."""
    plan = lowered("serial" if kind == "heads" else "fa2", "causal", 1, block_m=4)
    assert plan.scheduler.kind == kind
    for sizes in (Sizes(2, 9, 5, 6, 2), Sizes(1, 1, 0, 1, 1), Sizes(0, 4, 4, 2, 2)):
        names = {f"call.{size}": value for size, value in sizes.values.items()} | {"tile.block_m": 4}
        count = evaluate(plan.scheduler.count, names)
        assert count == evaluate_formula(plan.tiles, sizes.values)
        assert count == sum(len(tile.members) for tile in tiles(plan, sizes))


class _Ragged(Scheduler):
    """Sequence b of a batch is shorter by b rows and 3b keys, and begins after b rows and 2b keys."""

    @property
    def decoding(self) -> Definitions:
        q, k = (
            sub(name(f"call.{size}"), scale(by, name("b"))) for size, by in (("seqlen_q", 1), ("seqlen_k", 3))
        )
        starts = {"q_idx.start": name("b"), "kv_idx.start": scale(2, name("b"))}
        return {**super().decoding, "seqlen_q": q, "seqlen_k": k, **starts}


@pytest.mark.parametrize("schedule", ["serial", "fa2", "warp_specialized"])
@pytest.mark.parametrize("mask", ["causal", "kv_idx != q_idx"])
def test_other_lengths_are_but_another_decoding(schedule: str, mask: str) -> None:
    """Lengths and starts that differ by sequence are met wherever rows are read, masked and written."""
    fields = {"warpgroups": 1} if schedule == "warp_specialized" else {}
    plan = lowered(schedule, mask, 1, block_m=4, block_n=4, fields=fields)
    ragged = replace(plan, scheduler=_Ragged(plan.scheduler.kind, persistent=plan.scheduler.persistent))
    batch, dims = 3, (plan.head_dim_qk, plan.head_dim_v)
    make = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, length, 2, dim, generator=make, dtype=torch.float32).to(torch.bfloat16)
        for length, dim in ((10, dims[0]), (13, dims[0]), (13, dims[1]))
    )
    found, lse = simulate(ragged, q, k, v, return_lse=True)
    for b in range(batch):
        rows, keys = slice(b, 10), slice(2 * b, 13 - b)
        alone = (x[b : b + 1, of] for x, of in ((q, rows), (k, keys), (v, keys)))
        expected, expected_lse = simulate(plan, *alone, return_lse=True)
        assert torch.equal(found[b : b + 1, rows], expected)
        assert lse is not None and expected_lse is not None
        assert torch.equal(lse[b : b + 1, :, rows], expected_lse)
        assert found[b, :b].isnan().all()
