"""Rules refuse before any compiler runs, and name what would do."""

import pytest

import attngen
from attngen.arch import ARCHS
from attngen.lower import lower
from attngen.spec import Spec


def faults(arch: str = "sm_90a", **changes: object) -> dict[str, tuple[str, ...]]:
    """Rule -> nearest valid values."""
    with pytest.raises(attngen.PlanError) as caught:
        lower(attngen.load({"problem": {"head_dim": 128}} | changes), ARCHS[arch])
    return {fault.rule: fault.nearest for fault in caught.value.diagnostics}


def test_block_n_200_is_no_multiple_of_the_k_step() -> None:
    """The nearest valid values pass every rule, not only the one that was broken."""
    found = faults(tile={"block_n": 200}, problem={"head_dim": 32}, schedule={"stages": 1})
    assert found["mma-k-step"] == ("176",)


def test_the_nearest_values_are_legal() -> None:
    """Lowering with any value that an error names succeeds."""
    for changes in ({"tile": {"block_n": 200}}, {"tile": {"block_m": 100}}, {"schedule": {"stages": 9}}):
        for nearest in faults(**changes).values():
            for value in nearest:
                ((section, knobs),) = changes.items()
                key = next(iter(knobs))
                spec = attngen.load({"problem": {"head_dim": 128}, section: {key: int(value)}})
                lower(spec, ARCHS["sm_90a"])


def test_a_tile_too_large_for_shared_memory() -> None:
    """sm_86 has 99 KB; the report gives the sum that exceeds it."""
    with pytest.raises(attngen.PlanError, match=r"= 131072 bytes") as caught:
        lower(
            attngen.load(
                {
                    "problem": {"head_dim": 256},
                    "tile": {"block_m": 64, "block_n": 64},
                    "schedule": {"stages": 1},
                }
            ).replace({"tile.block_n": 96}),
            ARCHS["sm_86"],
        )
    assert any(fault.rule == "shared-memory" for fault in caught.value.diagnostics)


def test_serial_has_one_stage() -> None:
    """Serial overlaps nothing, so more stages are refused."""
    assert faults(schedule={"kind": "serial", "stages": 2})["serial-stages"] == ("1",)


def test_f32_is_for_the_simulator() -> None:
    """The matrix instruction takes 16-bit inputs; the simulator takes f32 too."""
    assert faults(precision={"inputs": "f32"})["input-dtype"] == ("f16", "bf16")
    spec = attngen.load({"target": "simulator", "problem": {"head_dim": 3}, "precision": {"inputs": "f32"}})
    assert lower(spec, ARCHS["simulator"]).block_m > 0


@pytest.mark.parametrize("head_dim", range(32, 257, 8))
@pytest.mark.parametrize("arch", [name for name, arch in ARCHS.items() if arch.emits])
def test_auto_finds_a_legal_tile_everywhere(arch: str, head_dim: int) -> None:
    """No head dim is without a kernel on any target, in either schedule."""
    for kind in ("serial", "fa2"):
        spec: Spec = attngen.load({"problem": {"head_dim": head_dim}, "schedule": {"kind": kind}})
        plan = lower(spec, ARCHS[arch])
        assert plan.kernel.smem_bytes <= ARCHS[arch].smem_bytes_per_block
