"""Faults as people make them, planted in the simulator or in a program.

A fault is either another function for some Steps or an edit of the plan. Each is a single slip in a place that
is right otherwise; where a schedule or a mask has no such place, the plan stays as it is.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch

from attngen.api import compile
from attngen.check.judging import quantized
from attngen.expr import add, const, evaluate
from attngen.fuzz.strategies import plan_of
from attngen.fuzz.trial import Make
from attngen.plan import BlockIndex, KernelPlan, Program, Step, View, body_of
from attngen.plan.steps import (
    Exponentiate,
    FinishRows,
    ForBlocks,
    Gemm,
    IssueGemm,
    JoinSink,
    LoadTile,
    MaskScores,
    MaskScoresEach,
    Promote,
    ReadScoreScale,
    ReadValueWeight,
    Release,
    RowMax,
    ScaleRows,
    TmaLoad,
    WaitGemm,
    When,
)
from attngen.quantize import DESCALES
from attngen.simulate import STEPS_SIMULATED, RoleRun, StepFunction, simulate
from attngen.simulate.visits import Member
from attngen.spec import Spec

Edit = Callable[[Step], Step | None]


@dataclass(frozen=True)
class Fault:
    """A slip.

    Attributes:
        steps: functions in place of the simulator's.
        edit: the plan with the slip in it.
    """

    steps: Mapping[type[Step], StepFunction] = field(default_factory=dict)
    edit: Callable[[KernelPlan], KernelPlan] = lambda plan: plan


@dataclass(frozen=True)
class Planted:
    """A simulated kernel with a fault; its backward pass is right, for the out and lse that it is given."""

    spec: Spec
    plan: KernelPlan
    fault: Fault

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        softmax_scale: float | None = None,
        return_lse: bool = False,
        out: torch.Tensor | None = None,
        layout: str = "bshd",
        **declared: Any,
    ) -> Any:
        descales: Mapping[str, torch.Tensor] = {}
        if self.plan.quantizer is not None:
            operands = quantized(
                self.plan, *(x if layout == "bshd" else x.transpose(1, 2) for x in (q, k, v))
            )
            q, k = (x if layout == "bshd" else x.transpose(1, 2) for x in (operands.q, operands.k))
            v, descales = operands.v, {name: getattr(operands, name) for name in DESCALES}
        result, lse = simulate(
            self.plan,
            q,
            k,
            v,
            softmax_scale=softmax_scale,
            return_lse=return_lse,
            layout=layout,
            declared=declared,
            steps=self.fault.steps,
            descales=descales,
        )
        result = result if out is None else out.copy_(result)
        return (result, lse) if return_lse else result

    def backward(self, *arguments: Any, **declared: Any) -> tuple[torch.Tensor, ...]:
        return compile(self.spec).backward(*arguments, **declared)


def plant(fault: Fault) -> Make:
    """Builds every spec with the fault in it."""

    def make(spec: Spec) -> Planted:
        plan = plan_of(spec)
        assert plan is not None
        return Planted(spec, fault.edit(plan), fault)

    return make


# ---- edits of programs --------------------------------------------------------------------------------
def rewritten(program: Program, edit: Edit) -> Program:
    """The program with every Step replaced by what the edit says, or left out for None."""
    result: list[Step] = []
    for step in program:
        if (changed := edit(step)) is not None:
            body = body_of(changed)
            result.append(replace(changed, body=rewritten(body, edit)) if body else changed)  # type: ignore[call-arg]
    return tuple(result)


def with_programs(plan: KernelPlan, change: Callable[[Program], Program]) -> KernelPlan:
    """The plan with every role's program changed."""
    roles = tuple(replace(role, program=change(role.program)) for role in plan.roles)
    return replace(plan, roles=roles)


def in_program(edit: Edit) -> Fault:
    """A fault of the program."""
    return Fault(edit=lambda plan: with_programs(plan, lambda program: rewritten(program, edit)))


def _one_key_more(step: Step) -> Step:
    """The mask lets every row see the key after its last."""
    if not isinstance(step, MaskScores):
        return step
    upper = tuple(add(bound, const(1)) for bound in step.visible.upper)
    return replace(step, visible=replace(step.visible, upper=upper))


def _no_lower_bound(step: Step) -> Step:
    """A window that does not end on the left."""
    return replace(step, visible=replace(step.visible, lower=())) if isinstance(step, MaskScores) else step


def _no_rescale(step: Step) -> Step | None:
    """O keeps what it summed under the old maximum."""
    return None if isinstance(step, ScaleRows) and step.by.name == "alpha" else step


def _sign_ignored(step: Step) -> Step | None:
    """A negative scale is taken for a positive one."""
    return None if isinstance(step, When) and step.condition == "scale is negative" else step


def _swapped_stages(step: Step) -> Step:
    """V arrives in the stage that is being read, K in the one that is free."""
    if not isinstance(step, LoadTile) or step.dst.cursor is None or step.src.name != "v":
        return step
    return replace(step, dst=View(step.dst.buffer, replace(step.dst.cursor, name="read_at")))


