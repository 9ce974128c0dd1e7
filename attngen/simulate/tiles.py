"""Which tiles a launch has, and who works on which: the arithmetic of the scheduler.

The emitted kernels decode the same tiles on the GPU.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from attngen.plan import KernelPlan, Plan
from attngen.simulate.visits import (
    BlockBounds,
    Member,
    Sizes,
    Visited,
    block_bounds,
    ceil_div,
    heads_differ,
    walk_of,
)

LOCKSTEP = 64
"""Most heads that one simulated block stands for; bounds its memory."""


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
        batch, head, head_kv = torch.tensor(self.members).unbind(1)
        return batch, head, head_kv

    def __str__(self) -> str:
        batch, head, _ = self.members[0]
        rows = "" if self.m_block is None else f"m_block {self.m_block}, "
        more = f" and {len(self.members) - 1} more" if len(self.members) > 1 else ""
        return f"{rows}head {head}, batch {batch}{more}"


def tiles(plan: Plan, kernel: KernelPlan, sizes: Sizes, lockstep: int = LOCKSTEP) -> Iterator[Tile]:
    """The tiles of a launch in the order of its blocks, up to `lockstep` heads in one."""
    members = tuple(
        Member(b, h, h // sizes.group) for b in range(sizes.batch) for h in range(sizes.num_heads_q)
    )
    if heads_differ(plan):
        lockstep = 1
    groups = [members[i : i + lockstep] for i in range(0, len(members), lockstep)]
    if kernel.scheduler.kind == "heads":
        yield from (Tile(None, None, None, group) for group in groups)
        return
    m_blocks = range(ceil_div(sizes.seqlen_q, plan.block_m))
    for m_block in reversed(m_blocks) if kernel.scheduler.longest_first else m_blocks:
        for group in groups:
            bounds = block_bounds(plan, sizes, m_block, group[0]) if plan.key_blocks else None
            walk = None if bounds else walk_of(plan, sizes, m_block, group[0])
            yield Tile(m_block, bounds, walk, group)


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
