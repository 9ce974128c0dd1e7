"""Steps between the two matrix products: score, mask, online softmax."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from attngen.expr import Expr, IndexRange, scalar
from attngen.plan.places import BlockIndex, RegTile, RegVec, View
from attngen.plan.steps.step import Step


@dataclass(frozen=True)
class Clear(Step):
    """Fill registers with 0, with -inf, or with the lowest finite number."""

    dst: RegTile | RegVec
    value: Literal["0", "-inf", "lowest"] = "0"

    def __str__(self) -> str:
        return f"{self.dst} = {self.value}"


@dataclass(frozen=True)
class NegateTile(Step):
    """Flip the sign of a tile in shared memory: what a negative softmax_scale asks of Q."""

    tile: View

    def __str__(self) -> str:
        return f"{self.tile} = -{self.tile}"


@dataclass(frozen=True)
class LookUp(Step):
    """Load an element of a tensor for each pair of a block, in the layout of P; memory answers under what follows."""

    dst: RegTile
    rows: BlockIndex
    block: BlockIndex
    lookup: Expr

    def __str__(self) -> str:
        return f"{self.dst} = {self.lookup} of each pair"


@dataclass(frozen=True)
class SeedScores(Step):
    """s = what the spec adds to the scaled product of each pair, over softmax_scale: the score GEMM adds to it.

    Attributes:
        added: in the units of the scaled product; nothing of it is looked up for each key.
    """

    s: RegTile
    rows: BlockIndex
    block: BlockIndex
    added: Expr

    def __str__(self) -> str:
        return f"{self.s} = what is added to the product of each pair, unscaled"


TANH = scalar("tanh of the score", "f32")
"""A name that no spec can declare."""


class ByTanh(NamedTuple):
    """A score that is a function of one tanh of itself.

    Attributes:
        multiple: how many times `score` that tanh takes.
        rest: the score out of `TANH`.
    """

    multiple: Expr
    rest: Expr

    @property
    def is_all(self) -> bool:
        """Whether the score is that tanh itself."""
        return self.rest is TANH


@dataclass(frozen=True)
class ModifyScores(Step):
    """s = the spec's score of each pair, in natural units; its `score` is s scaled by softmax_scale, or by `scale`.

    Attributes:
        looked_up: lookups of the score that a LookUp has put into registers.
        by_tanh: where what tanh takes is near 0 for all of a warp's pairs, it is a polynomial.
    """

    s: RegTile
    rows: BlockIndex
    block: BlockIndex
    score: Expr
    scale: RegVec | None = None
    looked_up: tuple[tuple[Expr, RegTile], ...] = ()
    by_tanh: ByTanh | None = None

    @property
    def is_tanh(self) -> bool:
        """Whether the score is that tanh itself; s then comes out as exponents of 2, its factor worked in."""
        return self.by_tanh is not None and self.by_tanh.is_all

    def __str__(self) -> str:
        return f"{self.s} = score of each pair, from scaled {self.s}"


@dataclass(frozen=True)
class MaskScores(Step):
    """Set the scores of invisible keys to -inf; what a row sees is an interval of keys, known in closed form."""

    s: RegTile
    rows: BlockIndex
    block: BlockIndex
    visible: IndexRange

    def __str__(self) -> str:
        return f"{self.s} = -inf where masked, or past the last key"


@dataclass(frozen=True)
class MaskScoresEach(Step):
    """Set the scores of invisible keys to -inf, asking the mask for each pair of row and key."""

    s: RegTile
    rows: BlockIndex
    block: BlockIndex
    mask: Expr

    def __str__(self) -> str:
        return f"{self.s} = -inf where masked, or past the last key (asked for each)"


@dataclass(frozen=True)
class RowMax(Step):
    """row_max = max(row_max, maxima of s); reference = that in log2 units, rounded up; alpha = 2^(old reference - new).

    A coarse row, of whose maximum rounding would leave an exponent of its own, takes one of two ways. With
    `by_integers`, where a warp votes anyway, its scores become relative to the maximum here, and reference is 0. Else
    its scale becomes a power of two, with which nothing is rounded.

    Attributes:
        row_max: in the units of s, the lowest number while a row has seen no key; with `scale` in log2 units, and -inf.
        reference: what the exponents of this block are taken relative to; with `scale` None, and row_max is that.
        scale: of each row, and group of columns, where operands have scales of their own; a row then has no other way.
        exponent_scale: what a row's scores are to be multiplied by, where that is chosen here.
        coarse: from which maximum on, in log2 units, a row is that; None with `scale`.
        is_scaled: s has been scaled.
        by_integers: positive scores are compared as integers, three by an instruction; the maximum is the same.
    """

    s: RegTile
    row_max: RegVec
    reference: RegVec | None
    alpha: RegVec
    scale: RegVec | None = None
    exponent_scale: RegVec | None = None
    coarse: float | None = None
    is_scaled: bool = False
    by_integers: bool = False

    def __str__(self) -> str:
        return f"{self.row_max}, {self.alpha} = running maximum of {self.s}, rescale factor"


@dataclass(frozen=True)
class Exponentiate(Step):
    """s = 2^(scaled s - reference); row_sum = alpha row_sum + sums of s.

    Attributes:
        reference: of `RowMax`; None where that is `row_max`, or 0 while a row has seen no key.
        row_max, alpha: None where scores are bounded, so that they are exponents as they are.
        scale: of each row, and group of columns, given or chosen by `RowMax`; the call's softmax_scale where None.
        is_scaled: as in `RowMax`.
        lift: s = 2^lift times that, and so are the sums.
        weight: s is multiplied by that as well; the sums are not.
    """

    s: RegTile
    row_sum: RegVec
    reference: RegVec | None = None
    row_max: RegVec | None = None
    alpha: RegVec | None = None
    scale: RegVec | None = None
    is_scaled: bool = False
    lift: int = 0
    weight: RegVec | None = None

    def __str__(self) -> str:
        if self.alpha is None:
            return f"{self.s} = exp2(scaled {self.s}); {self.row_sum} = {self.row_sum} + sums"
        total = f"{self.row_sum} = {self.alpha} {self.row_sum} + sums"
        return f"{self.s} = exp2(scaled {self.s} - {self.reference or self.row_max}); {total}"


@dataclass(frozen=True)
class ConvertP(Step):
    """Round probabilities to the input type, as the A operand of the second GEMM."""

    s: RegTile
    p: RegTile

    def __str__(self) -> str:
        return f"{self.p} = {self.s} rounded to {self.p.dtype.name}"


@dataclass(frozen=True)
class ScaleRows(Step):
    """Multiply every row of an accumulator by its factor.

    Attributes:
        votes: a warp all of whose factors are 1 leaves its rows alone, which changes no value.
    """

    o: RegTile
    by: RegVec
    votes: bool = False

    def __str__(self) -> str:
        return f"{self.o} = {self.o} * {self.by}" + (
            ", unless they are 1 in the whole warp" if self.votes else ""
        )


@dataclass(frozen=True)
class ReduceRows(Step):
    """Add up the parts of a row's sum that its lanes hold."""

    total: RegVec
    part: RegVec

    def __str__(self) -> str:
        return f"{self.total} = {self.part} added over the lanes"


