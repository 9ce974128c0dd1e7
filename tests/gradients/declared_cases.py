"""Calls with gradients of what a spec declares: every class of owners, broadcast, clamped, and beside GQA and masks."""

from dataclasses import dataclass, field
from typing import Any

import torch

import attngen
from attngen.check.gradients import GradientAccuracy, compare_gradients

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
ALIBI = "score + alibi(slopes)"
T5 = "score + table[h, clamp(kv_idx - q_idx, -8, 7) + 8]"


@dataclass(frozen=True)
class DeclaredCase:
    """A spec with gradients of all floats that it declares, and the sizes of a call.

    Attributes:
        tensors: as declared, with the shape of each where a name of its own binds it: `{"t": ("f32[n]", (50,))}`.
        scalars: values of declared f32 scalars.
        heads: of Q and of K and V.
    """

    score: str
    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)
    mask: str = "causal"
    lengths: tuple[int, int] = (70, 130)
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 32
    inputs: str = "bf16"
    batch: int = 2
    spec: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        formats = ", ".join(f"{name}: {text}" for name, (text, _) in self.tensors.items())
        return f"{self.inputs} d{self.head_dim} {self.mask} | {self.score} | {formats} {self.lengths} {self.heads}"

    @property
    def wanted(self) -> tuple[str, ...]:
        """What gradients are asked of, besides q, k and v."""
        return (*self.tensors, *self.scalars)

    def kernel(self, target: str) -> attngen.Kernel:
        """The kernel, with a backward pass."""
        tensors = {name: text for name, (text, _) in self.tensors.items()}
        if "doc" in self.mask:
            tensors["doc"] = "i32[batch, seqlen_k]"
        return attngen.compile(
            {
                "target": target,
                "problem": {"head_dim": self.head_dim},
                "precision": {"inputs": self.inputs},
                "mask": self.mask,
                "score": self.score,
                "tensors": tensors,
                "scalars": dict.fromkeys(self.scalars, "f32"),
                "gradients": ["q", "k", "v", *self.wanted],
                **self.spec,
            }
        )

    def inputs_on(self, device: str) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """Q, K, V and dO, N(0, 1), and what the spec declares."""
        generator = torch.Generator().manual_seed(7)
        (rows, keys), (heads, heads_kv), dtype = self.lengths, self.heads, DTYPES[self.inputs]
        shapes = ((rows, heads), (keys, heads_kv), (keys, heads_kv), (rows, heads))
        drawn = [
            torch.randn(self.batch, *shape, self.head_dim, generator=generator).to(device, dtype)
            for shape in shapes
        ]
        declared: dict[str, Any] = {}
        for name, (text, shape) in self.tensors.items():
            declared[name] = torch.randn(shape, generator=generator).to(
                device, DTYPES[text.partition("[")[0]]
            )
        declared |= self.scalars
        if "slopes" in declared:
            declared["slopes"] = declared["slopes"].abs() / 8
        if "doc" in self.mask:
            doc = torch.arange(keys, dtype=torch.int32) // 20
            declared["doc"] = doc.expand(self.batch, -1).to(device)
        return drawn, declared

    def verdict(
        self, got: Any, drawn: list[torch.Tensor], declared: dict[str, Any], **more: Any
    ) -> GradientAccuracy:
        """The rule on gradients of this call."""
        spec = self.kernel("simulator").spec
        about = {"score": spec.score_expr, "declared": declared, "wanted": self.wanted}
        return compare_gradients(got, *drawn, spec.mask_expr, **about, **more)


def bias(indices: str, dims: str, *shape: int, dtype: str = "f32") -> dict[str, Any]:
    """A score with a bias, and what it declares."""
    return {"score": f"score + bias[{indices}]", "tensors": {"bias": (f"{dtype}[{dims}]", shape)}}


