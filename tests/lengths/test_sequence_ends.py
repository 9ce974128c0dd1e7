"""The copy engine knows the ends of tensors, not of sequences: what kernels for warpgroups do about the rows behind."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import attngen
from attngen.errors import SpecError
from attngen.plan import KernelPlan, Program, Step, assemble, body_of, walk
from attngen.plan.steps import SyncWarpgroup, TmaStore, TmaStoreOwn, WhenAtEnd
from attngen.simulate import SimulationFault, Simulator
from attngen.simulate.clocks import Clock, Stamp
from attngen.simulate.shared_memory import Cell
from tests.lengths.batches import Batch, batch, compiled
from tests.simulate.small_plans import lowered

RAGGED = {"queries": "ragged", "keys": "ragged"}
SEQLENS_Q, SEQLENS_K = (5, 0, 13, 9, 1, 16), (5, 7, 20, 0, 3, 16)


@dataclass(frozen=True)
class Case:
    """A kernel for warpgroups."""

    schedule: str
    mask: str
    persistent: bool
    out_over_q: bool
    lengths: tuple[str, str] = ("ragged", "ragged")

    def plan(self) -> KernelPlan:
        """Of tiles of 8 by 8."""
        return lowered(
            self.schedule,
            self.mask,
            2,
            block_n=8,
            head_dim=16,
            inputs="bf16",
            problem=dict(zip(("queries", "keys"), self.lengths, strict=True)),
            fields={"persistent": self.persistent},
            out_over_q=self.out_over_q,
        )


CASES = [
    Case("warp_specialized", "full", True, False),
    Case("warp_specialized", "kv_idx != q_idx", False, True),
    Case("pingpong", "causal", True, True),
    Case("pingpong", "full", True, False, ("padded", "padded")),
]


def run(plan: KernelPlan, of: Batch) -> list[torch.Tensor]:
    """Out and lse."""
    call = Simulator(assemble((plan,)))
    return call.make(("out", "lse"), of.q, of.k, of.v, declared=of.lengths)


def poisoned(case: Case) -> Batch:
    """Sequences between which all is NaN."""
    of_padded = {"unused": 2} if "padded" in case.lengths else {"unused": 3, "leftpad": 2, "tail": 4}
    return batch(*case.lengths, SEQLENS_Q, SEQLENS_K, poison=math.nan, **of_padded)


def variants(program: Program, is_wanted: Any) -> Iterator[tuple[Step, Program]]:
    """A program without one of its Steps, for each that is wanted, and that Step."""
    for i, step in enumerate(program):
        if is_wanted(program, i):
            yield step, program[:i] + program[i + 1 :]
        for left_out, body in variants(body_of(step), is_wanted):
            yield left_out, (*program[:i], replace(step, body=body), *program[i + 1 :])  # type: ignore[call-arg]


def is_of_an_end(program: Program, i: int) -> bool:
    """A Step that is there for the ends of sequences, or orders the threads that store the rows of one."""
    before = program[max(0, i - 2) : i]
    is_after_store = isinstance(program[i], SyncWarpgroup) and any(isinstance(s, TmaStoreOwn) for s in before)
    return is_after_store or isinstance(program[i], WhenAtEnd | TmaStoreOwn)


def is_within_an_end(plan: KernelPlan) -> Any:
    """What is in a WhenAtEnd."""
    bodies = [step.body for step in walk(plan.worker.program) if isinstance(step, WhenAtEnd)]
    return lambda program, i: program in bodies


REDUNDANT = {
    "turns, and the barrier before Q is released, order zeros as well": lambda case, within: (
        within and case.schedule == "pingpong" and not case.out_over_q
    ),
    "a block of one tile does not release Q for another": lambda case, within: (
        not within and not case.persistent
    ),
}
"""Barriers of a warpgroup without which nothing changes that the simulator sees."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_step_for_an_end_is_needed(case: Case) -> None:
    """Without one of them a kernel faults, or makes something else of sequences that have NaN between them."""
    plan, of = case.plan(), poisoned(case)
    expected, left_out = run(plan, of), []
    assert not any(x.isnan().any() for x in expected)
    for within, is_wanted in ((False, is_of_an_end), (True, is_within_an_end(plan))):
        for step, program in variants(plan.worker.program, is_wanted):
            left_out.append(type(step).__name__)
            worker = replace(plan.worker, program=program)
            try:
                found = run(replace(plan, roles=(worker, *plan.roles[1:])), of)
            except SimulationFault:
                continue
            is_listed = isinstance(step, SyncWarpgroup) and any(
                why(case, within) for why in REDUNDANT.values()
            )
            assert all(map(torch.equal, found, expected)) == is_listed, step
    syncs = ["SyncWarpgroup"] * (2 if case.out_over_q else 1)
    assert sorted(left_out) == ["FenceAsync", *syncs, "TmaStoreOwn", "WaitFull", "WhenAtEnd", "ZeroTail"]


