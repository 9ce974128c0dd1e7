"""Learned sinks on a GPU: every schedule within the rule, whatever the sink, its gradient, and what must not change."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import attngen
from attngen.arch import arch_for_capability
from attngen.check.inputs import Shape, random_like
from attngen.check.judging import draw, judge, judge_gradients
from attngen.check.reference import attention
from tests.gpu.gpu_kernels import KINDS, WARPGROUP_KINDS, captured, compile_specs, skip_unless_runs_here

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]

SOME_SEE_NONE = "kv_idx < q_pos - 40"
MASKS = ("causal", SOME_SEE_NONE, "causal and (window(128, 0) or sinks(4))", "document(doc)")
SINKS: dict[str, tuple[float, ...]] = {
    "random": (0.7, -1.3, 2.5, 4.0, 6.0, 8.0, 0.0, -5.0),
    "ends": (-math.inf, math.inf, 1e4, -1e4, 3e38, -3e38, 1e30, -1e30),
    "ends with gradients": (-math.inf, math.inf, 1e4, -1e4, 2.3e38, -2.3e38, 1e30, -1e30),
}
"""From 2.36e38 on a sink of either sign is infinite in log2 units; rows whose lse it is give it no gradient."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPE = Shape(batch=2, heads=8, heads_kv=2, seqlen_q=333, seqlen_k=301)


@dataclass(frozen=True)
class SinkCase:
    """A spec with a sink, on this GPU."""

    kind: str
    head_dim: int = 128
    inputs: str = "bf16"
    score: str = "score"
    mask: str = "causal"
    gradients: tuple[str, ...] = ()

    @property
    def spec(self) -> dict[str, Any]:
        tensors = {"doc": "i32[batch, seqlen_k]"} if "doc" in self.mask else {}
        return {
            "target": arch_for_capability(torch.cuda.get_device_capability()).name,
            "problem": {"head_dim": self.head_dim},
            "precision": {"inputs": self.inputs},
            "mask": self.mask,
            "score": self.score,
            "tensors": tensors,
            "sink": "per_head",
            "gradients": list(self.gradients),
            "schedule": {"kind": self.kind},
        }

    def kernel(self, sink: str = "per_head") -> attngen.Kernel:
        skip_unless_runs_here(self.kind)
        return attngen.compile(self.spec | {"sink": sink})


def declared(kernel: attngen.Kernel, sink: torch.Tensor) -> dict[str, Any]:
    """What a call passes by name."""
    doc = (torch.arange(SHAPE.seqlen_k, dtype=torch.int32, device="cuda") // 100).expand(SHAPE.batch, -1)
    return {"sink": sink} | ({"doc": doc} if kernel.spec.tensors else {})


def assert_right(kernel: attngen.Kernel, sink: torch.Tensor, shape: Shape = SHAPE) -> None:
    """Out and lse are within the rule; a row that sees no key is 0 with lse the sink, to the bit."""
    inputs, passed = draw(kernel.plan, shape, "cuda", seed=3), declared(kernel, sink)
    out, lse = kernel(*inputs, return_lse=True, **passed)
    verdict = judge(kernel.spec, kernel.plan, out, lse, *inputs, declared=passed)
    assert verdict.ok, verdict
    of_mask = {name: value for name, value in passed.items() if name != "sink"}
    _, of_keys = attention(*inputs, kernel.spec.mask_expr, score=kernel.spec.score_expr, declared=of_mask)
    sees_none = of_keys.isneginf()
    assert not out.transpose(1, 2)[sees_none].any()
    assert torch.equal(lse[sees_none], sink.float()[None, :, None].expand_as(lse)[sees_none])
    assert not out[:, :, sink == math.inf].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", ["score", "softcap(score, 30.0)"])
def test_every_schedule_is_within_the_rule(kind: str, score: str) -> None:
    """With a running maximum and without, at three head dims, in both formats, under masks of every class."""
    skip_unless_runs_here(kind)
    cases = [
        *(SinkCase(kind, dim, inputs, score) for dim in (64, 128, 256) for inputs in ("bf16", "f16")),
        *(SinkCase(kind, 64, "bf16", score, mask) for mask in MASKS),
    ]
    for kernel in compile_specs([case.spec for case in cases]):
        for name in SINKS:
            assert_right(kernel, torch.tensor(SINKS[name], device="cuda"))


@pytest.mark.parametrize("kind", WARPGROUP_KINDS)
@pytest.mark.parametrize("scales", ["per_tensor", "per_head", "per_block", "per_token"])
def test_e4m3_is_within_the_rule(kind: str, scales: str) -> None:
    """Whose sums are lifted, and whose maxima are in log2 units unless a score is modified."""
    skip_unless_runs_here(kind)
    for score in ("score", "softcap(score, 30.0)"):
        case = SinkCase(kind, 128, "e4m3", score, SOME_SEE_NONE)
        kernel = attngen.compile(case.spec | {"precision": {"inputs": "e4m3", "scales": scales}})
        for name in SINKS:
            assert_right(kernel, torch.tensor(SINKS[name], device="cuda"))


@pytest.mark.parametrize("kind", KINDS)
def test_formats_strides_and_no_sink(kind: str) -> None:
    """f32, bf16 and f16 of any stride give one result; one of -inf that of a kernel without a sink, to the bit."""
    kernel = SinkCase(kind, 64, mask=SOME_SEE_NONE).kernel()
    inputs = draw(kernel.plan, SHAPE, "cuda", seed=3)
    whole = torch.tensor([1.5, -2.0, 0.25, 3.0, 6.0, 8.0, 0.0, -5.0], device="cuda")  # which all formats have
    wanted = kernel(*inputs, return_lse=True, sink=whole)
    for dtype in DTYPES:
        spread = torch.full((25,), math.nan, device="cuda", dtype=dtype)
        spread[1::3] = whole
        for sink in (whole.to(dtype), spread[1::3]):
            got = kernel(*inputs, return_lse=True, sink=sink)
            assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))
    none = kernel(*inputs, return_lse=True, sink=torch.full((8,), -math.inf, device="cuda"))
    plain = SinkCase(kind, 64, mask=SOME_SEE_NONE).kernel("none")(*inputs, return_lse=True)
    assert torch.equal(none[1], plain[1])
    assert torch.equal(none[0], plain[0]) or kind == "serial"  # which normalises once more
    torch.testing.assert_close(none[0], plain[0], rtol=2**-7, atol=0.0)