PAIRS = (
    DeclaredCase(**bias("b, h, q_idx, kv_idx", "batch, num_heads_q, seqlen_q, seqlen_k", 2, 4, 70, 130)),
    DeclaredCase(**bias("h, q_idx, kv_idx", "num_heads_q, seqlen_q, seqlen_k", 4, 70, 130, dtype="bf16")),
    DeclaredCase(**bias("h_kv, kv_idx, q_idx", "num_heads_kv, seqlen_k, seqlen_q", 2, 130, 70, dtype="f16")),
    DeclaredCase(
        **bias("b, 0, q_idx, kv_idx", "batch, 1, seqlen_q, seqlen_k", 2, 1, 70, 130),
        mask="kv_idx % 3 != q_idx % 2",
    ),
    DeclaredCase(**bias("q_idx, kv_idx", "seqlen_q, seqlen_k", 70, 130), mask="window(40, 3)", heads=(3, 1)),
    DeclaredCase(**bias("q_idx, 1, kv_idx", "a, c, e", 75, 3, 133), mask="full"),
    DeclaredCase(
        "2.0 * softcap(score + bias[h, q_idx, kv_idx], 5.0)",
        {"bias": ("bf16[num_heads_q, seqlen_q, seqlen_k]", (4, 130, 130))},
        mask="causal and document(doc)",
        lengths=(130, 130),
    ),
)
KEYS = (
    DeclaredCase(**bias("b, h, kv_idx", "batch, num_heads_q, seqlen_k", 2, 4, 130)),
    DeclaredCase(**bias("h_kv, kv_idx", "num_heads_kv, seqlen_k", 2, 130), mask="kv_idx % 3 != q_idx % 2"),
    DeclaredCase(**bias("kv_idx", "n", 50, dtype="f16"), mask="window(40, 3)"),
    DeclaredCase(
        "score * u[b, kv_idx]", {"u": ("bf16[batch, seqlen_k]", (2, 65))}, lengths=(130, 65), heads=(3, 1)
    ),
)
QUERIES = (
    DeclaredCase("score * t[b, h, q_idx]", {"t": ("f32[batch, num_heads_q, seqlen_q]", (2, 4, 70))}),
    DeclaredCase("score * t[h_kv, q_idx]", {"t": ("bf16[num_heads_kv, n]", (2, 100))}, mask="window(40, 3)"),
    DeclaredCase(
        "score * t[q_idx]",
        {"t": ("f32[seqlen_q]", (65,))},
        mask="kv_idx < 5 or kv_idx % 2 == 0",
        lengths=(65, 90),
    ),
)
HEADS = (
    DeclaredCase(ALIBI, {"slopes": ("f32[num_heads_q]", (4,))}),
    DeclaredCase(
        ALIBI, {"slopes": ("f32[num_heads_q]", (3,))}, mask="document(doc)", lengths=(90, 90), heads=(3, 3)
    ),
    DeclaredCase("score * t[b, h_kv]", {"t": ("f16[batch, num_heads_kv]", (2, 2))}, mask="window(40, 3)"),
    DeclaredCase("softcap(score, cap)", scalars={"cap": 2.0}),
    DeclaredCase("tanh(score * gain) * t[1] - t[1]", {"t": ("f32[n]", (3,))}, {"gain": 0.5}, mask="full"),
)
LENGTHS = tuple(
    DeclaredCase(
        "softcap(score + bias[q_idx, kv_idx], cap) * t[q_idx] + u[kv_idx]",
        {
            "bias": ("f32[seqlen_q, seqlen_k]", lengths),
            "t": ("f32[seqlen_q]", lengths[:1]),
            "u": ("f32[seqlen_k]", lengths[1:]),
        },
        {"cap": 4.0},
        mask=mask,
        lengths=lengths,
        heads=(2, 1),
        inputs=inputs,
    )
    for lengths, mask, inputs in (
        ((1, 1), "full", "bf16"),
        ((1, 3), "causal", "f16"),
        ((3, 1), "causal", "bf16"),
        ((64, 64), "causal", "f16"),
        ((63, 65), "full", "bf16"),
        ((130, 70), "causal", "bf16"),
    )
)
WIDE = tuple(
    DeclaredCase(
        "score + bias[h, q_idx, kv_idx] + alibi(slopes) + u[kv_idx]",
        {
            "bias": ("f32[num_heads_q, seqlen_q, seqlen_k]", (2, 70, 70)),
            "slopes": ("f32[num_heads_q]", (2,)),
            "u": ("f32[seqlen_k]", (70,)),
        },
        lengths=(70, 70),
        heads=(2, 1),
        head_dim=head_dim,
        batch=1,
    )
    for head_dim in (128, 192)
)
TABLES = (
    DeclaredCase(T5, {"table": ("f32[num_heads_q, 16]", (4, 16))}),
    DeclaredCase(
        "score + 3.0 * table[kv_idx % 3, h_kv, q_idx]",
        {"table": ("bf16[3, num_heads_kv, 7]", (3, 2, 7))},
        mask="kv_idx % 3 != q_idx % 2",
    ),
    DeclaredCase(
        "softcap(score + table[b, abs(kv_idx - q_idx)], 4.0)",
        {"table": ("f16[batch, 20]", (2, 20))},
        mask="window(40, 3)",
        heads=(3, 1),
    ),
)
ANY_ORDER = (
    DeclaredCase(
        "score + table[kv_idx - q_idx + 69]",
        {"table": ("f32[n]", (199,))},
        spec={"deterministic": False},
    ),
    DeclaredCase(
        "softcap(score + table[b, abs(kv_idx - q_idx)], 4.0)",
        {"table": ("f32[batch, n]", (2, 20))},
        mask="kv_idx % 3 != q_idx % 2",
        heads=(3, 1),
        spec={"deterministic": False},
    ),
)
CASES = (*PAIRS, *KEYS, *QUERIES, *HEADS, *TABLES, *ANY_ORDER, *LENGTHS, *WIDE)


def everything(
    head_dim: int, inputs: str, mask: str, lengths: tuple[int, int], heads: tuple[int, int]
) -> DeclaredCase:
    """A bias, one by key, one by query, slopes, a table and a cap in one score, for a GPU."""
    rows, keys = lengths
    return DeclaredCase(
        "softcap(score + bias[h, q_idx, kv_idx], cap) + alibi(slopes) + u[h_kv, kv_idx] * t[b, q_idx]"
        " + table[clamp(kv_idx - q_idx, -8, 7) + 8, h]",
        {
            "bias": ("bf16[num_heads_q, seqlen_q, seqlen_k]", (heads[0], rows, keys)),
            "slopes": ("f32[num_heads_q]", heads[:1]),
            "u": ("f32[num_heads_kv, seqlen_k]", (heads[1], keys)),
            "t": ("f16[batch, seqlen_q]", (2, rows)),
            "table": ("f32[16, num_heads_q]", (16, heads[0])),
        },
        {"cap": 5.0},
        mask,
        lengths,
        heads,
        head_dim,
        inputs,
    )
