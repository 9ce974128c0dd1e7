"""Masks and scores of the language, with values for what they declare; a kernel of each is judged by the reference.

Shared by the tests of the simulator and of the GPU.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import attngen
from attngen.check.accuracy import Accuracy, compare
from attngen.check.inputs import Shape, random_inputs

WINDOW_AND_SINKS = "window(7, 0) or sinks(2)"
TENSORS = {
    "doc": "i32[batch, seqlen_k]",
    "allow": "bool[num_heads_q, seqlen_q, seqlen_k]",
    "lens": "i32[batch]",
    "g": "f32[batch, seqlen_k]",
    "rank": "u8[seqlen_q]",
    "slopes": "f32[num_heads_q]",
    "bias": "bf16[num_heads_q, seqlen_q, seqlen_k]",
    "t": "f16[n, 4]",
}
SCALARS = {"reach": "i32", "cap": "f32 = 2.0", "strict": "bool"}
GIVEN: Mapping[str, Any] = {"reach": 3, "cap": 1.5, "strict": True}
"""What calls pass for the scalars."""


@dataclass(frozen=True)
class LanguageCase:
    """A mask and a score, and the scale of the call."""

    mask: str = "full"
    score: str = "score"
    softmax_scale: float | None = None

    def __str__(self) -> str:
        scale = "" if self.softmax_scale is None else f", scale {self.softmax_scale}"
        return f"{self.mask} | {self.score}{scale}"

    @property
    def declarations(self) -> dict[str, dict[str, str]]:
        """The tensors and scalars of a spec."""
        text = f"{self.mask} {self.score}"

        def read(names: Mapping[str, str]) -> dict[str, str]:
            return {name: how for name, how in names.items() if _has_word(text, name)}

        return {"tensors": read(TENSORS), "scalars": read(SCALARS)}

    def spec(self, **fields: Any) -> dict[str, Any]:
        """A spec of the case, with more fields."""
        return {"mask": self.mask, "score": self.score, **self.declarations, **fields}

    def arguments(self, shape: Shape, device: str = "cpu") -> dict[str, Any]:
        """A value by name for all that the spec declares."""
        declared = self.declarations
        made = {name: _VALUES[name](shape, _generator(1)).to(device) for name in declared["tensors"]}
        return made | {name: GIVEN[name] for name in declared["scalars"]}

    def judge(self, made: attngen.Kernel, shape: Shape, device: str = "cpu") -> Accuracy:
        """How far a kernel of the case is from the reference; lse too."""
        dims, number = (made.plan.head_dim_qk, made.plan.head_dim_v), made.plan.inputs.torch_name
        q, k, v = random_inputs(shape, *dims, getattr(torch, number), device, seed=2)
        declared = self.arguments(shape, device)
        out, lse = made(q, k, v, softmax_scale=self.softmax_scale, return_lse=True, **declared)
        return compare(
            out,
            lse,
            q,
            k,
            v,
            made.spec.mask_expr,
            self.softmax_scale,
            score=made.spec.score_expr,
            declared=declared,
            block_n=made.plan.block_n,
        )


def _has_word(text: str, name: str) -> bool:
    return name in "".join(c if c.isalnum() or c == "_" else " " for c in text).split()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


Draw = Callable[[Shape, torch.Generator], torch.Tensor]
_VALUES: dict[str, Draw] = {
    "doc": lambda x, g: torch.randint(0, 3, (x.batch, x.seqlen_k), generator=g).sort(-1).values.int(),
    "allow": lambda x, g: torch.rand(x.heads, x.seqlen_q, x.seqlen_k, generator=g) < 0.3,
    "lens": lambda x, g: (x.seqlen_k - torch.arange(x.batch) * (x.seqlen_k // 2)).int(),
    "g": lambda x, g: torch.rand(x.batch, x.seqlen_k, generator=g),
    "rank": lambda x, g: torch.randint(0, 256, (x.seqlen_q,), generator=g).to(torch.uint8),
    "slopes": lambda x, g: torch.rand(x.heads, generator=g),
    "bias": lambda x, g: torch.randn(x.heads, x.seqlen_q, x.seqlen_k, generator=g).bfloat16(),
    "t": lambda x, g: torch.randn(5, 4, generator=g).half(),
}

MASKS = (
    WINDOW_AND_SINKS,
    "window(5, 2)",
    "prefix(9)",
    "document(doc)",
    "document(doc) and causal",
    "chunked(8)",
    "dilated(3) and causal",
    "neighbourhood(5, 1)",
    "block_diffusion(16, 4)",
    "allow[h, q_idx, kv_idx]",
    "kv_idx < lens[b]",
    "g[b, kv_idx] < 0.5 or causal",
    "kv_idx * 16 < rank[q_idx] or kv_idx == 20",
    "(g[b, kv_idx] < 0.5) == (g[b, q_pos] < 0.5) and strict != (kv_idx == 1)",
    "kv_idx <= q_pos + reach and (strict or kv_idx != 1)",
    "false",
    "kv_idx < 0 or kv_idx * q_idx < 0 - 1",
    "kv_idx != q_idx",
    "kv_idx > q_pos + 3",
)
"""Most are walked; of the last but two no pair is seen, which the classes find block by block."""
SCORES = (
    "softcap(score, 2.0)",
    "softcap(score, cap)",
    "score + alibi(slopes)",
    "score + bias[h, q_idx, kv_idx]",
    "score * 2.0 if kv_idx % 2 == 0 else -inf",
    "score + t[0, min(kv_idx, 3)]",
    "score - 0.25 * abs(q_pos - kv_idx)",
    "3.0 * score",
    "-score",
)
CASES = (
    *(LanguageCase(mask) for mask in MASKS),
    *(LanguageCase(mask, score) for mask in ("causal", WINDOW_AND_SINKS) for score in SCORES),
    *(
        LanguageCase(mask, score, scale)
        for scale in (-0.7, 0.0)
        for mask, score in (
            (WINDOW_AND_SINKS, "score"),
            (WINDOW_AND_SINKS, "softcap(score, 2.0)"),
            ("causal", "score + alibi(slopes)"),
            ("document(doc)", "score * 2.0 if kv_idx % 2 == 0 else -inf"),
        )
    ),
)
