"""The verdict on calls whose sequences have lengths of their own: each sequence to the rule of a dense call.

An error in a short sequence is so not forgiven for what a long one may lose. Rows that no sequence counts must be
exactly 0, with lse -inf (or the sink), and their gradients 0. The gradient of a sink is the sum over all sequences.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from attngen.check.accuracy import LSE_ABSOLUTE, LSE_RELATIVE, Accuracy, compare
from attngen.check.by_sequence import CutCall
from attngen.check.by_sequence import Sequence as OfCall
from attngen.check.distances import distance, largest
from attngen.check.gradients import (
    GradientAccuracy,
    compare_gradients,
    declared_sums,
    declared_verdict,
)
from attngen.check.paging import as_padded
from attngen.check.problem import LARGEST_SINK, Layout
from attngen.errors import ArgumentError
from attngen.expr import SINK
from attngen.plan import Axis, Lengths

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
OUTSIDE = "outside"
"""The line of the rule about rows that no sequence counts."""


def compare_sequences(
    lengths: Lengths,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    inputs: Inputs,
    passed: Mapping[str, Any],
    layout: Layout = "bshd",
    **about: Any,
) -> Accuracy:
    """Hold an output against the fp64 reference, sequence by sequence.

    Args:
        lengths: how queries and keys are cut.
        out: (batch, seqlen_q, num_heads_q, head_dim_v), or (tokens_q, num_heads_q, head_dim_v) where they are ragged.
        lse: (batch, num_heads_q, seqlen_q), or (num_heads_q, tokens_q); None where the call returned none.
        inputs: q, k and v, as the call took them.
        passed: what it passed by name: lengths, and what is declared.
        layout: "bhsd" exchanges seqlen and heads in tensors that have batches; places are told without that.
        **about: mask, softmax_scale, score and block_n, as of `compare`.

    Returns:
        Numbers and places of the sequence that is nearest to its bound, for each line by itself.

    Raises:
        ArgumentError: out or lse has not the shape that q and v ask for, or sequences overlap.
    """
    lengths, k, v, passed = as_padded(lengths, *inputs[1:], passed)
    out, q, k, v = _in_bshd(layout, out, inputs[0], k, v)
    _check_shapes(lengths, out, lse, q, v)
    call = CutCall.read(lengths, q, k, passed)
    parts = [_outside(call, out, lse, passed)]
    for each in call.sequences:
        own_lse = None if lse is None else call.of_lse(lse, each)
        declared = call.declared(passed, each)
        own = call.rows(out, "queries", each)
        verdict = compare(own, own_lse, *call.inputs(q, k, v, each), declared=declared, **about)
        parts.append(_placed(call, verdict, "queries", each))
    return worst(parts)


def compare_gradients_of_sequences(
    lengths: Lengths,
    gradients: Iterable[torch.Tensor],
    inputs: Inputs,
    dout: torch.Tensor,
    passed: Mapping[str, Any],
    layout: Layout = "bshd",
    *,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    wanted: Sequence[str] = (),
    **about: Any,
) -> GradientAccuracy:
    """Hold dq, dk and dv against the fp64 reference, sequence by sequence; arguments as of `compare_sequences`.

    Gradients of what is wanted besides follow, and are held against the sums over all sequences. out and lse are what
    the backward pass read, dout and dlse the gradients of both; `about` is that of `compare_gradients`.
    """
    q, k, v, dout, out, dq, dk, dv, *of_declared = _in_bshd(layout, *inputs, dout, out, *gradients)
    found = (dq, dk, dv)
    call = CutCall.read(lengths, q, k, passed)
    for name, got, x in zip(("dq", "dk", "dv"), found, (q, k, v), strict=True):
        if got.shape != x.shape:
            raise ArgumentError(name, tuple(got.shape), tuple(x.shape))
    axes: tuple[Axis, ...] = ("queries", "keys", "keys")
    parts = [[_of_outside(call, x, axis)] for x, axis in zip(found, axes, strict=True)]
    sums = []
    for each in call.sequences:
        own: dict[str, Any] = {
            **dict(zip(("q", "k", "v"), call.inputs(q, k, v, each), strict=True)),
            "dout": call.rows(dout, "queries", each),
            "out": call.rows(out, "queries", each),
            "lse": call.of_lse(lse, each),
            "dlse": None if dlse is None else call.of_lse(dlse, each),
            "declared": call.declared(passed, each),
        }
        verdict = compare_gradients(call.inputs(dq, dk, dv, each), **own, **about)
        for into, of_one, axis in zip(parts, (verdict.dq, verdict.dk, verdict.dv), axes, strict=True):
            into.append(_placed(call, of_one, axis, each))
        sums += [declared_sums(wanted, **own, **about)] if wanted else []
    exact, short = [each for each, _ in sums], [each for _, each in sums]
    declared = {
        name: declared_verdict(name, x, exact, short) for name, x in zip(wanted, of_declared, strict=True)
    }
    of_q, of_k, of_v = map(worst, parts)
    return GradientAccuracy(of_q, of_k, of_v, declared)


def worst(parts: Sequence[Accuracy]) -> Accuracy:
    """One verdict out of those on parts: of each line the part nearest to its bound, or furthest beyond it."""

    def nearest(*lines: str, error: str, bound: str) -> Accuracy:
        def by(part: Accuracy) -> tuple[bool, float]:
            is_off = any(line in part.failures for line in lines)
            allowed = getattr(part, bound) or 0.0
            return is_off, (getattr(part, error) or 0.0) / allowed if allowed else 0.0

        return max(parts, key=by)

    of_max = nearest("max", OUTSIDE, error="max_error", bound="max_bound")
    of_rmse = nearest("rmse", error="rmse", bound="rmse_bound")
    of_lse = nearest("lse", error="lse_error", bound="lse_bound")
    failures = tuple(dict.fromkeys(line for part in parts for line in part.failures))
    return replace(
        of_max,
        ok=not failures,
        failures=failures,
        rmse=of_rmse.rmse,
        rmse_bound=of_rmse.rmse_bound,
        standard_rmse=of_rmse.standard_rmse,
        lse_error=of_lse.lse_error,
        lse_bound=of_lse.lse_bound,
        lse_index=of_lse.lse_index,
    )


def _in_bshd(layout: Layout, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows of heads with seqlen before heads; those without batches are so in every layout."""
    return tuple(x.transpose(1, 2) if layout == "bhsd" and x.dim() == 4 else x for x in tensors)


