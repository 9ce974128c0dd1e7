"""`attngen.flash_attn` over lengths, heads and options of the kind that flash-attention publishes tests of, on one GPU.

Every result is held to the project's rule against fp64; the judge is given the mask and the score that the options mean
in the language of specs, written here by hand.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import attngen
from attngen.check.judging import judge, judge_gradients
from attngen.flash_attn import version2, version3, version4

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]
DEVICE = "cuda"

HEAD_DIMS = (32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256)
LENGTHS = (
    (113, 203),
    (128, 217),
    (113, 211),
    (108, 256),
    (256, 512),
    (512, 256),
    (1024, 1024),
    (1023, 1024),
    (1024, 1023),
)
HEADS = {"mha": (6, 6), "mqa": (6, 1), "gqa": (6, 2)}
WINDOWS = {
    "full": ((-1, -1), False),
    "causal": ((-1, -1), True),
    "local": ((37, 21), False),
    "both": ((50, 3), True),
}
MASKS = {"full": "full", "causal": "causal", "local": "window(37, 21)", "both": "window(50, 0)"}
CAP, SLOPES = "softcap(score, 15.0)", "alibi_slopes[{}] * -abs(q_pos - kv_idx)"


@dataclass(frozen=True)
class Case:
    """One point of the grid."""

    head_dim: int
    dtype: torch.dtype
    heads: str
    window: str
    has_softcap: bool
    slopes: str
    lengths: tuple[int, int]

    def __str__(self) -> str:
        options = ("-softcap" * self.has_softcap) + (f"-slopes {self.slopes}" if self.slopes else "")
        sizes = "x".join(map(str, self.lengths))
        return f"{self.head_dim}-{str(self.dtype)[6:]}-{self.heads}-{self.window}{options}-{sizes}"

    @property
    def asked(self) -> dict[str, Any]:
        """Options of a call of flash_attn 2."""
        window, causal = WINDOWS[self.window]
        return {"window_size": window, "causal": causal, "softcap": 15.0 * self.has_softcap, **self.passed}

    @property
    def passed(self) -> dict[str, torch.Tensor]:
        """Slopes of a geometric row, f32."""
        of = HEADS[self.heads][0]
        row = torch.tensor([2.0 ** -(1 + head) for head in range(of)], dtype=torch.float32, device=DEVICE)
        shapes = {"h": {"alibi_slopes": row}, "b, h": {"alibi_slopes": torch.stack([row, row.flip(0)])}}
        return shapes.get(self.slopes, {})

    def spec(self, **more: Any) -> attngen.Spec:
        """What the judge goes by."""
        dims = {"h": "num_heads_q", "b, h": "batch, num_heads_q"}.get(self.slopes)
        return attngen.load(
            {
                "target": "simulator",
                "problem": {"head_dim": self.head_dim, **more},
                "precision": {
                    "inputs": {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}[self.dtype]
                },
                "mask": MASKS[self.window],
                "score": " + ".join(
                    ([CAP] if self.has_softcap else ["score"])
                    + ([SLOPES.format(self.slopes)] if dims else [])
                ),
                "tensors": {"alibi_slopes": f"f32[{dims}]"} if dims else {},
                "gradients": ["q", "k", "v"],
            }
        )

    def draw(self, *leading: tuple[int, ...]) -> list[torch.Tensor]:
        """q, k, v and the gradient of out from N(0, 1); leading dimensions of queries and of keys."""
        generator = torch.Generator().manual_seed(self.head_dim)
        of_q, of_k = leading
        shapes = [
            (*of, heads, self.head_dim)
            for of, heads in zip((of_q, of_k, of_k, of_q), self._heads, strict=True)
        ]
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float32) for shape in shapes]
        return [x.to(DEVICE, self.dtype) for x in drawn]

    @property
    def _heads(self) -> tuple[int, int, int, int]:
        of_q, of_k = HEADS[self.heads]
        return of_q, of_k, of_k, of_q


def grid() -> list[Case]:
    """Every head_dim three times; every other option with every value, paired with others from case to case."""
    found = []
    for i, head_dim in enumerate(HEAD_DIMS):
        for j in range(3):
            n = 3 * i + j
            found.append(
                Case(
                    head_dim,
                    (torch.bfloat16, torch.float16)[(i + j) % 2],
                    list(HEADS)[(i + 2 * j) % 3],
                    list(WINDOWS)[(n + i // 4) % 4],
                    n % 5 < 2,
                    ("", "h", "", "b, h")[(i + j) % 4],
                    LENGTHS[n % len(LENGTHS)],
                )
            )
    return found


def check(
    case: Case,
    spec: attngen.Spec,
    leaves: list[torch.Tensor],
    dout: torch.Tensor,
    made: tuple[Any, ...],
    cut: dict[str, Any],
) -> None:
    """Out, lse and gradients keep the rule."""
    out, lse = made[0].detach(), made[1].detach()
    plan = attngen.compile(spec, arch="simulator").plan
    inputs = tuple(x.detach() for x in leaves)
    declared = {**case.passed, **cut}
    verdict = judge(spec, plan, out, lse, *inputs, declared=declared)
    assert verdict.ok, verdict.failures
    found = torch.autograd.grad(made[0], leaves, dout)
    of_gradients = judge_gradients(spec, found, inputs, dout, out, lse, declared=declared)
    assert of_gradients.ok, of_gradients.failures
    assert all(x.any() for x in found)


@pytest.mark.parametrize("case", grid(), ids=str)
def test_dense_sequences(case: Case) -> None:
    """flash_attn_func of flash_attn 2, forward and backward."""
    *leaves, dout = case.draw((2, case.lengths[0]), (2, case.lengths[1]))
    leaves = [x.requires_grad_() for x in leaves]
    made = version2.flash_attn_func(*leaves, **case.asked, return_attn_probs=True)
    assert made[0].shape == dout.shape and made[1].shape == (2, HEADS[case.heads][0], case.lengths[0])
    check(case, case.spec(), leaves, dout, made, {})


@pytest.mark.parametrize("case", grid()[::2], ids=str)
def test_ragged_sequences(case: Case) -> None:
    """flash_attn_varlen_func, of sequences of any lengths up to those of the case, an empty one among them."""
    most_q, most_k = case.lengths
    lengths_q = [most_q, 1, most_q // 2, 0, most_q // 3]
    lengths_k = [most_k, 5, most_k // 3, 9, most_k // 2]
    if "," in case.slopes:
        lengths_q, lengths_k = lengths_q[:2], lengths_k[:2]
    cut: dict[str, Any] = {
        name: torch.tensor([0, *torch.tensor(of).cumsum(0)], dtype=torch.int32, device=DEVICE)
        for name, of in (("cu_seqlens_q", lengths_q), ("cu_seqlens_k", lengths_k))
    }
    cut |= {"max_seqlen_q": most_q, "max_seqlen_k": most_k}
    *leaves, dout = case.draw((sum(lengths_q),), (sum(lengths_k),))
    leaves = [x.requires_grad_() for x in leaves]
    made = version2.flash_attn_varlen_func(*leaves, **cut, **case.asked, return_attn_probs=True)
    assert made[1].shape == (HEADS[case.heads][0], sum(lengths_q))
    check(case, case.spec(queries="ragged", keys="ragged"), leaves, dout, made, cut)


@pytest.mark.parametrize("window", ["full", "causal", "local"])
@pytest.mark.parametrize("new", [0, 1, 16])
@pytest.mark.parametrize("seqlen_q", [1, 64])
def test_a_cache(seqlen_q: int, new: int, window: str) -> None:
    """flash_attn_with_kvcache: appended, read by index, with padding on the left, beside the rule."""
    case = Case(128, torch.bfloat16, "gqa", window, False, "", (seqlen_q, 400))
    q, k_cache, v_cache, _ = case.draw((3, seqlen_q), (5, 400))
    k, v = (x[:3, :new].clone() for x in (v_cache, k_cache))
    before, which, left = (
        torch.tensor(each, dtype=torch.int32, device=DEVICE)
        for each in ([80, 384, 201], [4, 0, 2], [7, 0, 64])
    )
    expected = [x.clone() for x in (k_cache, v_cache)]
    for b in range(3):
        rows = slice(int(before[b]), int(before[b]) + new)
        expected[0][which[b], rows], expected[1][which[b], rows] = k[b], v[b]
    places = {"cache_seqlens": before, "cache_batch_idx": which, "cache_leftpad": left}
    appended = {"k": k, "v": v} if new else {}
    with torch.no_grad():
        out, lse = version3.flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            **appended,
            **places,
            return_softmax_lse=True,
            window_size=case.asked["window_size"],
            causal=case.asked["causal"],
        )
    assert torch.equal(k_cache, expected[0]) and torch.equal(v_cache, expected[1])
    spec = case.spec(keys="padded")
    read = [x[which.long()] for x in expected]
    lengths = {"seqused_k": before + new, "leftpad_k": left}
    plan = attngen.compile(spec, arch="simulator").plan
    verdict = judge(spec, plan, out, lse, q, *read, declared=lengths)
    assert verdict.ok, verdict.failures


@pytest.mark.parametrize("head_dim", [64, 128])
def test_sinks_of_flash_attention_4(head_dim: int) -> None:
    """A learned sink under a causal window with its gradient; lse comes wherever something requires grad."""
    case = Case(head_dim, torch.bfloat16, "gqa", "both", False, "", (300, 333))
    *leaves, dout = case.draw((2, 300), (2, 333))
    sink = torch.linspace(-2, 2, 6, dtype=torch.float32, device=DEVICE)
    leaves = [x.requires_grad_() for x in (*leaves, sink)]
    q, k, v, sink = leaves
    out, lse = version4.flash_attn_func(q, k, v, window_size=(50, None), causal=True, learnable_sink=sink)
    assert lse is not None
    base = case.spec()
    spec = base.replace({"sink": "per_head", "gradients": ["q", "k", "v", "sink"]})
    found = torch.autograd.grad(out, leaves, dout)
    inputs = tuple(x.detach() for x in (q, k, v))
    passed = {"sink": sink.detach()}
    plan = attngen.compile(spec, arch="simulator").plan
    verdict = judge(spec, plan, out.detach(), lse.detach(), *inputs, declared=passed)
    assert verdict.ok, verdict.failures
    of_gradients = judge_gradients(spec, found, inputs, dout, out.detach(), lse.detach(), declared=passed)
    assert of_gradients.ok, of_gradients.failures


def test_nothing_on_the_device_is_read() -> None:
    """Calls with lengths, caches and bounds on the device do not wait for it."""
    case = Case(64, torch.bfloat16, "gqa", "causal", False, "", (4, 100))
    q, k_cache, v_cache, _ = case.draw((2, 4), (2, 100))
    used = torch.tensor([50, 90], dtype=torch.int32, device=DEVICE)
    k, v = k_cache[:, :4].clone(), v_cache[:, :4].clone()
    tokens = [x.flatten(0, 1) for x in (q, k_cache, v_cache)]
    starts = [torch.tensor([0, n, 2 * n], dtype=torch.int32, device=DEVICE) for n in (4, 100)]

    def call() -> list[torch.Tensor]:
        cached = version2.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=used, causal=True)
        ragged = version2.flash_attn_varlen_func(*tokens, *starts, used[0], used[1], causal=True)
        return [cached, ragged]  # type: ignore[list-item]

    with torch.no_grad():
        expected = call()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(x, y) and x.any() for x, y in zip(found, expected, strict=True))
