"""Formats of the operands: which target and schedule take which, and what a format asks of the tile."""

from itertools import product
from typing import Any

import pytest
import torch
from refused import SPECIALISED, diagnostics, faults, only

import attngen
from attngen.arch import ARCHS
from tests.plans import kernel_plan


def test_f32_is_for_the_simulator() -> None:
    """No matrix instruction takes f32; the simulator does."""
    fault = only(precision={"inputs": "f32"})
    assert (fault.rule, fault.nearest) == ("input-dtype", ("f16", "bf16", "e4m3"))
    assert fault.note == "the matrix instruction of sm_90a takes f16, bf16 and e4m3; f32 is for simulator"
    spec = attngen.load({"target": "simulator", "problem": {"head_dim": 3}, "precision": {"inputs": "f32"}})
    assert kernel_plan(spec, ARCHS["simulator"]).block_m > 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_120"])
def test_e4m3_is_for_wgmma(arch: str) -> None:
    """A target without it says which have it."""
    fault = only(arch, precision={"inputs": "e4m3"})
    assert (fault.rule, fault.nearest) == ("input-dtype", ("f16", "bf16"))
    assert fault.note.endswith("takes f16 and bf16; e4m3 is for sm_90a and simulator")


@pytest.mark.parametrize("arch", ["sm_90a", "simulator"])
@pytest.mark.parametrize("kind", ["fa2", "serial"])
def test_schedules_of_warps_do_not_take_e4m3(kind: str, arch: str) -> None:
    """The schedules that do are named."""
    fault = only(arch, precision={"inputs": "e4m3"}, schedule={"kind": kind})
    assert fault.message == f"schedule.kind = {kind} does not take e4m3 inputs"
    assert (fault.rule, fault.nearest) == ("schedule-inputs", SPECIALISED)


def test_what_a_target_lacks_is_told_at_once() -> None:
    """Formats and schedule in one report."""
    found = diagnostics("sm_80", precision={"inputs": "e4m3"}, schedule={"kind": "pingpong"})
    assert [fault.rule for fault in found] == ["input-dtype", "schedule-target"]


@pytest.mark.parametrize(
    ("block_n", "nearest"), [(48, ("32", "64")), (80, ("64", "96")), (144, ("128", "160"))]
)
def test_e4m3_takes_32_keys_at_a_time(block_n: int, nearest: tuple[str, ...]) -> None:
    """The output GEMM contracts 32 keys a step; 16 more are no step."""
    fault = only(precision={"inputs": "e4m3", "promote": 0}, tile={"block_n": block_n})
    assert (fault.rule, fault.nearest) == ("mma-k-step", nearest)
    assert fault.note == "P·V consumes block_n in k-steps of 32 for e4m3"


def test_a_promotion_that_does_not_fit_is_told() -> None:
    """Registers are counted with what the tensor core adds up before it joins O."""
    precision = {"inputs": "e4m3", "scales": "per_block", "promote": 1}
    changes: dict[str, Any] = {"problem": {"head_dim": 256}, "tile": {"block_m": 128, "block_n": 128}}
    fault = only(precision=precision, **changes)
    assert (fault.rule, fault.nearest) == ("registers", ("64",))
    assert fault.note == (
        "acc_s 64 + p 16 + acc_o 128 + part_o 32 = 240; part_o is what precision.promote: 0 does without"
    )
    plan = kernel_plan(attngen.load(changes | {"precision": precision | {"promote": 0}}), ARCHS["sm_90a"])
    assert "part_o" not in {tile.name for tile in plan.worker.reg_tiles}


DIMS_8BIT = [*((dim, dim) for dim in range(32, 257, 16)), (192, 128), (128, 208), (64, 256), (240, 64)]


@pytest.mark.parametrize("scales", ["per_tensor", "per_block", "per_token"])
@pytest.mark.parametrize("promote", [0, 1])
def test_auto_has_a_plan_for_every_head_dim_of_e4m3(promote: int, scales: str) -> None:
    """O is promoted whole or in even slices that wgmma takes; blocks of keys are whole steps of both GEMMs."""
    asked = (("causal", "score"), ("window(99, 0)", "score"), ("q_idx != kv_idx", "softcap(score, 20.0)"))
    for (qk, v), (mask, score) in product(DIMS_8BIT, asked):
        spec = {
            "problem": {"head_dim": {"qk": qk, "v": v}},
            "precision": {"inputs": "e4m3", "scales": scales, "promote": promote},
            "mask": mask,
            "score": score,
        }
        plan = kernel_plan(attngen.load(spec), ARCHS["sm_90a"])
        parts = [tile.cols for tile in plan.worker.reg_tiles if tile.name == "part_o"]
        assert len(parts) == promote and all(v % cols == 0 and cols % 8 == 0 for cols in parts)
        assert plan.block_n % 32 == 0


@pytest.mark.parametrize("kind", ["serial", "fa2", *SPECIALISED])
def test_short_inputs_give_f32_where_that_is_asked_for(kind: str) -> None:
    """In every schedule; the mean of 1 and 1 + 2^-7 is no bf16."""
    kernel = attngen.compile(
        {
            "target": "sm_90a",
            "problem": {"head_dim": 64},
            "precision": {"output": "f32"},
            "schedule": {"kind": kind},
        }
    )
    v = torch.tensor([1.0, 1.0 + 2**-7]).bfloat16().view(1, 2, 1, 1).repeat(1, 1, 1, 64)
    out = kernel(torch.zeros(1, 70, 1, 64).bfloat16(), torch.zeros_like(v), v)
    assert isinstance(out, torch.Tensor) and out.dtype == torch.float32
    assert out.shape == (1, 70, 1, 64) and ((out - (1.0 + 2**-8)).abs() < 1e-6).all()
    assert "out" not in {buffer.name for buffer in kernel.plan.buffers}


@pytest.mark.parametrize(
    ("precision", "tile", "rule", "nearest"),
    [
        (
            {"scales": "per_block", "promote": 0},
            {"block_m": 128, "block_n": 160},
            "staged-scales",
            ("128", "192"),
        ),
        ({"scales": "per_tensor", "promote": 0}, {"block_m": 128, "block_n": 256}, "registers", ("224",)),
        ({"scales": "per_tensor", "promote": 0}, {"block_m": 192, "block_n": 128}, "registers", ("96",)),
        ({"scales": "per_token", "promote": 0}, {"block_m": 128, "block_n": 192}, "registers", ("128",)),
        ({"scales": "per_token", "promote": 0}, {"block_m": 64, "block_n": 192}, "registers", ("160",)),
    ],
)
def test_tiles_that_would_spill_are_refused(
    precision: dict[str, Any], tile: dict[str, int], rule: str, nearest: tuple[str, ...]
) -> None:
    """head_dim 128: with O, scales or what the producer stages in the way, and the nearest tile that has room."""
    found = faults(precision={"inputs": "e4m3", **precision}, tile=tile)
    assert found[rule] == nearest
