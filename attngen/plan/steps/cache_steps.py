"""Steps of a cache in e4m3, which is multiplied as f16: what Q is made for it, and what descales do."""

from dataclasses import dataclass

from attngen.expr import Expr
from attngen.plan.cache_descales import CacheDescales
from attngen.plan.places import BlockIndex, RegTile, RegVec, View
from attngen.plan.steps.step import Step


@dataclass(frozen=True)
class ReadDescale(Step):
    """dst = the descale of the tile's head, in all rows."""

    dst: RegVec
    of: CacheDescales

    def __str__(self) -> str:
        return f"{self.dst} = {self.of} of the head"


@dataclass(frozen=True)
class FitRows(Step):
    """Make the bf16 rows of a tile f16, each times a power of two that brings its largest number to 2^14 or above.

    A power is 2^126 at most. Each warp does so for the rows that it owns of products.

    Attributes:
        scale: divided by the power of each row.
        is_first: nothing has been written to it: 1 is divided.
    """

    tile: View
    scale: RegVec
    is_first: bool

    def __str__(self) -> str:
        before = "1" if self.is_first else str(self.scale)
        return f"{self.tile} as f16, rows times powers of two; {self.scale} = {before} / these"


@dataclass(frozen=True)
class OrderColumns(Step):
    """Bring columns to their places, of an accumulator of products with rows of e4m3.

    Those leave of every 16 columns the even ones first (see `leaves_even_columns_first`).
    """

    o: RegTile

    def __str__(self) -> str:
        return f"{self.o} with its columns in order"


@dataclass(frozen=True)
class LoadDescales(Step):
    """Start copying the descale of each key of a block to shared memory, asynchronously, as `LoadTile` does its rows.

    Keys past the sequence have 0, and so have those that the mask hides from every query.

    Attributes:
        shown: holds for a key that some query may see; None where the mask asks nothing of keys alone.
    """

    dst: View
    src: CacheDescales
    block: BlockIndex
    shown: Expr | None

    def __str__(self) -> str:
        hidden = f", 0 where not {self.shown}" if self.shown else ""
        return f"load {self.dst} <- {self.src} of the keys of block {self.block}{hidden}"


@dataclass(frozen=True)
class ScaleColumns(Step):
    """s = s times the number of each key, over that of each row where there is one: a power of two."""

    s: RegTile
    by: View
    over: RegVec | None = None

    def __str__(self) -> str:
        return f"{self.s} = {self.s} * {self.by} of each key" + (f" / {self.over}" if self.over else "")


SMALLEST_REFERENCE, LARGEST_REFERENCE = 2.0**-126, 2.0**126
"""Powers of two that have a normal number for their inverse."""


@dataclass(frozen=True)
class RaiseReference(Step):
    """Let a reference be no less than the numbers of a block of keys: a power of two, the same in all rows.

    It is 2^-126 at least and 2^126 at most.

    Attributes:
        reference: 0 before the first block.
        factor: what sums under the reference before are multiplied by.
    """

    reference: RegVec
    factor: RegVec
    of: View

    def __str__(self) -> str:
        return f"{self.reference} = a power of two, {self.of} at least; {self.factor} = that before / this"
