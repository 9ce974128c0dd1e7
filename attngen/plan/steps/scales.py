"""Steps that bring the scales of 8-bit operands into scores, probabilities and outputs."""

from dataclasses import dataclass

from attngen.plan.places import BlockIndex, Descales, RegTile, RegVec, View
from attngen.plan.steps.step import Step


@dataclass(frozen=True)
class ReadRowScales(Step):
    """dst = the scale of scores, times Q's descale of each row, and times K's where a whole head has one.

    Attributes:
        in_natural_units: the scale is softmax_scale, as modified scores want it, else that in log2 units. Those meet
            scores of -inf, and are never less than FLT_MIN: -inf times it stays -inf.
    """

    dst: RegVec
    q: Descales
    k: Descales | None
    rows: BlockIndex
    in_natural_units: bool

    def __str__(self) -> str:
        scale = "softmax_scale" if self.in_natural_units else "softmax_scale log2(e)"
        return f"{self.dst} = {' '.join(map(str, (scale, self.q, self.k) if self.k else (scale, self.q)))}"


@dataclass(frozen=True)
class StageScales(Step):
    """Leave the descales of a block of keys in shared memory for its consumers, before its stage is said to be full.

    Attributes:
        dst: K's, one for each key or for each of the groups, and behind them V's for each of these.
        groups: of columns in which no other granule of V begins.
    """

    dst: View
    k: Descales
    v: Descales
    groups: int
    block: BlockIndex

    def __str__(self) -> str:
        return f"stage {self.dst} <- {self.k}, {self.v} of block {self.block}"


@dataclass(frozen=True)
class ReadScoreScale(Step):
    """dst = src times K's descale of a block of keys; units as of ReadRowScales."""

    dst: RegVec
    src: RegVec
    staged: View
    in_natural_units: bool

    def __str__(self) -> str:
        return f"{self.dst} = {self.src} times K's in {self.staged}"


@dataclass(frozen=True)
class ScaleKeys(Step):
    """s = s times K's descale of each key of a block."""

    s: RegTile
    staged: View

    def __str__(self) -> str:
        return f"{self.s} = {self.s} times K's of each key in {self.staged}"


@dataclass(frozen=True)
class ReadTopScale(Step):
    """top = V's largest descale of this head."""

    top: RegVec
    v: Descales

    def __str__(self) -> str:
        return f"{self.top} = largest {self.v}"


@dataclass(frozen=True)
class ReadValueWeight(Step):
    """weight = V's descale of a block of keys in relation to the largest, at least 2^-32; P takes it up."""

    weight: RegVec
    top: RegVec
    staged: View

    def __str__(self) -> str:
        return f"{self.weight} = V's in {self.staged} / {self.top}"


@dataclass(frozen=True)
class CopyRows(Step):
    """dst = src, a value per row."""

    dst: RegVec
    src: RegVec

    def __str__(self) -> str:
        return f"{self.dst} = {self.src}"


@dataclass(frozen=True)
class Promote(Step):
    """o = o times a factor per row, plus what the tensor core added up: its own sums keep fewer bits than f32.

    Attributes:
        first_column: of o, where it has more columns than the part.
    """

    o: RegTile
    part: RegTile
    by: RegVec
    first_column: int = 0

    def __str__(self) -> str:
        some = f", columns from {self.first_column} on" if self.first_column else ""
        return f"{self.o} = {self.by} {self.o} + {self.part}{some}"
