"""The properties of out and lse, each a function from a trial to a complaint."""

import torch

from attngen.check.accuracy import LSE_ABSOLUTE, LSE_RELATIVE, Accuracy
from attngen.check.inputs import POISON, Canary, poison
from attngen.check.reference import attention_as_fractions
from attngen.fuzz.properties_of_gradients import first_difference
from attngen.fuzz.trial import SIMULATOR_ULPS, Complaint, Trial, largest

WIDE_WINDOW = "kv_idx > q_pos - 1000000 and kv_idx < q_pos + 1000000"
"""Wider than any length that is drawn."""
SHIFTS = (1e2, 1e4)
"""Constants added to all scores."""


def judge(accuracy: Accuracy) -> Complaint:
    """A complaint where an output is not within its bound."""
    return None if accuracy.ok else str(accuracy)


def error(trial: Trial) -> Complaint:
    """Out and lse are within the bound; on the exact tier, within a unit in the last place of the quotient."""
    complaint = judge(trial.accuracy(trial.out, trial.lse))
    if complaint is not None:
        return complaint
    if trial.case.kind != "integers" or trial.q.dtype == torch.float32:
        return None  # f32: a product by a reciprocal, and serial's normalising at each block, cost more than a unit
    if trial.subject.plan.every_descale:
        return None  # an amax of 3 is 448 / 3 units, and no other integer is a number of e4m3 then
    if trial.subject.plan.has_score or trial.case.shape.cuts:
        return None  # the weights of plain scores alone are powers of two; sequences are dense calls (`sequences`)
    q = trial.q if trial.scale > 0 else -trial.q
    numerator, denominator = attention_as_fractions(q, trial.k, trial.v, trial.mask, declared=trial.declared)
    exact = torch.where(denominator == 0, 0.0, numerator / denominator)
    _, exponent = torch.frexp(exact)
    unit = torch.ldexp(torch.full_like(exact, torch.finfo(trial.out.dtype).eps), exponent - 1)
    wrong = ((trial.out.double() - exact).abs() > unit + 1e-6).nonzero()
    if not len(wrong):
        return None
    at = tuple(wrong[0].tolist())
    return f"out{list(at)} = {trial.out[at]:.8g} on the exact tier, where {exact[at]:.8g} is right"


def repeat(trial: Trial) -> Complaint:
    """A second call, on the same inputs, gives the same bits; so does one that asks for out alone."""
    out = trial.turned(trial.call(trial.q, trial.k, trial.v))
    return trial.differs(*trial.run(trial.q, trial.k, trial.v)) or trial.differs(out, trial.lse)


def surroundings(trial: Trial) -> Complaint:
    """NaN, inf and 6e4 around the inputs change no bit, and nothing around the output is written."""
    given = (trial.q, trial.k, trial.v)
    canary = Canary(tuple(_batched(trial.out).shape), trial.out.dtype, trial.device)  # type: ignore[arg-type]  # of four
    q, k, v = map(_as_given, poison(*map(_batched, given)), given)
    out, lse = trial.run(q, k, v, out=_as_given(canary.out, trial.out))
    if (where := canary.damaged()) is not None:
        return f"memory around out was written, at {where}"
    if count := canary.unwritten():
        return f"{count} elements of out were never written"
    return trial.differs(out, lse)


def _batched(x: torch.Tensor) -> torch.Tensor:
    """Rows of heads with a batch, of one where they are ragged."""
    return x if x.dim() == 4 else x[None]


