"""Steps of a cache in e4m3, which is multiplied as f16: what Q is made for it, and what descales do."""

from dataclasses import dataclass

from attngen.plan.cache_descales import CacheDescales
from attngen.plan.places import RegTile, RegVec, View
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
