"""What is emitted of the kernel that adds dQ up beside dK and dV: by NVRTC, and of its sheets by g++."""

import math
import re

import pytest
import torch

from attngen.plan import PADDED_ROWS, FinishSums, PrepareRows
from attngen.runtime import disassemble
from attngen.simulate.simulated_sheets import finish_sums
from attngen.simulate.visits import Sizes
from tests.gradients.backward_cases import BackwardCase
from tests.gradients.sheets_on_cpu import as_registers, run_on_cpu
from tests.gradients.test_fused_backward import FREE, assert_compiles, fused


@pytest.mark.matrix(most=2)
@pytest.mark.parametrize("inputs", ["bf16", "f16"])
@pytest.mark.parametrize("mask", ["full", "causal", "window(100, 30)"])
@pytest.mark.parametrize(
    ("head_dim", "score"),
    [
        (64, "score"),
        (128, "score"),
        (128, "softcap(score, 30.0)"),
        (128, "softcap(score, cap)"),
        (128, "score + alibi(slopes)"),
    ],
)
def test_kernels_compile_without_spills(
    head_dim: int, score: str, mask: str, inputs: str, nvdisasm: None
) -> None:
    """Products stay in flight, descriptors in uniform registers, and nothing is touched before a kernel has waited."""
    spec = FREE | ({"scalars": {"cap": "f32"}} if "cap)" in score else {})
    case = BackwardCase(mask, score, head_dim=(head_dim, head_dim), inputs=inputs, spec=spec)
    kernel = fused(case)
    assert_compiles(kernel)
    (plan,) = kernel.call.gradients
    sass = disassemble(kernel.modules[plan.module].compiled.cubin)
    consumer = sass[sass.index("HGMMA") : sass.rindex("HGMMA")]
    assert consumer.count("R2UR") <= 4  # bounds of blocks, no descriptors
    assert {"UBLKRED", "STSM", "UTMALDG"} <= set(re.findall(r"\b[A-Z]+\b", sass))


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_the_text_that_finishes_sums(
    head_dim: int, dtype: str, accumulates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By g++: each element of a register arrives at its row and column, scaled; rows past the end are left alone."""
    kernel = fused(BackwardCase(head_dim=(head_dim, head_dim), spec=FREE))
    (sheet,) = (each for each in kernel.call.kernels if isinstance(each, FinishSums))
    batch, heads, seqlen = 2, 3, 150
    padded = -(-seqlen // PADDED_ROWS) * PADDED_ROWS
    rows = torch.randn(batch, heads, padded, sheet.sums.cols, generator=torch.Generator().manual_seed(0))
    name = "dq" if dtype == "bf16" else "dq_f32"
    held = torch.ones(
        batch,
        seqlen + 9,
        heads,
        head_dim,
        dtype=getattr(torch, {"bf16": "bfloat16", "f32": "float32"}[dtype]),
    )
    sizes = Sizes(batch, seqlen, 1, heads, heads, softmax_scale=0.25, accumulates=accumulates)
    expected = finish_sums(sheet, {"dq_sums": rows, name: held[:, :seqlen]}, sizes)[name]
    numbers = {
        "batch": batch,
        "seqlen_q": seqlen,
        "num_heads_q": heads,
        "gradient_scale": 0.25,
        "accumulates": accumulates,
    }
    made = held.clone()
    run_on_cpu(sheet, {"dq_sums": as_registers(rows, sheet), name: made}, numbers)
    assert torch.equal(made[:, :seqlen], expected) and expected.std() > 0.1
    assert torch.equal(made[:, seqlen:], held[:, seqlen:])


def test_the_text_that_prepares_rows_clears_all_sums() -> None:
    """By g++: every element of every head is 0, those of padding too; without sums nothing is written."""
    kernel = fused(BackwardCase(head_dim=(64, 64), spec=FREE))
    (sheet,) = (each for each in kernel.call.kernels if isinstance(each, PrepareRows))
    batch, heads, seqlen, padded = 2, 3, 150, 256
    x = torch.ones(batch, seqlen, heads, 64, dtype=torch.bfloat16)
    values = {"out": x, "dout": x, "lse": torch.zeros(batch, heads, seqlen)}
    values |= {each: torch.full((batch, heads, padded), math.nan) for each in sheet.writes}
    sums = torch.full((batch, heads, padded, 64), math.nan)
    numbers = {"batch": batch, "seqlen_q": seqlen, "num_heads_q": heads}
    run_on_cpu(sheet, values | {"dq_sums": sums}, numbers)
    assert not sums.any() and not sums.isnan().any()
    assert (values["delta"][..., :seqlen] == 64).all()
    run_on_cpu(sheet, values, numbers)
