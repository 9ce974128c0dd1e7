"""Which tiles a launch has and which blocks of keys each one visits: the arithmetic of the scheduler.

The emitted kernels decode the same tiles on the GPU. `attngen explain` and tests read the bounds from here.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from attngen.expr import Expr, evaluate, free_names
from attngen.plan import KernelPlan, Plan

LOCKSTEP = 64
"""Most heads that one simulated block stands for; bounds its memory."""
SIMULATED_SMS = 2
"""Multiprocessors of the simulated GPU: enough for blocks to draw tiles from one another."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of one call. Heads of Q are a multiple of heads of K and V."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads_q: int
    num_heads_kv: int
    num_sms: int = SIMULATED_SMS

    @property
    def group(self) -> int:
        """Query heads that share a head of K and V."""
        return self.num_heads_q // max(1, self.num_heads_kv)

    @property
    def values(self) -> dict[str, int]:
        """What a formula of the plan may name."""
        return {**self.__dict__, "group": self.group}


class BlockBounds(NamedTuple):
    """Which blocks of keys a block of rows visits.

    n_min .. n_max - 1 are visited, of which n_full_begin .. n_full_end - 1 need no mask.
    """

    n_min: int
    n_full_begin: int
    n_full_end: int
    n_max: int


class Member(NamedTuple):
    """One head of one element of the batch."""

    batch: int
    head: int
    head_kv: int


ANY_HEAD = Member(0, 0, 0)
"""For masks that do not ask for the head."""


@dataclass(frozen=True)
class Tile:
    """What a block works on.

    Attributes:
        m_block: block of rows; None where a block does a whole head.
        bounds: its blocks of keys; None where m_block is.
        members: heads that the simulator runs in lockstep, as one block with stacked values, because nothing
            that steers the program differs between them. On a GPU each is a block of its own.
    """

    m_block: int | None
    bounds: BlockBounds | None
    members: tuple[Member, ...]

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


def ceil_div(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def clamp(x: int, low: int, high: int) -> int:
    """The number between low and high that is nearest to x."""
    return max(low, min(x, high))


def block_bounds(plan: Plan, sizes: Sizes, m_block: int, member: Member = ANY_HEAD) -> BlockBounds:
    """The blocks of keys that block `m_block` of rows visits, and those that it need not mask."""
    block_n, keys = plan.block_n, plan.key_blocks
    if not keys.exact:
        return BlockBounds(0, 0, 0, ceil_div(sizes.seqlen_k, plan.block_n))
    names = {
        "q_first": m_block * plan.block_m,
        "q_last": min((m_block + 1) * plan.block_m, sizes.seqlen_q) - 1,
        "seqlen_q": sizes.seqlen_q,
        "seqlen_k": sizes.seqlen_k,
        "b": member.batch,
        "h": member.head,
        "h_kv": member.head_kv,
    }

    def values(texts: tuple[Expr, ...]) -> tuple[int, ...]:
        return tuple(int(evaluate(text, names)) for text in texts)

    n_max = ceil_div(max(0, min((sizes.seqlen_k, *values(keys.end_any)))), block_n)
    n_min = min(max((0, *values(keys.first_any))) // block_n, n_max)
    n_last = max(n_max - 1, n_min) if keys.last_is_masked else n_max
    n_full_begin = clamp(ceil_div(max((0, *values(keys.first_all))), block_n), n_min, n_last)
    end_full = max(0, min((sizes.seqlen_k, *values(keys.end_all)))) // block_n
    return BlockBounds(n_min, n_full_begin, clamp(end_full, n_full_begin, n_last), n_max)


def tiles(plan: Plan, kernel: KernelPlan, sizes: Sizes, lockstep: int = LOCKSTEP) -> Iterator[Tile]:
    """The tiles of a launch in the order of its blocks, up to `lockstep` heads in one."""
    members = tuple(
        Member(b, h, h // sizes.group) for b in range(sizes.batch) for h in range(sizes.num_heads_q)
    )
    if heads_differ(plan):
        lockstep = 1
    groups = [members[i : i + lockstep] for i in range(0, len(members), lockstep)]
    if kernel.scheduler.kind == "heads":
        yield from (Tile(None, None, group) for group in groups)
        return
    m_blocks = range(ceil_div(sizes.seqlen_q, plan.block_m))
    for m_block in reversed(m_blocks) if kernel.scheduler.longest_first else m_blocks:
        for group in groups:
            yield Tile(m_block, block_bounds(plan, sizes, m_block, group[0]), group)


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


def heads_differ(plan: Plan) -> bool:
    """Whether the blocks of keys that a row visits depend on its head or its place in the batch."""
    keys = plan.key_blocks
    texts = (*keys.first_any, *keys.first_all, *keys.end_any, *keys.end_all)
    return any(free_names(text) & {"b", "h", "h_kv"} for text in texts)
