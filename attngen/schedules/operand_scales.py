"""What 8-bit operands are scaled by, and the Steps that bring it to scores and probabilities."""

from dataclasses import dataclass

from attngen.plan import BlockIndex, Buffer, Cursor, Descales, Program, RegTile, RegVec
from attngen.plan.steps import (
    ReadRowScales,
    ReadScoreScale,
    ReadTopScale,
    ReadValueWeight,
    ScaleKeys,
    StageScales,
)


@dataclass(frozen=True)
class Scales:
    """Descales in device memory and in registers.

    Attributes:
        q, k, v: descales.
        of_rows: of the scores of a row, without what K's descale changes from block to block.
        of_scores: of those of a block; `of_rows` itself where blocks of keys share one descale.
        top: V's largest descale of the head.
        weight: that of a block of V in relation to it; None where blocks share one descale.
        staged: where the producer leaves those of a block, K's and V's, with the stages of K; None likewise.
        groups: of columns of a block in which no other granule of V begins.
        lift: P is 2^lift times what it means, to use the whole range of its format.
    """

    q: Descales
    k: Descales
    v: Descales
    of_rows: RegVec
    of_scores: RegVec
    top: RegVec
    weight: RegVec | None
    staged: Buffer | None
    groups: int
    lift: int

    @property
    def has_key_scales(self) -> bool:
        """Whether each key has a scale; the producer's warp stages them."""
        return self.k.granule == 1

    @property
    def vectors(self) -> tuple[RegVec, ...]:
        """What of it is kept in registers."""
        known = (self.of_rows, self.of_scores, self.top, self.weight)
        return tuple(dict.fromkeys(vector for vector in known if vector))

    def start(self, rows: BlockIndex, in_natural_units: bool) -> Program:
        """What a tile needs to know of scales before its first block."""
        k = self.k if self.k.granule is None else None
        return (
            ReadRowScales(self.of_rows, self.q, k, rows, in_natural_units),
            ReadTopScale(self.top, self.v),
        )

    def stage(self, stage: Cursor, block: BlockIndex) -> Program:
        """What the producer says of the scales of a block; a load by its consumers would hold their GEMMs up."""
        if self.staged is None:
            return ()
        return (StageScales(self.staged.at(stage), self.k, self.v, self.groups, block),)

    def read(self, stage: Cursor, in_natural_units: bool) -> Program:
        """What a block of keys and values needs to know of scales."""
        if self.staged is None or self.weight is None:
            return ()
        staged = self.staged.at(stage)
        of_scores = (ReadScoreScale(self.of_scores, self.of_rows, staged, in_natural_units),)
        return (
            *(() if self.of_scores is self.of_rows else of_scores),
            ReadValueWeight(self.weight, self.top, staged),
        )

    def scale_keys(self, s: RegTile, stage: Cursor) -> Program:
        """What each key's scores are multiplied by, read before its stage is released."""
        if self.staged is None or not self.has_key_scales:
            return ()
        return (ScaleKeys(s, self.staged.at(stage)),)
