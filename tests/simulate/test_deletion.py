"""Every Step of every program has a reason: without it the simulator faults or gives another result."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from operands_8bit import drawn_call
from small_plans import lowered

from attngen.check.inputs import Shape
from attngen.plan import KernelPlan, Program, Role, Step, body_of, walk
from attngen.plan.steps import (
    Advance,
    CommitCopies,
    ForBlocks,
    ForVisited,
    Note,
    ReadTile,
    Release,
    ScaleRows,
    StageTile,
    SyncThreads,
    SyncWarpgroup,
    WaitCopies,
    WaitEmpty,
    WaitStores,
)
from attngen.simulate import SimulationFault, simulate
from attngen.simulate.tile_source import LOCKSTEP
from tests.check.language_cases import LanguageCase

Path = tuple[int, ...]
"""Where a Step stands: its number in the program, then in the body it is in, and so on."""
WINDOW = "kv_idx > q_pos - 12 and kv_idx <= q_pos + 5"
SINKS = "kv_idx > q_pos - 6 and kv_idx <= q_pos or kv_idx < 3"
DOCUMENT = "document(doc)"


@dataclass(frozen=True)
class Case:
    """A plan whose programs lose their Steps."""

    schedule: str
    mask: str
    stages: int = 2
    overlap: bool | None = None
    persistent: bool | None = None
    out_over_q: bool = False
    rescale: str = "middle"
    score: str = "score"
    scales: str = ""
    promote: int = 1
    has_sink: bool = False

    @property
    def inputs(self) -> tuple["Inputs", ...]:
        """The calls: where blocks of keys have scales of their own, of some blocks."""
        return INPUTS_OF_GRANULES if self.scales in ("per_block", "per_token") else INPUTS

    @property
    def language(self) -> LanguageCase:
        """The mask and the score, with values for what they declare."""
        return LanguageCase(self.mask, self.score)

    def plan(self) -> KernelPlan:
        """Small enough for every range of a program to hold many blocks."""
        sink = {"sink": "per_head"} if self.has_sink else {}
        pairs: dict[str, Any] = {"score": self.score, "declarations": self.language.declarations | sink}
        if self.overlap is None:
            return lowered(self.schedule, self.mask, self.stages, **pairs)
        fields = {"overlap": self.overlap, "persistent": self.persistent}
        variant: dict[str, Any] = {"out_over_q": self.out_over_q, "rescale": self.rescale}
        if self.scales:
            variant["precision"] = {"scales": self.scales, "promote": self.promote, "output": "f32"}
            has_granules = self.inputs is INPUTS_OF_GRANULES
            variant |= {"inputs": "e4m3"} | ({"block_m": 32, "block_n": 64} if has_granules else {})
        return lowered(self.schedule, self.mask, self.stages, fields=fields, **pairs, **variant)

    def __str__(self) -> str:
        overlap = {None: "", True: ", overlap", False: ", no overlap"}[self.overlap]
        persistent = {None: "", True: ", persistent", False: ", one tile a block"}[self.persistent]
        numbers = f"{self.stages}{overlap}{persistent}{', O over Q' * self.out_over_q}, {self.rescale}"
        scales = f", {self.scales}, promote {self.promote}" if self.scales else ""
        return f"{self.schedule}, {self.language}, {numbers}{scales}{', sink' * self.has_sink}"


@dataclass(frozen=True)
class Site:
    """A Step in a program.

    Attributes:
        around: the Steps it is in, outermost first.
    """

    case: Case
    role: str
    step: Step
    path: Path
    around: tuple[Step, ...]

    @property
    def range(self) -> str:
        """Name of the innermost range it runs over, or of the walk."""
        loops = (step for step in reversed(self.around) if isinstance(step, ForBlocks | ForVisited))
        inner = next(loops, None)
        return "" if inner is None else inner.range.name if isinstance(inner, ForBlocks) else inner.walk.name

    def __str__(self) -> str:
        number = ".".join(map(str, self.path))
        return f"{self.role} {number} {type(self.step).__name__}: {str(self.step).splitlines()[0]}"


@dataclass(frozen=True)
class Inputs:
    """One small call.

    Together: both signs, odd lengths, GQA, rows that see 0, 1, 2 and many blocks, blocks of threads with one tile and
    with many.
    """

    seqlen_q: int
    seqlen_k: int
    heads: int = 1
    heads_kv: int = 1
    softmax_scale: float = 0.6


INPUTS = (
    Inputs(1, 1),
    Inputs(5, 23, heads=2),
    Inputs(13, 22, heads=2, heads_kv=1, softmax_scale=-0.7),
    Inputs(23, 9),
    Inputs(16, 32, softmax_scale=-0.5),
    Inputs(32, 32),
    Inputs(41, 0, heads=3 * LOCKSTEP),
    Inputs(7, 6, heads=3 * LOCKSTEP, heads_kv=1),
    Inputs(7, 4, heads=3 * LOCKSTEP, heads_kv=1),
    Inputs(7, 2, heads=3 * LOCKSTEP, heads_kv=1),
)
INPUTS_OF_GRANULES = (
    Inputs(5, 23, heads=2),
    Inputs(70, 390, heads=2, heads_kv=1, softmax_scale=-0.2),
    Inputs(150, 150, softmax_scale=0.2),
    Inputs(41, 0, heads=3 * LOCKSTEP),
    Inputs(7, 70, heads=3 * LOCKSTEP, heads_kv=1),
)
"""The same where 64 rows of Q and 128 keys share a scale, and tiles have 64 keys."""
TOLERANCE = 1e-3
"""Less is rounding; every input below differs by more from what it should be, or not at all."""

CASES = [
    *(
        Case(schedule, mask, stages)
        for schedule, many in (("serial", (1,)), ("fa2", (1, 2, 3)))
        for stages in many
        for mask in ("full", "causal", WINDOW)
    ),
    Case("warp_specialized", "full", 2, overlap=True, persistent=True),
    Case("warp_specialized", "causal", 3, overlap=False, persistent=True, out_over_q=True, rescale="last"),
    Case("warp_specialized", WINDOW, 2, overlap=True, persistent=False),
    Case("warp_specialized", "kv_idx != q_idx", 2, overlap=True, persistent=True),
    Case("pingpong", "full", 2, overlap=False, persistent=False, out_over_q=True),
    Case("pingpong", "causal", 2, overlap=True, persistent=True, rescale="last"),
    Case("pingpong", WINDOW, 2, overlap=True, persistent=True, out_over_q=True, rescale="last"),
    *(
        Case(schedule, mask, stages, score=score)
        for schedule, stages in (("serial", 1), ("fa2", 1), ("fa2", 2), ("fa2", 3))
        for mask, score in (
            (SINKS, "softcap(score, 2.0)"),
            (DOCUMENT, "score"),
            (WINDOW, "score + alibi(slopes)"),
        )
    ),
    *(
        Case(schedule, mask, 2, overlap, persistent, out_over_q, rescale, score)
        for schedule in ("warp_specialized", "pingpong")
        for mask, overlap, persistent, out_over_q, rescale, score in (
            (SINKS, True, True, False, "middle", "softcap(score, 2.0)"),
            (DOCUMENT, False, False, True, "middle", "score"),
            (SINKS, True, True, True, "last", "score"),
            ("causal", True, True, False, "middle", "score + bias[h, q_idx, kv_idx]"),
        )
    ),
    *(
        Case("pingpong", mask, 2, overlap, True, False, rescale, score, scales, promote)
        for mask, overlap, rescale, score, scales, promote in (
            ("full", True, "last", "score", "per_block", 1),
            ("full", False, "middle", "softcap(score, 9.0)", "per_token", 1),
            (WINDOW, True, "middle", "score", "per_head", 0),
        )
    ),
    Case("serial", "causal", 1, has_sink=True),
    Case("fa2", "causal", 2, has_sink=True),
    Case("warp_specialized", WINDOW, 2, overlap=True, persistent=True, has_sink=True),
    Case("pingpong", "full", 2, True, True, False, "last", "score", "per_block", 1, has_sink=True),
]


def is_first_rescale(site: Site) -> bool:
    """With the full mask only the last block of keys is masked, and it is the first to be visited."""
    rescales = isinstance(site.step, ScaleRows) and site.step.by.name == "alpha"
    return rescales and site.range == "right" and site.case.mask == "full"


def lands_keys_of_serial(site: Site) -> bool:
    """Before the loop over rows. With other masks some blocks of keys have no rows, and Q does not follow."""
    in_loop_over_keys = site.case.schedule == "serial" and site.range == "keys" and len(site.around) == 2
    if isinstance(site.step, CommitCopies | WaitCopies):
        return in_loop_over_keys and site.case.mask in ("full", "causal")
    return in_loop_over_keys and isinstance(site.step, SyncThreads) and site.path[-1] > 0


def is_before_copy_of_out(site: Site) -> bool:
    """O takes the bytes of Q, which the last block of keys reads before its barrier for V."""
    if not isinstance(site.step, SyncThreads) or not site.around:
        return False
    following = body_of(site.around[-1])[site.path[-1] + 1 :]
    is_last_but_one = any(isinstance(step, StageTile) for step in following[:1])
    return is_last_but_one and site.case.schedule == "fa2" and site.case.stages == 1


def has_one_tile(site: Site) -> bool:
    """What makes a stage ready for another tile, or waits for that, where a block has no other."""
    if site.case.persistent is not False or site.range:
        return False
    if isinstance(site.step, Release | Advance):
        return site.step.cursor.name != "k_at"
    if isinstance(site.step, WaitEmpty):
        return site.step.cursor.name != "v_at"
    if isinstance(site.step, WaitStores | SyncWarpgroup) and site.around:
        following = body_of(site.around[-1])[site.path[-1] + 1 :][:2]
        return any(isinstance(step, StageTile) for step in following)
    return False


def waits_for_v_without_overlap(site: Site) -> bool:
    """Then V of a stage is released before K of the block after it, for which the producer has waited."""
    is_wait_for_v = isinstance(site.step, WaitEmpty) and site.step.cursor.name == "v_at"
    return is_wait_for_v and site.range != "" and site.case.overlap is False


REDUNDANT: dict[str, Callable[[Site], bool]] = {
    "saves registers, changes no value": lambda site: isinstance(site.step, ReadTile),
    "O is still 0 when the first block of keys rescales it": is_first_rescale,
    "the wait and the barriers for Q, which follows, cover K and V": lands_keys_of_serial,
    "a block with one tile needs no stage for another": has_one_tile,
    "without overlap the wait for K covers V": waits_for_v_without_overlap,
    "with one stage the barrier for V already stands after the last read of Q": is_before_copy_of_out,
}
"""Steps without which nothing changes that the simulator sees, by reason."""


def sites(case: Case, role: Role, prefix: Path = (), around: Program = ()) -> Iterator[Site]:
    """Every Step of a role's program, outer before inner."""
    for i, step in enumerate(body_of(around[-1]) if around else role.program):
        yield Site(case, role.name, step, (*prefix, i), around)
        yield from sites(case, role, (*prefix, i), (*around, step))


