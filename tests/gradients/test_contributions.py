"""The simulator counts what a gradient is made of: a visit that is skipped, doubled or another's is a fault."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from attngen.plan import LENGTHS, Step
from attngen.plan.steps import Gemm, LoadTile
from attngen.simulate import STEPS_SIMULATED, RoleRun, SimulationFault, simulated_copies
from tests.gradients.backward_cases import BackwardCase, run_backward

CASE = BackwardCase("causal", lengths=(200, 200), heads=(4, 2))
CASES = {
    "ranges": CASE,
    "walks": replace(CASE, mask="causal and kv_idx % 3 != q_idx % 2"),
    "wide": replace(CASE, head_dim=(192, 32)),
}
OWNERS = ("acc_dq", "acc_dk", "acc_dv")


def others_block(role: RoleRun) -> int:
    """The block of the side that is looped over."""
    looped = "m" if role.tile.n_block is not None else "n"
    return role.variables.get(looped, role.variables.get("visit.n", -1))


def times(count: int, only: Callable[[RoleRun], bool], owner: str) -> dict:
    """A simulator whose products for a gradient are done so often, where a condition holds."""

    def gemm(step: Gemm, role: RoleRun) -> None:
        chosen = step.acc.name == owner and step.contracted in LENGTHS and only(role)
        for _ in range(count if chosen else 1):
            STEPS_SIMULATED[Gemm](step, role)

    return {Gemm: gemm}


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("name", CASES)
def test_a_visit_counts_once(name: str, count: int, owner: str) -> None:
    """Skipped or doubled, for one block: the fault says which, in which gradient, and how often it counts."""
    case = CASES[name]
    only = times(count, lambda role: others_block(role) == 1, owner)
    message = f"not once: block 1 of head . counts {count} times in {owner}, and should 1 times"
    with pytest.raises(SimulationFault, match=message) as raised:
        run_backward(case, case.kernel("sm_80"), steps=only)
    assert raised.value.rule == "not once" and raised.value.place == owner


@pytest.mark.parametrize("owner", OWNERS)
def test_a_visit_that_no_bit_tells_of(owner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where weights of a block vanish, gradients are the same without its visit, which is a fault all the same."""
    case = replace(CASE, mask="full", score="score - 400.0 * f32(abs(q_idx // 64 - kv_idx // 64))")
    kernel = case.kernel("sm_80")
    far = times(
        0, lambda role: {role.tile.m_block, role.tile.n_block} == {0, None} and others_block(role) == 3, owner
    )
    with pytest.raises(SimulationFault, match=f"block 3 of head . counts 0 times in {owner}"):
        run_backward(case, kernel, steps=far)
    whole = run_backward(case, kernel)
    monkeypatch.setattr(simulated_copies, "check_contributions", lambda gradient, role: None)
    for x, y in zip(run_backward(case, kernel, steps=far), whole, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("tensor", ["q", "dout"])
def test_a_head_counts_once(tensor: str) -> None:
    """A tile of the first head in place of the second's, in a group of two, is told by where it came from."""

    def load(step: LoadTile, role: RoleRun) -> None:
        tile = role.tile
        if step.src.name == tensor and tile.n_block is not None:
            first = tuple(each._replace(head=each.head // 2 * 2) for each in tile.members)
            role.tile = replace(tile, members=first)
        STEPS_SIMULATED[LoadTile](step, role)
        role.tile = tile

    steps: dict[type[Step], Callable] = {LoadTile: load}
    owner = "acc_dk" if tensor == "q" else "acc_dv"
    with pytest.raises(SimulationFault, match=f"not once: block . of head . counts . times in {owner}"):
        run_backward(CASE, CASE.kernel("sm_80"), steps=steps)
