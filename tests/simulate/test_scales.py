"""Plans of e4m3 inputs, against exact attention on the real values that their operands stand for."""

from typing import Any

import pytest
import torch

import attngen
from attngen.check.inputs import Shape
from attngen.check.reference import attention
from attngen.lower import warpgroups
from attngen.plan import Ring, walk
from attngen.plan.steps import Promote, StageScales
from attngen.quantize import SCALE_KINDS, Operands, dequantize
from attngen.simulate import SimulationFault
from tests.check.language_cases import LanguageCase

GQA = Shape(1, 4, 2, 21, 140)
ROUNDING = 2.0**-4
"""Half a unit in the last place of e4m3, relative: what rounding P to it may change."""
SMALLEST = 2.0**-10 / 2**8
"""Half the smallest e4m3 number, in relation to the largest P: what that changes where P is smaller."""
TYPICAL = 0.05
"""RMSE in relation to the RMS of the output. Errors of P, some 0.026 of it each, go into it as P itself does."""


PLAIN = LanguageCase()


def compiled(case: LanguageCase = PLAIN, head_dim: Any = 64, **blocks: Any) -> attngen.Kernel:
    """A kernel of the simulator; `blocks` are of the spec, precision without its inputs."""
    precision = {"inputs": "e4m3", "output": "f32", **blocks.pop("precision", {})}
    language = {"mask": case.mask, "score": case.score, **case.declarations}
    spec = {"target": "simulator", "problem": {"head_dim": head_dim}, "precision": precision}
    return attngen.compile(spec | language | blocks)


