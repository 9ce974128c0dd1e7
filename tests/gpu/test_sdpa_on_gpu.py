"""`attngen.sdpa` on one GPU: results by the rule, beside torch's own backends, and nothing left to them in silence."""

from typing import Any

import pytest
import torch
from torch.nn.attention import bias
from torch.nn.functional import scaled_dot_product_attention as attend

import attngen
from attngen import sdpa
from attngen.check.judging import judge, judge_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]
DEVICE = "cuda"
BATCH, HEADS, SEQLEN_Q, SEQLEN_K, COLUMNS = 2, 4, 300, 333, 64

MASKS: dict[str, tuple[str, str, str | None, tuple[int, ...]]] = {
    "full": ("full", "score", None, ()),
    "is_causal": ("causal_top_left", "score", None, ()),
    "lower right": ("causal", "score", None, ()),
    "keys that count": ("attn_mask[b, kv_idx]", "score", "bool[batch, seqlen_k]", (BATCH, 1, 1, SEQLEN_K)),
    "pairs that count": (
        "attn_mask[q_idx, kv_idx]",
        "score",
        "bool[seqlen_q, seqlen_k]",
        (SEQLEN_Q, SEQLEN_K),
    ),
    "a bias": (
        "full",
        "score + attn_mask[h, q_idx, kv_idx]",
        "bf16[num_heads_q, seqlen_q, seqlen_k]",
        (1, HEADS, SEQLEN_Q, SEQLEN_K),
    ),
    "a bias of keys": (
        "full",
        "score + attn_mask[b, h, kv_idx]",
        "bf16[batch, num_heads_q, seqlen_k]",
        (BATCH, HEADS, 1, SEQLEN_K),
    ),
}
"""Mask and score in the language, what they declare, and the shape of the tensor that torch is passed."""


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return made.to(DEVICE, dtype)


@pytest.mark.parametrize("heads_kv", [HEADS, 2])
@pytest.mark.parametrize("columns", [COLUMNS, 40, 20, 128])
@pytest.mark.parametrize("which", MASKS)
def test_calls_keep_the_rule(which: str, columns: int, heads_kv: int) -> None:
    """Out and gradients, that of a bias too, of strict calls: whatever is left to torch fails."""
    mask, score, declared, shape = MASKS[which]
    q = drawn(BATCH, HEADS, SEQLEN_Q, columns, seed=0).requires_grad_()
    k, v = (drawn(BATCH, heads_kv, SEQLEN_K, columns, seed=seed).requires_grad_() for seed in (1, 2))
    leaves, passed, given = [q, k, v], {}, None
    if declared is not None:
        given = drawn(*shape, seed=3)
        given = given > -0.5 if declared.startswith("bool") else given.requires_grad_()
        elements = given.detach()[tuple(0 if size == 1 else slice(None) for size in shape)]
        passed = {"attn_mask": elements}
        leaves += [given] if given.requires_grad else []
    asked: dict[str, Any] = {
        "attn_mask": given,
        "enable_gqa": heads_kv != HEADS,
        "is_causal": which == "is_causal",
    }
    if which == "lower right":
        asked["attn_mask"] = bias.causal_lower_right(SEQLEN_Q, SEQLEN_K)
    with sdpa.enabled(devices=(DEVICE,), strict=True):
        out = attend(q, k, v, **asked)
    dout = drawn(*out.shape, seed=4)
    found = [x.detach() for x in torch.autograd.grad(out, leaves, dout)]
    spec = attngen.load(
        {
            "target": "simulator",
            "problem": {"head_dim": columns},
            "mask": mask,
            "score": score,
            "tensors": {} if declared is None else {"attn_mask": declared},
            "gradients": ["q", "k", "v", *(["attn_mask"] if len(leaves) > 3 else [])],
        }
    )
    kernel = attngen.compile(spec, arch="simulator")
    rows = [x.detach().transpose(1, 2) for x in (q, k, v)]
    verdict = judge(spec, kernel.plan, out.detach().transpose(1, 2), None, *rows, declared=passed)
    assert verdict.ok, verdict.failures
    # The rule on gradients reads lse, which this face does not return: that of f64.
    whole = [x.detach().double() for x in (q, k, v)]
    group = HEADS // heads_kv
    scores = whole[0] @ whole[1].repeat_interleave(group, 1).transpose(-1, -2) * columns**-0.5
    place = torch.arange(SEQLEN_Q, device=DEVICE)[:, None]
    key = torch.arange(SEQLEN_K, device=DEVICE)
    if which in ("is_causal", "lower right"):
        shift = SEQLEN_K - SEQLEN_Q if which == "lower right" else 0
        scores = scores.masked_fill(key > place + shift, -torch.inf)
    elif given is not None and given.dtype == torch.bool:
        scores = scores.masked_fill(~given, -torch.inf)
    elif given is not None:
        scores = scores + given.detach().double()
    lse = scores.logsumexp(-1).float()
    of_rows = [x.transpose(1, 2) for x in found[:3]] + [
        x[tuple(0 if size == 1 else slice(None) for size in shape)] for x in found[3:]
    ]
    judged = judge_gradients(
        spec, of_rows, tuple(rows), dout.transpose(1, 2), out.detach().transpose(1, 2), lse, declared=passed
    )
    assert judged.ok, judged.failures