@dataclass(frozen=True)
class FinishRows(Step):
    """inv_sum = top / row_sum, or 0 for a row that saw no key; lse = natural log-sum-exp, or -inf.

    Attributes:
        row_max: None where exponents were taken as they are.
        coarse, is_scaled: as in `RowMax`; of row_max and no scale of operands.
        lift: the sums are 2^lift times what they mean.
        top: what inv_sum is multiplied by; 1 where None.
    """

    row_max: RegVec | None
    row_sum: RegVec
    inv_sum: RegVec
    lse: RegVec
    coarse: float | None = None
    is_scaled: bool = False
    lift: int = 0
    top: RegVec | None = None

    def __str__(self) -> str:
        return f"{self.inv_sum}, {self.lse} = {self.top or 1} / {self.row_sum}, log-sum-exp"


@dataclass(frozen=True)
class ReadSink(Step):
    """dst = the learned sink of this tile's head: a logit in natural units, whatever the format that a call passes."""

    dst: RegVec

    def __str__(self) -> str:
        return f"{self.dst} = sink of this head"


@dataclass(frozen=True)
class JoinSink(Step):
    """The sink joins the sum of each row, without a value: lse = log(exp(lse) + exp(sink)).

    Nothing overflows, whatever the sink; one of -inf changes nothing, and of one of +inf a row gets 0.

    Attributes:
        by: what O is multiplied by; it is multiplied by the keys' share of the new sum.
        lse: of the keys, -inf in a row that saw none; then of keys and sink.
        sink: in natural units, as lse is; not a score, so that softmax_scale, score and mask are nothing to it.
    """

    by: RegVec
    lse: RegVec
    sink: RegVec

    def __str__(self) -> str:
        return f"{self.by}, {self.lse} = those of keys and {self.sink}"
