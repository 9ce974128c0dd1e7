"""What the kernels of this folder mean, in torch: what CPU tensors get, and what the emitted texts are held against."""

import math
from collections.abc import Sequence

import torch

from attngen.simulate.simulated_softmax import LARGEST, LN_2, LOG2_E, joined
from attngen.torch_state import torch_defaults


@torch_defaults()
def merged(
    outs: Sequence[torch.Tensor],
    lses: Sequence[torch.Tensor],
    sink: torch.Tensor | None,
    layout: str,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge parts that have been checked; arguments as of `attngen.merge_states`.

    Args:
        outs: of the parts, like lses.
        lses: see outs.
        sink: a logit of each head, or None.
        layout: of outs.
        dtype: of the result.

    Returns:
        out, dense, in f32 until it is rounded, and lse.
    """
    natural = torch.stack([lse.masked_fill(lse == math.inf, -math.inf) for lse in lses])
    largest = natural.amax(0).clamp(min=-LARGEST)
    weights = torch.exp2((natural - largest) * LOG2_E)
    total = weights.sum(0)
    by = torch.where(total == 0, 0.0, total.reciprocal())
    lse = largest + torch.log2(total) * LN_2
    if sink is not None:
        by, lse = joined(by, lse, sink.float().unsqueeze(-1))
    out = torch.zeros_like(outs[0], dtype=torch.float32, memory_format=torch.contiguous_format)
    rows = _heads_first(out, layout)
    for part, weight, of_part in zip(outs, weights, natural, strict=True):
        seen = _heads_first(part, layout).float().masked_fill((of_part == -math.inf).unsqueeze(-1), 0.0)
        rows += weight.unsqueeze(-1) * seen
    rows *= by.unsqueeze(-1)
    return out.to(dtype), lse


def _heads_first(x: torch.Tensor, layout: str) -> torch.Tensor:
    """A view with rows as lse has them: (batch, heads, seqlen, head_dim), or (heads, tokens, head_dim)."""
    return x if x.dim() == 4 and layout == "bhsd" else x.transpose(-3, -2)
