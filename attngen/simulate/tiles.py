"""Which tiles a launch has, and who works on which: the arithmetic of the scheduler.

The emitted kernels decode the same tiles on the GPU.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeVar

import torch

from attngen.plan import KernelPlan
from attngen.simulate.visits import (
    BlockBounds,
    Member,
    Sizes,
    Visited,
    block_bounds,
    ceil_div,
    heads_alike,
    visited_blocks,
    walk_of,
)

Way = TypeVar("Way", bound=Hashable)
"""What steers a program on its way through a tile."""

LOCKSTEP = 32
"""Most heads that one simulated block stands for: 16 to 64 are as fast, and what they hold should stay in the cache."""


@dataclass(frozen=True)
class Tile:
    """What a block works on.

    Attributes:
        m_block: block of rows; None where a block does a whole head.
        bounds: its blocks of keys, where they have a closed form and m_block is not None.
        walk: its blocks of keys, where they have none.
        members: heads that the simulator runs in lockstep, as one block with stacked values, because nothing
            that steers the program differs between them. On a GPU each is a block of its own.
    """

    m_block: int | None
    bounds: BlockBounds | None
    walk: tuple[Visited, ...] | None
    members: tuple[Member, ...]

    @property
    def visits(self) -> int:
        """Blocks of keys that it visits."""
        if self.bounds is not None:
            return self.bounds.n_max - self.bounds.n_min
        return len(self.walk or ())

    @cached_property
    def columns(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Batch, head and head_kv of the members: (members,) each, for indexing."""
        batch, head, head_kv = torch.tensor(self.members, dtype=torch.int64).unbind(1)
        return batch, head, head_kv

    def __str__(self) -> str:
        batch, head, _ = self.members[0]
        rows = "" if self.m_block is None else f"m_block {self.m_block}, "
        more = f" and {len(self.members) - 1} more" if len(self.members) > 1 else ""
        return f"{rows}head {head}, batch {batch}{more}"


def tiles(plan: KernelPlan, sizes: Sizes, lockstep: int = LOCKSTEP) -> Iterator[Tile]:
    """The tiles of a launch in the order of its blocks; up to `lockstep` heads that take one way are one."""
    m_blocks = range(ceil_div(sizes.seqlen_q, plan.block_m))
    heads = heads_alike(plan, sizes)
    if plan.scheduler.kind == "heads":

        def visits(member: Member) -> tuple[tuple[int, ...], ...]:
            return tuple(visited_blocks(plan, sizes, m, member) for m in m_blocks)

        for _, members in _stacked(heads, visits, lockstep):
            yield Tile(None, None, None, members)
        return
    for m_block in reversed(m_blocks) if plan.scheduler.longest_first else m_blocks:
        if plan.key_blocks:
            for bounds, members in _stacked(heads, partial(block_bounds, plan, sizes, m_block), lockstep):
                yield Tile(m_block, bounds, None, members)
        else:
            for walk, members in _stacked(heads, partial(walk_of, plan, sizes, m_block), lockstep):
                yield Tile(m_block, None, walk, members)


def _stacked(
    heads: Sequence[Sequence[Member]], way_of: Callable[[Member], Way], lockstep: int
) -> Iterator[tuple[Way, tuple[Member, ...]]]:
    """Heads that take one way, up to `lockstep` together. Those in one of the sequences do so in any case."""
    takers: dict[Way, list[Member]] = {}
    for alike in heads:
        takers.setdefault(way_of(alike[0]), []).extend(alike)
    for way, members in takers.items():
        for i in range(0, len(members), lockstep):
            yield way, tuple(members[i : i + lockstep])


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
