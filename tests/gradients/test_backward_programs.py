"""The programs of a backward pass: every Step has a reason, and what is emitted of them compiles as planned."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import attngen
from attngen.plan import Program, Step, body_of
from attngen.plan.steps import Note
from attngen.runtime import disassemble
from attngen.simulate import SimulationFault
from tests.emit.sass import done_before_waiting
from tests.gradients.backward_cases import BackwardCase, run_backward

CASE = BackwardCase("window(130, 70)", "softcap(score, 3.0)", heads=(2, 1), batch=1)
WIDE = replace(CASE, head_dim=(192, 32))
"""Of which there is one stage for a block."""
WALKED = replace(CASE, mask="window(130, 70) and kv_idx % 2 != q_idx % 3")
LAST_OF_TWO = (
    "for each tile of this block: when tile has blocks: for n in n_full_begin - 1 .. n_min downwards (partial tiles): "
    "advance load_at"
)
"""On an edge of the mask lie two blocks at most, and after the second nothing is loaded."""
LENGTHS = ((330, 330), (20, 300), (300, 20))
"""Such that blocks of keys are seen by many blocks of queries, and by none."""
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


@pytest.mark.parametrize(
    ("case", "number", "expected"),
    [
        (CASE, 0, [LAST_OF_TWO]),
        (CASE, 1, []),
        (WALKED, 0, []),
        (WALKED, 1, []),
        (WIDE, 0, []),
        (WIDE, 1, []),
        (WIDE, 2, []),
    ],
    ids=["dq", "dk and dv", "dq, walked", "dk and dv, walked", "dq, wide", "dv, wide", "dk, wide"],
)
def test_every_step_is_needed(case: BackwardCase, number: int, expected: list[str]) -> None:
    """Without any one of them the simulator faults, or another gradient comes out."""
    kernel, cases = case.kernel("sm_90a"), [replace(case, lengths=lengths) for lengths in LENGTHS]
    whole = [run_backward(each, kernel) for each in cases]
    plan = kernel.call.gradients[number]
    spare = []
    for missing, program in without_one(plan.worker.program):
        shorter = replace(plan, roles=(replace(plan.worker, program=program),))
        kernels = tuple(shorter if each is plan else each for each in kernel.call.kernels)
        try:
            made = [run_backward(each, kernel, replace(kernel.call, kernels=kernels)) for each in cases]
        except SimulationFault:
            continue
        if all(
            torch.equal(x, y) for xs, ys in zip(made, whole, strict=True) for x, y in zip(xs, ys, strict=True)
        ):
            spare.append(missing)
    assert spare == expected


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
        if target == "sm_90a":
            assert done_before_waiting(disassemble(compiled.cubin)) == []
