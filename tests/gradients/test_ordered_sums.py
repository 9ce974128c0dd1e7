"""Sums of dQ that blocks of keys add to in one order: the same bits however blocks run, and no Step of it is spare."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import attngen
from attngen.bind import bind
from attngen.kernel import GRADIENTS
from attngen.lower import fused_gradients
from attngen.plan.steps import PassRank, TakeRank, WaitAdded
from attngen.simulate import SimulationFault, launches
from attngen.simulate.launches import run_call
from tests.gradients.backward_cases import BackwardCase, given_backward, run_given
from tests.gradients.test_backward_programs import plans_without_one

CASE = BackwardCase("window(150, 70)", lengths=(300, 330), heads=(4, 2), head_dim=(64, 64), batch=1)
"""Blocks of keys share blocks of queries with neighbours on either side."""
ADDS = (TakeRank, WaitAdded, PassRank)


@pytest.fixture(autouse=True)
def _taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fused_gradients, "ORDERED_IS_FASTER", True)
    yield


def ordered(case: BackwardCase) -> attngen.Kernel:
    """The kernel of a case, whose blocks wait for their ranks."""
    kernel = case.kernel("sm_90a")
    assert [bool(plan.query_ranks) for plan in kernel.call.gradients] == [True]
    return kernel


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("mask", ["full", "causal", "window(100, 30)", "causal and q_idx > 40"])
@pytest.mark.parametrize("lengths", [(1, 64), (64, 1), (128, 128), (70, 330), (330, 70), (300, 330)], ids=str)
def test_the_same_bits_on_any_number_of_multiprocessors(
    lengths: tuple[int, int], mask: str, head_dim: int
) -> None:
    """With one block at a time, two or three, every block comes to its rank, and gradients are within the rule."""
    case = replace(CASE, mask=mask, lengths=lengths, head_dim=(head_dim, head_dim))
    kernel = ordered(case)
    given = given_backward(case, kernel)
    made = [run_call(kernel.call, bind(kernel.call.manifest, given, GRADIENTS, n)) for n in (1, 2, 3)]
    for each in made[1:]:
        assert all(torch.equal(each[name], made[0][name]) for name in GRADIENTS)
    drawn, declared = case.inputs_on("cpu")
    got = tuple(made[0][name] for name in GRADIENTS)
    out, lse = kernel(*drawn[:3], return_lse=True)
    verdict = case.verdict(got, drawn, declared, out=out, lse=lse)
    assert verdict.ok, verdict.failures


@pytest.mark.parametrize("num_sms", [1, 2, 3])
def test_another_order_of_tiles_never_ends(num_sms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose smaller numbers have not started waits for ever where no other block fits: a deadlock, and told."""
    case = replace(CASE, lengths=(300, 900), mask="full")
    kernel = ordered(case)
    given = given_backward(case, kernel)
    own = launches.tiles
    monkeypatch.setattr(launches, "tiles", lambda *of: reversed(list(own(*of))))
    with pytest.raises(SimulationFault, match="deadlock: .*dq_ranks"):
        run_call(kernel.call, bind(kernel.call.manifest, given, GRADIENTS, num_sms))


def test_every_step_of_the_order_is_needed() -> None:
    """Without any one of them the simulator faults."""
    kernel = ordered(CASE)
    given, (plan,) = given_backward(CASE, kernel), kernel.call.gradients
    words = {str(step).split("[")[0] for step in _steps_of_order(plan)}
    missing_ones = [
        (missing, shorter)
        for missing, shorter in plans_without_one(plan)
        if any(missing.split(": ")[-1].startswith(word) or f" {word}" in missing for word in words)
    ]
    assert len(missing_ones) == len(ADDS)
    for _missing, shorter in missing_ones:
        kernels = tuple(shorter if each is plan else each for each in kernel.call.kernels)
        with pytest.raises(SimulationFault):
            run_given(replace(kernel.call, kernels=kernels), given, GRADIENTS)


def _steps_of_order(plan: attngen.plan.KernelPlan) -> list[attngen.plan.Step]:
    return [
        step
        for role in plan.roles
        for step in attngen.plan.steps.walk(role.program)
        if isinstance(step, ADDS)
    ]
