"""Gradients of attention written out in fp64, the yardstick for them, and the rule that a kernel's are held to.

With t the modified score of a pair, P = exp(t - lse), dO the gradient of out and dlse that of lse:

    D = rowsum(dO * O) - dlse,  dP = dO V^T,  dT = P (dP - D),  dS = dT * slope,
    dV = P^T dO,  dQ = softmax_scale * dS K,  dK = softmax_scale * dS^T Q,

where slope is the derivative of t by the scaled product (`expr.derivative`) and dK and dV are summed over the heads of
q that read one head of k. A pair of weight 0, masked or with a score of -inf, contributes nothing, whatever its rows of
Q, K, V and dO hold; a visible inf or NaN spoils what it reaches.

The rule, for dQ, dK and dV each:

- max |got - ref| is at most 2 times the yardstick's, plus a unit in the last place of the largest |ref|, plus order;
- the RMSE over the rows (of dK and dV: keys) that have a partner is at most 1.2 times the yardstick's, plus that unit
  times min(1, 4 / rows), where rows counts the different ones, plus the RMS of order;
- a row without keys and a key without rows is exactly 0; NaN and inf stand where the reference has them, only there.

Gradients of what is declared are held to it too (`score_gradients`), each element a row. Nothing of theirs is rounded
before it is added up, in f32; beside order they may move by SUM times all magnitudes that are added up. So is that of a
sink s, of each head the sum over its rows of exp(s - lse) (-D): a pair whose value is 0.

Why the unit fades, `accuracy` says. Its sum with 0.3 has no part here: the rule holds of 2^n dO what it holds of dO. On
2,000 small problems a loop over blocks needed at most 0.8 of the terms, and 0.2 where the yardstick read its out.

order is what f32 sums may move where dP and D err by ORDER times |dO| |V|: the root of a sum of squares over the pairs
of an element. Where P is 1, dS is 0 by cancellation and the yardstick may be exact; this is then all that is allowed.
This module shares no code with the simulator or the kernels.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from attngen.check.accuracy import Accuracy, measure
from attngen.check.accuracy_terms import different_rows, share_of_chance
from attngen.check.distances import largest, root_mean_square
from attngen.check.problem import Layout, Problem
from attngen.check.reference import standard_attention, weighted_sum
from attngen.check.score_gradients import SUM, ScoreGradients
from attngen.errors import ArgumentError
from attngen.expr import Expr
from attngen.torch_state import torch_defaults

SCORES = 2**22
"""Scores that are held at once, in some ten matrices: 32 MiB of fp64 each."""

ORDER = 2.0**-20
"""Of |dO| |V|, what f32 sums of dP and D may lose: 16 roundings, or twice 8 steps of a tensor core that drops bits."""


class Gradients(NamedTuple):
    """Of one call, in the shapes and layout of q, k and v."""

    dq: Tensor
    dk: Tensor
    dv: Tensor


class _Sums(Gradients):
    """Gradients as they grow, their heads before their rows, dq and dk without softmax_scale."""

    @staticmethod
    def zeros(problem: Problem, number: torch.dtype) -> "_Sums":
        return _Sums(*(x.new_zeros(x.shape, dtype=number) for x in (problem.q, problem.k, problem.v)))

    def add(self, piece: "_Piece", rounding: torch.dtype = torch.float64) -> None:
        """What some rows contribute, their P and dS rounded; a weight of 0 takes nothing."""
        number = self.dq.dtype
        p, ds = (x.to(rounding).to(number) for x in (piece.p, piece.ds))
        self.dq[piece.b, piece.h, piece.here] += weighted_sum(ds, piece.keys.to(number))
        self.dk[piece.b, piece.h_kv] += weighted_sum(ds.mT, piece.queries.to(number))
        self.dv[piece.b, piece.h_kv] += weighted_sum(p.mT, piece.dout.to(number))

    def scaled(self, scale: float, layout: Layout) -> Gradients:
        return Gradients(*(_turned(x, layout) for x in (scale * self.dq, scale * self.dk, self.dv)))


@dataclass(frozen=True)
class GradientAccuracy:
    """The verdict on dQ, dK, dV and gradients of what is declared, each as `accuracy.Accuracy` without lse."""

    dq: Accuracy
    dk: Accuracy
    dv: Accuracy
    declared: Mapping[str, Accuracy] = field(default_factory=dict)

    @property
    def by_name(self) -> dict[str, Accuracy]:
        """Each by the name of its gradient; that of a bias is dbias."""
        others = {f"d{name}": each for name, each in self.declared.items()}
        return {"dq": self.dq, "dk": self.dk, "dv": self.dv, **others}

    @property
    def ok(self) -> bool:
        """Whether every line of the rule holds for each."""
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """The lines that do not hold, as "dk rmse"."""
        return tuple(f"{name} {line}" for name, each in self.by_name.items() for line in each.failures)

    def __str__(self) -> str:
        return "\n".join(f"{name} {each}" for name, each in self.by_name.items())


@torch_defaults()
def attention_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    mask: Expr | None = None,
    softmax_scale: float | None = None,
    layout: Layout = "bshd",
    *,
    dlse: Tensor | None = None,
    score: Expr | None = None,
    declared: Mapping[str, Any] | None = None,
) -> Gradients:
    """Compute the gradients of `reference.attention` in fp64 by the formulas, with memory linear in the lengths.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim_qk), any floating dtype.
        k: (batch, seqlen_k, num_heads_kv, head_dim_qk).
        v: (batch, seqlen_k, num_heads_kv, head_dim_v).
        dout: (batch, seqlen_q, num_heads_q, head_dim_v), the gradient of out, any strides.
        mask: true where the query sees the key; None is the full mask.
        softmax_scale: any finite number; 1/sqrt(head_dim_qk) where None.
        layout: "bhsd" exchanges the seqlen and heads dimensions of q, k, v, dout and the gradients.
        dlse: (batch, num_heads_q, seqlen_q), the gradient of lse; 0 where None.
        score: what becomes of each scaled product, its `score`, before the mask; itself where None.
        declared: a value for each scalar and tensor that mask and score read, by name.

    Returns:
        fp64; 0 in rows of dq that see no key and in those of dk and dv that no row sees.
    """
    problem = Problem.read(q, k, v, mask, softmax_scale, layout, None, score, declared)
    total = _Sums.zeros(problem, torch.float64)
    for piece in _pieces(problem, dout, dlse, torch.float64):
        total.add(piece)
    return total.scaled(problem.softmax_scale, layout)


@torch_defaults()
def declared_gradients(
    wanted: Sequence[str],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    mask: Expr | None = None,
    softmax_scale: float | None = None,
    layout: Layout = "bshd",
    *,
    dlse: Tensor | None = None,
    score: Expr | None = None,
    declared: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Compute the gradients of what is declared in fp64, by name; arguments are those of `attention_gradients`."""
    problem = Problem.read(q, k, v, mask, softmax_scale, layout, None, score, declared)
    total = ScoreGradients(problem, wanted, torch.float64)
    for piece in _pieces(problem, dout, dlse, torch.float64):
        piece.add_to(total)
    return total.sums


