"""Steps of the backward pass: probabilities recomputed, and the gradient of the scores.

Queries may be the rows of a tile or its columns: which they are, its axes say. Their numbers are read from device
memory; or those of rows are in registers, and those of columns in shared memory.
"""

import math
from dataclasses import dataclass

from attngen.errors import InternalError
from attngen.expr import Expr, magnitude, tensor_names
from attngen.plan.places import BlockIndex, RegTile, RegVec, Rows, Tensor, View
from attngen.plan.steps.step import Step

RowNumbers = Rows | RegVec | View
"""A number of each query of a tile."""


def _check_numbers(numbers: RowNumbers, tile: RegTile) -> None:
    """Refuse numbers of queries that lie where a tile of these axes does not look for them.

    Raises:
        InternalError: they are in registers and queries are columns, or in shared memory and queries are rows.
    """
    if isinstance(numbers, RegVec if tile.axes[1] == "queries" else View):
        raise InternalError(f"{numbers} does not lie where {tile} {tile.axes} has its queries")


def _of_block(numbers: RowNumbers, rows: BlockIndex) -> str:
    return f"{numbers}[{rows}]" if isinstance(numbers, Rows) else str(numbers)


@dataclass(frozen=True)
class RecoverP(Step):
    """s = 2^(score in log2 units - lse), 0 for pairs that are hidden or do not exist; p = that rounded; s = s slope.

    A P of 0 stays 0, whatever the slope of a hidden pair, or of a score of -inf, is.
    Source: Dao et al., "FlashAttention", arXiv 2205.14135, Algorithm 4, line 13.

    Attributes:
        s: products of queries and keys.
        p: the A operand of dV; None where nobody wants it.
        lse: log-sum-exp of every query in log2 units, +inf where it sees no key.
        rows, block: of queries and of keys.
        score: out of the scaled product; `slope`, its derivative. Both are None where it is that product.
        mask: which pairs are visible; None where all are, and exist.
    """

    s: RegTile
    p: RegTile | None
    lse: RowNumbers
    rows: BlockIndex
    block: BlockIndex
    score: Expr | None
    slope: Expr | None
    mask: Expr | None

    def __post_init__(self) -> None:
        _check_numbers(self.lse, self.s)

    @property
    def is_steep(self) -> bool:
        """Whether a slope may be no finite number, which times 0 is NaN; a lookup may find any number."""
        slope = self.slope
        return slope is not None and (bool(tensor_names(slope)) or math.isinf(magnitude(slope)))

    def __str__(self) -> str:
        rounded = f"; {self.p} = {self.s} rounded" if self.p else ""
        slope = f"; {self.s} = {self.s} times the score's slope" if self.slope else ""
        masked = "" if self.mask is None else ", 0 where masked"
        lse = _of_block(self.lse, self.rows)
        return f"{self.s} = exp2(scaled {self.s} - {lse}){masked}{rounded}{slope}"


@dataclass(frozen=True)
class HidePairs(Step):
    """s and p are 0 for pairs that are hidden or do not exist, whatever they are there, and for others what they are.

    A Step of its own where blocks that a mask hides nothing of are told apart at run time: two `RecoverP`, of which one
    masks, would take more registers than there are.

    Attributes:
        s: P of each pair, times the derivative of the score.
        p: P, rounded; None where nobody wants it.
        rows, block: of queries and of keys.
        mask: which pairs are visible.
    """

    s: RegTile
    p: RegTile | None
    rows: BlockIndex
    block: BlockIndex
    mask: Expr

    def __str__(self) -> str:
        return f"{self.s}{f', {self.p}' if self.p else ''} = 0 where masked"


@dataclass(frozen=True)
class GradientOfPairs:
    """What the Steps have in common that make s (dp - delta) of every pair of a tile.

    Attributes:
        s: P of each pair times the derivative of the score by that whose gradient it is.
        dp: dO Vᵀ of the pairs.
        delta: of every query the sum over the columns of dO O.
        rows: block of queries.
    """

    s: RegTile
    dp: RegTile
    delta: RowNumbers
    rows: BlockIndex

    def __post_init__(self) -> None:
        _check_numbers(self.delta, self.s)

    @property
    def of_pairs(self) -> str:
        """The gradient, for listings."""
        return f"{self.s} ({self.dp} - {_of_block(self.delta, self.rows)})"


@dataclass(frozen=True)
class ScoreGradient(GradientOfPairs, Step):
    """ds = s (dp - delta), rounded to the input type: the gradient of the products, as an A operand.

    Source: Dao et al., "FlashAttention", arXiv 2205.14135, Algorithm 4, line 20.
    """

    ds: RegTile

    def __str__(self) -> str:
        return f"{self.ds} = {self.of_pairs} rounded"


@dataclass(frozen=True)
class ScaleGradient(Step):
    """Multiply an accumulator by softmax_scale, and by the constant factor of the score: what dS was left without."""

    acc: RegTile

    def __str__(self) -> str:
        return f"{self.acc} = {self.acc} times the scale of gradients"


@dataclass(frozen=True)
class StoreGradient(Step):
    """Write a buffer of f32 to a block of rows in device memory; rows past the sequence are dropped.

    A call that accumulates adds what stands there, and the sum is rounded.

    Attributes:
        src: of a warpgroup its own rows.
        places: one for each format that a call may want; of those that it does not want nothing is read or written.
    """

    src: View
    places: tuple[Tensor, ...]
    block: BlockIndex

    def __str__(self) -> str:
        places = " or ".join(map(str, self.places))
        return f"store {places}[{self.block}] <- {self.src}, or add it where the call accumulates"