def test_a_store_by_the_copy_engine_past_an_end_is_a_fault() -> None:
    """It would write over the next sequence's rows; a plain TmaStore is for tensors of one length."""
    plan = CASES[0].plan()
    (own,) = (step for step in walk(plan.worker.program) if isinstance(step, TmaStoreOwn))
    with_plain = _replaced(plan.worker.program, own, TmaStore(own.src, own.dst, own.block))
    broken = replace(plan, roles=(replace(plan.worker, program=with_plain), *plan.roles[1:]))
    whole = batch("ragged", "ragged", (8, 16), (5, 7))
    assert all(map(torch.equal, run(broken, whole), run(plan, whole)))
    with pytest.raises(SimulationFault, match="out of bounds.*of which the sequence has 1"):
        run(broken, batch("ragged", "ragged", (5, 16), (5, 7)))


def _replaced(program: Program, old: Step, new: Step) -> Program:
    found: list[Step] = []
    for step in program:
        if step == old:
            found.append(new)
        elif body := body_of(step):
            found.append(replace(step, body=_replaced(body, old, new)))  # type: ignore[call-arg]
        else:
            found.append(step)
    return tuple(found)


@pytest.mark.parametrize("mask", ["full", "causal", "window(5, 3)", "kv_idx % 3 != q_idx % 2"])
@pytest.mark.parametrize("schedule", ["serial", "fa2", "warp_specialized", "pingpong"])
def test_a_sequence_does_not_see_its_neighbours(schedule: str, mask: str) -> None:
    """One sequence keeps its bits where all others are NaN, queries, keys and values."""
    of, kernel = batch("ragged", "ragged", SEQLENS_Q, SEQLENS_K), compiled(schedule, "ragged", "ragged", mask)
    expected = kernel(of.q, of.k, of.v, **of.lengths)
    for _, rows, keys in of.sequences():
        q, k, v = (torch.full_like(x, math.nan) for x in (of.q, of.k, of.v))
        q[rows], k[keys], v[keys] = of.q[rows], of.k[keys], of.v[keys]
        assert torch.equal(kernel(q, k, v, **of.lengths)[rows], expected[rows])


@pytest.mark.parametrize("schedule", ["warp_specialized", "pingpong"])
def test_dense_programs_have_nothing_for_ends(schedule: str) -> None:
    """Where all sequences are of one length the end of the tensor is that of each."""
    plan = lowered(schedule, "causal", 2)
    assert not any(isinstance(step, WhenAtEnd | TmaStoreOwn) for step in walk(plan.worker.program))


def from_row(first: int) -> torch.Tensor:
    """Of four rows those from one on."""
    return torch.arange(4).unsqueeze(0) >= first


