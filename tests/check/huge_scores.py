"""Scores that are huge and finite, as padding makes them, and what softmax of f32 gives for them.

Shared by the tests of the simulator and of the GPU. Rows have good keys beside padded ones, or padded ones alone: then
all scores are one number as f32 has it, and O is the mean of V.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

SEQLEN_Q, SEQLEN_K, HEADS, DIM = 40, 200, 2, 64
CONSTANTS = (
    *(-1e4, -1e9, -2e9, -4e9, -1e10, -9e15, -1e16, -1e20, -1e30, -1e38),
    *(-2.3819763e38, -3.3895314e38, -3.4028234663852886e38),
    *(1e9, 1e12, 1e30, 1e38, 3e38, 3.4028234663852886e38),
)
"""Of models, of finfo.min of bf16 and f32, and of both signs up to the largest number."""
WHOLE_NUMBERS = (-3e7, -1e8, -1.2e8, 1e8, 1.2e8)
"""Scores near which f32 has steps of 2 or 8: some rows have a few scores of different weights. Not for e4m3, whose P is
too coarse for so few."""
ERROR = {"e4m3": 0.1, "bf16": 0.015, "f16": 0.004, "f32": 1e-5}
"""Of an element of O of magnitude up to 3; P has 3, 8 or 11 bits."""
DTYPES = {"f16": torch.float16, "f32": torch.float32}


@dataclass(frozen=True)
class Padding:
    """A score that says of keys past `lens` how they count, by a number `fill`, and the same of f32 scores in torch."""

    score: str
    tensors: tuple[str, ...]
    modified: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def _past(scores: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
    return torch.arange(scores.shape[-1], device=scores.device) >= lens


PADDINGS = {
    "added": Padding(
        "score + where(kv_idx >= lens[b], fill[h], 0.0)",
        ("lens: i32[batch]", "fill: f32[num_heads_q]"),
        lambda scores, lens, fill: scores + torch.where(_past(scores, lens), fill, 0.0),
    ),
    "chosen": Padding(
        "where(kv_idx >= lens[b], fill[h], score)",
        ("lens: i32[batch]", "fill: f32[num_heads_q]"),
        lambda scores, lens, fill: torch.where(_past(scores, lens), fill, scores),
    ),
    "a bias": Padding(
        "score + bias[kv_idx]",
        ("bias: f32[seqlen_k]",),
        lambda scores, lens, fill: scores + torch.where(_past(scores, lens), fill, 0.0),
    ),
}


def spec(padding: Padding, inputs: str, **more: Any) -> dict[str, Any]:
    """A spec of head_dim 64 with that score."""
    return {
        "problem": {"head_dim": DIM},
        "precision": {"inputs": inputs},
        "tensors": dict(text.split(": ") for text in padding.tensors),
        "score": padding.score,
        **more,
    }


def random_operands(
    inputs: str, device: str, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of one batch; for e4m3 they are bf16."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, length, HEADS, DIM) for length in (SEQLEN_Q, SEQLEN_K, SEQLEN_K))
    drawn = (torch.randn(*shape, generator=generator, dtype=torch.float32) for shape in shapes)
    q, k, v = (x.to(DTYPES.get(inputs, torch.bfloat16)).to(device) for x in drawn)
    return q, k, v


def faults(
    kernel: Callable[..., Any],
    padding: Padding,
    inputs: str,
    fill: float,
    lens: tuple[int, ...] = (0, 100, SEQLEN_K),
    device: str = "cpu",
) -> Iterator[str]:
    """What is wrong with calls of a kernel of `spec` where keys from one of `lens` on are padded by `fill`."""
    q, k, v = random_operands(inputs, device)
    products = (q.float().transpose(1, 2) @ k.float().transpose(1, 2).mT) * DIM**-0.5
    for length in lens:
        given = {
            "lens": torch.tensor([length], dtype=torch.int32, device=device),
            "fill": torch.full((HEADS,), fill, dtype=torch.float32, device=device),
            "bias": torch.where(torch.arange(SEQLEN_K, device=device) >= length, fill, 0.0).float(),
        }
        declared = {text.split(":")[0] for text in padding.tensors}
        out, lse = kernel(q, k, v, return_lse=True, **{name: given[name] for name in declared})
        scores = padding.modified(products, given["lens"], fill)
        want = (scores.softmax(-1) @ v.float().transpose(1, 2)).transpose(1, 2)
        error = (out.float() - want).abs().max().item()
        of_lse = ((lse - scores.logsumexp(-1)).abs() / (1 + scores.logsumexp(-1).abs())).max().item()
        if not error < ERROR[inputs]:
            yield f"{fill} from key {length} on: out is off by {error}"
        if not of_lse < (0.02 if inputs == "e4m3" else 1e-5):
            yield f"{fill} from key {length} on: lse is off by {of_lse} of it"
