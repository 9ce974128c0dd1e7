"""Who takes a call of scaled_dot_product_attention, and why not others."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.bias import CausalBias, CausalVariant

from attngen.errors import ArgumentError, RefusedError
from attngen.kernel import Kernel
from attngen.sdpa.jagged import translated_jagged
from attngen.sdpa.override import check_bias, standing
from attngen.sdpa.question import Causal, Question
from attngen.sdpa.torchs_backends import FUSED, TorchsCall
from attngen.sdpa.translation import translated


@dataclass(frozen=True)
class Answer:
    """What attngen makes of a call.

    Attributes:
        kernel: its name.
        mask: the text that says which keys a query sees.
        score: the text that says what becomes of a score.
    """

    kernel: str
    mask: str
    score: str


@dataclass(frozen=True)
class Report:
    """What becomes of a call.

    Attributes:
        taken: whether attngen takes it, now that the override stands or does not.
        answer: by which kernel it does, or would; None where there is none.
        reasons: why attngen does not take the call.
        torchs_choice: which of its backends torch would take.
        torchs_reasons: by fused backend, what torch has against it, of dense CUDA tensors; empty where nothing is.
    """

    taken: bool
    answer: Answer | None
    reasons: tuple[str, ...]
    torchs_choice: str
    torchs_reasons: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        lines = [f"taken by {'attngen' if self.taken else f'torch ({self.torchs_choice})'}"]
        if self.answer is not None:
            lines += [f"  {name}: {text}" for name, text in vars(self.answer).items()]
        lines += [f"  not by attngen: {reason}" for reason in self.reasons]
        lines += [f"  torch would take: {self.torchs_choice}"] * self.taken
        for name, reasons in self.torchs_reasons.items():
            lines.append(f"  torch's {name}: {'; '.join(reasons) or 'could take it'}")
        return "\n".join(lines)


def explain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Report:
    """Print who takes a call of scaled_dot_product_attention with these arguments, and return it.

    Where attngen does not, or would not if it were enabled, all its reasons are told. Nothing is computed, but a kernel
    that takes the call is compiled.

    Raises:
        ArgumentError: query, key or value is no tensor.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, torch.Tensor):
            raise ArgumentError(name, type(x).__name__, "a torch tensor")
    answer: Answer | None = None
    reasons: list[str] = []
    try:
        options = (attn_mask, dropout_p, is_causal, scale, enable_gqa)
        answer = (_of_nested if query.is_nested else _of_dense)(query, key, value, *options)
    except RefusedError as refusal:
        reasons += refusal.reasons
    override, device = standing(), query.device.type
    if override is None:
        reasons.append("it is not enabled: attngen.sdpa.enable()")
    elif device not in override.devices:
        reasons.append(f"it is enabled for {', '.join(override.devices)}: enable(devices=({device!r}, ...))")
    mask = attn_mask
    if isinstance(attn_mask, CausalBias):
        # Before it writes a bias out, torch asks for backends without a mask.
        is_causal, mask = attn_mask.variant == CausalVariant.UPPER_LEFT, None
    of_torch = TorchsCall(query, key, value, mask, dropout_p, is_causal, enable_gqa, scale)
    choice = "as it chooses for nested tensors" if query.is_nested else of_torch.choice()
    asked = FUSED if query.is_cuda and not query.is_nested else ()
    torchs_reasons = {backend: of_torch.reasons_against(backend) for backend in asked}
    report = Report(not reasons, answer, tuple(reasons), choice, torchs_reasons)
    print(report)
    return report


def _of_dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Answer:
    causal: Causal = "top_left" if is_causal else "no"
    bias, mask = (attn_mask, None) if isinstance(attn_mask, CausalBias) else (None, attn_mask)
    if bias is not None:
        causal = "top_left" if bias.variant == CausalVariant.UPPER_LEFT else "bottom_right"
    question = Question(query, key, value, mask, dropout_p, causal, scale, enable_gqa)
    if bias is not None:
        check_bias(bias, question)
    call = translated(question)
    return Answer(call.kernel().serving(call.rows[1]).name, call.form.mask, call.form.score)


def _of_nested(query: torch.Tensor, *rest: Any) -> Answer:
    call = translated_jagged(query, *rest)
    assert isinstance(call.kernel, Kernel)  # nothing is captured where this is asked
    return Answer(call.kernel.serving(call.rows[1]).name, call.kernel.plan.mask_text, "score")
