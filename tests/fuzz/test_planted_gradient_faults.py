"""The fuzzer finds what people get wrong in a backward pass, by gradients alone, and makes it small."""

from typing import Any

import pytest
import torch
from planted_gradient_faults import GRADIENT_FAULTS, plant_gradients

from attngen.check.inputs import Shape
from attngen.fuzz.case import Case
from attngen.fuzz.properties import RULES, PropertyFailure, check
from attngen.fuzz.search_faults import fuzz, kernels, reproduce
from attngen.spec import Spec, load
from attngen.torch_state import torch_defaults

TRAINED: dict[str, Any] = {
    "target": "simulator",
    "problem": {"head_dim": {"qk": 2, "v": 3}},
    "precision": {"inputs": "f32"},
    "tile": {"block_m": 2, "block_n": 3},
    "gradients": ["q", "k", "v"],
}
OF_GRADIENTS = [name for name, rule in RULES.items() if rule.of_gradients and rule.lengths != "own"]
SMALL = 40
"""Queries and keys of a shrunk case together."""


@pytest.mark.matrix(classes=lambda name: {bool(GRADIENT_FAULTS[name].steps)})
@pytest.mark.parametrize("name", GRADIENT_FAULTS)
def test_planted_fault_is_found_and_shrunk(name: str) -> None:
    """Within 300 drawn cases gradients are out of bounds, or the simulator counts other visits; the fault is shrunk.

    The shrunk case shows it again, and is the fault's alone.
    """
    make = plant_gradients(GRADIENT_FAULTS[name])
    report = fuzz(examples=300, seed=1, targets=("simulator",), make=make, backward=True)
    assert report.failure is not None, "not found"
    is_told = report.failure.rule == "crash" and "not once" in report.failure.complaint
    assert report.failure.rule == "gradients" or is_told, report
    case = report.failure.case
    assert case.spec.gradients == ("q", "k", "v")
    assert case.shape.seqlen_q + case.shape.seqlen_k <= SMALL, report
    again = Case.from_json(case.to_json())
    assert again == case
    failure = reproduce(again, make=make)
    assert failure is not None and failure.complaint == report.failure.complaint
    assert reproduce(again) is None, "the case fails without the fault too"


@pytest.mark.parametrize("rule", OF_GRADIENTS)
@pytest.mark.parametrize("scale", [None, -0.5, 0.0])
@pytest.mark.parametrize("inputs", ["f32", "f16", "bf16"])
def test_a_right_pass_holds_each_rule_that_applies(inputs: str, scale: float | None, rule: str) -> None:
    """Several blocks of rows and keys, grouped heads, a gradient of lse; rules need a spec with gradients."""
    spec = load(TRAINED | {"precision": {"inputs": inputs}, "mask": "causal"})
    plan = kernels()(spec).plan
    assert RULES[rule].may_hold(spec, plan) == (rule != "scaled-gradients" or inputs != "f16")
    assert not RULES[rule].may_hold(spec.replace({"gradients": []}), plan)
    if RULES[rule].may_hold(spec, plan):
        case = Case(spec, Shape(3, 6, 2, 7, 9), scale, seed=5, rule=rule, has_dlse=True, layout="bhsd")
        assert (failure := reproduce(case)) is None, str(failure)


class Restless:
    """A right kernel that adds the last bit to dK at every second pass."""

    def __init__(self, spec: Spec) -> None:
        self.inner = kernels()(spec)
        self.plan = self.inner.plan
        self.passes = 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.inner(*arguments, **options)

    def backward(self, *arguments: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        dq, dk, dv = self.inner.backward(*arguments, **options)
        self.passes += 1
        with torch_defaults():
            return dq, dk if self.passes % 2 else torch.nextafter(dk, torch.full_like(dk, 9.0)), dv


@pytest.mark.parametrize("rule", ["repeated-gradients", "scaled-gradients"])
def test_one_bit_of_a_gradient_is_noticed(rule: str) -> None:
    """Two passes that are to give the same bits and differ in the last of dK break the property, not the bound."""
    case = Case(load(TRAINED), Shape(2, 4, 2, 3, 5), rule=rule)
    with pytest.raises(PropertyFailure, match=r"dk\[0, 0, 0, 0\] is ") as caught:
        check(case, Restless)
    assert caught.value.rule == rule


def test_gradients_are_judged_whatever_the_property() -> None:
    """Where a spec asks for gradients a case judges them beside the property that it names."""
    make = plant_gradients(GRADIENT_FAULTS["delta forgotten"])
    failure = reproduce(Case(load(TRAINED), Shape(1, 1, 1, 3, 5), rule="wide-window"), make=make)
    assert failure is not None and failure.rule == "gradients" and "dq FAILED" in failure.complaint


@pytest.mark.parametrize("backward", [False, True])
def test_some_specs_ask_for_gradients_or_all(backward: bool) -> None:
    """Without `backward` specs of both kinds are drawn, with it none is without gradients."""
    counts = fuzz(examples=25, seed=2, targets=("simulator",), backward=backward).coverage.counts
    asked = counts["gradients", "of out"] + counts["gradients", "of out and lse"]
    assert asked > 0 and (counts["gradients", "none"] > 0) != backward


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_kernels_hold_every_property_of_gradients_on_the_gpu() -> None:
    """Cubins of some drawn specs with gradients, each on many cases: within bounds, the same bits twice."""
    report = fuzz(examples=100, device="cuda", seed=12, backward=True)
    assert report.ok, str(report)
