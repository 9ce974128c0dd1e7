"""What an output may differ by beside multiples of the yardstick's errors; the rule is that of `accuracy.py`.

Why `term` fades from the RMSE: it is there for chance. An exact algorithm that rounds P against another
maximum draws other rounding errors than the yardstick, and over few rows one of the two may be luckier by
far more than 1.2. Over many rows it may not, and `term`, which is larger than the RMSE at thousands of keys,
would leave the line without a meaning. On 48,000 random small problems (blocks of 1 to 64 keys, deferred and
immediate normalisation, inputs expanded or not) the worst needed half of what it is given, at one row, and
none of 64 rows or more needed any. Rows are told apart by their lse, since those of expanded inputs repeat
one draw.

`term` itself is at least one unit in the last place of the largest |ref|: with few elements the sum with 0.3
may be exact by luck. The (1, 1) problem needs none of this: out is v there, exactly.

f32 inputs round P to nothing shorter, so that the order of f32 sums is all that differs, and the yardstick,
whose matrix product is rounded once, is no bound for a loop over blocks. They are allowed one more term (see
`_order_term`), which grows with the number of blocks.

Of 8-bit operands (`attngen.check.judging`) the reference takes the numbers that they stand for, and the yardstick
rounds P as the kernels do. There the rule has more of:

- chance: a number of e4m3 errs by up to 2^-4 of itself, and by nothing where it meets the format by luck. An element of
  out may then err by 2^-4 * spread, spread^2 = sum of P^2 V^2 over the keys. The largest is added to the first line and
  their RMS to the second, times min(1, CHANCE_ROWS / rows); rows of little spread count for less;
- sums: a tensor core keeps some 14 bits of sums of 8-bit products, relative to the largest of 32 of them, and drops the
  rest of each. The yardstick's products are multiples of score_unit * |q| * |k|, and lse may err by softmax_scale times
  as much, for the row's q and the head's longest k. The simulator's sums are f32, and neither is granted to it;
- the inputs themselves, where they are known: the RMSE of out against fp64 attention on what was quantised is at most
  INPUT_FACTOR times the yardstick's, plus chance.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attngen.check.distances import largest, root_mean_square
from attngen.check.problem import scale_of
from attngen.check.reference import Roundings, attention, attention_chunked
from attngen.expr import Expr
from attngen.expr.arithmetic import times
from attngen.expr.tree import real

CHANCE_ROWS = 4
BLOCK_ROUNDINGS = 4
SUM_BITS = 13
"""After the point, of a tensor core's sums of 8-bit products in relation to the largest."""

NAIVE_SCORES = 2**22
"""Above this many scores (32 MiB of fp64) the reference is computed in chunks."""


def score_unit_of(head_dim: int) -> float:
    """What a tensor core may lose of the product of two rows of e4m3, as a part of |q| * |k|.

    Each of head_dim products loses up to a unit of the last bit that is kept, of either sign; sqrt(head_dim) units are
    1.7 standard deviations of their sum. An H200 lost up to 0.43 of this, where one product was larger than all others.
    """
    return 2.0**-SUM_BITS * math.sqrt(head_dim)