def _last_block_dropped(step: Step) -> Step:
    """The sequence of keys ends one block early."""

    def moved(value: Any) -> Any:
        if isinstance(value, BlockIndex) and value.base in ("n_max", "n_end"):
            return value - 1
        return value

    if isinstance(step, LoadTile | TmaLoad):
        return replace(step, block=moved(step.block))
    return (
        replace(step, range=replace(step.range, hi=moved(step.range.hi)))
        if isinstance(step, ForBlocks)
        else step
    )


def _wide_full_range(plan: KernelPlan) -> KernelPlan:
    """A block counts as full where only its first key is visible to all."""
    keys = plan.key_blocks
    ends = tuple(add(bound, const(plan.block_n - 1)) for bound in keys.end_all)
    return replace(plan, key_blocks=replace(keys, end_all=ends))


# ---- other functions for Steps ------------------------------------------------------------------------
def _no_tail_mask(step: MaskScores, role: RoleRun) -> None:
    """Keys past the sequence, which arrive as zeros, count with a score of 0."""
    sizes = role.call.sizes
    first_row, first_key = role.index(step.rows) * step.s.rows, role.index(step.block) * step.s.cols
    kv_idx = torch.arange(first_key, first_key + step.s.cols).view(1, 1, -1)
    names: dict[str, int | torch.Tensor] = {
        "q_idx": torch.arange(first_row, first_row + step.s.rows).view(1, -1, 1),
        "seqlen_q": sizes.seqlen_q,
        "seqlen_k": sizes.seqlen_k,
    } | {
        name: column.view(-1, 1, 1)
        for name, column in zip(("b", "h", "h_kv"), role.tile.columns, strict=True)
    }
    keep = torch.ones(1, 1, 1, dtype=torch.bool)
    for bound in step.visible.lower:
        keep = keep & (kv_idx >= evaluate(bound, names))
    for bound in step.visible.upper:
        keep = keep & (kv_idx < evaluate(bound, names))
    role.write(step.s, lambda s: torch.where(keep, s, -math.inf), role.read(step.s))


def _of_members(change: Callable[[Member, RoleRun], Member]) -> Mapping[type[Step], StepFunction]:
    """The loads of K and V, for other heads than the tile's."""

    def load(step: LoadTile | TmaLoad, role: RoleRun) -> None:
        tile = role.tile
        if step.src.heads == "kv":
            role.tile = replace(tile, members=tuple(change(m, role) for m in tile.members))
        STEPS_SIMULATED[type(step)](step, role)
        role.tile = tile

    return {LoadTile: load, TmaLoad: load}


def _head_modulo(member: Member, role: RoleRun) -> Member:
    return member._replace(head_kv=member.head % role.call.sizes.num_heads_kv)


def _first_batch(member: Member, role: RoleRun) -> Member:
    return member._replace(batch=0)


def _lse_in_log2(step: FinishRows, role: RoleRun) -> None:
    STEPS_SIMULATED[FinishRows](step, role)
    role.write(step.lse, torch.div, role.read(step.lse), math.log(2))


def _no_guard_for_empty_rows(step: FinishRows, role: RoleRun) -> None:
    total = role.read(step.row_sum)
    STEPS_SIMULATED[FinishRows](step, role)
    role.write(step.inv_sum, torch.reciprocal, total)


def _max_of_the_block(step: RowMax, role: RoleRun) -> None:
    """The maximum forgets the blocks before; O and its sums are as they were."""
    role.write(step.row_max, torch.full_like, role.read(step.row_max), torch.finfo(torch.float32).min)
    STEPS_SIMULATED[RowMax](step, role)
    role.write(step.alpha, torch.ones_like, role.read(step.alpha))


def _sum_not_rescaled(step: Exponentiate, role: RoleRun) -> None:
    total = role.read(step.row_sum, partial=True)
    STEPS_SIMULATED[Exponentiate](step, role)
    s = role.read(step.s)
    role.write(step.row_sum, lambda: total + s.sum(-1))


def _one_column_short(step: Gemm | IssueGemm, role: RoleRun) -> None:
    """Q Kᵀ without the last column of the head dim."""
    if step.contracted == "qk_columns" and isinstance(step.a, View):
        read = role.read_by_gemm if isinstance(step, IssueGemm) else role.read_shared
        a, b = read(step.a), read(step.b)
        cols = step.a.buffer.valid_cols - 1
        role.write(step.acc, lambda: a[..., :cols] @ b[..., :cols].mT)
        if isinstance(step, IssueGemm):
            role.issue_gemm(step.acc)
    else:
        STEPS_SIMULATED[type(step)](step, role)


def _in_bodies(program: Program, change: Callable[[Program], Program]) -> list[Step]:
    """The Steps of a program, those of control with their bodies changed."""
    return [replace(step, body=change(body)) if (body := body_of(step)) else step for step in program]  # type: ignore[call-arg]