def drawn(
    kernel: attngen.Kernel, shape: Shape, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v, bf16."""
    generator = torch.Generator().manual_seed(seed)
    qk, v = kernel.plan.head_dim_qk, kernel.plan.head_dim_v
    sizes = (
        (shape.seqlen_q, shape.heads, qk),
        (shape.seqlen_k, shape.heads_kv, qk),
        (shape.seqlen_k, shape.heads_kv, v),
    )
    q, k, v = (torch.randn(shape.batch, *size, generator=generator).bfloat16() for size in sizes)
    return q, k, v


def assert_right(
    kernel: attngen.Kernel, operands: Operands, softmax_scale: float | None = None, **declared: Any
) -> None:
    """Within what rounding P to e4m3 may do, and lse, which is of P before it, as exact as of other inputs."""
    out, lse = kernel(operands, softmax_scale=softmax_scale, return_lse=True, **declared)
    q, k, v = dequantize(operands)
    spec = kernel.spec
    given = {"softmax_scale": softmax_scale, "score": spec.score_expr, "declared": declared}
    exact, exact_lse = attention(q, k, v, spec.mask_expr, **given)
    of_magnitudes, _ = attention(q, k, v.abs(), spec.mask_expr, **given)
    most = operands.v_descale.amax().double() * 448 if v.numel() else 0
    error = (out.double() - exact).abs()
    assert (error <= (ROUNDING + 1e-4) * of_magnitudes + SMALLEST * operands.seqlen_k * most).all()
    assert error.square().mean().sqrt() <= TYPICAL * exact.square().mean().sqrt()
    assert torch.allclose(lse.double(), exact_lse, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("promote", [0, 1])
@pytest.mark.parametrize("incoherent", ["none", "hadamard"])
@pytest.mark.parametrize("scales", SCALE_KINDS)
def test_every_kind_of_scales(scales: str, incoherent: str, promote: int) -> None:
    """Grouped heads, odd lengths, several granules of keys; with both signs of the scale."""
    precision = {"scales": scales, "incoherent": incoherent, "promote": promote}
    kernel = compiled(LanguageCase("causal"), precision=precision)
    operands = kernel.quantize(*drawn(kernel, GQA))
    for softmax_scale in (None, -0.1):
        assert_right(kernel, operands, softmax_scale)


@pytest.mark.parametrize("scales", SCALE_KINDS[1:])  # that of a tensor is what all heads share
@pytest.mark.parametrize(
    "case",
    [
        LanguageCase("window(20, 3)"),
        LanguageCase("document(doc)", "score"),
        LanguageCase("causal", "softcap(score, 3.0)"),
        LanguageCase("kv_idx != q_idx", "score + bias[h, q_idx, kv_idx]"),
        LanguageCase("causal", "score + alibi(slopes)"),
    ],
    ids=str,
)
def test_masks_and_scores(case: LanguageCase, scales: str) -> None:
    """Scores enter the language in natural units, whatever shares a scale."""
    kernel = compiled(case, precision={"scales": scales})
    operands = kernel.quantize(*drawn(kernel, GQA))
    assert_right(kernel, operands, **case.arguments(GQA))


@pytest.mark.parametrize(
    ("head_dim", "part"), [(128, 64), ({"qk": 32, "v": 240}, 80), (256, 64), ({"qk": 4, "v": 5}, 5)]
)
def test_promotion_in_slices(head_dim: Any, part: int) -> None:
    """Slices that share out O evenly are promoted one after another."""
    kernel = compiled(head_dim=head_dim, precision={"scales": "per_head", "promote": 1})
    promotions = [step for step in walk(kernel.plan.worker.program) if isinstance(step, Promote)]
    assert {step.part.cols for step in promotions} == {part}
    assert {step.first_column for step in promotions} == set(range(0, kernel.plan.head_dim_v, part))
    assert_right(kernel, kernel.quantize(*drawn(kernel, Shape(1, 2, 1, 9, 200))))


@pytest.mark.parametrize(("block_n", "seqlen_k"), [(2, 35), (3, 35), (48, 170), (160, 170)])
def test_any_block_of_keys_is_simulated(block_n: int, seqlen_k: int) -> None:
    """Blocks that end within 16 keys that lie in the order of fragments, and within a granule of 128."""
    kernel = compiled(precision={"scales": "per_block"}, tile={"block_m": 4, "block_n": block_n})
    assert_right(kernel, kernel.quantize(*drawn(kernel, Shape(1, 2, 1, 5, seqlen_k))))


@pytest.mark.parametrize("scales", SCALE_KINDS)
def test_values_of_many_orders(scales: str) -> None:
    """Granules from 2^-20 to 2^20, blocks of zeros and single outliers."""
    kernel = compiled(precision={"scales": scales})
    q, k, v = drawn(kernel, Shape(1, 2, 1, 70, 400))
    k[:, 128:256] *= 2.0**-20
    v[:, :128] *= 2.0**20
    v[:, 256:384] *= 2.0**-20
    q[:, 64:], k[:, 256:384] = 0, 0
    q[0, 3, 0, 5], v[0, 7, 0, 9] = 400.0, 2.0**26
    assert_right(kernel, kernel.quantize(q, k, v))


@pytest.mark.parametrize("scales", SCALE_KINDS)
def test_scales_too_small_for_f32_leave_masked_keys_masked(scales: str) -> None:
    """The product of all scales is less than the smallest f32, and -inf times it is -inf still, not NaN."""
    kernel = compiled(LanguageCase("causal"), precision={"scales": scales})
    q, k, v = drawn(kernel, Shape(1, 2, 1, 14, 130))
    assert_right(kernel, kernel.quantize(q * 2.0**-90, k * 2.0**-90, v))
    assert_right(kernel, kernel.quantize(q, k, v), softmax_scale=0.0)


@pytest.mark.parametrize("scales", SCALE_KINDS)
def test_rows_without_keys_are_zero(scales: str) -> None:
    """Of a mask that hides all, of a sequence without keys, and of one without queries."""
    kernel = compiled(LanguageCase("causal"), precision={"scales": scales})
    for shape, hidden in ((Shape(2, 4, 2, 90, 70), 20), (Shape(2, 4, 2, 9, 0), 9), (Shape(2, 4, 2, 0, 9), 0)):
        out, lse = kernel(*drawn(kernel, shape), return_lse=True)
        assert (out[:, :hidden] == 0).all() and (lse[..., :hidden] == -torch.inf).all()
        assert out[:, hidden:].isfinite().all() and lse[..., hidden:].isfinite().all()


@pytest.mark.parametrize("incoherent", ["none", "hadamard"])
@pytest.mark.parametrize("scales", SCALE_KINDS)
def test_a_nan_of_q_spoils_its_row_alone(scales: str, incoherent: str) -> None:
    """And changes no scale, so that all other rows are the same, bit by bit."""
    kernel = compiled(precision={"scales": scales, "incoherent": incoherent})
    q, k, v = drawn(kernel, Shape(1, 2, 1, 20, 40))
    q[0, 7, 1] *= 0.01  # so that no maximum is of this row
    clean = kernel(q, k, v)
    q[0, 7, 1, 3] = torch.nan
    out = kernel(q, k, v)
    assert out[0, 7, 1].isnan().all()
    out[0, 7, 1] = clean[0, 7, 1]
    assert torch.equal(out, clean)


def test_staged_scales_are_released_by_every_warp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one thread did, others of its warpgroup might read those of a later block: no GEMM waits for them."""
    monkeypatch.setattr(warpgroups, "Ring", lambda name, stages, *how: Ring(name, stages))
    kernel = compiled(precision={"scales": "per_block"})
    with pytest.raises(SimulationFault, match="consumer 0 read it, and nothing orders") as caught:
        kernel(*drawn(kernel, Shape(1, 2, 1, 14, 600)))
    assert isinstance(caught.value.step, StageScales)