@torch_defaults()
def standard_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    mask: Expr | None = None,
    softmax_scale: float | None = None,
    layout: Layout = "bshd",
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    dlse: Tensor | None = None,
    score: Expr | None = None,
    declared: Mapping[str, Any] | None = None,
) -> Gradients:
    """Compute the gradients at a kernel's precision, in the dtype of q: the yardstick of `compare_gradients`.

    S, dP and D in f32, D of the out that was rounded; P = exp2(t log2(e) - lse log2(e)) with one rounding of its
    exponent; dS = P slope (dP - D) of the P that is not rounded; P and dS rounded to the input dtype before their
    products, which are summed in f32; softmax_scale and the rounding to the input dtype come last.

    The arguments are those of `attention_gradients`, with out and lse of the forward call, or by `standard_attention`
    where None; all are in a kernel's dtypes.
    """
    forward = _forward(q, k, v, mask, softmax_scale, layout, out, lse, score, declared)
    problem = Problem.read(q, k, v, mask, softmax_scale, layout, None, score, declared)
    # Of f32 the order of sums is all that errs, and torch's differs from machine to machine.
    total = _Sums.zeros(problem, torch.float64 if q.dtype == torch.float32 else torch.float32)
    for piece in _pieces(problem, dout, dlse, torch.float32, forward):
        total.add(piece, q.dtype)
    return Gradients(*(x.to(q.dtype) for x in total.scaled(problem.softmax_scale, layout)))


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Expr | None,
    softmax_scale: float | None,
    layout: Layout,
    out: Tensor | None,
    lse: Tensor | None,
    score: Expr | None,
    declared: Mapping[str, Any] | None,
) -> tuple[Tensor, Tensor]:
    """Out and lse as they are given, or by `standard_attention`."""
    if out is not None and lse is not None:
        return out, lse
    own = standard_attention(q, k, v, mask, softmax_scale, layout, score=score, declared=declared)
    return own[0] if out is None else out, own[1] if lse is None else lse


