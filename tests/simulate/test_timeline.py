"""The timeline of one SM: what units do when, by a stated cost for each Step."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest

from attngen.arch import ARCHS
from attngen.errors import ToolchainError
from attngen.plan import KernelPlan, Program
from attngen.plan.steps import ForBlocks, ForTiles, PassTurn, Release, Step, When
from attngen.simulate import (
    COSTS,
    UNITS,
    Interval,
    SimulationFault,
    Timeline,
    costs_of,
    count,
    predict,
    timeline,
)
from attngen.simulate.charges import CHARGES
from attngen.spec import load
from tests.plans import kernel_plan

H200 = COSTS["sm_90a"]
LENGTH = 1024


def plan_of(kind: str, mask: str = "full", head_dim: int = 128, **schedule: Any) -> KernelPlan:
    spec = {
        "target": "sm_90a",
        "problem": {"head_dim": head_dim},
        "mask": mask,
        "schedule": {"kind": kind, **schedule},
    }
    return kernel_plan(load(spec), ARCHS["sm_90a"])


PLANS = {
    "serial": lambda: plan_of("serial", head_dim=64),
    "fa2": lambda: plan_of("fa2", "causal"),
    "warp_specialized": lambda: plan_of("warp_specialized", "causal"),
    "pingpong": lambda: plan_of("pingpong", "causal"),
    "three warpgroups": lambda: plan_of("warp_specialized", "causal", 64),
    "not persistent": lambda: plan_of("pingpong", persistent=False),
    "no overlap": lambda: plan_of("pingpong", overlap=False),
}


def without(plan: KernelPlan, role: str, kind: type[Step]) -> KernelPlan:
    """The plan, one role of which lacks the first Step of a kind."""

    def cut(program: Program, left: list[int]) -> Program:
        steps: list[Step] = []
        for step in program:
            if isinstance(step, ForTiles | ForBlocks | When):
                step = dataclasses.replace(step, body=cut(step.body, left))
            if isinstance(step, kind) and left[0]:
                left[0] -= 1
            else:
                steps.append(step)
        return tuple(steps)

    roles = tuple(
        dataclasses.replace(r, program=cut(r.program, [1])) if r.name == role else r for r in plan.roles
    )
    kernel = dataclasses.replace(plan, roles=roles)
    return kernel


def assert_none_overlap(intervals: Iterable[Interval]) -> None:
    end = 0
    for interval in sorted(intervals, key=lambda i: i.begin):
        assert interval.begin >= end and interval.end > interval.begin, interval
        end = interval.end


def tensor_share(found: Timeline) -> float:
    return found.share("tensor core")


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("slots", [1, 2])
def test_a_unit_does_one_thing_at_a_time(name: str, slots: int) -> None:
    """Each unit, and each role, is busy with one thing at a time, from 0 to the end, and every unit is used."""
    found = timeline(PLANS[name](), LENGTH, LENGTH, slots=slots)
    for unit in UNITS:
        assert_none_overlap(i for i in found.intervals if i.unit == unit)
        assert 0 < found.busy(unit) <= found.cycles
    for role in found.roles:
        assert_none_overlap(i for i in found.intervals if i.unit is None and i.role == role)
    assert len(found.roles) == slots * sum(role.warpgroups for role in PLANS[name]().roles)


@pytest.mark.parametrize("kind", ["warp_specialized", "pingpong"])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_the_tensor_core_is_busy_for_its_flops(kind: str, mask: str) -> None:
    """wgmma's time is the FLOPs that the simulator counts, over the rate of the table, for both tiles drawn."""
    found = timeline(plan_of(kind, mask), 128, LENGTH)
    counted = count(plan_of(kind, mask), 128, LENGTH)
    assert found.tiles == 2
    assert found.busy("tensor core") == 2 * counted.flops / H200.flops_of_16_bit


def test_mma_sync_is_slower_by_its_share() -> None:
    """fa2's GEMMs take the time of their FLOPs at mma.sync's rate, each rounded up to a cycle."""
    found = timeline(plan_of("fa2"), 128, LENGTH)
    exact = count(plan_of("fa2"), 128, LENGTH).flops / (H200.flops_of_16_bit * H200.mma_share)
    gemms = 2 * LENGTH // 64
    assert exact <= found.busy("tensor core") <= exact + gemms


def test_exponentials_take_their_rate() -> None:
    """16 a cycle: as many cycles as there are scores in the tile, over 16."""
    plan = plan_of("pingpong")
    found = timeline(plan, 128, LENGTH)
    assert found.busy("exponential unit") == found.tiles * 128 * LENGTH / H200.exponentials


def test_a_copy_is_not_read_before_its_bytes_are_there() -> None:
    """The first score GEMM begins when Q and a block of K have been moved, and the latency has passed."""
    plan = plan_of("warp_specialized")
    found = timeline(plan, 128, LENGTH)
    first = min(i.begin for i in found.intervals if i.unit == "tensor core")
    size = 2 * 128 * 128 * 2
    assert first >= size / H200.copy_bytes + H200.copy_latency


