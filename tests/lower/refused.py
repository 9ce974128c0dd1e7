"""What `lower` says of a spec that it refuses."""

import pytest

import attngen
from attngen.arch import ARCHS
from attngen.errors import Diagnostic
from tests.plans import kernel_plan

SPECIALISED = ("warp_specialized", "pingpong")


def diagnostics(arch: str = "sm_90a", **changes: object) -> tuple[Diagnostic, ...]:
    with pytest.raises(attngen.PlanError) as caught:
        kernel_plan(attngen.load({"problem": {"head_dim": 128}} | changes), ARCHS[arch])
    return caught.value.diagnostics


def faults(arch: str = "sm_90a", **changes: object) -> dict[str, tuple[str, ...]]:
    """Rule -> nearest valid values."""
    return {fault.rule: fault.nearest for fault in diagnostics(arch, **changes)}


def only(arch: str = "sm_90a", **changes: object) -> Diagnostic:
    (fault,) = diagnostics(arch, **changes)
    return fault
