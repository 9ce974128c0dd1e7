"""Steps that say what runs and which tile it is of, and how programs are walked and listed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from attngen.plan.places import Axis, BlockIndex, Cursor, Range, Walk
from attngen.plan.steps.step import Program, Step


@dataclass(frozen=True)
class ForTiles(Step):
    """Run the body for every tile that the scheduler gives this block."""

    body: Program

    def __str__(self) -> str:
        return "for each tile of this block:"


@dataclass(frozen=True)
class ForBlocks(Step):
    """Run the body for every block of a range; `index` names the loop's variable."""

    range: Range
    index: Literal["m", "n"]
    body: Program

    def __str__(self) -> str:
        return f"for {self.index} in {self.range} ({self.range.tile_class} tiles):"


Condition = Literal[
    "tile has blocks",
    "scale is negative",
    "m sees n",
    "last warpgroup",
    "first warp",
    "tile is whole",
    "tile is a part",
    "all parts are there",
]
"""Closed set of run-time conditions, uniform over the warps that run a program alike. `m sees n`: the mask lets some
row of block m see some key of block n. `tile is a part`: there are others for the same rows.
`all parts are there`: its `CountPart` has found those of all others counted."""


@dataclass(frozen=True)
class When(Step):
    """Run the body where a uniform condition holds."""

    condition: Condition
    body: Program

    def __str__(self) -> str:
        return f"when {self.condition}:"


@dataclass(frozen=True)
class ForHeads(Step):
    """Run the body for every query head that shares the tile's head of K and V."""

    body: Program

    def __str__(self) -> str:
        return "for each query head of the group:"


@dataclass(frozen=True)
class ForSummed(Step):
    """Run the body for every batch and every head that the elements of a tile of pairs are sums over."""

    body: Program

    def __str__(self) -> str:
        return "for each batch and head that is summed over:"


@dataclass(frozen=True)
class WhenBlock(Step):
    """Run the body where block `block` is not left of `first`, that is, exists."""

    block: BlockIndex
    first: BlockIndex
    body: Program

    def __str__(self) -> str:
        return f"when {self.block} >= {self.first}:"


@dataclass(frozen=True)
class WhenAtEnd(Step):
    """Run the body where a block reaches past the end of the tile's sequence."""

    axis: Axis
    block: BlockIndex
    body: Program

    def __str__(self) -> str:
        return f"when block {self.block} reaches past the end of {self.axis}:"


@dataclass(frozen=True)
class StartWalk(Step):
    """Stand before the first block that the tile visits."""

    walk: Walk

    def __str__(self) -> str:
        return f"start {self.walk}, a walk over the blocks that the mask shows"


@dataclass(frozen=True)
class WhenNext(Step):
    """Go on to the next block of a walk; run the body where there is one."""

    walk: Walk
    body: Program

    def __str__(self) -> str:
        return f"go on with {self.walk}; when there is a next block:"


@dataclass(frozen=True)
class ForVisited(Step):
    """Run the body for every block that a walk still comes to."""

    walk: Walk
    body: Program

    def __str__(self) -> str:
        return f"for each further block of {self.walk}:"


@dataclass(frozen=True)
class WhenVisited(Step):
    """Run the body where a walk has come to some block."""

    walk: Walk
    body: Program

    def __str__(self) -> str:
        return f"when {self.walk} has come to a block:"


@dataclass(frozen=True)
class WhenPartial(Step):
    """Run the body where the mask, or the end of a sequence, hides some pair of the block that a walk stands at."""

    walk: Walk
    body: Program

    def __str__(self) -> str:
        return f"when the block of {self.walk} is partial:"


@dataclass(frozen=True)
class ReadTile(Step):
    """Work out the tile anew, so that nothing of it is kept in registers across the loops before."""

    def __str__(self) -> str:
        return "read the tile again"


@dataclass(frozen=True)
class DrawTile(Step):
    """Draw the number of the next tile from the counter of the launch, and publish it to the consumers."""

    cursor: Cursor

    def __str__(self) -> str:
        return f"draw the next tile, publish it in {self.cursor.name}"


@dataclass(frozen=True)
class TakeTile(Step):
    """Go on to the tile whose number the producer published."""

    cursor: Cursor

    def __str__(self) -> str:
        return f"take the next tile from {self.cursor.name}"


@dataclass(frozen=True)
class Note(Step):
    """A heading for readers; it does nothing."""

    text: str

    def __str__(self) -> str:
        return f"# {self.text}"


_HoldsSteps = (
    ForTiles
    | ForHeads
    | ForSummed
    | ForBlocks
    | ForVisited
    | When
    | WhenAtEnd
    | WhenBlock
    | WhenNext
    | WhenVisited
    | WhenPartial
)


def body_of(step: Step) -> Program:
    """The Steps inside a control Step; nothing for the others."""
    return step.body if isinstance(step, _HoldsSteps) else ()


def walk(program: Program) -> Iterator[Step]:
    """Every Step of a program, outer before inner, in order."""
    for step in program:
        yield step
        yield from walk(body_of(step))


def listing(program: Program, indent: int = 0) -> str:
    """The program as text, one line a Step."""
    lines = []
    for step in program:
        lines.append("  " * indent + str(step))
        if body := body_of(step):
            lines.append(listing(body, indent + 1))
    return "\n".join(lines)