@torch_defaults()
def compare_gradients(
    got: Iterable[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    mask: Expr | None = None,
    softmax_scale: float | None = None,
    layout: Layout = "bshd",
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    dlse: Tensor | None = None,
    score: Expr | None = None,
    declared: Mapping[str, Any] | None = None,
    wanted: Sequence[str] = (),
) -> GradientAccuracy:
    """Hold gradients against the fp64 reference on the same inputs, on the device they are on.

    got holds dq, dk and dv in the shapes of q, k and v and in a kernel's dtype, then the gradient of each name in
    wanted, which is declared; the other arguments are those of `standard_gradients`. Where out and lse are what the
    kernel read, the yardstick errs by their roundings too, and `accuracy.compare` has to judge them first. A gradient
    of another shape is an ArgumentError.
    """
    about: dict[str, Any] = {"dlse": dlse, "score": score, "declared": declared}
    forward = _forward(q, k, v, mask, softmax_scale, layout, out, lse, score, declared)
    given: dict[str, Any] = {"out": forward[0], "lse": forward[1], **about}
    standard = standard_gradients(q, k, v, dout, mask, softmax_scale, layout, **given)
    problem = Problem.read(q, k, v, mask, softmax_scale, layout, None, score, declared)
    exact, order = (_Sums.zeros(problem, torch.float64) for _ in range(2))
    number = torch.float64 if q.dtype == torch.float32 else torch.float32
    of_score, short = ScoreGradients(problem, wanted, torch.float64), ScoreGradients(problem, wanted, number)
    for piece in _pieces(problem, dout, dlse, torch.float32, forward) if wanted else ():
        piece.add_to(short)
    rows, keys = (x.new_zeros(x.shape[:3], dtype=torch.bool) for x in (problem.q, problem.k))
    for piece in _pieces(problem, dout, dlse, torch.float64):
        exact.add(piece)
        order.add(piece.squares())
        piece.add_to(of_score)
        rows[piece.b, piece.h, piece.here] = (piece.p != 0).any(dim=1)
        keys[piece.b, piece.h_kv] |= (piece.p != 0).any(dim=0)
    ref = exact.scaled(problem.softmax_scale, layout)
    squares = order.scaled(problem.softmax_scale**2, layout)
    paired = (_turned(x, layout) for x in (rows, keys, keys))
    found = tuple(got)
    if len(found) != len(ref) + len(wanted):
        raise ArgumentError("got", f"{len(found)} gradients", f"{len(ref) + len(wanted)}")
    dq, dk, dv = map(_verdict, found, ref, standard, squares, paired)
    return GradientAccuracy(
        dq,
        dk,
        dv,
        {
            name: declared_verdict(name, x, [of_score], [short])
            for name, x in zip(wanted, found[len(ref) :], strict=True)
        },
    )


@torch_defaults()
def declared_sums(
    wanted: Sequence[str],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    mask: Expr | None,
    softmax_scale: float | None,
    *,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    score: Expr | None,
    declared: Mapping[str, Any],
) -> tuple[ScoreGradients, ScoreGradients]:
    """Gradients of what is declared in fp64, and at a kernel's precision; arguments as of `compare_gradients`."""
    problem = Problem.read(q, k, v, mask, softmax_scale, "bshd", None, score, declared)
    number = torch.float64 if q.dtype == torch.float32 else torch.float32
    exact, short = ScoreGradients(problem, wanted, torch.float64), ScoreGradients(problem, wanted, number)
    for piece in _pieces(problem, dout, dlse, torch.float64):
        piece.add_to(exact)
    for piece in _pieces(problem, dout, dlse, torch.float32, (out, lse)):
        piece.add_to(short)
    return exact, short


def declared_verdict(
    name: str, got: Tensor, exact: Sequence[ScoreGradients], short: Sequence[ScoreGradients]
) -> Accuracy:
    """The rule on the gradient of something declared, which parts of a call add up: the reference, the yardstick."""
    ref, squares, magnitudes, standard = (torch.zeros_like(got, dtype=torch.float64) for _ in range(4))
    is_read = torch.zeros_like(got, dtype=torch.bool)
    for part, yardstick in zip(exact, short, strict=True):
        ref += part.sums[name]
        squares += part.squares[name]
        magnitudes += part.magnitudes[name]
        standard += yardstick.sums[name]
        is_read |= part.is_read[name]
    got, ref, squares, beside = (x[..., None] for x in (got, ref, squares, SUM * magnitudes))
    return _verdict(got, ref, standard.to(got.dtype)[..., None], squares, is_read, beside)


def _verdict(
    got: Tensor, ref: Tensor, standard: Tensor, squares: Tensor, paired: Tensor, beside: Tensor | None = None
) -> Accuracy:
    """The rule on one gradient, from the squares of order / ORDER and which of its rows, or keys, have a partner.

    What else f32 may lose is `beside`, element by element.
    """
    if got.shape != ref.shape:
        raise ArgumentError("a gradient", tuple(got.shape), tuple(ref.shape))
    rounded = ref.to(got.dtype)
    ref = torch.where(rounded.isinf(), rounded.double(), ref)  # what got's dtype cannot hold
    format, size = torch.finfo(got.dtype), largest(rounded[rounded.isfinite()].abs())
    unit = format.eps * max(format.smallest_normal, math.ulp(size) / math.ulp(1.0))
    share = share_of_chance(different_rows(ref[paired].square().sum(-1).log()))
    order = ORDER * squares.sqrt() + (0.0 if beside is None else beside)
    order = order[order.isfinite()]
    by_max, by_rmse = unit + largest(order), unit * share + root_mean_square(order)
    return measure(got.detach(), ref, standard, paired, ~paired, by_max, by_rmse)


def _turned(x: Tensor, layout: Layout) -> Tensor:
    """From the caller's layout to heads before rows, or back."""
    return x.detach() if layout == "bhsd" else x.detach().transpose(1, 2)


@dataclass(frozen=True)
class _Piece:
    """Some rows of one head and all its keys: what sums over rows or keys are made of, in fp64 or f32."""

    b: int
    h: int
    h_kv: int
    here: slice  # of the rows
    queries: Tensor  # (rows, head_dim_qk)
    keys: Tensor  # (seqlen_k, head_dim_qk)
    values: Tensor  # (seqlen_k, head_dim_v)
    dout: Tensor  # (rows, head_dim_v)
    p: Tensor  # (rows, seqlen_k), 0 where masked
    reach: Tensor  # (rows, seqlen_k), P slope: what an error of dP moves dS by
    ds: Tensor  # (rows, seqlen_k)
    dt: Tensor  # (rows, seqlen_k), ds without the slope
    scaled: Tensor  # (rows, seqlen_k), products before the score
    places: tuple[Any, ...]  # b, h, q_idx and kv_idx of the pairs
    of_sink: (
        tuple[Tensor, Tensor, Tensor] | None
    )  # P of the sink, what it is times, and |dO| |O|, (rows, 1) each

    @property
    def sizes(self) -> Tensor:
        """(rows, seqlen_k), |dO| |V|."""
        dout, values = (x.norm(dim=-1).nan_to_num(0.0, 0.0, 0.0) for x in (self.dout, self.values))
        sizes: Tensor = dout[:, None] * values
        return sizes

    def add_to(self, gradients: ScoreGradients) -> None:
        """What these rows contribute to gradients of what is declared, and of a sink."""
        gradients.add(self.dt, self.p, self.sizes, self.scaled, self.places)
        if self.of_sink is not None:
            gradients.add_sink(self.h, *self.of_sink)

    def squares(self) -> "_Piece":
        """Squares of what is summed, of dS where dP errs by |dO| |V|."""
        squared = {name: getattr(self, name).square() for name in ("queries", "keys", "dout", "p")}
        return replace(self, ds=(self.reach * self.sizes).square(), **squared)


def _pieces(
    problem: Problem, dout: Tensor, dlse: Tensor | None, number: torch.dtype, given: tuple[Tensor, ...] = ()
) -> Iterator[_Piece]:
    """Every row of every head once, computed in a format; P and D are those of out and lse, where they are given."""
    dout = _turned(dout, problem.layout)
    kv_idx = torch.arange(problem.seqlen_k, device=dout.device)[None, :]
    chunk = 1 + SCORES // max(1, problem.seqlen_k)
    for b, h, here in problem.query_chunks(chunk) if problem.seqlen_k or problem.sink is not None else ():
        h_kv = h // problem.group
        parts = (problem.q[b, h, here], problem.k[b, h_kv], problem.v[b, h_kv], dout[b, h, here])
        queries, keys, values, dout_here = (x.to(number) for x in parts)
        places = (b, h, problem.rows[here][:, None], kv_idx)
        hidden = ~problem.sees(*places)
        scaled = problem.softmax_scale * (queries @ keys.mT)
        scores = problem.modified(scaled, *places).masked_fill(hidden, -math.inf)
        if not given:
            row_max = pad(scores, (0, 1), value=-math.inf).amax(dim=-1, keepdim=True)  # there may be no key
            row_max = row_max.masked_fill_(row_max.isneginf(), 0.0)
            p = (scores - row_max).exp_()
            row_sum = p.sum(dim=-1, keepdim=True)
            lse, share = problem.with_sink(row_max + row_sum.log(), h)
            p = (share * p / row_sum.masked_fill(row_sum == 0, 1.0)).masked_fill_(hidden, 0.0)
            out = weighted_sum(p, values)
        else:
            log2_e = math.log2(math.e)
            lse = given[1].detach()[b, h, here, None]
            exponent = scores.double() * log2_e - (lse.float() * log2_e).double()
            p = exponent.to(number).exp2_().masked_fill_(hidden | lse.isneginf(), 0.0)
            out = _turned(given[0], problem.layout)[b, h, here].to(number)
        d = (dout_here * out).sum(dim=-1, keepdim=True)
        if dlse is not None:
            d = d - dlse.detach()[b, h, here, None].to(number)
        reach = (p * problem.slopes(scaled, *places)).masked_fill_(p == 0, 0.0)
        less = dout_here @ values.mT - d
        ds, dt = ((x * less).masked_fill_(p == 0, 0.0) for x in (reach, p))
        of_sink = None
        if problem.sink is not None:
            size = dout_here.norm(dim=-1, keepdim=True) * out.norm(dim=-1, keepdim=True)
            of_sink = (problem.sink_weight(lse, h, number).to(number), -d, size)
        yield _Piece(
            b, h, h_kv, here, queries, keys, values, dout_here, p, reach, ds, dt, scaled, places, of_sink
        )