def without(program: Program, path: Path) -> Program:
    """The program without the Step at a path and what is in it."""
    first, *rest = path
    before, step, after = program[:first], program[first], program[first + 1 :]
    if not rest:
        return before + after
    shorter = without(body_of(step), tuple(rest))
    return (*before, replace(step, body=shorter), *after)  # type: ignore[call-arg]


def without_step(plan: KernelPlan, site: Site) -> KernelPlan:
    """The plan whose role lacks the Step."""
    roles = (
        replace(role, program=without(role.program, site.path)) if role.name == site.role else role
        for role in plan.roles
    )
    return replace(plan, roles=tuple(roles))


def results(plan: KernelPlan, case: Case) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Out and lse of every one of the fixed inputs."""
    for i, x in enumerate(case.inputs):
        shape = Shape(2, x.heads, x.heads_kv, x.seqlen_q, x.seqlen_k)
        generator = torch.Generator().manual_seed(i)
        call = drawn_call(plan, shape, generator) if plan.scales else drawn_tensors(plan, shape, generator)
        declared = case.language.arguments(shape)
        if case.has_sink:
            declared["sink"] = torch.randn(x.heads, generator=generator)
        out, lse = simulate(plan, **call, softmax_scale=x.softmax_scale, return_lse=True, declared=declared)
        assert lse is not None
        yield out, lse


def drawn_tensors(plan: KernelPlan, shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Q, K and V of a call."""

    def randn(seqlen: int, heads: int, cols: int) -> torch.Tensor:
        values = torch.randn(shape.batch, seqlen, heads, cols, generator=generator)
        return (2 * values).to(getattr(torch, plan.inputs.torch_name))

    q = randn(shape.seqlen_q, shape.heads, plan.head_dim_qk)
    k = randn(shape.seqlen_k, shape.heads_kv, plan.head_dim_qk)
    return {"q": q, "k": k, "v": randn(shape.seqlen_k, shape.heads_kv, plan.head_dim_v)}


