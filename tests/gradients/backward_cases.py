"""Calls whose gradients are held against fp64: masks and scores of every class, lengths beside the tiles' edges."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import attngen
from attngen.bind import Given, bind, check_arguments
from attngen.check.gradients import GradientAccuracy, compare_gradients
from attngen.plan import GRADIENTS_INTAKE, Call
from attngen.simulate.launches import run_call
from attngen.spec_call import GRADIENTS

TENSORS = {
    "doc": "i32[batch, seqlen_k]",
    "slopes": "f32[num_heads_q]",
    "bias": "bf16[num_heads_q, seqlen_q, seqlen_k]",
    "lens": "i32[batch]",
}
LENGTHS = ((1, 1), (1, 3), (3, 1), (64, 64), (63, 65), (70, 130), (130, 70))


@dataclass(frozen=True)
class BackwardCase:
    """A spec, and the sizes of a call.

    Attributes:
        heads: of Q and of K and V.
        scale: softmax_scale; of head_dim where None.
    """

    mask: str = "full"
    score: str = "score"
    lengths: tuple[int, int] = (70, 130)
    heads: tuple[int, int] = (2, 1)
    head_dim: tuple[int, int] = (32, 32)
    inputs: str = "bf16"
    scale: float | None = None
    batch: int = 2
    spec: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        dims = "x".join(map(str, self.head_dim))
        more = "".join(f" {key}={value}" for key, value in self.spec.items())
        return f"{self.inputs} d{dims} {self.mask} | {self.score} {self.lengths} {self.heads}{more}"

    @property
    def softmax_scale(self) -> float:
        """The one that counts."""
        return self.head_dim[0] ** -0.5 if self.scale is None else self.scale

    def kernel(self, target: str) -> attngen.Kernel:
        """The kernel, with a backward pass."""
        read = {name: text for name, text in TENSORS.items() if name in self.mask + self.score}
        qk, v = self.head_dim
        return attngen.compile(
            {
                "target": target,
                "problem": {"head_dim": {"qk": qk, "v": v}},
                "precision": {"inputs": self.inputs},
                "mask": self.mask,
                "score": self.score,
                "tensors": read,
                "gradients": ["q", "k", "v"],
                **self.spec,
            }
        )

    def inputs_on(self, device: str) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Q, K, V and dO, N(0, 1), and what the spec declares."""
        generator = torch.Generator().manual_seed(7)
        (rows, keys), (heads, heads_kv), (qk, v) = self.lengths, self.heads, self.head_dim
        shapes = ((rows, heads, qk), (keys, heads_kv, qk), (keys, heads_kv, v), (rows, heads, v))
        dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[self.inputs]
        drawn = [torch.randn(self.batch, *shape, generator=generator).to(device, dtype) for shape in shapes]
        declared = {
            "doc": (torch.arange(keys, dtype=torch.int32) // 20).expand(self.batch, -1),
            "slopes": torch.rand(heads, generator=generator) / 8,
            "lens": torch.arange(self.batch, dtype=torch.int32) * keys // 2 + 1,
        }
        if "bias" in self.score:  # of two million rows there is no room for it
            declared["bias"] = torch.randn(heads, rows, keys, generator=generator).bfloat16()
        return drawn, {name: x.to(device) for name, x in declared.items() if name in self.mask + self.score}

    def verdict(
        self,
        got: tuple[torch.Tensor, ...],
        drawn: list[torch.Tensor],
        declared: Mapping[str, Any],
        **more: Any,
    ) -> GradientAccuracy:
        """The rule on gradients of this call."""
        spec = self.kernel("simulator").spec
        return compare_gradients(
            got, *drawn, spec.mask_expr, self.scale, score=spec.score_expr, declared=declared, **more
        )


MASKS = (
    "causal",
    "window(40, 3)",
    "prefix(17)",
    "causal and document(doc)",
    "kv_idx < lens[b]",
    "kv_idx % 3 != q_idx % 2",
    "false",
)
SCORES = (
    "softcap(score, 3.0)",
    "score + alibi(slopes)",
    "score + bias[h, q_idx, kv_idx]",
    "score * 0.5",
    "tanh(score) * slopes[h] + score",
)
SORTED: Mapping[str, Any] = {"tensors": {"doc": "i32[batch, seqlen_k] sorted"}}
CASES = (
    *(BackwardCase(lengths=lengths) for lengths in LENGTHS),
    *(BackwardCase("causal", lengths=lengths) for lengths in LENGTHS),
    *(BackwardCase(mask, lengths=(130, 130), heads=(4, 2)) for mask in MASKS),
    *(BackwardCase("causal", score, heads=(4, 2)) for score in SCORES),
    BackwardCase("causal and document(doc)", "softcap(score, 3.0)", lengths=(90, 90)),
    BackwardCase("causal and document(doc)", "softcap(score, 3.0)", (90, 70), (4, 2), spec=SORTED),
    BackwardCase("document(doc)", lengths=(70, 130), heads=(4, 2), spec=SORTED),
    BackwardCase("causal", heads=(3, 1), head_dim=(64, 32)),
    BackwardCase("causal", scale=-0.3),
    BackwardCase("causal", scale=0.0),
    BackwardCase(inputs="f16", heads=(1, 1)),
)


def run_backward(
    case: BackwardCase, kernel: attngen.Kernel, call: Call | None = None, **changed: Any
) -> tuple[torch.Tensor, ...]:
    """dq, dk and dv of a case, of another call than the kernel's own, or by a simulator with changed Steps."""
    given = given_backward(case, kernel)
    return run_given(call or kernel.call, given, GRADIENTS, case.scale, **changed)


def given_backward(case: BackwardCase, kernel: attngen.Kernel) -> Given:
    """What the backward pass of a case is given, the forward's results included."""
    drawn, declared = case.inputs_on("cpu")
    out, lse = kernel(*drawn[:3], case.scale, return_lse=True, **declared)
    return _given(kernel, drawn, {"out": out, "lse": lse, **declared}, case.scale)


def _given(
    kernel: attngen.Kernel, drawn: list[torch.Tensor], named: Mapping[str, Any], scale: float | None
) -> Given:
    q, k, v, dout = drawn
    named = {"dout": dout, **named}
    return check_arguments(kernel.manifest, q, k, v, scale, {}, "bshd", named, GRADIENTS_INTAKE)


def run_given(
    call: Call, given: Given, wanted: Sequence[str], scale: float | None = None, **changed: Any
) -> tuple[torch.Tensor, ...]:
    """Some gradients of a call, of which only the kernels run that they need."""
    made = run_call(call, bind(call.manifest, given, tuple(wanted), 2, scale), **changed)
    return tuple(made[name] for name in wanted)


def simulate_backward(
    kernel: attngen.Kernel,
    drawn: list[torch.Tensor],
    named: Mapping[str, Any],
    scale: float | None,
    call: Call | None = None,
    **changed: Any,
) -> tuple[torch.Tensor, ...]:
    """dq, dk and dv by a simulator that may be changed.

    Args:
        kernel: with a backward pass.
        drawn: q, k, v and dout.
        named: out, lse, dlse if it is there, and what the spec declares.
        scale: softmax_scale.
        call: instead of the kernel's own.
        **changed: as of `run_call`: `steps`, `observer`.
    """
    given = _given(kernel, drawn, named, scale)
    return run_given(call or kernel.call, given, GRADIENTS, scale, **changed)
