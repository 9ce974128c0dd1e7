"""The properties of attention that hold whatever the kernel, each a function from a trial to a complaint.

The error bound is checked in every case, that of gradients where there are some; of the others each case draws one that
its mask allows. Two runs that
must do the same arithmetic are compared bit by bit; runs that sum in another order are each held to the bound.
Source: docs/design/check.md.
"""

import math
from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from attngen.check.accuracy import LSE_ABSOLUTE, LSE_RELATIVE, Accuracy
from attngen.check.inputs import Canary, poison
from attngen.check.judging import judge as judged
from attngen.check.judging import judge_gradients
from attngen.check.reference import attention_as_fractions
from attngen.errors import AttngenError
from attngen.expr import TRUE, free_names
from attngen.fuzz.case import Case
from attngen.fuzz.states import STATES
from attngen.memory import is_out_of_memory
from attngen.plan import KernelPlan
from attngen.spec import Spec

Complaint = str | None
WIDE_WINDOW = "kv_idx > q_pos - 1000000 and kv_idx < q_pos + 1000000"
"""Wider than any length that is drawn."""
SIMULATOR_ULPS = 16
"""What two simulated runs of one row may differ by, where torch's vectors fall otherwise."""
SHIFTS = (1e2, 1e4)
"""Constants added to all scores."""


class Subject(Protocol):
    """What is tried: a kernel, or a simulated plan with a planted fault."""

    @property
    def plan(self) -> KernelPlan:
        """Its plan."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        softmax_scale: float | None = None,
        return_lse: bool = False,
        out: torch.Tensor | None = None,
        layout: str = "bshd",
        **declared: Any,
    ) -> Any:
        """As `attngen.Kernel.__call__`."""

    def backward(self, *arguments: Any, **declared: Any) -> tuple[torch.Tensor, ...]:
        """As `attngen.Kernel.backward`, where the spec asks for gradients."""


Make = Callable[[Spec], Subject]


class PropertyFailure(AttngenError):
    """A property does not hold.

    Attributes:
        case: where.
        rule: which property; "error" is the bound itself, "crash" an exception.
        complaint: what was seen.
    """

    def __init__(self, case: Case, rule: str, complaint: str) -> None:
        super().__init__(f"{rule}: {complaint}")
        self.case = case
        self.rule = rule
        self.complaint = complaint


class Trial:
    """A case at work.

    Attributes:
        q, k, v: its inputs, (batch, seqlen, heads, head_dim).
        declared: what it passes for what the spec declares.
        out, lse: what the subject made of them.
        dout, dlse: their gradients, where the spec asks for gradients; dlse only if the case has it.
    """

    def __init__(self, case: Case, make: Make, device: str) -> None:
        self.case = case
        self.make = make
        self.subject = make(case.spec)
        self.mask = self.subject.plan.mask
        self.device = device
        self.state = STATES[case.state]
        with self.state():
            self.q, self.k, self.v = case.inputs(device)
            self.declared = case.declared(device)
            self.dout: torch.Tensor | None = None
            self.dlse: torch.Tensor | None = None
            if case.spec.gradients:
                self.dout, self.dlse = case.upstream(device)
        self.out, self.lse = self.run(self.q, self.k, self.v)

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor | None = None,
        subject: Subject | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Out and lse of other inputs, or by another subject; tensors here are always bshd."""
        result, lse = self.call(
            q,
            k,
            v,
            subject,
            return_lse=True,
            out=None if out is None else self.turned(out),
        )
        return self.turned(result), lse

    def call(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        subject: Subject | None = None,
        **options: Any,
    ) -> Any:
        """What a call on bshd tensors returns, in its own layout."""
        q, k, v = (self.turned(x) for x in (q, k, v))
        options |= {"softmax_scale": self.case.softmax_scale, "layout": self.case.layout}
        if subject is None:
            subject, options = self.subject, options | self.declared
        with self.state():
            return subject(q, k, v, **options)

    def gradients(self, scale: float = 1.0, batch: slice = slice(None)) -> tuple[torch.Tensor, ...]:
        """dq, dk and dv, in bshd, of a multiple of the gradients of out and lse, or of a slice of the batch."""
        assert self.dout is not None
        dlse = None if self.dlse is None else scale * self.dlse[batch]
        tensors = (scale * self.dout if scale != 1.0 else self.dout, self.q, self.k, self.v, self.out)
        turned = (self.turned(x[batch]) for x in tensors)
        scale_and_layout = (self.case.softmax_scale, self.case.layout)
        with self.state():
            made = self.subject.backward(*turned, self.lse[batch], dlse, *scale_and_layout, **self.declared)
        return tuple(map(self.turned, made))

    @cached_property
    def first_gradients(self) -> tuple[torch.Tensor, ...]:
        """dq, dk and dv of the case."""
        return self.gradients()

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor from bshd to the layout of the call, or back."""
        return x.transpose(1, 2) if self.case.layout == "bhsd" else x

    def accuracy(
        self,
        out: torch.Tensor,
        lse: torch.Tensor,
        q: torch.Tensor | None = None,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
    ) -> Accuracy:
        """How outputs stand to the reference on the case's inputs, or on those given."""
        q, k, v = (self.q if q is None else q, self.k if k is None else k, self.v if v is None else v)
        spec, plan, scale = self.case.spec, self.subject.plan, self.case.softmax_scale
        by_gpu = self.device != "cpu"
        with self.state():
            return judged(spec, plan, out, lse, q, k, v, scale, declared=self.declared, by_gpu=by_gpu)

    @property
    def scale(self) -> float:
        """softmax_scale, the default filled in."""
        given = self.case.softmax_scale
        return 1 / math.sqrt(self.q.shape[-1]) if given is None else given

    def differs(
        self, out: torch.Tensor, lse: torch.Tensor, batch: slice = slice(None), ulps: int = 0
    ) -> Complaint:
        """A complaint where outputs are not those of the first run, or of a slice of its batch.

        They are the same bits, or within some units in the last place of the largest number.
        """
        for name, got, expected in (("out", out, self.out[batch]), ("lse", lse, self.lse[batch])):
            size = largest(self.v) if name == "out" else 1.0 + expected.abs().nan_to_num(posinf=0.0)
            slack = ulps * torch.finfo(got.dtype).eps * size
            same = (got == expected) | ((got.float() - expected.float()).abs() <= slack)
            if not bool(same.all()):
                index = tuple((~same).nonzero()[0].tolist())
                return f"{name}[{', '.join(map(str, index))}] is {got[index]:.8g}, was {expected[index]:.8g}"
        return None


