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

What the rule allows beside multiples of the yardstick's errors, and why, stands in `accuracy_terms.py`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attngen.check.accuracy_terms import Oracle, sum_term
from attngen.check.distances import distance, largest, root_mean_square, where_largest
from attngen.check.problem import Layout
from attngen.check.reference import Roundings, standard_attention
from attngen.errors import ArgumentError
from attngen.expr import Expr
from attngen.torch_state import torch_defaults

MAX_FACTOR = 2.0
RMSE_FACTOR = 1.2
LSE_ABSOLUTE = 1e-4
LSE_RELATIVE = 1e-6
INPUT_FACTOR = 2.0


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
    p_dtype: torch.dtype | None = None,
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
        p_dtype: what P is rounded to; q's dtype where None.

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
    oracle = Oracle(k, v, mask, softmax_scale, rows, score, declared)
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
        p_dtype=p_dtype,
    )
    visible = ref_lse.isfinite()
    by_max, by_rmse = oracle.terms(q, ref, ref_lse, out.dtype, block_n, roundings)
    measured = measure(out, ref, standard, visible, ref_lse.isneginf(), by_max, by_rmse)
    failures = [*measured.failures]
    if inputs is not None:
        ideal, _ = oracle(*(x if layout == "bhsd" else x.transpose(1, 2) for x in inputs))
        input_rmse, allowed_rmse = (
            root_mean_square(distance(x.double(), ideal)[visible]) for x in (out, standard)
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
            sums = sum_term(queries, k, softmax_scale, roundings.score_unit)
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
    error = distance(got.double(), ref).masked_fill_(empty[..., None] & (got != 0), math.inf)
    standard_error = distance(standard.double(), ref).nan_to_num_(posinf=0.0)
    max_error, standard_max = largest(error), largest(standard_error)
    rmse, standard_rmse = root_mean_square(error[visible]), root_mean_square(standard_error[visible])
    max_bound, rmse_bound = MAX_FACTOR * standard_max + by_max, RMSE_FACTOR * standard_rmse + by_rmse
    lines = {"max": max_error <= max_bound, "rmse": rmse <= rmse_bound}
    failures = tuple(name for name, holds in lines.items() if not holds)
    at = where_largest(error) if error.numel() else ()
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


def _check_shapes(out: Tensor, lse: Tensor | None, q: Tensor, v: Tensor, layout: Layout) -> None:
    batch, heads, seqlen_q = (q.shape[i] for i in ((0, 1, 2) if layout == "bhsd" else (0, 2, 1)))
    expected = (*q.shape[:3], v.shape[3])
    if tuple(out.shape) != expected:
        raise ArgumentError("out", tuple(out.shape), expected)
    if lse is not None and tuple(lse.shape) != (batch, heads, seqlen_q):
        raise ArgumentError("lse", tuple(lse.shape), (batch, heads, seqlen_q))


def _worst_lse(lse: Tensor, ref: Tensor, sums: Tensor | float) -> tuple[float, float, tuple[int, ...]]:
    """The error of lse where it is largest in relation to its bound, the bound and the index.

    Args:
        lse: of the call.
        ref: by the reference.
        sums: what lse may err by besides, of the tensor core's own sums.
    """
    if not lse.numel():
        return 0.0, LSE_ABSOLUTE, ()
    difference = distance(lse, ref)
    allowed = LSE_ABSOLUTE + LSE_RELATIVE * ref.abs().masked_fill(~ref.isfinite(), 0.0) + sums
    at = where_largest(difference / allowed)
    return difference[at].item(), allowed[at].item(), at
