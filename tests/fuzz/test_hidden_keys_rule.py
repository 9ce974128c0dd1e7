"""The property of keys that a mask hides from every query: where it holds, and that it finds slips."""

from typing import Any

import pytest
from planted_faults import in_program, plant
from planted_gradient_faults import GradientFault, plant_gradients

from attngen.check.inputs import Shape
from attngen.fuzz.case import Case
from attngen.fuzz.properties import RULES
from attngen.fuzz.search_faults import kernels, reproduce
from attngen.fuzz.trial import Make
from attngen.plan import Step
from attngen.plan.steps import ZeroHidden
from attngen.spec import Spec, load

RULE = "hidden-keys"


def spec_of(kind: str, mask: str, **fields: Any) -> Spec:
    spec = {
        "target": "simulator",
        "problem": {"head_dim": 4},
        "mask": mask,
        "tile": {"block_m": 4, "block_n": 4},
        "schedule": {"kind": kind},
        "gradients": ["q", "k", "v"],
    }
    return load(spec | fields)


def forget_zeros(step: Step) -> Step | None:
    """Hidden keys stay as they are."""
    return None if isinstance(step, ZeroHidden) else step


@pytest.mark.parametrize(
    "mask", ["causal and kv_idx % 3 != 0", "kv_idx < 5", "kv_idx != 2 * h and kv_idx > h_kv"]
)
@pytest.mark.parametrize("kind", ["serial", "fa2", "pingpong"])
def test_it_finds_zeros_that_are_left_out(kind: str, mask: str) -> None:
    """Of out and of gradients, and not in a kernel that has them; of no keys and of no rows as well."""
    spec = spec_of(kind, mask)
    assert RULES[RULE].may_hold(spec, kernels()(spec).plan)
    case = Case(spec, Shape(2, 4, 2, 9, 11), seed=5, rule=RULE, has_dlse=True, layout="bhsd")
    assert (failure := reproduce(case)) is None, str(failure)
    faulty: tuple[Make, ...] = (
        plant(in_program(forget_zeros)),
        plant_gradients(GradientFault(edit=forget_zeros)),
    )
    for make in faulty:
        found = reproduce(case, make=make)
        assert found is not None and found.rule == RULE, str(found)
    for lengths in ((9, 0), (0, 11)):
        assert reproduce(Case(spec, Shape(2, 4, 2, *lengths), seed=5, rule=RULE)) is None


@pytest.mark.parametrize(
    ("mask", "fields"),
    [
        ("causal", {}),
        ("kv_idx % 3 != 0", {"precision": {"inputs": "e4m3"}, "tile": {"block_m": 64, "block_n": 64}}),
        ("kv_idx % 3 != 0", {"problem": {"head_dim": 4, "keys": "padded"}}),
    ],
)
def test_it_is_for_masks_that_ask_something_of_keys(mask: str, fields: dict[str, Any]) -> None:
    """Not for scales that hidden keys have a part in, nor for sequences that have lengths of their own."""
    spec = spec_of("pingpong", mask, **fields)
    assert not RULES[RULE].may_hold(spec, kernels()(spec).plan)
