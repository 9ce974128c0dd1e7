"""Which tiles a launch has, as the plan's scheduler decodes them, and who works on which."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch

from attngen.plan import Axis, KernelPlan
from attngen.simulate.visits import (
    BlockBounds,
    Member,
    Sizes,
    Visited,
    all_blocks,
    asks_for,
    block_bounds,
    decoded,
    visited_blocks,
    walk_of,
    what_tells_apart,
)

LOCKSTEP = 32
"""Most heads that one simulated block stands for: 16 to 64 are as fast, and what they hold should stay in the cache."""


@dataclass(frozen=True)
class Tile:
    """What a block works on.

    Attributes:
        m_block: block of rows; None where a block does a whole head, or a block of keys.
        bounds: its blocks of keys, where they have a closed form and m_block is not None.
        walk: its blocks of keys, where they have none.
        members: heads that the simulator runs in lockstep, as one block with stacked values, because nothing
            that steers the program differs between them, lengths included. On a GPU each is a block of its own.
        n_block: block of keys, for all heads that share it; `members` are then the first of these. Beside a block of
            rows, for all batches and heads that the elements of a tile of pairs are sums over.
    """

    m_block: int | None
    bounds: BlockBounds | None
    walk: tuple[Visited, ...] | None
    members: tuple[Member, ...]
    n_block: int | None = None

    def of_group(self, place: int) -> Self:
        """The tile for another of the query heads that share its keys."""
        return replace(self, members=tuple(each._replace(head=each.head + place) for each in self.members))

    def of_summed(self, batch: int, place: int, group: int) -> Self:
        """The tile for another batch, and another head, that its elements are sums over."""
        heads = ((each, each.head + place) for each in self.members)
        return replace(
            self,
            members=tuple(
                each._replace(batch=each.batch + batch, head=head, head_kv=head // group)
                for each, head in heads
            ),
        )

    @property
    def visits(self) -> int:
        """Blocks of keys that it visits."""
        if self.bounds is not None:
            return self.bounds.n_max - self.bounds.n_min
        return len(self.walk or ())

    def sequence(self, axis: Axis) -> tuple[int, int]:
        """Where its queries or keys begin among the rows of a tensor, and how many there are."""
        member = self.members[0]
        if axis == "keys":
            return member.k_start, member.seqlen_k
        return member.q_start, member.seqlen_q

    @property
    def seqlen_q(self) -> int:
        """Rows of queries of its sequence."""
        return self.members[0].seqlen_q

    @property
    def seqlen_k(self) -> int:
        """Keys of its sequence."""
        return self.members[0].seqlen_k

    @property
    def starts(self) -> dict[str, int]:
        """Where its queries and keys begin among all tokens, by the names that expressions have for it."""
        return {"q_idx.start": self.members[0].q_start, "kv_idx.start": self.members[0].k_start}

    @cached_property
    def columns(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Batch, head and head_kv of the members: (members,) each, for indexing."""
        batch, head, head_kv = torch.tensor([each[:3] for each in self.members], dtype=torch.int64).unbind(1)
        return batch, head, head_kv

    def __str__(self) -> str:
        batch, head, *_ = self.members[0]
        rows = "" if self.m_block is None else f"m_block {self.m_block}, "
        more = f" and {len(self.members) - 1} more" if len(self.members) > 1 else ""
        return f"{rows}head {head}, batch {batch}{more}"


def tiles(plan: KernelPlan, sizes: Sizes, lockstep: int = LOCKSTEP) -> Iterator[Tile]:
    """The tiles of a launch in the order of its blocks; up to `lockstep` heads that take one way are one."""
    telling = what_tells_apart(plan)
    alike: dict[Any, dict[tuple[int, ...], list[Member]]] = {}
    for m_block, member in decoded(plan, sizes):
        alike.setdefault(m_block, {}).setdefault(telling(member), []).append(member)
    if plan.scheduler.kind in ("key_blocks", "pair_blocks"):
        together = 1 if any(asks_for(plan)) else lockstep
        in_order = sorted(alike.items(), reverse=True) if plan.scheduler.in_turn else alike.items()
        for block, heads in in_order:  # in turn, of every head its later keys before the earlier ones
            m, n = block if isinstance(block, tuple) else (None, block)
            for members in heads.values():
                for i in range(0, len(members), together):
                    yield Tile(m, None, None, tuple(members[i : i + together]), n)
        return
    bounds_of: dict[tuple[int, ...], dict[Any, BlockBounds]] = {}
    for m_block, heads in alike.items():
        takers: dict[Any, list[Member]] = {}
        for told, members in heads.items():
            first, bounds, walk, visited = members[0], None, None, None
            if plan.scheduler.kind == "heads":
                visited = tuple(visited_blocks(plan, sizes, all_blocks(plan, sizes, first), first))
            elif plan.key_blocks is None:
                walk = walk_of(plan, sizes, m_block, first)
            else:
                if told not in bounds_of:
                    bounds_of[told] = dict(
                        zip(alike, block_bounds(plan, sizes, list(alike), first), strict=True)
                    )
                bounds = bounds_of[told][m_block]
            takers.setdefault((first.rows, bounds, walk, visited), []).extend(members)
        for (_, bounds, walk, _), members in takers.items():
            for i in range(0, len(members), lockstep):
                yield Tile(m_block, bounds, walk, tuple(members[i : i + lockstep]))


class TileSource:
    """The tiles of a launch by number, and the counter from which persistent blocks draw.

    Attributes:
        blocks: of threads; each works on the tile of its own number first.
        is_drawn_from: whether blocks draw more tiles, or have one each.
        counter: tiles drawn so far, 0 again after the last draw.
    """

    def __init__(self, tiles: Iterable[Tile], persistent: bool, resident: int) -> None:
        """Take the tiles of a launch; `resident` blocks of a persistent kernel run at a time."""
        self._tiles = tuple(tiles)
        self.is_drawn_from = persistent
        self.blocks = min(resident, len(self._tiles)) if persistent else len(self._tiles)
        self.counter = 0

    def tile(self, number: int) -> Tile | None:
        """A tile, or None beyond the last."""
        return self._tiles[number] if number < len(self._tiles) else None

    def of_block(self, block: int) -> Tile:
        """The first tile of a block."""
        return self._tiles[block]

    def draw(self) -> int:
        """The number of the next tile, or one that no tile has; every block draws until it gets such a one."""
        number = self.blocks + self.counter
        self.counter = (self.counter + 1) % len(self._tiles)
        return number

    @property
    def heads(self) -> int:
        """Tiles as the GPU counts them, one head each."""
        return sum(len(tile.members) for tile in self._tiles)