def differ(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    """Whether anything differs by more than rounding; -inf equals -inf."""
    return any(
        not torch.allclose(f.float(), e.float(), rtol=TOLERANCE, atol=TOLERANCE)
        for f, e in zip(found, expected, strict=True)
    )


def is_noticed(plan: KernelPlan, case: Case, expected: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """Whether some input makes the plan fault or give something else than expected."""
    try:
        return any(differ(found, right) for found, right in zip(results(plan, case), expected, strict=True))
    except SimulationFault:
        return True


def deletions(case: Case) -> Iterator[tuple[str, ...]]:
    """What is deleted, where, and why nobody notices if so; and the schedule's masks, scores and kinds of scales."""
    for role in case.plan().roles:
        for site in sites(case, role):
            why = next((reason for reason, claims in REDUNDANT.items() if claims(site)), "")
            yield case.schedule, role.name, type(site.step).__name__, site.range, why
    yield from ((case.schedule, case.mask), (case.score,), (case.scales, str(case.promote)))
    yield from ((case.schedule, "sink"),) if case.has_sink else ()


@pytest.mark.matrix(classes=deletions, most=14)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_step_is_needed(case: Case) -> None:
    """Without one of its Steps, but for Notes, a program faults or differs, or the Step is listed, and none in vain."""
    plan = case.plan()
    expected = list(results(plan, case))
    unnoticed, listed = [], []
    for site in (site for role in plan.roles for site in sites(case, role)):
        if isinstance(site.step, Note):
            continue  # a heading for readers
        if any(claims(site) for claims in REDUNDANT.values()):
            listed.append(str(site))
        if not is_noticed(without_step(plan, site), case, expected):
            unnoticed.append(str(site))
    assert unnoticed == listed


@pytest.mark.parametrize("case", [Case("fa2", "causal"), CASES[-1]], ids=str)
def test_deletion_finds_nested_steps(case: Case) -> None:
    """The test reaches Steps in every body, and a deletion takes a Step and what is in it and no more."""
    plan = case.plan()
    for role in plan.roles:
        every = list(sites(case, role))
        assert max(len(site.path) for site in every) >= 4
        for site in every:
            (shorter,) = (r for r in without_step(plan, site).roles if r.name == role.name)
            removed = 1 + sum(1 for _ in walk(body_of(site.step)))
            assert len(list(walk(shorter.program))) == len(every) - removed


def test_barrier_before_a_wide_output_is_needed() -> None:
    """Where O is wider than Q it takes bytes of K and V too, which the last block of keys has just read."""
    plan = lowered("fa2", "causal", 1, head_dim=4, head_dim_v=12)
    case = Case("fa2", "causal", 1)
    every = sites(case, plan.worker)
    (site,) = (site for site in every if is_before_copy_of_out(site))
    with pytest.raises(SimulationFault, match="StageTile") as caught:
        list(results(without_step(plan, site), case))
    assert (caught.value.rule, caught.value.place) == ("race", "out")
