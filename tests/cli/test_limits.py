"""What a plan leaves of each limit, what binds it, and how many blocks an SM holds."""

import pytest

from attngen.api import resolve_arch
from attngen.arch import ARCHS
from attngen.cli.limits import MARGINS, binding, margins, occupancy
from attngen.plan import KernelPlan
from attngen.plan.rules import RULES
from attngen.spec import load
from tests.plans import kernel_plan


def test_every_rule_has_a_margin() -> None:
    """A rule added to the table of the plan must be shown by explain."""
    assert set(MARGINS) == set(RULES)


def assert_margins_are_kept(plan: KernelPlan) -> None:
    for margin in margins(plan):
        assert margin.used <= margin.limit if margin.is_amount else margin.used % margin.limit == 0, margin
    tile_rules = ("registers", "shared-memory", "wgmma-columns")
    assert binding(plan).share == max(m.share for m in margins(plan) if m.rule in tile_rules)


@pytest.mark.parametrize("name", ["fa2_d128_causal", "fa2_d64", "serial_d64", "fa2_d192x128"])
def test_margins_of_a_legal_plan_are_kept(name: str) -> None:
    """A plan that passed the rules is within every margin, and the margin says what binds."""
    spec = load(name)
    plan = kernel_plan(spec, resolve_arch(spec))
    assert_margins_are_kept(plan)
    of_warpgroups = {"warpgroups", "wgmma-rows", "wgmma-columns", "staged-scales"}
    assert {m.rule for m in margins(plan)} == set(RULES) - of_warpgroups


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("kind", ["warp_specialized", "pingpong"])
def test_margins_of_warpgroups_are_kept(kind: str, head_dim: int) -> None:
    """The same where warpgroups compute; the rows of mma.sync say nothing there."""
    plan = kernel_plan(load({"problem": {"head_dim": head_dim}, "schedule": {"kind": kind}}), ARCHS["sm_90a"])
    assert_margins_are_kept(plan)
    assert {m.rule for m in margins(plan)} == set(RULES) - {"mma-rows", "staged-scales"}


def test_staged_scales_have_a_margin() -> None:
    """Three groups of columns in 96 keys; a producer of 32 registers has room for five."""
    precision = {"inputs": "e4m3", "scales": "per_block"}
    plan = kernel_plan(
        load({"problem": {"head_dim": 64}, "precision": precision, "tile": {"block_n": 96}}), ARCHS["sm_90a"]
    )
    assert_margins_are_kept(plan)
    assert "3 of 5 groups of columns (2 left)" in map(str, margins(plan))


def hopper_margin(rule: str, **changes: object) -> str:
    plan = kernel_plan(load({"problem": {"head_dim": 128}} | changes), ARCHS["sm_90a"])
    (found,) = [str(margin) for margin in margins(plan) if margin.rule == rule]
    return found


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
    assert str(binding(plan)) == "256 of 256 keys (0 left)"
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
    assert str(binding(kernel_plan(spec, ARCHS["sm_90a"]))) == "192 of 208 accumulator registers (16 left)"
    assert binding(kernel_plan(spec.replace({"tile.block_n": 80}), ARCHS["sm_90a"])).share == 1.0
    with pytest.raises(PlanError) as refused:
        kernel_plan(spec.replace({"tile.block_n": 96}), ARCHS["sm_90a"])
    assert [d.rule for d in refused.value.diagnostics] == ["registers"]


@pytest.mark.parametrize(
    ("threads", "registers", "smem", "blocks", "limit"),
    [
        (128, 128, 0, 4, "registers"),  # 65536 / (128 * 128)
        (128, 121, 0, 4, "registers"),  # 121 is granted as 128
        (128, 32, 64 * 1024, 3, "shared memory"),  # 228 KiB holds three of 65 KiB
        (1024, 16, 0, 2, "threads"),  # 2048 threads
        (384, 168, 0, 1, "registers"),  # two consumers and a producer: 64512 of 65536
        (512, 128, 0, 1, "registers"),  # three and a producer: all of them
        (
            160,
            200,
            0,
            1,
            "registers",
        ),  # each quarter of the multiprocessor holds two warps of 6400, a block has five
    ],
)
def test_occupancy_on_hopper(threads: int, registers: int, smem: int, blocks: int, limit: str) -> None:
    """Resident blocks of an sm_90a multiprocessor, worked out by hand."""
    found = occupancy(ARCHS["sm_90a"], threads, registers, smem)
    assert found.blocks == blocks
    assert found.warps == blocks * threads // 32
    assert found.limited_by == limit
