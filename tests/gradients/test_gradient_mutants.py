"""A fault in a backward pass is found by the properties that speak of it: each kills mutants, and none survives.

A mutant is a simulator in which some Step of the pass does something else, as a slip in a kernel would. That each visit
counts once the simulator sees to by itself: `test_contributions.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest

from attngen.expr import Expr, parse_mask
from attngen.plan import Step
from attngen.plan.steps import Gemm, HidePairs, RecoverP, ScaleGradient, ScoreGradient
from attngen.simulate import STEPS_SIMULATED, RoleRun, StepFunction
from attngen.simulate.simulated_copies import rounded
from attngen.simulate.tile_source import Tile
from attngen.simulate.visits import Member
from tests.gradients import gradient_properties as properties
from tests.gradients.backward_cases import BackwardCase
from tests.gradients.gradient_properties import Property, Subject
from tests.gradients.test_gradient_properties import PROPERTIES

Run = Any


def run(step: Step, role: RoleRun) -> Run:
    """What the Step really does."""
    return STEPS_SIMULATED[type(step)](step, role)


def adds_nothing(step: Gemm, role: RoleRun) -> None:
    """Gradients stay 0."""
    before = None if step.starts_at_zero else role.read(step.acc)
    run(step, role)
    if before is not None:
        role.write(step.acc, lambda: before)


def drops_the_last_block(step: Gemm, role: RoleRun) -> None:
    """Of the side that is looped over, the block with the highest number has no part in a gradient."""
    looped, count = ("m", "m_max") if role.tile.n_block is not None else ("n", "n_end")
    is_last = role.variables.get(looped, role.variables.get("visit.n")) == role.variables[count] - 1
    (adds_nothing if is_last else run)(step, role)


def masks_by(mask: Expr | None, step: RecoverP, role: RoleRun) -> Run:
    return run(replace(step, mask=step.mask and mask), role)


def hides_nothing(step: HidePairs, role: RoleRun) -> None:
    """All pairs count."""


def forgets_the_slope(step: RecoverP, role: RoleRun) -> Run:
    return run(replace(step, slope=None), role)


def forgets_delta(step: ScoreGradient, role: RoleRun) -> None:
    s, dp = role.read(step.s), role.read(step.dp)
    role.write(step.ds, lambda: rounded(s * dp, step.ds.dtype))


def adds_delta(step: ScoreGradient, role: RoleRun) -> None:
    """D has the wrong sign."""
    s, dp = role.read(step.s), role.read(step.dp)
    run(step, role)
    ds = role.registers[step.ds.name]
    role.write(step.ds, lambda: rounded(2 * s * dp - ds, step.ds.dtype))


def rounds_to_f16(step: ScoreGradient, role: RoleRun) -> None:
    """dS is held in a format that it may be too large for."""
    run(step, role)
    ds = role.registers[step.ds.name]
    role.write(step.ds, lambda: ds.half().float())


def takes_delta_of(
    other: Callable[[Tile, int], tuple[Member, ...]], step: ScoreGradient, role: RoleRun
) -> None:
    """D is that of other heads or sequences."""
    tile = role.tile
    role.tile = replace(tile, members=other(tile, role.call.sizes.num_heads_q))
    run(step, role)
    role.tile = tile


def of_first_sequence(tile: Tile, heads: int) -> tuple[Member, ...]:
    return tile.members[:1] * len(tile.members)


def of_next_head(tile: Tile, heads: int) -> tuple[Member, ...]:
    return tuple(each._replace(head=(each.head + 1) % heads) for each in tile.members)


def scales(times: int, step: ScaleGradient, role: RoleRun) -> None:
    for _ in range(times):
        run(step, role)


def keeps_to_the_first_head(step: Gemm, role: RoleRun) -> None:
    """The other query heads of a group have no part in dK and dV."""
    is_first = role.tile.members[0].head % role.call.sizes.group == 0
    (run if is_first or role.tile.n_block is None else adds_nothing)(step, role)


def masked_by(mask: str) -> Callable[[BackwardCase], BackwardCase]:
    """The backward pass of another mask, where there is one."""
    return lambda case: case if case.mask == "full" else replace(case, mask=mask)


CAUSAL = BackwardCase("causal", lengths=(130, 132), heads=(4, 2))
FULL = replace(CAUSAL, mask="full", lengths=(130, 128))
CAPPED = replace(CAUSAL, score="softcap(score, 3.0)")
HIDING = replace(CAUSAL, mask="causal and q_idx >= 3 and kv_idx < 60")
CASES: Mapping[str, tuple[Property, BackwardCase]] = {
    "integers": (properties.whole_numbers_are_exact, CAUSAL),
    "full integers": (properties.whole_numbers_are_exact, FULL),
    "dlse": (properties.the_gradient_of_scores_sums_to_that_of_lse, FULL),
    "dlse alone": (properties.a_gradient_of_lse_alone_has_no_part_in_dv, FULL),
    "constant": (properties.a_constant_in_all_scores_changes_nothing, CAPPED),
    "low scores": (properties.very_low_scores_are_recovered, CAPPED),
    "permuted": (properties.permuted_keys_permute_dk_and_dv, FULL),
    "batch": (properties.a_part_of_a_batch_has_its_own_gradients, CAUSAL),
    "documents": (properties.two_documents_are_two_calls, CAUSAL),
    "groups": (properties.a_group_sums_over_its_heads, CAUSAL),
    "heads": (properties.a_head_keeps_to_itself, CAUSAL),
    "window": (properties.a_window_of_all_is_full, FULL),
    "powers": (properties.powers_of_two_pass_through, CAUSAL),
    "nothing": (properties.what_sees_nothing_touches_nothing, HIDING),
    "factor": (properties.a_factor_of_the_score_is_one_of_the_scale, CAUSAL),
}
"""Properties, each on a call that mutants show in."""


@dataclass(frozen=True)
class Mutant:
    """A slip, and the `CASES` that must fail by it."""

    found_by: str
    steps: Mapping[type[Step], StepFunction] = field(default_factory=dict)
    edit: Callable[[BackwardCase], BackwardCase] = lambda case: case


RULE = "constant, low scores"
"""Those that hold gradients to fp64."""
MUTANTS = {
    "zeros": Mutant(f"integers, full integers, dlse, dlse alone, powers, {RULE}", {Gemm: adds_nothing}),
    "last block dropped": Mutant(
        f"full integers, dlse, permuted, documents, {RULE}", {Gemm: drops_the_last_block}
    ),
    "one key too few": Mutant(
        f"integers, documents, {RULE}", {RecoverP: partial(masks_by, parse_mask("kv_idx < q_pos"))}
    ),
    "one key too many": Mutant(
        f"integers, documents, {RULE}", {RecoverP: partial(masks_by, parse_mask("kv_idx <= q_pos + 1"))}
    ),
    "no mask": Mutant(
        f"integers, documents, nothing, {RULE}",
        {RecoverP: partial(masks_by, None), HidePairs: hides_nothing},
    ),
    "causal aligned to the top left": Mutant("integers", edit=masked_by("kv_idx <= q_idx")),
    "a window cut short": Mutant("window", edit=masked_by("window(64, 64)")),
    "slope forgotten": Mutant(f"factor, {RULE}", {RecoverP: forgets_the_slope}),
    "D forgotten": Mutant(f"integers, dlse, dlse alone, {RULE}", {ScoreGradient: forgets_delta}),
    "D added": Mutant(f"integers, dlse, {RULE}", {ScoreGradient: adds_delta}),
    "D of another sequence": Mutant("batch", {ScoreGradient: partial(takes_delta_of, of_first_sequence)}),
    "D of another head": Mutant(
        f"integers, heads, {RULE}", {ScoreGradient: partial(takes_delta_of, of_next_head)}
    ),
    "dS in f16": Mutant("powers", {ScoreGradient: rounds_to_f16}),
    "scale forgotten": Mutant(f"integers, dlse, factor, {RULE}", {ScaleGradient: partial(scales, 0)}),
    "scale twice": Mutant(f"integers, dlse, factor, {RULE}", {ScaleGradient: partial(scales, 2)}),
    "first head alone": Mutant(f"integers, groups, {RULE}", {Gemm: keeps_to_the_first_head}),
}


def holds(name: str, subject: Subject) -> bool:
    check, case = CASES[name]
    try:
        check(subject, case)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_found(name: str) -> None:
    """By each of the properties that speak of it."""
    mutant = MUTANTS[name]
    subject = Subject(steps=mutant.steps, edit=mutant.edit)
    assert [each for each in mutant.found_by.split(", ") if holds(each, subject)] == []


@pytest.mark.parametrize("name", CASES)
def test_a_property_finds_mutants(name: str) -> None:
    """What no mutant fails would say nothing; what is right does not fail."""
    assert any(name in mutant.found_by.split(", ") for mutant in MUTANTS.values())
    assert holds(name, Subject())


def test_every_property_is_tried() -> None:
    """A property that is new wants a mutant."""
    assert {check for check, _ in CASES.values()} == PROPERTIES.keys()
