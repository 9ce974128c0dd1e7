"""Deleting any Step of any program changes the emitted text: nothing in a program is without effect on it."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

import attngen
from attngen.arch import ARCHS
from attngen.emit import emit
from attngen.plan import KernelPlan, Program, Role, body_of
from tests.plans import kernel_plan


def shorter_programs(program: Program) -> Iterator[tuple[str, Program]]:
    """Every program with one Step less, and the Step's line."""
    for i, step in enumerate(program):
        yield str(step), program[:i] + program[i + 1 :]
        for line, inner in shorter_programs(body_of(step)):
            yield line, (*program[:i], replace(step, body=inner), *program[i + 1 :])  # type: ignore[call-arg]


def unchanged_by_deletion(plan: KernelPlan, role: Role) -> tuple[list[str], int]:
    """The Steps of a role whose deletion leaves the text as it is, and how many were deleted."""
    text = emit(plan)
    unchanged, deleted = [], 0
    for line, program in shorter_programs(role.program):
        roles = tuple(replace(r, program=program) if r is role else r for r in plan.roles)
        deleted += 1
        if emit(replace(plan, roles=roles)) == text:
            unchanged.append(line)
    return unchanged, deleted


@pytest.mark.parametrize(("kind", "stages"), [("serial", 1), ("fa2", 1), ("fa2", 2), ("fa2", 3)])
def test_every_deleted_step_changes_the_text(kind: str, stages: int) -> None:
    """Nested Steps too, on a causal kernel."""
    spec = {"problem": {"head_dim": 64}, "mask": "causal", "schedule": {"kind": kind, "stages": stages}}
    plan = kernel_plan(attngen.load(spec), ARCHS["sm_90a"])
    (role,) = plan.roles
    unchanged, deleted = unchanged_by_deletion(plan, role)
    assert deleted > 25
    assert unchanged == []


@pytest.mark.matrix(
    classes=lambda kind, overlap, persistent, head_dim: [
        ("overlap", kind, overlap),
        ("persistent", kind, persistent),
        ("head_dim", kind, head_dim),
    ]
)
@pytest.mark.parametrize("head_dim", [64, 192])
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("kind", ["warp_specialized", "pingpong"])
def test_every_deleted_step_of_every_role_changes_the_text(
    kind: str, overlap: bool, persistent: bool, head_dim: int
) -> None:
    """Consumer and producer; at head_dim 192 O is rescaled first, and the result staged over Q."""
    schedule = {"kind": kind, "overlap": overlap, "persistent": persistent}
    spec = {"problem": {"head_dim": head_dim}, "mask": "causal", "schedule": schedule}
    plan = kernel_plan(attngen.load(spec), ARCHS["sm_90a"])
    counts = {}
    for role in plan.roles:
        unchanged, counts[role.name] = unchanged_by_deletion(plan, role)
        assert unchanged == [], role.name
    assert counts["consumer"] > 60 and counts["producer"] >= (22 if persistent else 19)
