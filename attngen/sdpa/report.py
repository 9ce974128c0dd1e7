"""Who takes a call of scaled_dot_product_attention, and why not others."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend
from torch.nn.attention.bias import CausalBias, CausalVariant

from attngen.errors import ArgumentError, RefusedError
from attngen.kernel import Kernel
from attngen.sdpa.jagged import translated_jagged
from attngen.sdpa.override import check_bias, standing
from attngen.sdpa.question import Causal, Question
from attngen.sdpa.translation import translated

_BACKENDS = {
    "flash": can_use_flash_attention,
    "efficient": can_use_efficient_attention,
    "cudnn": can_use_cudnn_attention,
}


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
        torchs_reasons: by backend, what torch has against it; empty where nothing is.
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
    of_torch = (query, key, value, mask, dropout_p, is_causal, enable_gqa)
    report = Report(
        not reasons, answer, tuple(reasons), _choice(*of_torch, scale), _torchs_reasons(*of_torch)
    )
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


def _choice(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
    scale: float | None,
) -> str:
    """The backend that torch would take, or that it would raise."""
    if query.is_nested:
        return "as it chooses for nested tensors"
    try:
        number = torch._fused_sdp_choice(
            query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    except RuntimeError as error:
        return f"an error: {str(error).splitlines()[0]}"
    return SDPBackend(number).name.lower()


def _torchs_reasons(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> dict[str, tuple[str, ...]]:
    """What torch's fused backends have against a call, by name; nothing of others than dense CUDA tensors."""
    if not query.is_cuda or query.is_nested:
        return {}
    params = SDPAParams(query, key, value, mask, dropout_p, is_causal, enable_gqa)
    found = {}
    for name, can_use in _BACKENDS.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            can = can_use(params, debug=True)
        told = tuple(str(warning.message).splitlines()[0] for warning in caught)
        found[name] = () if can else told or ("it cannot, and does not say why",)
    return found
