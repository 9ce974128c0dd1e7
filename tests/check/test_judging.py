"""The rule for kernels of 8-bit operands accepts an algorithm of blocks in torch and refuses what is nearly right."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import attngen
from attngen.check.accuracy import compare
from attngen.check.accuracy_terms import score_unit_of
from attngen.check.inputs import Kind, Shape
from attngen.check.judging import Inputs, call_dtype, compare_operands, draw, judge, quantized, roundings_of
from attngen.quantize import SCALE_KINDS, Operands, ScaleKind, dequantize, quantize
from attngen.spec import load

BLOCK_N = 96
SHAPES = (
    Shape(1, 2, 1, 1, 1),
    Shape(1, 1, 1, 1, 2),
    Shape(2, 2, 2, 3, 130),
    Shape(2, 4, 2, 113, 303),
    Shape(1, 2, 1, 300, 13),
)
SEEDS = (None, 3)


def spec(scales: ScaleKind = "per_block", incoherent: str = "none", mask: str = "full") -> attngen.Spec:
    precision = {"inputs": "e4m3", "scales": scales, "incoherent": incoherent}
    return load({"target": "sm_90a", "problem": {"head_dim": 64}, "precision": precision, "mask": mask})


def inputs(shape: Shape, kind: Kind = "randn", seed: int = 0) -> Inputs:
    return draw(attngen.compile(spec()).plan, shape, kind=kind, seed=seed)


def flash(
    operands: Operands, round_p: Callable[[Tensor], Tensor] | None = None, block_n: int = BLOCK_N
) -> tuple[Tensor, Tensor]:
    """The kernels' arithmetic in a dozen lines: blocks of keys, last first; P relative to the maximum so far."""
    q, k, v = (x.transpose(1, 2) for x in dequantize(operands))
    weight = roundings_of(operands).value_weight
    group = q.shape[1] // k.shape[1]
    k, v, weight = (x.repeat_interleave(group, 1) for x in (k, v, weight))
    row_max = q.new_full((*q.shape[:3], 1), -math.inf)
    row_sum, acc_o = torch.zeros_like(row_max), q.new_zeros(*q.shape[:3], v.shape[-1])
    for start in reversed(range(0, k.shape[2], block_n)):
        keys = slice(start, start + block_n)
        w = weight[..., None, keys]
        score = q @ k[..., keys, :].mT / math.sqrt(q.shape[-1])
        new_max = torch.maximum(row_max, score.amax(-1, keepdim=True))
        alpha, p = (row_max - new_max).exp(), (score - new_max).exp()
        rounded = (round_p or e4m3)(p * w * 2.0**8) / 2.0**8
        row_sum = alpha * row_sum + p.sum(-1, keepdim=True)
        acc_o = alpha * acc_o + rounded @ (v[..., keys, :] / w.mT)
        row_max = new_max
    return (acc_o / row_sum).to(torch.bfloat16).transpose(1, 2), (row_max + row_sum.log())[..., 0]


def e4m3(x: Tensor) -> Tensor:
    return x.clamp(max=448.0).to(torch.float8_e4m3fn).float()


@pytest.mark.parametrize("kind", ["randn", "outliers"])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scales", SCALE_KINDS)
def test_blocks_of_keys_are_right(scales: ScaleKind, seed: int | None, kind: Kind) -> None:
    """Any scales and either basis, one row or many: P rounded against the maximum so far is within every line."""
    for shape in SHAPES:
        for draws in range(3):
            made_of = inputs(shape, kind, draws)
            operands = quantize(*made_of, scales, seed)
            found = compare_operands(*flash(operands), operands, inputs=made_of)
            assert found.ok and found.input_rmse is not None, f"{shape}: {found}"


def test_p_rounded_otherwise_is_refused() -> None:
    """P that lost one more bit, or ends at 240 where a few keys have all the weight, breaks a line on many rows."""

    def truncated(x: Tensor) -> Tensor:
        return (e4m3(x).view(torch.int32) & ~0x1FFFFF).view(torch.float32)

    def ending_at_240(x: Tensor) -> Tensor:
        return e4m3(x.clamp(max=240.0))

    q, k, v = inputs(SHAPES[3])
    for queries, wrong in ((q, truncated), (8 * q, ending_at_240)):
        operands = quantize(queries, k, v, "per_head")
        assert compare_operands(*flash(operands), operands).ok
        assert not compare_operands(*flash(operands, wrong), operands).ok


