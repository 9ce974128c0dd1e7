"""The programs of a backward pass: every Step has a reason, and what is emitted of them compiles as planned."""

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import attngen
from attngen.plan import KernelPlan, Program, Step, body_of
from attngen.plan.steps import Note
from attngen.runtime import disassemble
from attngen.simulate import SimulationFault
from tests.emit.sass import done_before_waiting
from tests.gradients.backward_cases import BackwardCase, given_backward, run_given

CASE = BackwardCase("", "softcap(score, 3.0)", heads=(2, 1), head_dim=(64, 64), batch=1)
WIDE = replace(CASE, head_dim=(192, 64))
"""Of which there is one stage for a block."""
WALKED = replace(CASE, mask=" and kv_idx % 2 != q_idx % 3")
SPARE = {
    ("sm_80", "dq"): [
        "warps: for each tile of this block: when tile has blocks: "
        "for n in n_full_begin - 1 .. n_min downwards (partial tiles): advance load_at"
    ],
    ("sm_90a", "dq"): [
        "consumer: for each tile of this block: "
        "for n in n_full_begin - 1 .. n_min downwards (partial tiles): release k_at"
    ],
}
"""On an edge of the mask lie fewer blocks than stages, and after the last nothing is loaded."""
LENGTHS = {"sm_80": ((20, 300), (300, 20), (330, 330)), "sm_90a": ((20, 300), (900, 900))}
"""Such that blocks of keys are seen by more blocks of queries than a ring has stages, and by none; the shortest first,
for what one call notices need not be tried with the others."""
WINDOWS = {"sm_80": "window(130, 70)", "sm_90a": "window(400, 300)"}
"""Such that some blocks of either pair are masked and some are not."""
HARD = {
    "mask": "causal and document(doc)",
    "score": "softcap(score, 30.0)",
    "tensors": {"doc": "i32[batch, seqlen_k]"},
}


def without_one(program: Program) -> Iterator[tuple[str, Program]]:
    """The program without each of its Steps, notes apart, by what is missing."""
    for i, step in enumerate(program):
        before, after = program[:i], program[i + 1 :]
        if not isinstance(step, Note):
            yield str(step).splitlines()[0], (*before, *after)
        for missing, body in without_one(body_of(step)):
            changed: Step = replace(step, body=body)  # type: ignore[call-arg]
            yield f"{str(step).splitlines()[0]} {missing}", (*before, changed, *after)


def plans_without_one(plan: KernelPlan) -> Iterator[tuple[str, KernelPlan]]:
    """A kernel without each Step of each role."""
    for i, role in enumerate(plan.roles):
        for missing, program in without_one(role.program):
            roles = (*plan.roles[:i], replace(role, program=program), *plan.roles[i + 1 :])
            yield f"{role.name}: {missing}", replace(plan, roles=roles)


@pytest.mark.matrix
@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    ("what", "case", "number"),
    [
        ("dq", CASE, 0),
        ("dk and dv", CASE, 1),
        ("dq, walked", WALKED, 0),
        ("dk and dv, walked", WALKED, 1),
        ("dq, wide", WIDE, 0),
        ("dv, wide", WIDE, 1),
        ("dk, wide", WIDE, 2),
    ],
)
def test_every_step_is_needed(what: str, case: BackwardCase, number: int, target: str) -> None:
    """Without any one of them the simulator faults, or another gradient comes out."""
    case = replace(case, mask=WINDOWS[target] + case.mask)
    kernel, cases = case.kernel(target), [replace(case, lengths=lengths) for lengths in LENGTHS[target]]
    given = [given_backward(each, kernel) for each in cases]
    plan = kernel.call.gradients[number]
    wanted = [tensor.name for tensor in plan.outputs]
    whole = [run_given(kernel.call, each, wanted) for each in given]
    spare = []
    for missing, shorter in plans_without_one(plan):
        kernels = tuple(shorter if each is plan else each for each in kernel.call.kernels)
        made = (run_given(replace(kernel.call, kernels=kernels), each, wanted) for each in given)
        try:
            if all(
                torch.equal(x, y)
                for xs, ys in zip(made, whole, strict=True)
                for x, y in zip(xs, ys, strict=True)
            ):
                spare.append(missing)
        except SimulationFault:
            continue
    assert spare == SPARE.get((target, what), [])


@pytest.mark.matrix(most=2)
@pytest.mark.parametrize("spec", [{"mask": "causal"}, HARD], ids=["causal", "documents, capped"])
@pytest.mark.parametrize(
    ("target", "head_dim"),
    [("sm_90a", 64), ("sm_90a", 128), ("sm_90a", 192), ("sm_90a", 256), ("sm_80", 128)],
)
def test_backward_kernels_compile_without_spills(target: str, head_dim: int, spec: dict) -> None:
    """Nothing spills, and nothing of device memory is touched before a kernel has waited for those before it."""
    data = {"target": target, "problem": {"head_dim": head_dim}, "gradients": ["q", "k", "v"], **spec}
    kernel = attngen.compile(data)
    for plan in kernel.call.gradients:
        compiled = kernel.modules[plan.module].compiled
        assert all(used.spill_stores == used.spill_loads == 0 for used in compiled.resources), plan.name
        assert "C75" not in str(compiled.warnings), plan.name
        if target == "sm_90a":
            sass = disassemble(compiled.cubin)
            assert done_before_waiting(sass) == []
            assert {"HGMMA", "UTMALDG"} <= set(re.findall(r"\b[A-Z]+\b", sass)), plan.name
