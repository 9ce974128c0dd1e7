"""Scores that are huge and finite, on a GPU: see tests/check/huge_scores.py."""

from itertools import product

import pytest
from gpu_kernels import KINDS, WARPGROUP_KINDS, compile_specs, skip_unless_runs_here

from tests.check.huge_scores import CONSTANTS, PADDINGS, WHOLE_NUMBERS, faults, spec

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [*product(KINDS, ("bf16", "f16")), *product(WARPGROUP_KINDS, ("e4m3",))],
)
def test_padding_counts_for_nothing_or_alone(kind: str, inputs: str) -> None:
    """Good keys are as without padding; a row of padding alone is the mean of V, and its lse the padding's number."""
    skip_unless_runs_here(kind)
    kernels = compile_specs([spec(how, inputs, schedule={"kind": kind}) for how in PADDINGS.values()])
    found = [
        f"{name}: {fault}"
        for (name, how), kernel in zip(PADDINGS.items(), kernels, strict=True)
        for fill in (CONSTANTS if inputs == "e4m3" else (*CONSTANTS, *WHOLE_NUMBERS))
        for fault in faults(kernel, how, inputs, fill, device="cuda")
    ]
    assert not found, "\n".join(found)