def test_a_wrong_descale_is_refused() -> None:
    """One block's descale of Q, K or V off by an eighth breaks a line; an output of zeros breaks max and rmse."""
    made_of = inputs(SHAPES[3])
    operands = quantize(*made_of, "per_block")
    for name in ("q_descale", "k_descale", "v_descale"):
        wrong = getattr(operands, name).clone()
        wrong[0, 0, 0] *= 1.125
        assert not compare_operands(*flash(replace(operands, **{name: wrong})), operands).ok, name
    out, lse = flash(operands)
    assert {"max", "rmse"} <= set(compare_operands(torch.zeros_like(out), lse, operands).failures)


def test_the_inputs_are_a_line_of_their_own() -> None:
    """Right attention on operands that lost more than quantisation takes breaks that line and no other."""
    made_of = inputs(SHAPES[3])
    coarse = quantize(*(x * 1.5 for x in made_of), "per_block")
    found = compare_operands(*flash(coarse), coarse, inputs=made_of)
    assert found.failures == () and found.input_bound is not None  # the yardstick has the same operands
    fine = quantize(*made_of, "per_block")
    out, lse = flash(fine)
    worse = out + 4 * (out - flash(quantize(*made_of, "per_block", 7))[0])
    assert "inputs" in compare_operands(worse, lse, fine, inputs=made_of).failures


def test_a_gpu_has_terms_for_its_sums_and_the_simulator_has_none() -> None:
    """A tenth of the term for lse is too much on the CPU, and allowed where a tensor core made it; twice it is not."""
    operands = quantize(*inputs(SHAPES[3]), "per_block")
    q, k, _ = dequantize(operands)
    out, lse = flash(operands)
    term = score_unit_of(64) * float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) / 8
    assert compare_operands(out, lse + term / 10, operands, by_gpu=True).ok
    assert compare_operands(out, lse + term / 10, operands).failures == ("lse",)
    assert compare_operands(out, lse + 2 * term, operands, by_gpu=True).failures == ("lse",)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_calls_are_judged_by_what_they_were_given(layout: str) -> None:
    """A call on bf16 tensors, f16 ones and operands, in either layout, Q and K in a basis of their own."""
    kernel = attngen.compile(spec("per_head", "hadamard", "causal"))
    assert call_dtype(kernel.plan.inputs) == torch.bfloat16
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = (x.to(dtype) for x in inputs(Shape(1, 2, 1, 40, 70)))
        operands = quantized(kernel.plan, q, k, v)
        if layout == "bhsd":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = kernel(q, k, v, return_lse=True, layout=layout)
        found = judge(kernel.spec, kernel.plan, out, lse, q, k, v, layout=layout)  # type: ignore[arg-type]
        assert found.ok and found.input_rmse is not None, str(found)
        again = judge(kernel.spec, kernel.plan, out, lse, operands, layout=layout)  # type: ignore[arg-type]
        assert again.ok and again.input_rmse is None
        rows = judge(kernel.spec, kernel.plan, out, lse, operands, layout=layout, rows=[3, 39])  # type: ignore[arg-type]
        assert rows.ok and 0 < rows.rmse < 2 * again.rmse
        assert not judge(kernel.spec, kernel.plan, out.roll(1, -1), lse, q, k, v, layout=layout).ok  # type: ignore[arg-type]


def test_kernels_of_other_inputs_are_judged_as_before() -> None:
    """Without e4m3 inputs the verdict is `compare`'s."""
    kernel = attngen.compile({"target": "sm_80", "problem": {"head_dim": 32}, "mask": "causal"})
    q, k, v = draw(kernel.plan, Shape(1, 2, 1, 9, 30))
    out, lse = kernel(q, k, v, return_lse=True)
    expected = compare(out, lse, q, k, v, kernel.spec.mask_expr, block_n=kernel.plan.block_n)
    assert judge(kernel.spec, kernel.plan, out, lse, q, k, v) == expected