def test_of_no_keys_there_is_the_sink_alone() -> None:
    """seqlen_k of 0 in every schedule, and a call on another device's sink is refused."""
    sink = torch.tensor(SINKS["random"], device="cuda")
    for kind in KINDS:
        if kind in WARPGROUP_KINDS and torch.cuda.get_device_capability() != (9, 0):
            continue
        kernel = SinkCase(kind, 64).kernel()
        q, k, v = draw(kernel.plan, Shape(2, 8, 2, 70, 0), "cuda")
        out, lse = kernel(q, k, v, return_lse=True, sink=sink)
        assert not out.any() and torch.equal(lse, sink[None, :, None].expand(2, 8, 70))
        with pytest.raises(attngen.ArgumentError, match="argument sink: got device cpu"):
            kernel(q, k, v, sink=sink.cpu())


@pytest.mark.parametrize("inputs", ["bf16", "f16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("mask", [*MASKS[:2], "document(doc)"])
def test_gradients_are_within_the_rule(mask: str, head_dim: int, inputs: str) -> None:
    """dQ, dK, dV and dsink, which has the sink's type; rows that see no key have no other gradient."""
    case = SinkCase("auto", head_dim, inputs, mask=mask, gradients=("q", "k", "v", "sink"))
    kernel = attngen.compile(case.spec)
    drawn = draw(kernel.plan, SHAPE, "cuda", seed=3)
    for name, dtype in (
        ("random", torch.float32),
        ("random", torch.bfloat16),
        ("ends with gradients", torch.float32),
    ):
        passed = declared(kernel, torch.tensor(SINKS[name], device="cuda", dtype=dtype))
        out, lse = kernel(*drawn, return_lse=True, **passed)
        dout, dlse = random_like(out, 6), random_like(lse, 7)
        made = kernel.backward(dout, *drawn, out, lse, dlse, **passed)
        verdict = judge_gradients(kernel.spec, made, drawn, dout, out, lse, dlse, declared=passed)
        assert verdict.ok, verdict
        assert made[3].dtype == dtype and made[3].any()


def test_gradients_of_e4m3_have_the_sinks_too() -> None:
    """Straight through the rounding, to bf16 inputs."""
    skip_unless_runs_here("pingpong")
    kernel = SinkCase("pingpong", 128, "e4m3", gradients=("q", "k", "v", "sink")).kernel()
    drawn, sink = draw(kernel.plan, SHAPE, "cuda", seed=3), torch.tensor(SINKS["random"], device="cuda")
    out, lse = kernel(*drawn, return_lse=True, sink=sink)
    dout = random_like(out, 6)
    made = kernel.backward(dout, *drawn, out, lse, sink=sink)
    verdict = judge_gradients(kernel.spec, made, drawn, dout, out, lse, declared={"sink": sink})
    assert verdict.ok, verdict


def test_the_same_bits_come_out_in_every_run() -> None:
    """Fifty backward passes of many rows: a block of threads adds a head's up in one order."""
    kernel = attngen.compile(SinkCase("auto", 64, gradients=("q", "k", "v", "sink")).spec)
    drawn, sink = (
        draw(kernel.plan, Shape(4, 8, 2, 2000, 2000), "cuda"),
        torch.tensor(SINKS["random"], device="cuda"),
    )
    out, lse = kernel(*drawn, return_lse=True, sink=sink)
    first = kernel.backward(out, *drawn, out, lse, sink=sink)
    for _ in range(50):
        again = kernel.backward(out, *drawn, out, lse, sink=sink)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_autograd_and_graphs_read_the_sink_where_it_is() -> None:
    """A replayed graph takes what the sink then holds, and autograd gives what `backward` does."""
    kernel = attngen.compile(SinkCase("auto", 64, gradients=("q", "k", "v", "sink")).spec)
    q, k, v = draw(kernel.plan, SHAPE, "cuda")
    sink = torch.tensor(SINKS["random"], device="cuda")
    out, lse = kernel(q, k, v, return_lse=True, sink=sink)
    expected = kernel.backward(out, q, k, v, out, lse, sink=sink)
    leaves = [x.detach().requires_grad_() for x in (q, k, v, sink)]
    got = torch.autograd.grad(kernel(*leaves[:3], sink=leaves[3]), leaves, out)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    graph, replayed = captured(lambda: kernel(q, k, v, sink=sink))
    sink.copy_(torch.tensor(SINKS["random"], device="cuda").flip(0))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(replayed, kernel(q, k, v, sink=sink)) and not torch.equal(replayed, out)
