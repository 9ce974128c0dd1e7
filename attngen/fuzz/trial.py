"""A case at work: its inputs, its kernel, what that made of them, and how it is called again.

Properties ask a trial for other runs of the same kernel; what holds of them is theirs (`properties_of_outputs.py`,
`properties_of_gradients.py`).
"""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import torch

from attngen.check.accuracy import Accuracy
from attngen.check.judging import judge as judged
from attngen.check.problem import Problem
from attngen.expr import shown_keys
from attngen.fuzz.case import Case
from attngen.fuzz.states import STATES
from attngen.plan import KernelPlan
from attngen.spec import Spec

Complaint = str | None
SIMULATOR_ULPS = 16
"""What two simulated runs of one row may differ by, where torch's vectors fall otherwise."""


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


class Trial:
    """A case at work.

    Attributes:
        q, k, v: its inputs, (batch, seqlen, heads, head_dim), or (tokens, heads, head_dim) where they are ragged.
        declared: what it passes by name.
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
        with self.state():
            return (subject or self.subject)(q, k, v, **options, **self.declared)

    def gradients(
        self,
        scale: float = 1.0,
        batch: slice = slice(None),
        keys: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """All gradients, in bshd: of a multiple of those of out and lse, of a slice of the batch, of other K and V."""
        assert self.dout is not None
        dlse = None if self.dlse is None else scale * self.dlse[batch]
        k, v = keys or (self.k, self.v)
        tensors = (scale * self.dout if scale != 1.0 else self.dout, self.q, k, v, self.out)
        turned = (self.turned(x[batch]) for x in tensors)
        scale_and_layout = (self.case.softmax_scale, self.case.layout)
        with self.state():
            made = self.subject.backward(*turned, self.lse[batch], dlse, *scale_and_layout, **self.declared)
        return (*map(self.turned, made[:3]), *made[3:])

    @cached_property
    def first_gradients(self) -> tuple[torch.Tensor, ...]:
        """The gradients of the case."""
        return self.gradients()

    @property
    def hidden_keys(self) -> torch.Tensor:
        """Of dense tensors, the keys that the mask hides from every query of all heads that share them.

        Returns:
            (batch, seqlen_k, num_heads_kv), true where one is.
        """
        shown = shown_keys(self.mask)
        problem = Problem.read(self.q, self.k, self.v, shown, None, "bshd", None, None, self.declared)
        b, h, q_idx, kv_idx = problem.every_index()
        batch, keys, heads, _ = self.k.shape
        with self.state():
            seen = problem.sees(b, h, q_idx[..., :1, :], kv_idx)
        of_heads = seen.expand(batch, heads * problem.group, 1, keys).reshape(
            batch, heads, problem.group, keys
        )
        return ~of_heads.any(2).transpose(1, 2)

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor from bshd to the layout of the call, or back; what has no batches is alike in both."""
        return x.transpose(1, 2) if self.case.layout == "bhsd" and x.dim() == 4 else x

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


def largest(x: torch.Tensor) -> float:
    """The largest absolute value, 0 where there is none."""
    return float(x.double().abs().max()) if x.numel() else 0.0