@dataclass(frozen=True)
class Oracle:
    """The fp64 reference of one call, its heads before its rows."""

    k: Tensor
    v: Tensor
    mask: Expr | None
    softmax_scale: float | None
    rows: Sequence[int] | None
    score: Expr | None
    declared: Mapping[str, Any] | None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Out and lse on these tensors; in chunks where the whole score matrix would take much memory."""
        about: dict[str, Any] = {"score": self.score, "declared": self.declared}
        if self.rows is None and q.shape[:3].numel() * k.shape[2] <= NAIVE_SCORES:
            return attention(q, k, v, self.mask, self.softmax_scale, "bhsd", **about)
        return attention_chunked(q, k, v, self.mask, self.softmax_scale, "bhsd", rows=self.rows, **about)

    def spread(self, q: Tensor, lse: Tensor) -> Tensor:
        """The root of the sum of P^2 V^2 over the keys, in the shape of out.

        P^2 is proportional to the weights that twice the scores give.
        """
        scale = scale_of(q, self.softmax_scale)
        if self.score is None:
            squared = replace(self, softmax_scale=2 * scale)
        else:
            squared = replace(self, score=times(real(2.0), self.score))
        of_squares, lse_of_squares = squared(q, self.k, self.v.double().square())
        return (of_squares * (lse_of_squares - 2 * lse).exp()[..., None]).sqrt()

    def terms(
        self,
        q: Tensor,
        ref: Tensor,
        lse: Tensor,
        dtype: torch.dtype,
        block_n: int | None,
        roundings: Roundings | None,
    ) -> tuple[float, float]:
        """What the largest error and the RMSE may be beside their multiples of the yardstick's.

        Args:
            q: as of the call.
            ref: out, by the reference.
            lse: by the reference.
            dtype: of the output.
            block_n: as of `compare`.
            roundings: as of `compare`.
        """
        visible = lse.isfinite()
        term = _rounding_term(ref, dtype)
        different = different_rows(lse[visible])
        by_max, by_rmse = term, term * share_of_chance(different)
        if roundings is not None:
            luck = _luck(self.spread(q, lse)[visible], different, torch.finfo(roundings.p_dtype).eps / 2)
            return by_max + luck[0], by_rmse + luck[1]
        if q.dtype == torch.float32:
            blocks = math.ceil(self.k.shape[2] / block_n) if block_n else 0
            order = _order_term(q, self.k, self.v, self.softmax_scale, blocks)
            return by_max + order, by_rmse + order
        return by_max, by_rmse


def different_rows(lse: Tensor) -> int:
    """How many rows are not the same draw; equal rows differ by 1e-12 at most in fp64."""
    return len(torch.unique(lse.round(decimals=9)))


def share_of_chance(rows: float) -> float:
    """What is left of a term for chance over so many rows."""
    return min(1.0, CHANCE_ROWS / max(1.0, rows))


def _luck(spread: Tensor, different: int, rounding: float) -> tuple[float, float]:
    """What the largest error and the RMSE may be by chance, of visible rows' spread, (rows, head_dim_v).

    Args:
        spread: of the elements of visible rows.
        different: how many of the rows are not the same draw.
        rounding: the largest relative error of P.
    """
    squares = spread[spread.isfinite().all(-1)].square().sum(-1)
    if not squares.numel() or not bool(squares.any()):
        return 0.0, 0.0
    squares = squares / squares.max()
    carrying = float(squares.sum() ** 2 / squares.square().sum())  # rows, were they all of one spread
    share = rounding * share_of_chance(min(different, carrying))
    finite = spread[spread.isfinite()]
    return share * largest(finite), share * root_mean_square(finite)


def _rounding_term(ref: Tensor, dtype: torch.dtype) -> float:
    """2 * max |(ref + 0.3 - 0.3) - ref| in dtype, at least a unit in the last place of the largest |ref|."""
    rounded = ref.to(dtype)
    rounded = rounded[rounded.isfinite()]
    if not rounded.numel():
        return 0.0
    by_sum = 2.0 * largest(((rounded + 0.3 - 0.3) - rounded).abs())
    _, exponent = math.frexp(largest(rounded.abs()))
    return max(by_sum, math.ldexp(torch.finfo(dtype).eps, exponent - 1))


def _order_term(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None, blocks: int) -> float:
    """What f32 may lose in any order: half a unit in the last place of the largest score, times the largest
    v; and as much of v for each time that a block of keys rounds O.

    An error of d in a score moves out by about d * |v|. The largest score is bounded by |softmax_scale| *
    |q| * |k|, some times more than a typical one, which leaves room for the errors of the sums, measured at
    up to 0.05 of this on f32 inputs with blocks of 1 to 128 keys. Where all scores are about 0, the blocks tell:
    `serial` un-normalises O, rescales it, adds to it and normalises it again, all in BLOCK_ROUNDINGS.
    """

    def largest_finite(x: Tensor) -> float:
        return largest(x[x.isfinite()])

    scale = abs(scale_of(q, softmax_scale))
    score = scale * largest_finite(q.norm(dim=-1)) * largest_finite(k.norm(dim=-1))
    return 2.0**-24 * (1.0 + score + BLOCK_ROUNDINGS * blocks) * largest_finite(v.abs())


def sum_term(q: Tensor, k: Tensor, softmax_scale: float | None, unit: float) -> Tensor:
    """What sums of few bits may take from a row's scores: (batch, num_heads_q, rows). Heads stand before rows."""
    scale = abs(scale_of(q, softmax_scale))
    longest = torch.cat((k.norm(dim=-1).nan_to_num(), k.new_zeros(*k.shape[:2], 1)), -1).amax(-1)
    group = q.shape[1] // max(1, k.shape[1])
    lost: Tensor = scale * unit * q.norm(dim=-1).nan_to_num() * longest.repeat_interleave(group, 1)[..., None]
    return lost