def _released_early(program: Program) -> Program:
    """Every stage is handed back before the wait for the GEMMs that read it."""
    steps = _in_bodies(program, _released_early)
    for i, (step, following) in enumerate(pairwise(tuple(steps))):
        if isinstance(step, WaitGemm) and isinstance(following, Release):
            steps[i], steps[i + 1] = following, step
    return tuple(steps)


def _rescaled_in_flight(program: Program) -> Program:
    """O is rescaled when its GEMM has been issued, not when it has landed."""
    steps = _in_bodies(program, _rescaled_in_flight)
    rescales = [step for step in steps if _no_rescale(step) is None]
    others = [step for step in steps if _no_rescale(step) is not None]
    issued = [
        i for i, step in enumerate(others, 1) if isinstance(step, IssueGemm) and step.contracted == "keys"
    ]
    return (*others[: issued[0]], *rescales, *others[issued[0] :]) if issued else tuple(steps)


def _rows_of_the_first_warpgroup(step: IssueGemm, role: RoleRun) -> None:
    """Every warpgroup takes the rows of Q that the first owns."""
    own, role.warpgroup = role.warpgroup, 0
    STEPS_SIMULATED[IssueGemm](step, role)
    role.warpgroup = own


# ---- slips with scales --------------------------------------------------------------------------------
def _only_the_rows_scale(step: ReadScoreScale, role: RoleRun) -> None:
    """K's descale is left out of the scores'."""
    src = role.read(step.src)
    role.write(step.dst, lambda: src)


def _every_weight_one(step: ReadValueWeight, role: RoleRun) -> None:
    """All blocks of V are taken to have the largest descale."""
    role.read(step.top)
    role.write(step.weight, lambda: torch.ones(len(role.tile.members), 1, 1))


def _sums_are_weighted(step: Exponentiate, role: RoleRun) -> None:
    """The row sum adds up P with V's weights in it."""
    STEPS_SIMULATED[Exponentiate](replace(step, weight=None), role)
    if step.weight is not None:
        s, weight = role.read(step.s), role.read(step.weight)
        role.write(step.s, lambda: s * weight)
        total = role.read(step.row_sum, partial=True)
        role.write(step.row_sum, lambda: total - s.sum(-1) + (s * weight).sum(-1))


def _lifted_lse(step: FinishRows, role: RoleRun) -> None:
    """The lift of P is not taken off the log-sum-exp."""
    STEPS_SIMULATED[FinishRows](replace(step, lift=0), role)


def _promoted_without_rescaling(step: Promote, role: RoleRun) -> None:
    """What was added up before keeps its old maximum."""
    o, part = role.read(step.o), role.read(step.part)
    role.read(step.by)
    columns = slice(step.first_column, step.first_column + step.part.cols)

    def joined() -> torch.Tensor:
        result = o.clone()
        result[..., columns] += part
        return result

    role.write(step.o, joined)


FAULTS_OF_SCALES: dict[str, Fault] = {
    "K's descale left out": Fault({ReadScoreScale: _only_the_rows_scale}),
    "weights of V left out": Fault({ReadValueWeight: _every_weight_one}),
    "row sum of weighted P": Fault({Exponentiate: _sums_are_weighted}),
    "lse of lifted sums": Fault({FinishRows: _lifted_lse}),
    "promoted without rescaling": Fault({Promote: _promoted_without_rescaling}),
}
"""Faults of e4m3 specs with scales per block."""

FAULTS: dict[str, Fault] = {
    "causal off by one": in_program(_one_key_more),
    "missing tail mask": Fault({MaskScores: _no_tail_mask}),
    "window without its left end": in_program(_no_lower_bound),
    "no rescale": in_program(_no_rescale),
    "row_sum not rescaled": Fault({Exponentiate: _sum_not_rescaled}),
    "row_max not running": Fault({RowMax: _max_of_the_block}),
    "wrong GQA head": Fault(_of_members(_head_modulo)),
    "K and V of the first batch": Fault(_of_members(_first_batch)),
    "lse unscaled": Fault({FinishRows: _lse_in_log2}),
    "empty rows not guarded": Fault({FinishRows: _no_guard_for_empty_rows}),
    "swapped stages": in_program(_swapped_stages),
    "last KV block dropped": in_program(_last_block_dropped),
    "scale sign ignored": in_program(_sign_ignored),
    "full range too wide": Fault(edit=_wide_full_range),
    "one column of the head dim short": Fault({Gemm: _one_column_short, IssueGemm: _one_column_short}),
    "mask without a closed form ignored": Fault({MaskScoresEach: lambda step, role: None}),
    "stage released under its GEMM": Fault(edit=lambda plan: with_programs(plan, _released_early)),
    "O rescaled under its GEMM": Fault(edit=lambda plan: with_programs(plan, _rescaled_in_flight)),
    "sink forgotten": Fault({JoinSink: lambda step, role: None}),
    "rows of the first warpgroup": Fault({IssueGemm: _rows_of_the_first_warpgroup}),
}
RACES = ("stage released under its GEMM", "O rescaled under its GEMM")
"""Faults that change no value here and would on a GPU, now and then: the simulator itself refuses them."""
