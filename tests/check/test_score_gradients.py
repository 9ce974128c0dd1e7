"""The oracle of gradients of what is declared: finite differences of fp64 attention."""

from typing import Any

import pytest
import torch

import attngen
from attngen.check.gradients import declared_gradients
from attngen.check.reference import attention

SCORES: dict[str, tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, float]]] = {
    "score + bias[b, h, q_idx, kv_idx]": ({"bias": ("f32[batch, num_heads_q, m, n]", (2, 4, 5, 6))}, {}),
    "softcap(score + bias[h_kv, kv_idx], cap)": ({"bias": ("f32[num_heads_kv, n]", (2, 4))}, {"cap": 1.5}),
    "score + alibi(slopes)": ({"slopes": ("f32[num_heads_q]", (4,))}, {}),
    "score + table[clamp(kv_idx - q_idx, -2, 1) + 2, h]": ({"table": ("f32[4, num_heads_q]", (4, 4))}, {}),
    "score * gain + t[q_idx] * t[kv_idx]": ({"t": ("f32[n]", (4,))}, {"gain": 0.5}),
}
STEP = 1e-5


@pytest.mark.parametrize("mask", ["causal", "kv_idx % 3 != q_idx % 2"])
@pytest.mark.parametrize("score", SCORES)
def test_gradients_are_slopes_of_attention(score: str, mask: str) -> None:
    """Of a weighted sum of out and lse, by each element and scalar; clamped and repeated lookups among them.

    Central differences of 1e-5 leave 1e-10 of third derivatives and 1e-11 of rounding.
    """
    tensors, scalars = SCORES[score]
    spec = attngen.load(
        {
            "problem": {"head_dim": 8},
            "target": "simulator",
            "mask": mask,
            "score": score,
            "tensors": {name: text for name, (text, _) in tensors.items()},
            "scalars": dict.fromkeys(scalars, "f32"),
        }
    )
    torch.manual_seed(1)
    q, dout = (torch.randn(2, 5, 4, 8, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(2, 6, 2, 8, dtype=torch.float64) for _ in range(2))
    dlse = torch.randn(2, 4, 5, dtype=torch.float64)
    declared: dict[str, Any] = {
        name: torch.randn(shape, dtype=torch.float64) for name, (_, shape) in tensors.items()
    }
    declared |= {name: torch.tensor(value, dtype=torch.float64) for name, value in scalars.items()}

    def loss() -> float:
        out, lse = attention(q, k, v, spec.mask_expr, score=spec.score_expr, declared=declared)
        seen = lse.isfinite()
        return ((out * dout).sum() + (lse * dlse)[seen].sum()).item()

    found = declared_gradients(
        tuple(declared), q, k, v, dout, spec.mask_expr, dlse=dlse, score=spec.score_expr, declared=declared
    )
    for name, x in declared.items():
        expected = torch.zeros_like(x)
        for at in range(x.numel()):
            element = x.view(-1)[at]
            middle, ends = element.item(), []
            for end in (middle + STEP, middle - STEP):
                x.view(-1)[at] = end
                ends.append(loss())
            x.view(-1)[at] = middle
            expected.view(-1)[at] = (ends[0] - ends[1]) / (2 * STEP)
        assert expected.any()
        torch.testing.assert_close(found[name], expected, rtol=1e-7, atol=1e-8)
