"""How far an output is from the fp64 reference, and how far it may be.

One rule serves the simulator and every kernel: the yardstick is `reference.standard_attention`, the same
mathematics at the same precision without tiles. This module compares; it runs no kernel and prints nothing.

The rule, with `term = 2 * max |(ref + 0.3 - 0.3) - ref|` evaluated in the output dtype:

- max |out - ref| is at most 2 times the yardstick's, plus `term`;
- the RMSE over the rows that see a key is at most 1.2 times the yardstick's, plus `term * min(1, 4 / rows)`,
  where rows counts the different ones among them, over batch and heads;
- |lse - ref| is at most 1e-4 + 1e-6 * |ref| in every row;
- a row that sees no key is exactly 0 with lse = -inf; NaN and inf stand where the reference has them, only
  there.

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

from attngen.check.reference import (
    Layout,
    Roundings,
    attention,
    attention_chunked,
    scale_of,
    standard_attention,
)
from attngen.errors import ArgumentError
from attngen.expr import Expr
from attngen.expr.arithmetic import times
from attngen.expr.tree import real
from attngen.torch_state import torch_defaults

MAX_FACTOR = 2.0
RMSE_FACTOR = 1.2
CHANCE_ROWS = 4
BLOCK_ROUNDINGS = 4
LSE_ABSOLUTE = 1e-4
LSE_RELATIVE = 1e-6
INPUT_FACTOR = 2.0
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
class Accuracy:
    """The verdict on one output.

    Attributes:
        ok: whether every line of the rule holds.
        max_error: largest |out - ref|; inf where one is NaN or inf and the other is not the same, or where a
            row that sees no key is not 0.
        rmse: root of the mean square of out - ref over the rows that see a key.
        max_bound: what max_error may be.
        rmse_bound: what rmse may be.
        standard_max_error: the yardstick's own max_error.
        standard_rmse: the yardstick's own rmse.
        worst_index: index of max_error in out; () where out is empty.
        got: out at worst_index.
        expected: the reference at worst_index.
        failures: the lines of the rule that do not hold, in words.
        lse_error: |lse - ref| where it is largest against its bound; None where no lse was given.
        lse_bound: what it may be there.
        lse_index: where that is in lse: (batch, head, row).
        input_rmse: against attention on the inputs that were quantised; None where there are none.
        input_bound: what it may be.
    """

    ok: bool
    max_error: float
    rmse: float
    max_bound: float
    rmse_bound: float
    standard_max_error: float
    standard_rmse: float
    worst_index: tuple[int, ...]
    got: float
    expected: float
    failures: tuple[str, ...]
    lse_error: float | None = None
    lse_bound: float | None = None
    lse_index: tuple[int, ...] = ()
    input_rmse: float | None = None
    input_bound: float | None = None

    def describe(self) -> str:
        """One line: verdict, errors, bounds, worst index."""
        text = "ok" if self.ok else f"FAILED ({', '.join(self.failures)})"
        text += f": max error {self.max_error:.2e} of {self.max_bound:.2e} allowed"
        if self.worst_index:
            index = ", ".join(map(str, self.worst_index))
            text += f" at ({index}): got {self.got:.6g}, expected {self.expected:.6g}"
        text += f"; rmse {self.rmse:.2e} of {self.rmse_bound:.2e}"
        if self.input_rmse is not None:
            text += f"; rmse against the inputs {self.input_rmse:.2e} of {self.input_bound:.2e}"
        if self.lse_error is not None:
            text += f"; lse {self.lse_error:.2e} of {self.lse_bound:.2e}"
            if "lse" in self.failures:
                text += f" at ({', '.join(map(str, self.lse_index))})"
        return text

    def __str__(self) -> str:
        return self.describe()


@torch_defaults()
def compare(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Expr | None = None,
    softmax_scale: float | None = None,
    layout: Layout = "bshd",
    *,
    rows: Sequence[int] | None = None,
    block_n: int | None = None,
    score: Expr | None = None,
    declared: Mapping[str, Any] | None = None,
    roundings: Roundings | None = None,
    inputs: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Accuracy:
    """Hold an output against the fp64 reference on the same inputs, on the device they are on.

    The reference is chunked where the naive one would take much memory; every row is compared, at any length.

    Args:
        out: (batch, seqlen_q, num_heads_q, head_dim_v), f16, bf16 or f32.
        lse: (batch, num_heads_q, seqlen_q), f32; None where the call returned none.
        q: (batch, seqlen_q, num_heads_q, head_dim_qk), what the kernel read: f16, bf16 or f32.
        k: (batch, seqlen_k, num_heads_kv, head_dim_qk), of q's dtype.
        v: (batch, seqlen_k, num_heads_kv, head_dim_v), of q's dtype.
        mask: the mask the kernel applied; None is the full mask.
        softmax_scale: 1/sqrt(head_dim_qk) where None.
        layout: "bhsd" exchanges the seqlen and heads dimensions of q, k, v and out.
        rows: Compare these queries alone, of every batch and head. For tensors of billions of elements, whose
            reference takes minutes; an error elsewhere then goes unseen.
        block_n: keys in a block of the kernel's loop; with f32 inputs each block is allowed its roundings.
        score: what the kernel made of each scaled product; itself where None.
        declared: what the call passed for the scalars and tensors that mask and score read.
        roundings: of a kernel of 8-bit operands; q, k and v are then what these stand for, f32.
        inputs: what the operands were made of, in the shapes of q, k and v.

    Raises:
        ArgumentError: out or lse has not the shape that q and v ask for.
    """
    _check_shapes(out, lse, q, v, layout)
    out = out.detach()
    if layout == "bshd":
        q, k, v, out = (x.transpose(1, 2) for x in (q, k, v, out))
    if rows is not None:
        index = torch.tensor(list(rows), dtype=torch.int64, device=out.device)
        out = out.index_select(2, index)
        lse = None if lse is None else lse.index_select(2, index)
    oracle = _Oracle(k, v, mask, softmax_scale, rows, score, declared)
    ref, ref_lse = oracle(q, k, v)
    standard, _ = standard_attention(
        q,
        k,
        v,
        mask,
        softmax_scale,
        "bhsd",
        out_dtype=out.dtype,
        rows=rows,
        score=score,
        declared=declared,
        roundings=roundings,
    )
    visible = ref_lse.isfinite()
    by_max, by_rmse = oracle.terms(q, ref, ref_lse, out.dtype, block_n, roundings)
    measured = measure(out, ref, standard, visible, ref_lse.isneginf(), by_max, by_rmse)
    failures = [*measured.failures]
    if inputs is not None:
        ideal, _ = oracle(*(x if layout == "bhsd" else x.transpose(1, 2) for x in inputs))
        input_rmse, allowed_rmse = (
            root_mean_square(_distance(x.double(), ideal)[visible]) for x in (out, standard)
        )
        input_bound = INPUT_FACTOR * allowed_rmse + by_rmse
        failures += [] if input_rmse <= input_bound else ["inputs"]
        measured = replace(measured, input_rmse=input_rmse, input_bound=input_bound)

    if measured.worst_index:
        b, h, row, column = measured.worst_index
        row = row if rows is None else rows[row]
        worst_index = (b, h, row, column) if layout == "bhsd" else (b, row, h, column)
        measured = replace(measured, worst_index=worst_index)

    if lse is not None:
        sums: Tensor | float = 0.0
        if roundings is not None and roundings.score_unit:
            queries = q if rows is None else q.index_select(2, index)
            sums = _sum_term(queries, k, softmax_scale, roundings.score_unit)
        lse_error, lse_bound, lse_index = _worst_lse(lse.detach().double(), ref_lse, sums)
        if lse_index and rows is not None:
            lse_index = (*lse_index[:2], rows[lse_index[2]])
        failures += [] if lse_error <= lse_bound else ["lse"]
        measured = replace(measured, lse_error=lse_error, lse_bound=lse_bound, lse_index=lse_index)
    return replace(measured, ok=not failures, failures=tuple(failures))


def measure(
    got: Tensor, ref: Tensor, standard: Tensor, visible: Tensor, empty: Tensor, by_max: float, by_rmse: float
) -> Accuracy:
    """The first two lines of the rule on rows in the last dimension, of which the empty ones must be exactly 0.

    The RMSE is of visible rows; by_max and by_rmse are allowed beside the multiples of the yardstick's.
    """
    error = _distance(got.double(), ref).masked_fill_(empty[..., None] & (got != 0), math.inf)
    standard_error = _distance(standard.double(), ref).nan_to_num_(posinf=0.0)
    max_error, standard_max = largest(error), largest(standard_error)
    rmse, standard_rmse = root_mean_square(error[visible]), root_mean_square(standard_error[visible])
    max_bound, rmse_bound = MAX_FACTOR * standard_max + by_max, RMSE_FACTOR * standard_rmse + by_rmse
    lines = {"max": max_error <= max_bound, "rmse": rmse <= rmse_bound}
    failures = tuple(name for name, holds in lines.items() if not holds)
    at = _where_largest(error) if error.numel() else ()
    return Accuracy(
        ok=not failures,
        max_error=max_error,
        rmse=rmse,
        max_bound=max_bound,
        rmse_bound=rmse_bound,
        standard_max_error=standard_max,
        standard_rmse=standard_rmse,
        worst_index=at,
        got=got[at].item() if at else math.nan,
        expected=ref[at].item() if at else math.nan,
        failures=failures,
    )


@dataclass(frozen=True)
class _Oracle:
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


def _check_shapes(out: Tensor, lse: Tensor | None, q: Tensor, v: Tensor, layout: Layout) -> None:
    batch, heads, seqlen_q = (q.shape[i] for i in ((0, 1, 2) if layout == "bhsd" else (0, 2, 1)))
    expected = (*q.shape[:3], v.shape[3])
    if tuple(out.shape) != expected:
        raise ArgumentError("out", tuple(out.shape), expected)
    if lse is not None and tuple(lse.shape) != (batch, heads, seqlen_q):
        raise ArgumentError("lse", tuple(lse.shape), (batch, heads, seqlen_q))


def _distance(x: Tensor, ref: Tensor) -> Tensor:
    """|x - ref|, with 0 for the same inf or NaN and inf for NaN or inf against anything else."""
    same = (x == ref) | (x.isnan() & ref.isnan())
    return (x - ref).abs_().nan_to_num_(nan=math.inf, posinf=math.inf).masked_fill_(same, 0.0)


def largest(x: Tensor) -> float:
    """The largest element, 0 where there is none."""
    return float(x.max()) if x.numel() else 0.0


def root_mean_square(x: Tensor) -> float:
    """Over all elements, 0 where there is none."""
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


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


def _worst_lse(lse: Tensor, ref: Tensor, sums: Tensor | float) -> tuple[float, float, tuple[int, ...]]:
    """The error of lse where it is largest in relation to its bound, the bound and the index.

    Args:
        lse: of the call.
        ref: by the reference.
        sums: what lse may err by besides, of the tensor core's own sums.
    """
    if not lse.numel():
        return 0.0, LSE_ABSOLUTE, ()
    difference = _distance(lse, ref)
    allowed = LSE_ABSOLUTE + LSE_RELATIVE * ref.abs().masked_fill(~ref.isfinite(), 0.0) + sums
    at = _where_largest(difference / allowed)
    return difference[at].item(), allowed[at].item(), at


def _where_largest(x: Tensor) -> tuple[int, ...]:
    rest, at = int(x.argmax()), []
    for extent in reversed(x.shape):  # torch.unravel_index would load sympy, which takes a second
        rest, index = divmod(rest, extent)
        at.append(index)
    return tuple(reversed(at))


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


def _sum_term(q: Tensor, k: Tensor, softmax_scale: float | None, unit: float) -> Tensor:
    """What sums of few bits may take from a row's scores: (batch, num_heads_q, rows). Heads stand before rows."""
    scale = abs(scale_of(q, softmax_scale))
    longest = torch.cat((k.norm(dim=-1).nan_to_num(), k.new_zeros(*k.shape[:2], 1)), -1).amax(-1)
    group = q.shape[1] // max(1, k.shape[1])
    lost: Tensor = scale * unit * q.norm(dim=-1).nan_to_num() * longest.repeat_interleave(group, 1)[..., None]
    return lost