def test_jagged_tensors_are_ragged_sequences() -> None:
    """As near to torch's own as two roundings, causal too, with gradients."""
    lengths = (5, 130, 1, 517)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], device=DEVICE)
    tokens = [drawn(sum(lengths), 4, 64, seed=seed) for seed in range(3)]
    first = torch.nested.nested_tensor_from_jagged(tokens[0], starts)
    nested = [first.requires_grad_()] + [
        torch.nested.nested_tensor_from_jagged(x, first.offsets()).requires_grad_() for x in tokens[1:]
    ]
    for is_causal in (False, True):
        with sdpa.enabled(devices=(DEVICE,), strict=True):
            out = attend(*(x.transpose(1, 2) for x in nested), is_causal=is_causal)
        found = torch.autograd.grad(out.values().float().sum(), nested)
        for b, rows in enumerate(zip(*(x.split(lengths) for x in tokens), strict=True)):
            exact = [x.double().transpose(0, 1).requires_grad_() for x in rows]
            own = attend(*exact, is_causal=is_causal)
            expected = torch.autograd.grad(own.sum(), exact)
            made = out.transpose(1, 2).unbind()[b].transpose(0, 1)
            assert float((made - own).abs().max()) <= 2.0**-6 * float(own.abs().max())
            for x, y in zip(found, expected, strict=True):
                mine = x.unbind()[b].transpose(0, 1).double()
                assert float((mine - y).abs().max()) <= 2.0**-5 * max(1.0, float(y.abs().max()))


def test_explain_tells_of_torchs_backends() -> None:
    """A mask tensor keeps torch's flash backend away, which says so; attngen takes the call."""
    q, k, v = (drawn(1, 2, 128, 64, seed=seed) for seed in range(3))
    with sdpa.enabled(devices=(DEVICE,)):
        report = sdpa.explain(q, k, v, torch.ones(128, 128, dtype=torch.bool, device=DEVICE))
    assert report.taken and report.torchs_reasons["flash"]
    assert set(report.torchs_reasons) == {"flash", "efficient", "cudnn"}
    assert report.answer is not None and "sm" in report.answer.kernel


def test_f32_is_left_to_torch_with_its_reason() -> None:
    """There are kernels of 16 bits; a strict call raises."""
    q, k, v = (drawn(1, 2, 128, 64, seed=seed, dtype=torch.float32) for seed in range(3))
    with sdpa.enabled(devices=(DEVICE,)):
        assert attend(q, k, v).any()
    with (
        sdpa.enabled(devices=(DEVICE,), strict=True),
        pytest.raises(attngen.RefusedError, match="torch.float32"),
    ):
        attend(q, k, v)


@pytest.mark.skipif(
    not hasattr(torch.nn.attention, "restore_flash_attention_impl"), reason="this torch takes no other"
)
def test_torchs_flash_backend_may_be_attngens() -> None:
    """Activated by its name, chosen by torch's own rules, taken back; results as near as two roundings."""
    sdpa.register_flash_attention()
    q, k, v = (drawn(2, 4, 300, 64, seed=seed).requires_grad_() for seed in range(3))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out64 = attend(*exact, is_causal=True)
    expected = torch.autograd.grad(out64.sum(), exact)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        torchs = attend(q, k, v, is_causal=True)
        torch.nn.attention.activate_flash_attention_impl("attngen")
        try:
            out = attend(q, k, v, is_causal=True)
            found = torch.autograd.grad(out.float().sum(), (q, k, v))
        finally:
            torch.nn.attention.restore_flash_attention_impl()
        assert torch.equal(attend(q, k, v, is_causal=True), torchs)
    assert float((out - out64).abs().max()) <= 2.0**-6 * float(out64.abs().max())
    for x, y in zip(found, expected, strict=True):
        assert float((x.double() - y).abs().max()) <= 2.0**-5 * max(1.0, float(y.abs().max()))