def judge(accuracy: Accuracy) -> Complaint:
    """A complaint where an output is not within its bound."""
    return None if accuracy.ok else str(accuracy)


# ---- the rules ----------------------------------------------------------------------------------------
def error(trial: Trial) -> Complaint:
    """Out and lse are within the bound; on the exact tier, within a unit in the last place of the quotient."""
    complaint = judge(trial.accuracy(trial.out, trial.lse))
    if complaint is not None:
        return complaint
    if trial.case.kind != "integers" or trial.q.dtype == torch.float32:
        return None  # f32: a product by a reciprocal, and serial's normalising at each block, cost more than a unit
    if trial.subject.plan.scales:
        return None  # an amax of 3 is 448 / 3 units, and no other integer is a number of e4m3 then
    if trial.subject.plan.has_score:
        return None  # the weights of plain scores alone are powers of two
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
    canary = Canary(tuple(trial.out.shape), trial.out.dtype, trial.device)  # type: ignore[arg-type]  # of four
    out, lse = trial.run(*poison(trial.q, trial.k, trial.v), out=canary.out)
    if (where := canary.damaged()) is not None:
        return f"memory around out was written, at {where}"
    if count := canary.unwritten():
        return f"{count} elements of out were never written"
    return trial.differs(out, lse)


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


# ---- rules of gradients -------------------------------------------------------------------------------
def gradients(trial: Trial) -> Complaint:
    """dq, dk and dv are within their bound, for the out and lse that the call returned."""
    case, made = trial.case, trial.first_gradients
    assert trial.dout is not None
    with trial.state():
        verdict = judge_gradients(
            case.spec,
            made,
            (trial.q, trial.k, trial.v),
            trial.dout,
            trial.out,
            trial.lse,
            trial.dlse,
            case.softmax_scale,
            declared=trial.declared,
        )
    return None if verdict.ok else str(verdict)


def repeated_gradients(trial: Trial) -> Complaint:
    """A second backward pass gives the same bits."""
    return _first_difference(trial.gradients(), trial.first_gradients)


def scaled_gradients(trial: Trial) -> Complaint:
    """Of 8 times the gradients of out and lse, gradients are 8 times as large, to the bit: no rounding is another.

    But for what terms below the normal numbers of f32 and bf16, where roundings are others, come to in a sum.
    """
    eightfold = tuple(8.0 * x for x in trial.first_gradients)
    return _first_difference(trial.gradients(8.0), eightfold, floor=2.0**-110)


def sliced_gradients(trial: Trial) -> Complaint:
    """The last element of the batch, alone, has the same gradients, to the bit on a GPU (as of `batch_slice`)."""
    last = slice(max(0, trial.q.shape[0] - 1), None)
    ulps = SIMULATOR_ULPS if trial.device == "cpu" else 0
    return _first_difference(trial.gradients(batch=last), tuple(x[last] for x in trial.first_gradients), ulps)