class TestZeros:
    """Warpgroups that share a stage write zeros each for itself."""

    def filled(self) -> tuple[Cell, Clock, Clock]:
        """Four rows that a copy has filled, of which two warpgroups know."""
        cell, ours, theirs = Cell("v", range(4)), Clock(), Clock()
        cell.fill(torch.ones(1, 4, 2), Stamp("the copy", 0))
        for clock in (ours, theirs):
            clock.see("the copy", 1)
        return cell, ours, theirs

    def test_zeros_over_zeros_disturb_no_reader(self) -> None:
        """The second may write while a product of the first reads; it must have met and fenced before its own."""
        cell, ours, theirs = self.filled()
        assert cell.objection_to_zeros(from_row(2), ours, "us") is None
        cell.zero(from_row(2), Stamp("us", 0))
        assert cell.objection_to_read(ours, "us") is not None  # threads have not met
        ours.see("us", 1)
        assert cell.objection_to_read(ours, "us") is None
        assert cell.objection_to_asynchronous_read(ours, Clock()) is not None  # nor fenced
        cell.fence_zeros(Stamp("us", 1))
        ours.see("us", 2)
        assert cell.objection_to_asynchronous_read(ours, Clock()) is None
        cell.note_read(Stamp("a GEMM of us", 0))
        assert cell.objection_to_zeros(from_row(2), theirs, "them") is None
        assert cell.objection_to_read(theirs, "them") is not None  # zeros of which they do not know
        cell.zero(from_row(2), Stamp("them", 0))
        assert torch.equal(cell.values, torch.tensor([[[1.0, 1.0]] * 2 + [[0.0, 0.0]] * 2]))

    def test_the_first_zeros_race_with_who_reads(self) -> None:
        """Who reads without zeros of its own would see them or not."""
        cell, ours, theirs = self.filled()
        cell.note_read(Stamp("a GEMM of them", 0))
        assert cell.objection_to_zeros(from_row(2), ours, "us") is not None
        ours.see("a GEMM of them", 1)
        assert cell.objection_to_zeros(from_row(2), ours, "us") is None
        cell.zero(from_row(3), Stamp("us", 0))
        cell.note_read(Stamp("a GEMM of us", 0))
        assert (
            cell.objection_to_zeros(from_row(2), theirs, "them") is not None
        )  # one row more than there are zeros

    def test_who_reads_knows_of_zeros_in_every_row(self) -> None:
        """Zeros behind an end are not those of hidden keys, which another wrote; to write, neither waits."""
        cell, ours, theirs = self.filled()
        hidden = torch.tensor([[True, False, False, False]])
        cell.zero(from_row(3), Stamp("us", 0))
        assert cell.objection_to_zeros(hidden, theirs, "them") is None
        cell.zero(hidden, Stamp("them", 0))
        for line, clock in (("us", ours), ("them", theirs)):
            cell.fence_zeros(Stamp(line, 1))
            clock.see(line, 2)
            assert cell.objection_to_read(clock, line) is not None
            assert cell.objection_to_asynchronous_read(clock, Clock()) is not None
        cell.zero(hidden, Stamp("us", 2))
        cell.fence_zeros(Stamp("us", 3))
        ours.see("us", 4)
        assert (
            cell.objection_to_read(ours, "us") is cell.objection_to_asynchronous_read(ours, Clock()) is None
        )

    def test_who_fills_the_stage_anew_waits_for_all_zeros(self) -> None:
        """Zeros are stores like others to whoever writes next; a copy in flight, or none, takes none."""
        cell, ours, _ = self.filled()
        cell.zero(from_row(2), Stamp("us", 0))
        producer = Clock()
        producer.see("the copy", 1)
        assert cell.objection_to_write(producer, "the producer") is not None
        producer.see("us", 1)
        assert cell.objection_to_write(producer, "the producer") is None
        cell.take()
        assert cell.objection_to_zeros(from_row(2), ours, "us") is not None
        cell.in_flight = True
        assert cell.objection_to_zeros(from_row(2), ours, "us") is not None


@pytest.mark.parametrize("problem", [{"queries": "ragged"}, {"keys": "padded"}])
def test_e4m3_has_no_lengths(problem: dict[str, str]) -> None:
    """V of e4m3 is stored by columns, in which keys come in blocks that begin with the tensor."""
    spec = {"problem": {"head_dim": 64, **problem}, "precision": {"inputs": "e4m3"}}
    ((axis, kind),) = problem.items()
    with pytest.raises(SpecError, match=f"must have 16 bits where {axis} are {kind}") as caught:
        attngen.load(spec)
    assert "lengths-of-16-bit" in str(caught.value) and f"problem.{axis}: dense" in str(caught.value)