def test_overlap_beats_none_beats_fa2() -> None:
    """At head_dim 64, where exponentials cost as much as GEMMs, the order of the paper's ablation.

    Source: FlashAttention-3, arXiv 2407.08608, table 2: without overlap 582 of 661 TFLOPS. Without turns: `auto` passes
    them late, which measured better and which the model thinks ill of.
    """
    full = timeline(plan_of("warp_specialized", head_dim=64), 4096, 4096)
    one_less = timeline(plan_of("warp_specialized", head_dim=64, overlap=False), 4096, 4096)
    assert tensor_share(full) > 1.01 * tensor_share(one_less)
    useful = [
        predict(plan, 4096, 4096, 4, 32, slots=slots).seconds
        for plan, slots in (
            (plan_of("warp_specialized", head_dim=64), 1),
            (plan_of("warp_specialized", head_dim=64, overlap=False), 1),
            (plan_of("fa2", head_dim=64), 2),
        )
    ]
    assert useful == sorted(useful)


@pytest.mark.parametrize("kind", ["warp_specialized", "pingpong"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_overlap_is_better_than_none(kind: str, head_dim: int) -> None:
    """The softmax under the output GEMM makes a tile shorter."""
    more, less = (
        predict(plan_of(kind, head_dim=head_dim, overlap=overlap), 2048, 2048, 8, 16)
        for overlap in (True, False)
    )
    assert more.tile_cycles < less.tile_cycles


def test_turns_alternate() -> None:
    """With pingpong the tensor core serves the two GEMMs of one warpgroup, then those of the other."""
    found = timeline(plan_of("pingpong"), 128, LENGTH)
    served = sorted(
        (i for i in found.intervals if i.unit == "tensor core" and i.block is not None), key=lambda i: i.begin
    )
    assert served
    for pair in zip(served[::2], served[1::2], strict=True):
        assert [i.acc for i in pair] == ["acc_s", "acc_o"]
        assert pair[0].role == pair[1].role
    order = [i.role for i in served[::2]]
    assert order[: len(order) // 2] == ["consumer 0", "consumer 1"] * (len(order) // 4)


def test_a_deadlock_is_reported() -> None:
    """A consumer that keeps a stage, or the turn, still ends in the fault that names who waits for what."""
    with pytest.raises(SimulationFault, match="producer waits for"):
        timeline(without(plan_of("warp_specialized"), "consumer", Release), LENGTH, LENGTH)
    with pytest.raises(SimulationFault, match="waits for its turn"):
        timeline(without(plan_of("pingpong"), "consumer", PassTurn), LENGTH, LENGTH)


def test_prediction_follows_the_work() -> None:
    """Twice the batch takes about twice the time, and causal between half and the whole of full."""
    full, causal = plan_of("pingpong"), plan_of("pingpong", "causal")
    once, twice = (predict(full, 2048, 2048, batch, 16) for batch in (8, 16))
    assert 1.8 < twice.cycles / once.cycles < 2.1
    assert 0.5 < predict(causal, 2048, 2048, 8, 16).cycles / once.cycles < 0.75
    assert once.seconds == once.cycles / H200.clock_hz


def test_a_prediction_is_no_faster_than_the_tensor_core() -> None:
    """The time lies above that of the FLOPs alone, and grows where exponentials take four times as long."""
    plan = plan_of("pingpong")
    bound = count(plan, 4096, 4096, 4, 16).flops / H200.flops_of_16_bit / H200.num_sms
    stated = predict(plan, 4096, 4096, 4, 16).cycles
    slower = dataclasses.replace(H200, exponentials=H200.exponentials // 4)
    assert bound < stated < predict(plan, 4096, 4096, 4, 16, costs=slower).cycles


def test_long_heads_are_scaled() -> None:
    """serial's tile is a whole head: one too long to be simulated costs by its pairs of blocks."""
    plan = plan_of("serial", head_dim=64)
    short, long = (predict(plan, n, n, 1, 132).tile_cycles for n in (1024, 2048))
    assert 3.5 < long / short < 4.5


def test_nothing_to_do_takes_no_time() -> None:
    """A call without queries has an empty timeline and takes no time; one without keys writes zeros."""
    plan = plan_of("pingpong")
    assert timeline(plan, 0, 128).intervals == () and predict(plan, 0, 128).seconds == 0
    assert timeline(plan, 128, 0).busy("tensor core") == 0


def test_the_same_every_time() -> None:
    """A timeline depends on nothing but its arguments."""
    plan = plan_of("pingpong", "causal")
    assert timeline(plan, LENGTH, LENGTH) == timeline(plan, LENGTH, LENGTH)


def test_a_target_without_a_table_is_refused() -> None:
    """No costs are made up for a GPU of which none are stated; the cure names one that has them."""
    with pytest.raises(ToolchainError, match="sm_80.*\n.*--arch sm_90a"):
        costs_of(ARCHS["sm_80"])


def test_every_step_on_registers_has_stated_slots() -> None:
    """The table names only Steps that are charged, so that none of its rows is dead."""
    assert set(H200.lane_slots) <= set(CHARGES)
