"""The oracles: attention computed plainly in fp64, and the yardstick for what a short number format may lose.

`attention` is the definition written out, with the whole score matrix in memory. `attention_chunked` gives
the same numbers with memory linear in the lengths. `standard_attention` is the same mathematics at the
kernel's precision, which is what `attngen.check.accuracy` measures kernels against. `attention_as_fractions` is for
the tier of inputs on which sums are exact.

All take tensors of one dtype and legal shapes, (batch, seqlen, heads, head_dim) unless layout="bhsd",
on any device and with any strides, and read the mask through `expr.evaluate`, with index tensors that
broadcast. A key that a row does not see contributes nothing to it, whatever its K and V hold. Sizes of 0 are
legal.

A learned sink, `declared["sink"]` of (num_heads_q), is one more score of each row of its head: a logit in natural units
that no mask, score or scale touches, and whose value is 0.

This module shares no code with the simulator or the kernels, checks no arguments and is not tuned for speed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attngen.check.problem import Layout, Problem
from attngen.expr import Expr, magnitude
from attngen.scaling import SMALLEST_SCALE, needs_no_maximum
from attngen.torch_state import torch_defaults

STANDARD_SCORES = 2**24
"""Scores that `standard_attention` holds at once: 64 MiB of f32."""


@dataclass(frozen=True)
class Roundings:
    """Where a kernel of 8-bit operands rounds, for `standard_attention` to do the same.

    Attributes:
        p_dtype: the format of P.
        lift: P is 2^lift times what it means when it is rounded; what passes the format's largest number becomes it.
        value_weight: (batch, num_heads_kv, seqlen_k), f32, positive: P takes it before it is rounded, V gives it up.
        score_unit: a product of rows q and k is a multiple of score_unit * |q| * |k|; f32 where 0.
    """

    p_dtype: torch.dtype
    lift: int
    value_weight: Tensor
    score_unit: float = 0.0

    def products(self, queries: Tensor, keys: Tensor) -> Tensor:
        """queries times keys transposed, f32, as the kernel has it."""
        exact = queries @ keys.mT
        if not self.score_unit:
            return exact
        unit = self.score_unit * queries.norm(dim=-1)[:, None] * keys.norm(dim=-1)
        return torch.where(unit > 0, (exact / unit).round() * unit, exact)

    def weighted_sum(self, p: Tensor, values: Tensor, b: int, h_kv: int) -> Tensor:
        """P V of one head, P rounded."""
        weight = self.value_weight[b, h_kv]
        largest = torch.finfo(self.p_dtype).max
        lifted = (p * weight * 2.0**self.lift).clamp(max=largest)
        return weighted_sum(lifted.to(self.p_dtype).float(), values / weight[:, None]) * 2.0**-self.lift


@torch_defaults()
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Expr | None = None,
    softmax_scale: float | None = None,
    layout: Layout = "bshd",
    *,
    score: Expr | None = None,
    declared: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute softmax(softmax_scale * Q K^T, modified and masked) V in fp64, naively.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim_qk), any floating dtype.
        k: (batch, seqlen_k, num_heads_kv, head_dim_qk); head h of q reads head h // (num_heads_q //
            num_heads_kv).
        v: (batch, seqlen_k, num_heads_kv, head_dim_v).
        mask: true where the query sees the key; None is the full mask.
        softmax_scale: any finite number, zero and negative included; 1/sqrt(head_dim_qk) where None.
        layout: "bhsd" exchanges the seqlen and heads dimensions of q, k, v and out.
        score: what becomes of each scaled product, its `score`, before the mask; itself where None.
        declared: a value for each scalar and tensor that mask and score read, by name, and for a sink; `b` besides,
            where the tensors are one sequence of a call and that is its number there (`attngen.check.by_sequence`).

    Returns:
        out: (batch, seqlen_q, num_heads_q, head_dim_v), fp64; 0 in a row that sees no key, NaN in a row that
            sees a score of +inf or NaN.
        lse: (batch, num_heads_q, seqlen_q), fp64, natural logarithm; -inf, or the sink, and NaN for these rows.
    """
    problem = Problem.read(q, k, v, mask, softmax_scale, layout, None, score, declared)
    queries = problem.q.double()  # (batch, num_heads_q, seqlen_q, head_dim_qk)
    keys = problem.k.double().repeat_interleave(problem.group, dim=1)  # one for every head of q
    values = problem.v.double().repeat_interleave(problem.group, dim=1)
    every = problem.every_index()
    scores = problem.softmax_scale * (queries @ keys.mT)  # (batch, num_heads_q, seqlen_q, seqlen_k)
    scores = problem.modified(scores, *every).masked_fill(~problem.sees(*every), -math.inf)
    if problem.sink is not None:
        scores = torch.cat((scores, problem.sink.view(-1, 1, 1).expand(*scores.shape[:-1], 1)), dim=-1)
        values = pad(values, (0, 0, 0, 1))
    lse = scores.logsumexp(dim=-1)
    p = (scores - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp()
    # Their sum is 1, unless scores are so large that adding the logarithm of a sum changes nothing.
    total = p.sum(dim=-1, keepdim=True)
    out = torch.where(total == 0, 0.0, weighted_sum(p, values) / total)
    return problem.finish(out, lse)


@torch_defaults()
def attention_as_fractions(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Expr | None = None,
    layout: Layout = "bshd",
    declared: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention on `inputs` of kind "integers" with softmax_scale = log 2, without any rounding.

    Each weight is 2^(q.k), a power of two, so that out is a quotient of two sums that are exact in fp64. The
    same sums are exact in a kernel's f32: its out is numerator / denominator but for one division and the
    rounding to the output dtype, hence within one unit in the last place of it, and equal where the
    denominator is a power of two. `declared` has a value for each scalar and tensor that the mask reads, and for a
    sink, whose weight, of e, is rounded to fp64.

    Returns:
        numerator: (batch, seqlen_q, num_heads_q, head_dim_v), fp64; layout as in `attention`.
        denominator: (batch, seqlen_q, num_heads_q, 1), fp64; 0 in a row that sees no key.
    """
    problem = Problem.read(q, k, v, mask, None, layout, None, None, declared)
    keys, values = (x.double().repeat_interleave(problem.group, dim=1) for x in (problem.k, problem.v))
    weight = (problem.q.double() @ keys.mT).exp2()
    weight = weight.masked_fill(~problem.sees(*problem.every_index()), 0.0)
    total = weight.sum(dim=-1, keepdim=True)
    if problem.sink is not None:
        total = total + problem.sink.exp().view(-1, 1, 1)
    sums = (weight @ values, total)
    numerator, denominator = (x if layout == "bhsd" else x.transpose(1, 2) for x in sums)
    return numerator, denominator


@torch_defaults()
def attention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Expr | None = None,
    softmax_scale: float | None = None,
    layout: Layout = "bshd",
    *,
    chunk: int = 2048,
    rows: Sequence[int] | None = None,
    score: Expr | None = None,
    declared: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the same as `attention`, exactly, with memory linear in the lengths.

    One head at a time, the queries are split in chunks and, for each, the keys too; a chunk of keys leaves
    its maximum, its sum of exponentials and its weighted sum of values, which are rescaled as the next one
    is met. Beside out and lse, nothing larger than chunk * max(chunk, head_dim) elements is made.

    Args:
        q: As in `attention`.
        k: As in `attention`.
        v: As in `attention`.
        mask: As in `attention`.
        softmax_scale: As in `attention`.
        layout: As in `attention`.
        chunk: Queries and keys in one piece of the score matrix.
        rows: The queries to compute, ascending or not; out and lse then have len(rows) in place of seqlen_q.
            For inputs so long that even one pass in fp64 takes minutes.
        score: As in `attention`.
        declared: As in `attention`.

    Source: Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory", sections 2 and 3, in fp64.
    """
    problem = Problem.read(q, k, v, mask, softmax_scale, layout, rows, score, declared)
    out, lse = problem.empty_outputs(torch.float64, torch.float64)
    for b, h, here in problem.query_chunks(chunk):
        queries = problem.q[b, h, here].double()  # (chunk, head_dim_qk)
        q_idx = problem.rows[here][:, None]
        row_max = queries.new_full((queries.shape[0], 1), -math.inf)
        if problem.sink is not None:
            row_max = problem.sink[h].expand_as(row_max)
        row_sum = torch.zeros_like(row_max).masked_fill_(~row_max.isneginf(), 1.0)
        acc_o = queries.new_zeros(queries.shape[0], out.shape[-1])
        for start in range(0, problem.seqlen_k, chunk):
            at = slice(start, min(start + chunk, problem.seqlen_k))
            kv_idx = torch.arange(at.start, at.stop, device=q.device)[None, :]
            keys, values = (x[b, h // problem.group, at].double() for x in (problem.k, problem.v))
            scores = problem.softmax_scale * (queries @ keys.mT)  # (chunk, chunk)
            scores = problem.modified(scores, b, h, q_idx, kv_idx)
            scores = scores.masked_fill(~problem.sees(b, h, q_idx, kv_idx), -math.inf)
            new_max = torch.maximum(row_max, scores.amax(dim=-1, keepdim=True))
            origin = new_max.masked_fill(new_max.isneginf(), 0.0)
            alpha = (row_max - origin).exp()
            p = scores.sub_(origin).exp_()
            row_sum = alpha * row_sum + p.sum(dim=-1, keepdim=True)
            acc_o = torch.where(alpha == 0, 0.0, alpha * acc_o) + weighted_sum(p, values)
            row_max = new_max
        out[b, h, here] = torch.where(row_sum == 0, 0.0, acc_o / row_sum)
        lse[b, h, here] = (row_max + row_sum.log())[:, 0]
    return problem.finish(out, lse)


@torch_defaults()
def standard_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Expr | None = None,
    softmax_scale: float | None = None,
    layout: Layout = "bshd",
    *,
    out_dtype: torch.dtype | None = None,
    rows: Sequence[int] | None = None,
    score: Expr | None = None,
    declared: Mapping[str, Any] | None = None,
    roundings: Roundings | None = None,
    p_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the same mathematics at a kernel's precision: the yardstick of `attngen.check.accuracy`.

    S in f32; P = exp(S - row_max) rounded to the input dtype before it is normalised, or exp(S) where the score is
    bounded (`scaling.needs_no_maximum`); P V in f32 and divided by the f32 sum of the P that was not rounded; the
    quotient rounded to out_dtype. A flash kernel rounds at these same places: its P is relative to the
    maximum so far, which is why P is rounded unnormalised here (a normalised P of f16 falls among the subnormals at
    16k keys, and the yardstick would forgive too much). What the kernel does besides, rescaling and another order
    of sums, is f32.

    Exponents are in log2 units, as in the kernels, so that weights which are powers of two are exact
    (see `attngen.check.inputs.EXACT_SCALE`). On CUDA, f32 inputs want torch's TF32 off, as it is by default.

    Args:
        q: As in `attention`, in the kernel's input dtype; with `roundings` f32, what 8-bit operands stand for.
        k: As in `attention`.
        v: As in `attention`.
        mask: As in `attention`.
        softmax_scale: As in `attention`.
        layout: As in `attention`.
        out_dtype: q's dtype where None.
        rows: As in `attention_chunked`.
        score: As in `attention`; its arithmetic is f32.
        declared: As in `attention`.
        roundings: of a kernel of 8-bit operands.
        p_dtype: what P is rounded to; q's dtype where None.

    Returns:
        out in out_dtype and lse in f32, in the shapes of `attention`.
    """
    problem = Problem.read(q, k, v, mask, softmax_scale, layout, rows, score, declared)
    out, lse = problem.empty_outputs(out_dtype or q.dtype, torch.float32)
    out.zero_()
    lse.fill_(-math.inf)
    if problem.seqlen_k == 0:
        return problem.finish(out, lse)
    log2_e = math.log2(math.e)
    # Of f32 the order of sums is all that errs, and torch's differs from machine to machine.
    sums = torch.float64 if q.dtype == torch.float32 else torch.float32
    p_dtype = p_dtype or q.dtype
    largest_p = torch.finfo(p_dtype).max
    is_bounded = score is not None and roundings is None and needs_no_maximum(magnitude(score), largest_p)
    kv_idx = torch.arange(problem.seqlen_k, device=q.device)[None, :]
    for b, h, here in problem.query_chunks(max(1, STANDARD_SCORES // problem.seqlen_k)):
        h_kv = h // problem.group
        pieces = (problem.q[b, h, here], problem.k[b, h_kv], problem.v[b, h_kv])
        queries, keys, values = (x.float() for x in pieces)
        places = (b, h, problem.rows[here][:, None], kv_idx)
        products = queries @ keys.mT if roundings is None else roundings.products(queries, keys)
        if (
            score is None
        ):  # what a score is times `unit`, in log2 units, is taken after its maximum: it may be huge
            scores, unit = (
                math.copysign(1.0, problem.softmax_scale) * products,
                abs(problem.softmax_scale) * log2_e,
            )
        else:
            scores, unit = problem.modified(problem.softmax_scale * products, *places), log2_e
        unit = max(unit, SMALLEST_SCALE)
        scores = scores.masked_fill(~problem.sees(*places), -math.inf)  # (chunk, seqlen_k)
        row_max = scores.amax(dim=-1, keepdim=True)
        row_max.masked_fill_(row_max.isneginf() | is_bounded, 0.0)
        p = (scores - row_max).mul_(unit).exp2_()
        row_sum = p.sum(dim=-1, keepdim=True)
        if roundings is None:
            acc_o = weighted_sum(p.to(p_dtype).to(sums), values.to(sums)).float()
        else:
            acc_o = roundings.weighted_sum(p, values, b, h_kv)
        of_keys = (row_max.double() * unit + row_sum.log2()) * math.log(2.0)
        whole, share = problem.with_sink(of_keys, h)
        out[b, h, here] = torch.where(row_sum == 0, 0.0, acc_o / row_sum * share).to(out.dtype)
        lse[b, h, here] = whole[:, 0].to(lse.dtype)
    return problem.finish(out, lse)


def weighted_sum(p: Tensor, v: Tensor) -> Tensor:
    """Compute p @ v where a weight of 0 takes nothing, even from a value that is inf or NaN."""
    finite = v.isfinite()
    if bool(finite.all()):
        return p @ v
    total = p @ v.masked_fill(~finite, 0.0)
    for taken, sign in (((p > 0).to(v.dtype), 1.0), ((p < 0).to(v.dtype), -1.0)):
        for kind, value in ((v.isposinf(), math.inf), (v.isneginf(), -math.inf), (v.isnan(), math.nan)):
            total = torch.where(taken @ kind.to(v.dtype) > 0, total + sign * value, total)
    return total