def _first_difference(
    got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], ulps: int = 0, floor: float = 0.0
) -> Complaint:
    """A complaint where gradients differ by more than a floor, and than units in the last place of the largest."""
    for name, x, y in zip(("dq", "dk", "dv"), got, expected, strict=True):
        slack = max(floor, ulps * torch.finfo(x.dtype).eps * largest(y))
        same = (x == y) | (x.isnan() & y.isnan()) | ((x.float() - y.float()).abs() <= slack)
        if not bool(same.all()):
            index = tuple((~same).nonzero()[0].tolist())
            return f"{name}[{', '.join(map(str, index))}] is {x[index]:.8g}, was {y[index]:.8g}"
    return None


def largest(x: torch.Tensor) -> float:
    """The largest absolute value, 0 where there is none."""
    return float(x.double().abs().max()) if x.numel() else 0.0


@dataclass(frozen=True)
class Rule:
    """A property and where it holds.

    Attributes:
        check: the property; its docstring says what it claims.
        applies: whether it holds for a plan whose mask and score use such names.
        is_rare: few masks allow it; where one does, it is drawn four times as often.
        of_gradients: it holds for specs that ask for gradients.
    """

    check: Callable[[Trial], Complaint]
    applies: Callable[[KernelPlan, Set[str]], bool] = lambda plan, names: True
    is_rare: bool = False
    of_gradients: bool = False

    def may_hold(self, spec: Spec, plan: KernelPlan) -> bool:
        """Whether it holds for a spec and its plan."""
        return (not self.of_gradients or bool(spec.gradients)) and self.applies(plan, names_of(plan))


def names_of(plan: KernelPlan) -> Set[str]:
    """What mask and score read, and the sizes that declared tensors have."""
    sizes = (dim for tensor in plan.declarations.tensors.values() for dim in tensor.dims)
    return {*free_names(plan.mask), *free_names(plan.score), *map(str, sizes)}


def _scales_span(plan: KernelPlan, *kinds: str) -> bool:
    """Whether scales are of one of these kinds; those of 16-bit inputs, none, are of all."""
    return plan.quantizer is None or plan.quantizer.scales in kinds


def _is_plain(plan: KernelPlan, names: Set[str]) -> bool:
    """Whether every query sees every key, by its plain score."""
    return plan.mask is TRUE and not plan.has_score


# With e4m3 inputs both runs must have the same operands, or a reference of their own: not where a scale of the whole
# batch is that of a slice, where a group of heads of Q shares one, where keys change their block of V, or where parts
# of the keys or a large column have scales that the whole has not.
RULES: dict[str, Rule] = {
    "error": Rule(error),
    "repeat": Rule(repeat),
    "surroundings": Rule(surroundings),
    "batch-slice": Rule(
        batch_slice,
        lambda plan, names: (
            names.isdisjoint(("b", "batch")) and _scales_span(plan, "per_head", "per_block", "per_token")
        ),
    ),
    "repeated-heads": Rule(
        repeated_heads,
        lambda plan, names: (
            names.isdisjoint(("h_kv", "num_heads_kv"))
            and _scales_span(plan, "per_tensor", "per_block", "per_token")
        ),
    ),
    "shifted-scores": Rule(shifted_scores, lambda plan, names: not plan.has_score and not plan.scales),
    "permuted-keys": Rule(
        permuted_keys,
        lambda plan, names: _is_plain(plan, names) and _scales_span(plan, "per_tensor", "per_head"),
        is_rare=True,
    ),
    "split-keys": Rule(
        split_keys, lambda plan, names: _is_plain(plan, names) and not plan.scales, is_rare=True
    ),
    "wide-window": Rule(wide_window, _is_plain, is_rare=True),
    "gradients": Rule(gradients, of_gradients=True),
    "repeated-gradients": Rule(repeated_gradients, of_gradients=True),
    # What is smaller than f16's normal numbers has fewer bits, and what is larger than all of them none.
    "scaled-gradients": Rule(
        scaled_gradients, lambda plan, names: plan.inputs.name != "f16", of_gradients=True
    ),
    "sliced-gradients": Rule(
        sliced_gradients, lambda plan, names: names.isdisjoint(("b", "batch")), of_gradients=True
    ),
}


def check(case: Case, make: Make, device: str = "cpu") -> None:
    """Run a case.

    Raises:
        PropertyFailure: the bound or the case's property does not hold, or something was raised.
    """
    rule, complaint = _complaint(case, make, device)
    if complaint is not None:  # the one place that raises, so that Hypothesis shrinks all failures as one
        raise PropertyFailure(case, rule, complaint)


def _complaint(case: Case, make: Make, device: str) -> tuple[str, Complaint]:
    try:
        trial = Trial(case, make, device)
        always = ("error", "gradients") if case.spec.gradients else ("error",)
        for name in dict.fromkeys((*always, case.rule)):
            if (complaint := RULES[name].check(trial)) is not None:
                return name, complaint
    except Exception as raised:  # whatever a legal call raises is a finding, but for this machine's size
        if is_out_of_memory(raised):
            raise
        return "crash", f"{type(raised).__name__}: {raised}"
    return "", None
