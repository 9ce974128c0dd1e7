"""Attention of transformers' layers by the book, in f64: what models are judged by."""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "exact"


def exact_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Softmax of all scores, row by row; a row that sees no key is 0, or what its sink leaves of it."""
    assert query.dtype == torch.float64
    group = query.shape[1] // key.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = query @ k.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        assert attention_mask.dtype == torch.bool
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    elif query.shape[2] > 1 and (module.is_causal if is_causal is None else is_causal):
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    sinks = torch.full((query.shape[1],), -torch.inf) if s_aux is None else s_aux
    sinks = sinks.to(scores)[None, :, None, None].expand(*scores.shape[:3], 1)
    p = torch.cat((scores, sinks), -1).softmax(-1).nan_to_num()[..., :-1]
    return (p @ v).transpose(1, 2).contiguous(), None


def register_exact() -> None:
    """Make it known to transformers, with masks as tensors."""
    AttentionInterface.register(NAME, exact_attention)
    whole = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    AttentionMaskInterface.register(NAME, lambda **named: sdpa_mask(**{**named, **whole}))
