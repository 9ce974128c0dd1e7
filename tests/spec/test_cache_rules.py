"""What a cache in e4m3 rules out beside it: told by name, with what would do."""

from typing import Any

import pytest

import attngen
from attngen.errors import Diagnostic, PlanError, SpecError
from attngen.spec import load

CACHE = {"cache": "e4m3"}


def spec(precision: dict[str, Any], keys: str = "paged", **more: Any) -> dict[str, Any]:
    return {"target": "sm_90a", "problem": {"head_dim": 64, "keys": keys}, "precision": precision, **more}


def fault_of(data: dict[str, Any]) -> Diagnostic:
    with pytest.raises(SpecError) as raised:
        attngen.compile(data)
    (found,) = raised.value.diagnostics
    return found


@pytest.mark.parametrize(
    ("data", "rule", "says", "nearest"),
    [
        (spec(CACHE | {"inputs": "e4m3"}, "dense"), "e4m3-cache", "must be bf16 or f16", "bf16"),
        (spec(CACHE | {"scales": "per_block"}), "e4m3-cache", "means nothing to a cache", "per_head"),
        (spec(CACHE | {"scales": "per_page"}, "padded"), "e4m3-cache", "where keys are padded", "per_token"),
        (spec(CACHE, "dense", schedule={"kind": "pingpong"}), "e4m3-cache", "must be fa2", "fa2"),
        (spec(CACHE, "dense", schedule={"kind": "serial"}), "e4m3-cache", "must be fa2", "fa2"),
        (spec(CACHE, "padded", gradients=["q", "k", "v"]), "e4m3-cache", r"must be \[\]", "[]"),
        (spec(CACHE | {"promote": 1}), "precision-field", "means nothing to bf16", "auto"),
        (spec({"scales": "per_page"}), "precision-field", "means nothing to bf16", "auto"),
        (
            spec({"inputs": "e4m3", "scales": "per_page"}, "dense"),
            "e4m3-cache",
            "inputs of e4m3",
            "per_token",
        ),
        (spec({"cache": "f16"}), "known-formats", "one of auto, e4m3", "auto"),
        (spec(CACHE) | {"problem": {"head_dim": 72}}, "head-dim", "multiple of 16", "64"),
        (spec(CACHE) | {"target": "sm_80"}, "cache-target", "not to be had on sm_80", "auto"),
        (spec(CACHE) | {"target": "sm_86"}, "cache-target", "not to be had on sm_86", "auto"),
    ],
)
def test_what_does_not_go_together(data: dict[str, Any], rule: str, says: str, nearest: str) -> None:
    """Where it stands, the rule, and the nearest value that passes."""
    found = fault_of(data)
    assert found.rule == rule and nearest in found.nearest
    pytest.raises(SpecError, attngen.compile, data).match(says)


def test_f32_queries_have_no_such_cache() -> None:
    """Not on the simulator either, which has f32."""
    data = spec(CACHE | {"inputs": "f32"}, "dense") | {"target": "simulator"}
    assert fault_of(data).rule == "e4m3-cache"


@pytest.mark.parametrize("target", ["sm_89", "sm_90a", "sm_120", "simulator"])
def test_targets_that_make_f16_of_e4m3(target: str) -> None:
    """On all of them the schedule is fa2, and products are of f16."""
    plan = attngen.compile(spec(CACHE, "dense") | {"target": target}).plan
    assert plan.schedule == "fa2" and plan.multiplied.name == "f16" and plan.inputs.name == "bf16"


def test_a_cache_as_the_inputs_are_changes_no_digest() -> None:
    """Kernels of specs that do not say it keep their names; what shares a scale makes another."""
    plain = load(spec({}))
    assert load(spec({"cache": "auto"})).digest() == plain.digest()
    digests = {
        load(spec(CACHE | {"scales": each})).digest() for each in ("per_tensor", "per_head", "per_page")
    }
    assert len(digests) == 3 and plain.digest() not in digests


def test_refusals_are_of_one_plan() -> None:
    """A target without the instruction is told before tiles are tried."""
    with pytest.raises(PlanError):
        attngen.compile(spec(CACHE, "dense") | {"target": "sm_80"})
