"""What holds of gradients whatever computes them: a function a property, which a right backward pass gets through.

Two runs that must do the same arithmetic are compared bit by bit; two that round in other places lie `NEAR`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attngen.check.gradients import attention_gradients
from attngen.check.reference import attention
from attngen.plan import Step
from attngen.simulate import StepFunction
from tests.gradients.backward_cases import BackwardCase, simulate_backward

NEAR = 2.0**-6
"""Of the largest gradient: two roundings to bf16 of the sum, and as much again of the dS and P in it."""
CANCELLED = 1e-5
"""What inputs of N(0, 1) may leave where f32 sums of dP and of D cancel, as they do where a row sees one key."""
POISON = 6e4
"""The largest that f16 holds, or nearly."""


class Made(NamedTuple):
    """A call's outputs and gradients."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor

    @property
    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.dq, self.dk, self.dv


@dataclass(frozen=True)
class Inputs:
    """What a call is given and what comes back into it."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None = None
    declared: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(case: BackwardCase) -> "Inputs":
        drawn, declared = case.inputs_on("cpu")
        return Inputs(*drawn, declared=declared)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.q, self.k, self.v, self.dout]


@dataclass(frozen=True)
class Subject:
    """A call and its backward pass on the simulator.

    Attributes:
        steps: functions in place of the simulator's, in the backward pass alone.
        edit: from a case to the one that the backward pass is for.
    """

    target: str = "sm_80"
    steps: Mapping[type[Step], StepFunction] = field(default_factory=dict)
    edit: Callable[[BackwardCase], BackwardCase] = lambda case: case

    def __call__(self, case: BackwardCase, given: Inputs) -> Made:
        out, lse = case.kernel(self.target)(*given.tensors[:3], case.scale, return_lse=True, **given.declared)
        return Made(out, lse, *self.backward(case, given, out, lse))

    def backward(self, case: BackwardCase, given: Inputs, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        """The gradients of a call that gave out and lse, or would have."""
        named = {"out": out, "lse": lse, **given.declared}
        named |= {} if given.dlse is None else {"dlse": given.dlse}
        kernel = self.edit(case).kernel(self.target)
        return simulate_backward(kernel, given.tensors, named, case.scale, steps=self.steps)


Property = Callable[[Subject, BackwardCase], None]


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """To the last bit."""
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


def assert_near(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """But for roundings."""
    for x, y in zip(found, expected, strict=True):
        assert (x.double() - y.double()).abs().max() <= NEAR * y.double().abs().max() + CANCELLED


def whole_numbers_are_exact(subject: Subject, case: BackwardCase) -> None:
    """Where Q or K is 0 and a row sees 2^n keys, P is 2^-n: of small whole V and dO every gradient is exact.

    A row that sees another number of keys, or more than a format has bits for, is given no dO. Q is 0 for dQ, and K
    for dK, which then is a sum of all there is. The fp64 reference, rounded once, must come out.
    """
    case = replace(case, scale=0.5)
    given, random = Inputs.of(case), torch.Generator().manual_seed(3)
    spec = case.kernel("simulator").spec
    v = torch.randint(0, 2, given.v.shape, generator=random).to(given.v.dtype)
    dout = torch.zeros_like(given.dout)
    dout[..., 5] = torch.randint(0, 2, dout.shape[:3], generator=random).to(dout.dtype) * 2 - 1
    for zero, whole in (("q", "k"), ("k", "q")):
        like: Tensor = getattr(given, whole)
        numbers = {zero: torch.zeros_like(getattr(given, zero))}
        numbers[whole] = torch.randint(-2, 3, like.shape, generator=random).to(like.dtype)
        about = {"mask": spec.mask_expr, "softmax_scale": case.scale, "declared": given.declared}
        _, lse = attention(numbers["q"], numbers["k"], v, **about)
        seen = lse.exp().round().transpose(1, 2)
        is_exact = (seen.log2().frac() == 0) & (seen <= (128 if case.inputs == "bf16" else 1024))
        exact = replace(given, v=v, dout=torch.where(is_exact[..., None], dout, 0.0), **numbers)
        ref = attention_gradients(exact.q, exact.k, exact.v, exact.dout, **about)
        assert_same(subject(case, exact).gradients, tuple(x.to(like.dtype) for x in ref))


def the_gradient_of_scores_sums_to_that_of_lse(subject: Subject, case: BackwardCase) -> None:
    """Where all keys are one vector u, dQ is softmax_scale u times the sum over the keys of dT, which is dlse.

    What dS and D lose by rounding stays below 2^-7 of what they are made of.
    """
    given, random = Inputs.of(case), torch.Generator().manual_seed(4)
    u = torch.randint(-2, 3, given.k.shape[-1:], generator=random).to(given.k.dtype)
    batch, rows, heads, _ = given.q.shape
    given = replace(
        given, k=u.expand_as(given.k).clone(), dlse=torch.randn(batch, heads, rows, generator=random)
    )
    made = subject(case, given)
    assert given.dlse is not None
    sees = ~made.lse.isinf()
    dlse = torch.where(sees, given.dlse, 0.0).transpose(1, 2).double()
    size = given.dout.double().norm(dim=-1) * given.v.double().norm(dim=-1).amax() + dlse.abs()
    error = (made.dq.double() - case.softmax_scale * dlse[..., None] * u.double()).abs()
    assert (error <= 2.0**-7 * case.softmax_scale * size[..., None] * u.double().abs()).all()


def a_gradient_of_lse_alone_has_no_part_in_dv(subject: Subject, case: BackwardCase) -> None:
    """Without dO dV is 0, and what dQ and dK are turns its sign with dlse."""
    given = Inputs.of(case)
    batch, rows, heads, _ = given.q.shape
    dlse = torch.randn(batch, heads, rows, generator=torch.Generator().manual_seed(5))
    one, other = (
        subject(case, replace(given, dout=torch.zeros_like(given.dout), dlse=sign * dlse)) for sign in (1, -1)
    )
    assert not one.dv.any() and one.dq.any() and one.dk.any()
    assert_same(one.gradients, tuple(-x for x in other.gradients))


def a_constant_in_all_scores_changes_nothing(subject: Subject, case: BackwardCase) -> None:
    """Only lse moves, to 120 and -120 too: the rule for the problem without the constant holds."""
    given = Inputs.of(case)
    for constant in (3.0, 120.0, -120.0):
        made = subject(replace(case, score=f"{case.score} + {constant}"), given)
        verdict = case.verdict(made.gradients, given.tensors, given.declared)
        assert verdict.ok, (constant, verdict.failures)


def very_low_scores_are_recovered(subject: Subject, case: BackwardCase) -> None:
    """With lse near -10^4, where f32 holds a score to 2^-11, gradients keep the rule for scores so rounded."""
    given, low = Inputs.of(case), replace(case, score=f"{case.score} - 10000.0")
    made = subject(low, given)
    verdict = low.verdict(made.gradients, given.tensors, given.declared, out=made.out, lse=made.lse)
    assert verdict.ok, verdict.failures


def permuted_keys_permute_dk_and_dv(subject: Subject, case: BackwardCase) -> None:
    """Where a mask knows no key from another, their order is that of dK and dV, and dQ does not know it."""
    given = Inputs.of(case)
    order = torch.randperm(case.lengths[1], generator=torch.Generator().manual_seed(6))
    made = subject(case, given)
    turned = subject(case, replace(given, k=given.k[:, order], v=given.v[:, order]))
    assert_near(turned.gradients, (made.dq, made.dk[:, order], made.dv[:, order]))


def a_part_of_a_batch_has_its_own_gradients(subject: Subject, case: BackwardCase) -> None:
    """An element of the batch alone has the bits that it has among others."""
    given = Inputs.of(case)
    declared = {name: x[1:2] if name in ("doc", "lens") else x for name, x in given.declared.items()}
    alone = replace(Inputs(*(x[1:2] for x in given.tensors)), declared=declared)
    made = subject(replace(case, batch=1), alone).gradients
    assert_same(made, tuple(x[1:2] for x in subject(case, given).gradients))


def two_documents_are_two_calls(subject: Subject, case: BackwardCase) -> None:
    """What one call makes of a packed sequence, a call for each of its documents makes."""
    length = case.lengths[0]
    first = 1 + length // 3
    parts = (slice(first), slice(first, length))
    packed = replace(case, mask="causal and document(doc)", lengths=(length, length))
    given = Inputs.of(packed)
    doc = (torch.arange(length) >= first).int().expand(case.batch, -1).contiguous()
    together = subject(packed, replace(given, declared={"doc": doc}))
    for part in parts:
        own = replace(case, mask="causal", lengths=(part.stop - (part.start or 0),) * 2)
        made = subject(own, Inputs(*(x[:, part] for x in given.tensors)))
        assert_near(made.gradients, tuple(x[:, part] for x in together.gradients))


def a_group_sums_over_its_heads(subject: Subject, case: BackwardCase) -> None:
    """Heads that share K and V have the dQ of heads with copies of them, and dK and dV are sums over the copies."""
    given = Inputs.of(case)
    heads, heads_kv = case.heads
    copies = {name: getattr(given, name).repeat_interleave(heads // heads_kv, 2) for name in ("k", "v")}
    made, apart = (
        subject(case, given),
        subject(replace(case, heads=(heads, heads)), replace(given, **copies)),
    )
    assert_same((made.dq,), (apart.dq,))
    sums = (x.unflatten(2, (heads_kv, -1)).double().sum(3) for x in (apart.dk, apart.dv))
    assert_near((made.dk, made.dv), tuple(sums))


def a_head_keeps_to_itself(subject: Subject, case: BackwardCase) -> None:
    """dO of one head alone gives dQ of that head, and dK and dV of the head that it reads."""
    given = Inputs.of(case)
    head, group = case.heads[0] - 1, case.heads[0] // case.heads[1]
    alone = torch.zeros_like(given.dout)
    alone[:, :, head] = given.dout[:, :, head]
    made = subject(case, replace(given, dout=alone))
    for x, own in zip(made.gradients, (head, head // group, head // group), strict=True):
        others = [i for i in range(x.shape[2]) if i != own]
        assert not x[:, :, others].any()
    assert_same((made.dq[:, :, head],), (subject(case, given).dq[:, :, head],))


def a_window_of_all_is_full(subject: Subject, case: BackwardCase) -> None:
    """A window as long as the sequences gives the bits of no mask, of one out and lse."""
    given = Inputs.of(case)
    made = subject(replace(case, mask="full"), given)
    wide = replace(case, mask=f"window({sum(case.lengths)}, {sum(case.lengths)})")
    assert_same(subject.backward(wide, given, made.out, made.lse), made.gradients)


def powers_of_two_pass_through(subject: Subject, case: BackwardCase) -> None:
    """Times 2^n, dO and dlse give 2^n times the gradients, bit by bit; in bf16, whose exponents are those of f32."""
    case = replace(case, inputs="bf16")
    given = Inputs.of(case)
    batch, rows, heads, _ = given.q.shape
    dlse = torch.randn(batch, heads, rows, generator=torch.Generator().manual_seed(8))
    once = subject(case, replace(given, dlse=dlse)).gradients
    assert all(x.any() for x in once)
    for factor in (2.0**-30, 2.0**40):
        scaled = subject(case, replace(given, dout=factor * given.dout, dlse=factor * dlse))
        assert_same(scaled.gradients, tuple(factor * x for x in once))


def what_sees_nothing_touches_nothing(subject: Subject, case: BackwardCase) -> None:
    """Rows without keys and keys without rows have gradients of 0, and what stands in them reaches no other."""
    given, mask = Inputs.of(case), case.kernel("simulator").spec.mask_expr
    ones = torch.ones_like(given.dout)
    sums = attention_gradients(given.q, given.k, given.v, ones, mask, declared=given.declared)
    made = subject(case, given)
    rows, keys = made.lse.isneginf().transpose(1, 2), ~sums.dv.any(-1)  # (batch, rows or keys, heads)
    assert rows.any() and not made.dq[rows].any()
    assert keys.any() and not made.dk[keys].any() and not made.dv[keys].any()
    poisoned = {name: getattr(given, name).clone() for name in ("q", "k", "v", "dout")}
    for name, x in poisoned.items():
        x[rows if name in ("q", "dout") else keys] = POISON
    assert_same(subject(case, replace(given, **poisoned)).gradients, made.gradients)


def a_factor_of_the_score_is_one_of_the_scale(subject: Subject, case: BackwardCase) -> None:
    """`score * slopes[h]` with slopes of 2 has the gradients of twice the softmax_scale."""
    given = Inputs.of(case)
    times = replace(case, score="score * slopes[h]", scale=case.softmax_scale)
    twice = replace(case, score="score", scale=2 * case.softmax_scale)
    slopes = torch.full((case.heads[0],), 2.0)
    made = subject(times, replace(given, declared={**given.declared, "slopes": slopes}))
    assert_near(made.gradients, subject(twice, given).gradients)