def _check_shapes(
    lengths: Lengths, out: torch.Tensor, lse: torch.Tensor | None, q: torch.Tensor, v: torch.Tensor
) -> None:
    expected = (*q.shape[:-1], v.shape[-1])
    if tuple(out.shape) != expected:
        raise ArgumentError("out", tuple(out.shape), expected)
    of_rows = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    if lse is not None and tuple(lse.shape) != of_rows:
        raise ArgumentError("lse", tuple(lse.shape), of_rows)


def _outside(
    call: CutCall, out: torch.Tensor, lse: torch.Tensor | None, passed: Mapping[str, Any]
) -> Accuracy:
    """The verdict on rows that no sequence counts; their lse is -inf, or the sink of their head."""
    of_out = _of_outside(call, out, "queries")
    if lse is None:
        return of_out
    rows = call.outside(lse.transpose(-1, -2)[..., None], "queries")[..., 0].double()  # (rows, heads)
    sink = passed.get(SINK)
    expected = torch.full_like(rows, -math.inf)
    expected = expected if sink is None else sink.to(rows).clamp(max=LARGEST_SINK).expand_as(rows)
    allowed = LSE_ABSOLUTE + LSE_RELATIVE * expected.abs().masked_fill(expected.isinf(), 0.0)
    error = distance(rows, expected)
    is_wrong = bool((error > allowed).any())
    return replace(
        of_out,
        ok=of_out.ok and not is_wrong,
        failures=(*of_out.failures, *((f"{OUTSIDE} lse",) if is_wrong else ())),
        lse_error=largest(error) if rows.numel() else 0.0,
        lse_bound=LSE_ABSOLUTE,
    )


def _of_outside(call: CutCall, x: torch.Tensor, axis: Axis) -> Accuracy:
    """The verdict on rows of heads that no sequence counts: they are exactly 0."""
    rows = call.outside(x, axis)
    error = largest(rows.double().abs().nan_to_num(nan=torch.inf)) if rows.numel() else 0.0
    failures = (OUTSIDE,) if error else ()
    return Accuracy(not failures, error, 0.0, 0.0, 0.0, 0.0, 0.0, (), error, 0.0, failures)


def _placed(call: CutCall, verdict: Accuracy, axis: Axis, sequence: OfCall) -> Accuracy:
    """The verdict on a sequence, its places those of the whole tensors."""
    first = sequence.rows[axis].start
    batch = () if call.lengths.is_by_token(axis) else (sequence.number,)
    at, lse_at = verdict.worst_index, verdict.lse_index
    return replace(
        verdict,
        worst_index=(*batch, first + at[1], *at[2:]) if at else (),
        lse_index=(*batch, lse_at[1], first + lse_at[2]) if lse_at else (),
    )
