"""Keys that a mask hides from every query hold NaN and infinities on a GPU: bits are those of a clean call."""

from typing import Any

import pytest
import torch
from gpu_kernels import (
    KINDS,
    compile_specs,
    counters_are_zero,
    runs_here,
    skip_unless_runs_here,
    wait_for_gpu,
)

import attngen
from attngen.check.judging import judge, judge_gradients
from tests.hidden_keys import HEADS, POISONS, declared_by, hidden_keys, inputs, passed

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]

MASKS = (
    "causal and pad[b, kv_idx]",
    "pad[b, kv_idx]",
    "kv_idx < lens[b]",
    "window(300, 20) and kv_idx < lens[b] + 40 * h_kv",
    "causal and kv_idx >= lens[b] - 100 * h_kv",
    "kv_idx % 3 != 0",
    "keep[h, kv_idx] and kv_idx % 5 != q_idx % 4",
    "causal and rank[b, kv_idx] < 40",
)
PLAIN, CAPPED, SLOPED = "score", "softcap(score, 5.0)", "score + slopes[h] * f32(kv_idx - q_pos)"
WIDTHS = [(64, PLAIN), (64, CAPPED), (64, SLOPED), (128, PLAIN), (128, CAPPED), (256, PLAIN)]
"""Columns of a head, and scores; of a softcap warps vote on products before they are masked."""
QUERIES, KEYS = 450, 521
"""Some blocks of keys are hidden as a whole, some in part, some end beside a block."""


def spec_of(mask: str, score: str, kind: str, dim: int, *wanted: str) -> dict[str, Any]:
    slopes = {"slopes": "f32[num_heads_q]"} if "slopes" in score else {}
    return {
        "problem": {"head_dim": dim},
        "mask": mask,
        "score": score,
        "tensors": declared_by(mask) | slopes,
        "schedule": {"kind": kind},
        **({"gradients": [*wanted]} if wanted else {}),
    }


Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def call_of(made: attngen.Kernel) -> tuple[Tensors, dict[str, torch.Tensor], torch.Tensor]:
    """Q, K and V, what is declared, and which keys are hidden."""
    dim, mask = made.plan.head_dim_qk, str(made.spec.mask)
    declared = passed(mask, KEYS)
    hidden = hidden_keys(made.spec.mask_expr, declared, QUERIES, KEYS).cuda()
    if "slopes" in made.spec.declarations.tensors:
        declared["slopes"] = torch.linspace(0.01, 0.2, HEADS)
    q, k, v = (x.cuda() for x in inputs(QUERIES, KEYS, dim))
    return (q, k, v), {name: x.cuda() for name, x in declared.items()}, hidden


def poisoned(
    k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """K and V with each poison in hidden keys, and with a large number, which is none."""
    where = hidden.unsqueeze(-1)
    return [(k.masked_fill(where, poison), v.masked_fill(where, poison)) for poison in (*POISONS, 3e38)]


@pytest.mark.parametrize(("dim", "score"), WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_keys_reach_neither_out_nor_lse(kind: str, dim: int, score: str) -> None:
    """Every mask; a clean call is within the rule, and its bits stay with any poison."""
    skip_unless_runs_here(kind)
    for made in compile_specs([spec_of(mask, score, kind, dim) for mask in MASKS]):
        (q, k, v), declared, hidden = call_of(made)
        expected = made(q, k, v, return_lse=True, **declared)
        wait_for_gpu()
        verdict = judge(made.spec, made.plan, *expected, q, k, v, declared=declared)
        assert verdict.ok, f"{made.spec.mask}: {verdict}"
        assert hidden.any() and expected[0].isfinite().all() and expected[0].any()
        for other_k, other_v in poisoned(k, v, hidden):
            found = made(q, other_k, other_v, return_lse=True, **declared)
            wait_for_gpu()
            assert all(map(torch.equal, found, expected)), made.spec.mask
    assert counters_are_zero()


@pytest.mark.parametrize(("dim", "score"), [*WIDTHS, (192, CAPPED)])
@pytest.mark.parametrize("kind", ["auto", "fa2"])
def test_hidden_keys_reach_no_gradient(kind: str, dim: int, score: str) -> None:
    """Kernels for warpgroups where this GPU runs them, and those that all warps run alike; theirs are 0."""
    wanted = ("q", "k", "v", *(("slopes",) if "slopes" in score else ()))
    for made in compile_specs([spec_of(mask, score, kind, dim, *wanted) for mask in MASKS]):
        (q, k, v), declared, hidden = call_of(made)
        out, lse = made(q, k, v, return_lse=True, **declared)
        dout = torch.randn_like(out)
        expected = made.backward(dout, q, k, v, out, lse, **declared)
        wait_for_gpu()
        verdict = judge_gradients(made.spec, expected, (q, k, v), dout, out, lse, declared=declared)
        assert verdict.ok, f"{made.spec.mask}: {verdict}"
        assert not expected[1][hidden].any() and not expected[2][hidden].any()
        for other_k, other_v in poisoned(k, v, hidden):
            found = made.backward(dout, q, other_k, other_v, out, lse, **declared)
            wait_for_gpu()
            assert all(map(torch.equal, found, expected)), made.spec.mask


def test_autograd_sees_no_hidden_key() -> None:
    """Padding of a batch, as it is trained: NaN behind the end of each sequence reaches neither loss nor weights."""
    lens = torch.tensor([300, 77], dtype=torch.int32, device="cuda")
    q, k, v = (x.cuda() for x in inputs(QUERIES, KEYS, 64))
    behind = torch.arange(KEYS, device="cuda") >= lens[:, None]
    gradients = []
    for poison in (0.0, float("nan")):
        tensors = [q.clone(), *(x.masked_fill(behind[..., None, None], poison) for x in (k, v))]
        for x in tensors:
            x.requires_grad_()
        declared = {"tensors": {"lens": "i32[batch]"}, "lens": lens}
        attngen.attention(
            *tensors, "causal and kv_idx < lens[b]", **declared
        ).float().square().sum().backward()
        gradients.append([x.grad for x in tensors])
    assert all(map(torch.equal, *gradients)) and all(x.isfinite().all() and x.any() for x in gradients[0])


def test_sequences_of_their_own_lengths_have_hidden_keys_too() -> None:
    """A padded batch whose mask hides keys inside its sequences: both ends and holes hold NaN."""
    for kind in filter(runs_here, KINDS):
        spec = spec_of(MASKS[0], CAPPED, kind, 128, "q", "k", "v")
        spec["problem"]["keys"] = "padded"
        made = attngen.compile(spec)
        (q, k, v), declared, _ = call_of(made)
        used = torch.tensor([KEYS, 200], dtype=torch.int32, device="cuda")
        hidden = (~declared["pad"] | (torch.arange(KEYS, device="cuda") >= used[:, None]))[..., None, None]
        call = {**declared, "seqused_k": used}
        out, lse = made(q, k, v, return_lse=True, **call)
        expected = (out, lse, *made.backward(out, q, k, v, out, lse, **call))
        k, v = (x.masked_fill(hidden, float("nan")) for x in (k, v))
        found = (*made(q, k, v, return_lse=True, **call), *made.backward(out, q, k, v, out, lse, **call))
        wait_for_gpu()
        assert all(map(torch.equal, found, expected)) and out.any(), kind
