"""What a plan leaves of each limit, and what binds it."""

import pytest

from attngen.api import resolve_arch
from attngen.arch import ARCHS
from attngen.cli.occupancy import occupancy
from attngen.plan import KernelPlan
from attngen.plan.hardware_rules import RULES, binding, margins
from attngen.spec import load
from tests.plans import kernel_plan


def assert_margins_are_kept(plan: KernelPlan) -> None:
    left = margins(plan)
    for margin in left.values():
        assert (
            margin.used <= margin.limit if margin.allows == "at most" else margin.used % margin.limit == 0
        ), margin
    tile_rules = ("registers", "shared-memory", "wgmma-columns")
    rule, fullest = binding(plan)
    assert rule in tile_rules and fullest.share == max(
        left[rule].share for rule in tile_rules if rule in left
    )


@pytest.mark.parametrize("name", ["fa2_d128_causal", "fa2_d64", "serial_d64", "fa2_d192x128"])
def test_margins_of_a_legal_plan_are_kept(name: str) -> None:
    """A plan that passed the rules is within every margin, and the margin says what binds."""
    spec = load(name)
    plan = kernel_plan(spec, resolve_arch(spec))
    assert_margins_are_kept(plan)
    of_others = {"warpgroups", "wgmma-rows", "wgmma-columns", "staged-scales", "parts"}
    of_others |= set() if plan.schedule == "serial" else {"serial-stages"}
    assert set(margins(plan)) == set(RULES) - of_others


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("kind", ["warp_specialized", "pingpong"])
def test_margins_of_warpgroups_are_kept(kind: str, head_dim: int) -> None:
    """Where warpgroups compute, a plan is within every margin; the rows of mma.sync say nothing there."""
    plan = kernel_plan(load({"problem": {"head_dim": head_dim}, "schedule": {"kind": kind}}), ARCHS["sm_90a"])
    assert_margins_are_kept(plan)
    assert set(margins(plan)) == set(RULES) - {"mma-rows", "staged-scales", "serial-stages", "parts"}


def test_staged_scales_have_a_margin() -> None:
    """Three groups of columns in 96 keys; a producer of 32 registers has room for five."""
    precision = {"inputs": "e4m3", "scales": "per_block"}
    plan = kernel_plan(
        load({"problem": {"head_dim": 64}, "precision": precision, "tile": {"block_n": 96}}), ARCHS["sm_90a"]
    )
    assert_margins_are_kept(plan)
    assert str(margins(plan)["staged-scales"]) == "3 of 5 groups of columns (2 left)"


def hopper_margin(rule: str, **changes: object) -> str:
    plan = kernel_plan(load({"problem": {"head_dim": 128}} | changes), ARCHS["sm_90a"])
    return str(margins(plan)[rule])


def test_the_registers_of_a_consumer_are_those_that_setmaxnreg_gives() -> None:
    """Two warpgroups hold 240 less 24, three 160 less 32, one what a launch may give; P has registers of its own."""
    small: dict[str, object] = {"problem": {"head_dim": 64}}
    assert hopper_margin("registers") == "160 of 216 tile registers (56 left)"
    assert hopper_margin("registers", tile={"block_m": 64}) == "160 of 208 tile registers (48 left)"
    assert hopper_margin("registers", **small) == "128 of 128 tile registers (0 left)"
    assert (
        hopper_margin("registers", **small, schedule={"warpgroups": 2})
        == "128 of 216 tile registers (88 left)"
    )
    assert (
        hopper_margin("registers", schedule={"kind": "fa2"}) == "192 of 208 accumulator registers (16 left)"
    )


def test_what_binds_warpgroups() -> None:
    """A block_n of 256, the widest wgmma, binds before anything else where registers are left."""
    plan = kernel_plan(
        load({"problem": {"head_dim": 32}, "tile": {"block_m": 128, "block_n": 256}}), ARCHS["sm_90a"]
    )
    assert str(binding(plan)[1]) == "256 of 256 keys (0 left)"
    assert hopper_margin("wgmma-rows") == "128 = 1 x 128 rows"
    assert hopper_margin("warpgroups") == "2 of 3 consumer warpgroups (1 left)"
    assert hopper_margin("threads-per-block") == "384 of 1024 threads (640 left)"


@pytest.mark.parametrize("count", [2, 3])
def test_the_pools_of_setmaxnreg_are_what_the_launch_gives(count: int) -> None:
    """The roles' registers sum to the block's at launch: the largest number of eights that threads can get."""
    spec = load({"problem": {"head_dim": 64}, "schedule": {"kind": "pingpong", "warpgroups": count}})
    kernel = kernel_plan(spec, ARCHS["sm_90a"])
    at_launch = ARCHS["sm_90a"].registers_per_sm // kernel.threads // 8 * 8
    held = [role.registers for role in kernel.roles if role.registers is not None]
    assert (
        sum(32 * role.warps * n for role, n in zip(kernel.roles, held, strict=True))
        == kernel.threads * at_launch
    )
    assert occupancy(ARCHS["sm_90a"], kernel.threads, at_launch, kernel.smem_bytes).blocks == 1


def test_the_plan_at_the_limit_of_registers_is_bound_by_them() -> None:
    """128x64 tiles of head_dim 128 fill 192 of 208 registers; one k-step more fits exactly, two are refused."""
    from attngen.errors import PlanError

    spec = load("fa2_d128_causal").replace({"tile.block_m": 128, "tile.block_n": 64, "schedule.warps": 4})
    assert str(binding(kernel_plan(spec, ARCHS["sm_90a"]))[1]) == "192 of 208 accumulator registers (16 left)"
    assert binding(kernel_plan(spec.replace({"tile.block_n": 80}), ARCHS["sm_90a"]))[1].share == 1.0
    with pytest.raises(PlanError) as refused:
        kernel_plan(spec.replace({"tile.block_n": 96}), ARCHS["sm_90a"])
    assert [d.rule for d in refused.value.diagnostics] == ["registers"]