def _as_given(x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """What `_batched` made of a tensor, as that was given."""
    return x if given.dim() == 4 else x[0]


def hidden_keys(trial: Trial) -> Complaint:
    """What K and V hold where the mask hides a key from every query changes no bit, of gradients neither."""
    hidden = trial.hidden_keys
    values = torch.tensor(POISON, dtype=trial.k.dtype, device=trial.k.device)
    k, v = trial.k.clone(), trial.v.clone()
    for x in (k, v):
        x[hidden] = values[torch.arange(int(hidden.sum()), device=x.device) % len(POISON)][:, None]
    complaint = trial.differs(*trial.run(trial.q, k, v))
    if complaint is None and trial.case.spec.gradients:
        complaint = first_difference(trial.gradients(keys=(k, v)), trial.first_gradients)
    return complaint


def batch_slice(trial: Trial) -> Complaint:
    """The last element of the batch, alone, gives the same bits on a GPU.

    The simulator stacks the heads it runs, and torch's vectors and their tails round exp2 differently; of e4m3, whose P
    may then fall on its other side, the slice is held to the bound.
    """
    last = slice(max(0, trial.q.shape[0] - 1), None)
    if trial.device == "cpu" and trial.subject.plan.scales:
        q, k, v = trial.q[last], trial.k[last], trial.v[last]
        return judge(trial.accuracy(*trial.run(q, k, v), q, k, v))
    ulps = SIMULATOR_ULPS if trial.device == "cpu" else 0
    return trial.differs(*trial.run(trial.q[last], trial.k[last], trial.v[last]), batch=last, ulps=ulps)


def repeated_heads(trial: Trial) -> Complaint:
    """With K and V repeated for each query head instead of shared, the same bits."""
    group = trial.q.shape[2] // max(1, trial.k.shape[2])
    k, v = (x.repeat_interleave(group, dim=2) for x in (trial.k, trial.v))
    return trial.differs(*trial.run(trial.q, k, v))


def permuted_keys(trial: Trial) -> Complaint:
    """With the keys in another order the result is within the bound of the same reference."""
    generator = torch.Generator().manual_seed(trial.case.seed)
    order = torch.randperm(trial.k.shape[1], generator=generator).to(trial.k.device)
    return judge(trial.accuracy(*trial.run(trial.q, trial.k[:, order], trial.v[:, order])))


def split_keys(trial: Trial) -> Complaint:
    """Two calls on parts of the keys, merged by lse, are within the bounds of the parts."""
    at = (trial.k.shape[1] + 1) // 3
    parts = [(trial.k[:, :at], trial.v[:, :at]), (trial.k[:, at:], trial.v[:, at:])]
    runs = [trial.run(trial.q, k, v) for k, v in parts]
    checks = [trial.accuracy(*run, k=k, v=v) for run, (k, v) in zip(runs, parts, strict=True)]
    for part in checks:
        if (complaint := judge(part)) is not None:
            return f"a part: {complaint}"
    both = torch.stack([lse.double() for _, lse in runs])
    lse = both.logsumexp(0)
    weights = (both - lse.masked_fill(lse.isneginf(), 0.0)).exp()  # (2, batch, heads, seqlen_q)
    outs = torch.stack([out.double() for out, _ in runs])
    merged = (outs * weights.transpose(2, 3).unsqueeze(-1)).sum(0)
    whole = trial.accuracy(trial.out, trial.lse)
    allowed = sum(part.max_bound for part in (*checks, whole)) + 4 * LSE_ABSOLUTE * largest(trial.v)
    apart = largest(merged - trial.out)
    if not apart <= allowed:
        return f"merged parts differ by {apart:.2e}, {allowed:.2e} allowed"
    seen = lse.isfinite()
    apart, allowed = (
        largest((lse - trial.lse)[seen]),
        2 * LSE_ABSOLUTE + 4 * LSE_RELATIVE * largest(lse[seen]),
    )
    return None if apart <= allowed else f"lse of merged parts differs by {apart:.2e}, {allowed:.2e} allowed"


def wide_window(trial: Trial) -> Complaint:
    """A window wider than both lengths is the full mask."""
    windowed = trial.make(trial.case.spec.replace({"mask": WIDE_WINDOW}))
    return judge(trial.accuracy(*trial.run(trial.q, trial.k, trial.v, subject=windowed)))


def shifted_scores(trial: Trial) -> Complaint:
    """A constant added to all scores, through a column of Q and K, moves lse by it and out by rounding alone."""
    if trial.scale == 0.0 or not trial.k.numel():
        return None
    finite = torch.finfo(trial.q.dtype).max
    q, k = trial.q.clone(), trial.k.clone()
    q[..., 0], k[..., 0] = 64.0, 0.0
    base, base_lse = trial.run(q, k, trial.v)
    of_base = trial.accuracy(base, base_lse, q, k)
    for shift in SHIFTS:
        shifted_k = k.clone()
        shifted_k[..., 0] = max(-finite, min(finite, shift / trial.scale / 64.0))
        constant = trial.scale * 64.0 * float(shifted_k[0, 0, 0, 0])
        out, lse = trial.run(q, shifted_k, trial.v)
        shifted = trial.accuracy(out, lse, q, shifted_k)
        # Each of a score's head_dim sums in f32 may lose 2^-23 of the constant; out follows by as much times |v|.
        lost = 2.0**-23 * q.shape[-1] * (1.0 + abs(constant))
        slack = 2 * lost * largest(trial.v)
        within = shifted.max_error <= shifted.max_bound + slack
        if not within or not (shifted.lse_error or 0.0) <= (shifted.lse_bound or 0.0) + lost:
            return f"scores shifted by {constant:.6g}: {shifted}"
        moved, allowed = largest(out - base), shifted.max_bound + of_base.max_bound + slack
        if not moved <= allowed:
            return f"scores shifted by {constant:.6g} move out by {moved:.2e}, {allowed:.2e} allowed"
        seen = base_lse.isfinite()
        moved = largest((lse.double() - base_lse.double() - constant)[seen])
        allowed = 2 * LSE_ABSOLUTE + 2 * LSE_RELATIVE * (abs(constant) + largest(base_lse[seen])) + lost
        if not moved <= allowed:
            return f"scores shifted by {constant:.6g} move lse by {moved:.2e} more, {allowed:.2e} allowed"
    return None
