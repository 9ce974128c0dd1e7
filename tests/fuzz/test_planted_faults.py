"""The fuzzer proves itself: what people get wrong is found, and made small enough to read."""

import pytest
from planted_faults import FAULTS, FAULTS_OF_SCALES, RACES, plant

from attngen.fuzz.case import Case
from attngen.fuzz.properties import PropertyFailure
from attngen.fuzz.search_faults import fuzz, reproduce
from attngen.spec import load

EXAMPLES = 500
SMALL = 40
"""Rows and keys of a shrunk case together: no fault needs more than two blocks of each, of at most 16 rows."""

ELSEWHERE = ("swapped stages", "mask without a closed form ignored", "sink forgotten")
"""Faults that schedules of warpgroups have no place for under a mask with a closed form and without a sink: rings have
their own cursors."""


def assert_a_race_if(is_race: bool, failure: PropertyFailure) -> None:
    raced = failure.rule == "crash" and failure.complaint.startswith("SimulationFault: race")
    assert raced or not is_race, failure
    assert "TypeError" not in failure.complaint, failure


def shown_by(name: str) -> set[str]:
    """A race or not, in Steps or in the plan; what warpgroups' schedules cannot find stands for itself."""
    return {f"race: {name in RACES}, in Steps: {bool(FAULTS[name].steps)}", *({name} & set(ELSEWHERE))}


@pytest.mark.matrix(classes=shown_by)
@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found_and_shrunk(name: str) -> None:
    """Within 500 cases of drawn specs the fault shows; its shrunk case shows it again, and is the fault's alone."""
    make = plant(FAULTS[name])
    report = fuzz(examples=EXAMPLES, seed=1, targets=("simulator",), make=make)
    assert report.failure is not None, "not found"
    assert_a_race_if(name in RACES, report.failure)
    assert report.found_after is not None and report.found_after <= EXAMPLES
    case = report.failure.case
    assert case.shape.seqlen_q + case.shape.seqlen_k <= SMALL, report
    assert case.shape.batch <= 2 and case.shape.heads_kv <= 2, report
    again = Case.from_json(case.to_json())
    assert again == case
    failure = reproduce(again, make=make)
    assert failure is not None and failure.complaint == report.failure.complaint
    assert reproduce(again) is None, "the case fails without the fault too"


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["warp_specialized", "pingpong"])
@pytest.mark.parametrize("name", [name for name in FAULTS if name not in ELSEWHERE])
def test_planted_fault_is_found_in_the_schedules_of_warpgroups(name: str, kind: str) -> None:
    """The same slips, where a producer loads and consumers compute a block behind; without them the case holds."""
    spec = {
        "target": "simulator",
        "problem": {"head_dim": 2},
        "precision": {"inputs": "f32"},
        "mask": "kv_idx >= q_pos - 5 and kv_idx <= q_pos",
        "tile": {"block_m": 4, "block_n": 2},  # two blocks on the diagonal: the last is masked in any case
        "schedule": {"kind": kind},
    }
    report = fuzz(load(spec), examples=EXAMPLES, seed=1, make=plant(FAULTS[name]))
    assert report.failure is not None, "not found"
    assert_a_race_if(name in RACES, report.failure)
    assert reproduce(report.failure.case) is None, "the case fails without the fault too"


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["warp_specialized", "pingpong"])
@pytest.mark.parametrize("name", FAULTS_OF_SCALES)
def test_planted_fault_of_scales_is_found(name: str, kind: str) -> None:
    """What is left out or done twice where operands have scales shows; without it the case holds."""
    spec = {
        "target": "simulator",
        "problem": {"head_dim": 16},
        "precision": {"inputs": "e4m3", "promote": 1},
        "mask": "causal",
        "tile": {"block_m": 4, "block_n": 32},
        "schedule": {"kind": kind},
    }
    report = fuzz(load(spec), examples=100, seed=1, make=plant(FAULTS_OF_SCALES[name]), rules=("error",))
    assert report.failure is not None, "not found"
    assert report.failure.rule == "error", report.failure
    assert reproduce(report.failure.case) is None, "the case fails without the fault too"
