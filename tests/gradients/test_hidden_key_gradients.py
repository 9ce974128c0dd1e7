"""Keys that a mask hides from every query may hold anything: they reach no gradient, and theirs are 0."""

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch

import attngen
from attngen.plan.steps import SyncThreads, ZeroHidden
from attngen.simulate import STEPS_SIMULATED, RoleRun, SimulationFault
from tests.gradients.backward_cases import simulate_backward
from tests.hidden_keys import (
    BESIDE,
    HEADS,
    POISONS,
    declared_by,
    hidden_keys,
    inputs,
    passed,
    without_one,
)

MASKS = (
    "causal and pad[b, kv_idx]",
    "kv_idx < lens[b]",
    "window(90, 30) and kv_idx >= lens[b] - 5 * h_kv",
    "keep[h, kv_idx] and kv_idx % 3 != q_idx % 2",
)
SORTED = "causal and rank[b, kv_idx] < 9"
"""In closed form for kernels that own keys too."""
QUERIES, KEYS = 70, 90
READ = {
    "u": "f32[batch, seqlen_k]",
    "slopes": "f32[num_heads_q]",
    "bias": "bf16[num_heads_q, seqlen_q, seqlen_k]",
}
BIASED = "score + u[b, kv_idx] * slopes[h] + bias[h, q_idx, kv_idx]"
CAPPED = "softcap(score, 5.0)"


@dataclass
class Call:
    """A call of a kernel with a backward pass.

    Attributes:
        hidden: which of its keys no query sees, (batch, keys, heads of K and V).
    """

    kernel: attngen.Kernel
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    declared: dict[str, torch.Tensor]
    hidden: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    dout: torch.Tensor

    def poisoned(self, poison: float) -> "Call":
        """The call with something else in hidden keys, for the out and lse that it had before."""
        k, v = (x.masked_fill(self.hidden.unsqueeze(-1), poison) for x in (self.k, self.v))
        return replace(self, k=k, v=v)

    def gradients(self) -> tuple[torch.Tensor, ...]:
        """All that the spec names."""
        tensors = (self.dout, self.q, self.k, self.v, self.out, self.lse)
        return self.kernel.backward(*tensors, **self.declared)

    def simulated(self, **changed: Any) -> tuple[torch.Tensor, ...]:
        """Those of q, k and v by a simulator that may be changed."""
        drawn, named = (
            [self.q, self.k, self.v, self.dout],
            {"out": self.out, "lse": self.lse, **self.declared},
        )
        return simulate_backward(self.kernel, drawn, named, None, **changed)


@cache
def call_of(
    target: str, mask: str, score: str = "score", dim: int = 64, wanted: tuple[str, ...] = ()
) -> Call:
    read = {name: text for name, text in READ.items() if f"{name}[" in score}
    spec = {
        "target": target,
        "problem": {"head_dim": dim},
        "mask": mask,
        "score": score,
        "tensors": declared_by(mask) | read,
        "gradients": ["q", "k", "v", *wanted],
    }
    kernel, (q, k, v) = attngen.compile(spec), inputs(QUERIES, KEYS, dim)
    random = torch.Generator().manual_seed(5)
    of_score = {
        "u": torch.randn(2, KEYS, generator=random),
        "slopes": torch.rand(HEADS, generator=random),
        "bias": torch.randn(HEADS, QUERIES, KEYS, generator=random).bfloat16(),
    }
    declared = passed(mask, KEYS) | {name: of_score[name] for name in read}
    hidden = hidden_keys(kernel.spec.mask_expr, declared, QUERIES, KEYS)
    out, lse = kernel(q, k, v, return_lse=True, **declared)
    dout = torch.randn(out.shape, generator=random).bfloat16()
    return Call(kernel, q, k, v, declared, hidden, out, lse, dout)


@pytest.mark.matrix
@pytest.mark.parametrize("score", ["score", CAPPED])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("target", "dim"), [("sm_80", 64), ("sm_80", 192), ("sm_90a", 64), ("sm_90a", 192)])
def test_hidden_keys_reach_no_gradient(target: str, dim: int, mask: str, score: str) -> None:
    """The bits are those of a clean call, of warps alike and of warpgroups; heads that share keys may hide others."""
    check(call_of(target, mask, score, dim))


@pytest.mark.parametrize("mask", [MASKS[0], MASKS[3]])
def test_hidden_keys_reach_nothing_that_is_declared(mask: str) -> None:
    """Sums of pairs, of queries and of keys; what a hidden key reads has gradient 0."""
    call = call_of("sm_80", mask, BIASED, wanted=("u", "slopes", "bias"))
    du = check(call)[3]
    assert du.any() and not du[call.hidden.all(-1)].any()


def check(call: Call) -> tuple[torch.Tensor, ...]:
    """Gradients of a clean call, whose bits are those of poisoned ones."""
    expected = call.gradients()
    assert call.hidden.any() and all(x.any() and not x.isnan().any() for x in expected)
    assert not any(x[call.hidden].any() for x in expected[1:3])
    for poison in POISONS:
        assert all(map(torch.equal, call.poisoned(poison).gradients(), expected)), poison
    return expected


@pytest.mark.parametrize(
    ("target", "mask", "score"),
    [
        ("sm_80", MASKS[0], CAPPED),
        ("sm_90a", MASKS[0], "score"),
        ("sm_80", MASKS[1], "score"),
        ("sm_90a", MASKS[1], CAPPED),
        ("sm_80", SORTED, CAPPED),
        ("sm_90a", SORTED, CAPPED),
    ],
)
def test_every_step_for_hidden_keys_is_needed(target: str, mask: str, score: str) -> None:
    """Without one of them a kernel faults, or a NaN of a hidden key comes out.

    But for zeros of K in kernels that own keys and walk, which choose P by the mask behind the slope of its score.
    """
    call = call_of(target, mask, score).poisoned(math.nan)
    of_call, expected = call.kernel.call, call.gradients()
    for plan in of_call.gradients:
        left_out = []
        for step, program in without_one(plan.worker.program):
            left_out.append(type(step))
            shorter = replace(plan, roles=(replace(plan.worker, program=program), *plan.roles[1:]))
            kernels = tuple(shorter if each is plan else each for each in of_call.kernels)
            try:
                found = call.simulated(call=replace(of_call, kernels=kernels))
            except SimulationFault:
                continue
            owns_keys = plan.scheduler.kind == "key_blocks" and plan.key_blocks is None
            is_spare = owns_keys and isinstance(step, ZeroHidden) and step.tile.buffer.name == "k"
            assert all(map(torch.equal, found, expected)) == is_spare, (plan.schedule, step)
        of_warps = {ZeroHidden} if plan.scheduler.kind == "key_blocks" else {ZeroHidden, SyncThreads}
        assert set(left_out) == (of_warps if target == "sm_80" else {ZeroHidden, *BESIDE} - {SyncThreads})


def zeros_of_another_head(step: ZeroHidden, role: RoleRun) -> None:
    """Keys that the first head of a group hides, whatever the others do."""
    STEPS_SIMULATED[ZeroHidden](replace(step, by_group=False), role)


def test_heads_that_share_keys_hide_them_together() -> None:
    """Where one of them sees a key, its gradients are what they are."""
    call = call_of("sm_90a", MASKS[3])
    steps = {**STEPS_SIMULATED, ZeroHidden: zeros_of_another_head}
    dq, dk, dv = call.simulated(steps=steps)
    expected = call.gradients()
    assert torch.equal(dq, expected[0]) and not torch.equal(dk, expected[1])
