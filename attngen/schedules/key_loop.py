"""The blocks of keys that a tile visits, from right to left: in ranges of a closed form, or classed one by one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from attngen.expr import IndexRange
from attngen.plan import BlockIndex, Program, Range, Walk
from attngen.plan.steps import (
    ForBlocks,
    ForVisited,
    StartWalk,
    Step,
    When,
    WhenBlock,
    WhenNext,
    WhenPartial,
    WhenVisited,
)

M_BLOCK, N, N_MIN, N_FULL_BEGIN, N_FULL_END, N_MAX = (
    BlockIndex("m_block"),
    BlockIndex("n"),
    BlockIndex("n_min"),
    BlockIndex("n_full_begin"),
    BlockIndex("n_full_end"),
    BlockIndex("n_max"),
)
VISIT, LOAD = Walk("visit"), Walk("load")
Masked = Literal["maybe", "where the walk says so", "no"]
"""Whether the mask, or an end, hides some pairs of a block."""


@dataclass(frozen=True)
class KeyBlock:
    """A block of keys that a loop is at, for a block of rows.

    Attributes:
        rows: the number of the block of rows.
        n: that of the block of keys.
        before: that of the block visited before it, to its right.
        masked: whether the mask hides some of its pairs.
        may_be_last: it may reach past the end of the sequence.
    """

    rows: BlockIndex
    n: BlockIndex
    before: BlockIndex
    masked: Masked
    may_be_last: bool

    def where_masked(self, body: Program) -> Program:
        """Run the body where the mask may hide some of its pairs."""
        if not body or self.masked == "no":
            return ()
        return body if self.masked == "maybe" else (WhenPartial(VISIT, body),)


@dataclass(frozen=True)
class KeyLoop:
    """How a program comes to the blocks of keys of its tile.

    Attributes:
        visible: the keys that a row sees, where they have a closed form; else blocks are classed one by one, in a walk.
    """

    visible: IndexRange | None

    @property
    def walks(self) -> bool:
        """Whether blocks of keys are classed one by one, for want of a closed form."""
        return self.visible is None

    def start(self, *walks: Walk) -> Program:
        """What must be done before the first block is asked for."""
        return tuple(map(StartWalk, walks)) if self.walks else ()

    def when_first(self, body: Program, walk: Walk = VISIT) -> Step:
        """Go to the first block, and run the body if there is one."""
        return WhenNext(walk, body) if self.walks else When("tile has blocks", body)

    def when_any(self, body: Program) -> Step:
        """Run the body if there was a first block."""
        return WhenVisited(VISIT, body) if self.walks else When("tile has blocks", body)

    @property
    def first_block(self) -> KeyBlock:
        """The first block, as a loop would be at it."""
        if self.walks:
            return KeyBlock(M_BLOCK, VISIT.n, VISIT.n, "where the walk says so", True)
        return KeyBlock(M_BLOCK, N_MAX - 1, N_MAX - 1, "maybe", True)

    @property
    def last_block(self) -> BlockIndex:
        """The last block, once all have been visited."""
        return VISIT.n if self.walks else N_MIN

    @property
    def first_to_load(self) -> BlockIndex:
        """The block that is loaded first, where loads walk by themselves."""
        return LOAD.n if self.walks else self.first_block.n

    def when_ahead(self, block: BlockIndex, load: Callable[[BlockIndex], Program]) -> Step:
        """Load a block to the left, if there is one: that number, or where the walk of the loads comes to."""
        return WhenNext(LOAD, load(LOAD.n)) if self.walks else WhenBlock(block, N_MIN, load(block))

    def for_further_blocks(self, body: Callable[[KeyBlock], Program], split: bool = True) -> Program:
        """Run the body for every block after the first, those that need no mask apart if `split`."""
        return self._for_blocks(body, N_MAX - 1) if split else self._unsplit(body, N_MAX - 1)

    def for_all_blocks(self, body: Callable[[KeyBlock], Program], split: bool = True) -> Program:
        """Run the body for every block, those that need no mask apart if `split`."""
        return self._for_blocks(body, N_MAX) if split else self._unsplit(body, N_MAX)

    def _unsplit(self, body: Callable[[KeyBlock], Program], end: BlockIndex) -> Program:
        if self.walks:
            return self._for_blocks(body, end)
        rest = Range("rest", N_MIN, end, descending=True, tile_class="any")
        return (ForBlocks(rest, "n", body(KeyBlock(M_BLOCK, N, N + 1, "no", True))),)

    def _for_blocks(self, body: Callable[[KeyBlock], Program], end: BlockIndex) -> Program:
        """Masked at both ends of what a row sees, unmasked between.

        Keys past the end of the sequence are masked in the last block only, whatever the mask; so without an upper
        bound the right end is empty where `end` leaves that block out.
        """
        if self.visible is None:
            block = KeyBlock(M_BLOCK, VISIT.n, BlockIndex("visit.before"), "where the walk says so", True)
            return (ForVisited(VISIT, body(block)),)
        right = Range("right", N_FULL_END, end, descending=True, tile_class="partial")
        full = Range("full", N_FULL_BEGIN, N_FULL_END, descending=True, tile_class="full")
        left = Range("left", N_MIN, N_FULL_BEGIN, descending=True, tile_class="partial")
        partial, free = (
            KeyBlock(M_BLOCK, N, N + 1, "maybe", True),
            KeyBlock(M_BLOCK, N, N + 1, "no", False),
        )
        has_right = self.visible.upper or end is N_MAX
        return (
            *((ForBlocks(right, "n", body(partial)),) if has_right else ()),
            ForBlocks(full, "n", body(free)),
            *((ForBlocks(left, "n", body(partial)),) if self.visible.lower else ()),
        )
