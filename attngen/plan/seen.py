"""Which blocks of keys a block of rows sees, and which blocks of rows see a block of keys, where that is one range.

It is written here once, for either axis: `emit` prints the definitions to CUDA and `simulate` evaluates them. Masks
that are no range are classed block by block (`attngen.expr.tile_classes`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, reduce

from attngen.expr import Boundary, Expr, IndexRange, add, const, extremes, name
from attngen.expr.arithmetic import call, compare, floor_divide, where
from attngen.expr.intervals import greater, lesser
from attngen.plan.scheduler import KEYS, PART_BEGIN, PART_END, Definitions, SequenceAxis


@dataclass(frozen=True)
class SeenBlocks:
    """Which keys a block of rows may and must see, or which rows a block of keys, as bounds over that block.

    A block is visited from `first_any` on and before `end_any`; it needs no mask from `first_all` on and before
    `end_all`. Each tuple holds bounds of which the strictest counts; empty means no bound but 0 and the length.

    Attributes:
        axis: of the blocks that are seen; bounds read the first and the last of a block of the other.
        boundaries: those of which bounds read elements, and masks at the edges; found before the kernel runs.
        last_is_masked: the program peels the last block off and masks it, so it is never counted as free of a mask.
        are_of_part: of them those alone count that are the tile's own part of the keys.
    """

    axis: SequenceAxis = KEYS
    first_any: tuple[Expr, ...] = ()
    first_all: tuple[Expr, ...] = ()
    end_any: tuple[Expr, ...] = ()
    end_all: tuple[Expr, ...] = ()
    last_is_masked: bool = False
    boundaries: tuple[Boundary, ...] = ()
    are_of_part: bool = False

    @property
    def bounds(self) -> tuple[Expr, ...]:
        """All of them."""
        return (*self.first_any, *self.first_all, *self.end_any, *self.end_all)

    def where_known(self, is_known: Callable[[Expr], bool]) -> "SeenBlocks":
        """Bounds that hold whatever the unknown ones are: those bound nothing, and leave no block free of a mask."""
        if all(map(is_known, self.bounds)):
            return self
        first_all = (bound if is_known(bound) else name(self.axis.seqlen) for bound in self.first_all)
        return replace(
            self,
            first_any=tuple(filter(is_known, self.first_any)),
            first_all=tuple(first_all),
            end_any=tuple(filter(is_known, self.end_any)),
            end_all=tuple(bound if is_known(bound) else const(0) for bound in self.end_all),
        )

    def of_whole_blocks(self) -> "SeenBlocks":
        """Bounds that also leave no block free of a mask where the block that sees does not exist as a whole."""
        other = self.axis.other
        is_whole = compare("<=", add(other.first, name(other.block)), name(other.seqlen))
        return replace(self, end_all=(*self.end_all, where(is_whole, name(self.axis.seqlen), const(0))))

    @cached_property
    def definitions(self) -> Definitions:
        """The blocks that are visited, `seen.min` .. `seen.max` - 1, and those that need no mask, `seen.full_begin` ..
        `seen.full_end` - 1, after what defines them; all by the first and last of a block of the other axis.
        """
        axis, zero, seqlen = self.axis, const(0), name(self.axis.seqlen)
        found: dict[str, Expr] = {}

        def define(key: str, value: Expr) -> Expr:
            """A name for the value, unless it is as short as one."""
            if value.op in ("const", "name"):
                return value
            found[f"seen.{key}"] = value
            return name(f"seen.{key}")

        def result(key: str, value: Expr) -> Expr:
            found[f"seen.{key}"] = value
            return value if value.op == "const" else name(f"seen.{key}")

        def first(bounds: tuple[Expr, ...]) -> Expr:
            return reduce(lambda strictest, bound: greater(bound, strictest), bounds, zero)

        def end(bounds: tuple[Expr, ...]) -> Expr:
            return greater(reduce(lambda strictest, bound: lesser(bound, strictest), bounds, seqlen), zero)

        def before(number: Expr) -> Expr:
            """How many blocks lie before a number."""
            return number if number is zero else floor_divide(number, name(axis.block))

        ends, begins = axis.blocks(define("end_any", end(self.end_any))), before(first(self.first_any))
        if self.are_of_part:
            ends, begins = lesser(PART_END, ends), greater(PART_BEGIN, begins)
        blocks = result("max", ends)
        # Never folded to 0: where ptxas knows it, descriptors of wgmma leave their uniform registers (docs/sass.md).
        visited = result("min", call("min", begins, blocks))
        before_last = greater(add(blocks, const(-1)), visited)
        last = define("last", before_last) if self.last_is_masked else blocks
        first_all = define("first_all", lesser(first(self.first_all), seqlen))
        begin = result("full_begin", greater(lesser(axis.blocks(first_all), last), visited))
        end_all = define("end_all", end(self.end_all))
        result("full_end", greater(lesser(before(end_all), last), begin))
        return found


def seen_blocks(
    visible: IndexRange | None,
    axis: SequenceAxis,
    last_is_masked: bool = False,
    are_of_part: bool = False,
) -> SeenBlocks | None:
    """The bounds over a block from those of one row or key: their extremes between its first and its last."""
    if visible is None:
        return None
    block = axis.other
    lower = [extremes(bound, block.index, block.first, block.last) for bound in visible.lower]
    upper = [extremes(bound, block.index, block.first, block.last) for bound in visible.upper]
    return SeenBlocks(
        axis,
        first_any=tuple(lo for lo, _ in lower),
        first_all=tuple(hi for _, hi in lower),
        end_any=tuple(hi for _, hi in upper),
        end_all=tuple(lo for lo, _ in upper),
        last_is_masked=last_is_masked,
        boundaries=visible.boundaries,
        are_of_part=are_of_part,
    )
