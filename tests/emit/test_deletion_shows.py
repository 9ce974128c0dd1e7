"""Deleting any Step of any program changes the emitted text: nothing in a program is without effect on it."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

import attngen
from attngen.arch import ARCHS
from attngen.emit import emit
from attngen.lower import lower
from attngen.plan import Program, body_of


def shorter_programs(program: Program) -> Iterator[tuple[str, Program]]:
    """Every program with one Step less, and the Step's line."""
    for i, step in enumerate(program):
        yield str(step), program[:i] + program[i + 1 :]
        for line, inner in shorter_programs(body_of(step)):
            yield line, (*program[:i], replace(step, body=inner), *program[i + 1 :])  # type: ignore[call-arg]


@pytest.mark.parametrize(("kind", "stages"), [("serial", 1), ("fa2", 1), ("fa2", 2), ("fa2", 3)])
def test_every_deleted_step_changes_the_text(kind: str, stages: int) -> None:
    """Nested Steps too, on a causal kernel."""
    spec = {"problem": {"head_dim": 64}, "mask": "causal", "schedule": {"kind": kind, "stages": stages}}
    plan = lower(attngen.load(spec), ARCHS["sm_90a"])
    text = emit(plan)
    (role,) = plan.kernel.roles
    unchanged, deleted = [], 0
    for line, program in shorter_programs(role.program):
        kernel = replace(plan.kernel, roles=(replace(role, program=program),))
        deleted += 1
        if emit(replace(plan, kernels=(kernel,))) == text:
            unchanged.append(line)
    assert deleted > 25
    assert unchanged == []
