"""The fuzzer proves itself: what people get wrong is found, and made small enough to read."""

import pytest
from planted_faults import FAULTS, plant

from attngen.fuzz import Case, fuzz, reproduce

EXAMPLES = 500
SMALL = 40
"""Rows and keys of a shrunk case together: no fault needs more than two blocks of each, of at most 16 rows."""


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found_and_shrunk(name: str) -> None:
    """Within 500 cases of drawn specs the fault shows; its shrunk case shows it again, and is the fault's alone."""
    make = plant(FAULTS[name])
    report = fuzz(examples=EXAMPLES, seed=1, targets=("simulator",), make=make)
    assert report.failure is not None, "not found"
    assert report.found_after is not None and report.found_after <= EXAMPLES
    case = report.failure.case
    assert case.shape.seqlen_q + case.shape.seqlen_k <= SMALL, report
    assert case.shape.batch <= 2 and case.shape.heads_kv <= 2, report
    again = Case.from_json(case.to_json())
    assert again == case
    failure = reproduce(again, make=make)
    assert failure is not None and failure.complaint == report.failure.complaint
    assert reproduce(again) is None, "the case fails without the fault too"
