"""Attention in f64 with everything drawn out, for faces to be held against."""

from typing import Any

import torch


def attention64(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    softcap: float = 0.0,
    sink: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out, (..., seqlen_q, heads, head_dim_v), and lse, (..., heads, seqlen_q), f64, which autograd differentiates.

    Args:
        q: (..., seqlen_q, heads_q, head_dim).
        k: (..., seqlen_k, heads_kv, head_dim).
        v: (..., seqlen_k, heads_kv, head_dim_v).
        seen: pairs that count, as far as (..., heads_q, seqlen_q, seqlen_k) asks.
        bias: added to scores, likewise.
        softcap: 0 for none.
        sink: (heads_q).
        scale: 1/sqrt(head_dim) where None.
    """
    q, k, v = (x.double().transpose(-3, -2) for x in (q, k, v))
    group = q.shape[-3] // k.shape[-3]
    k, v = (x.repeat_interleave(group, -3) for x in (k, v))
    score = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    if bias is not None:
        score = score + bias.double()
    if seen is not None:
        score = score.masked_fill(~seen, -torch.inf)
    if sink is not None:
        logits = sink.double()[:, None, None].expand(*score.shape[:-1], 1)
        score = torch.cat([score, logits], -1)
        v = torch.cat([v, torch.zeros_like(v[..., :1, :])], -2)
    lse = score.logsumexp(-1)
    weights = (score - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp()
    return (weights @ v).transpose(-3, -2), lse


def draw(*shapes: tuple[int, ...], seed: int = 0, **options: Any) -> list[torch.Tensor]:
    """Tensors from N(0, 1), f32."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float32, **options) for shape in shapes]


def assert_near(found: torch.Tensor, exact: torch.Tensor, bound: float = 1e-5, is_zero: bool = False) -> None:
    """Equal shapes, and no element further apart than f32 loses of numbers around 1; -inf stands beside -inf."""
    assert found.shape == exact.shape, (found.shape, exact.shape)
    is_infinite = exact.isneginf()
    assert torch.equal(found.isneginf(), is_infinite)
    apart = (found.detach().double() - exact.detach()).masked_fill(is_infinite, 0.0).abs().max()
    assert float(apart) <= bound, float(apart)
    assert is_zero or float(exact.detach().masked_fill(is_infinite, 0.0).abs().max()) > 0.05


def starts(*lengths: int) -> torch.Tensor:
    """Where sequences of these lengths begin, and where the last one ends, i32."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
