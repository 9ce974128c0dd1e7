"""Small plans: by hand for any program, and lowered from a spec.

A fault is provoked by the shortest program that commits it, whatever schedules do; values are asked of what
lowering makes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product as every
from types import MappingProxyType
from typing import Any

from attngen.arch import ARCHS
from attngen.dtypes import F32, DType
from attngen.expr import TRUE, Declarations, Expr, name
from attngen.lower import Features, build, candidates, warpgroups
from attngen.lower.choice import WarpgroupChoice
from attngen.lower.decision import Decision
from attngen.plan import (
    ROWS_OF_K,
    ROWS_OF_O,
    ROWS_OF_Q,
    ROWS_OF_V,
    SCORES,
    Buffer,
    Call,
    Cursor,
    KernelPlan,
    Program,
    RegTile,
    RegVec,
    Role,
    Rows,
    Scheduler,
    SeenBlocks,
    Tensor,
    assemble,
)
from attngen.plan.hardware_rules import verify
from attngen.schedules import KeyLoop, OnlineSoftmax, Pairs, Places, Scores, WarpgroupPlaces
from attngen.spec import load

FULL = Pairs.of(TRUE, name("score"))


def places(block_m: int = 4, block_n: int = 4, dim: int = 2, stages: int = 1, dtype: DType = F32) -> Places:
    """Places for tiles of the given sizes; `out` has the bytes of `q`."""
    q_bytes, kv_bytes = block_m * dim * 4, stages * block_n * dim * 4
    scores = Scores(RegTile("acc_s", F32, SCORES, block_m, block_n, block_n, "accumulator"), FULL)
    softmax = OnlineSoftmax(
        scores,
        p=RegTile("p", dtype, SCORES, block_m, block_n, block_n, "a_fragment"),
        row_max=RegVec("row_max", "queries", block_m),
        reference=RegVec("reference", "queries", block_m),
        exponent_scale=RegVec("exponent_scale", "queries", block_m, groups=1),
        row_sum=RegVec("row_sum", "queries", block_m, partial=True),
        alpha=RegVec("alpha", "queries", block_m),
        total=RegVec("total", "queries", block_m),
        inv_sum=RegVec("inv_sum", "queries", block_m),
        row_lse=RegVec("row_lse", "queries", block_m),
    )
    return Places(
        keys=KeyLoop(FULL.visible),
        scores=scores,
        softmax=softmax,
        acc_o=RegTile("acc_o", F32, ROWS_OF_O, block_m, dim, dim, "accumulator"),
        stages=stages,
        score_unroll=1,
        q=Buffer("q", dtype, ROWS_OF_Q, block_m, dim, dim),
        k=Buffer("k", dtype, ROWS_OF_K, block_n, dim, dim, stages, q_bytes),
        v=Buffer("v", dtype, ROWS_OF_V, block_n, dim, dim, stages, q_bytes + kv_bytes),
        out=Buffer("out", dtype, ROWS_OF_O, block_m, dim, dim, overlays="q"),
        load_at=Cursor("load", stages),
        read_at=Cursor("read", stages),
        q_in=Tensor("q", dtype, ROWS_OF_Q, dim, "q"),
        k_in=Tensor("k", dtype, ROWS_OF_K, dim, "kv"),
        v_in=Tensor("v", dtype, ROWS_OF_V, dim, "kv"),
        result=Tensor("out", dtype, ROWS_OF_O, dim, "q"),
        lse=Rows("lse", "queries", optional=True),
        parts=None,
        o_acc=Tensor("o_acc", F32, ROWS_OF_O, dim, "q", workspace=True),
        saved_max=Rows("saved_max", "queries", workspace=True),
        saved_sum=Rows("saved_sum", "queries", workspace=True),
    )


def plan_of(
    at: Places,
    *programs: Program,
    schedule: str = "fa2",
    key_blocks: SeenBlocks | None = None,
    mask: Expr = TRUE,
) -> KernelPlan:
    """A kernel whose roles run these programs."""
    dim = at.q.cols
    return KernelPlan(
        name="attention",
        spec_digest="",
        arch=ARCHS["simulator"],
        inputs=at.q.dtype,
        output=at.q.dtype,
        head_dim_qk=dim,
        head_dim_v=dim,
        mask=mask,
        mask_text="full",
        score=name("score"),
        score_factor=1.0,
        tile_classes=None,
        declarations=Declarations(),
        schedule=schedule,
        block_m=at.q.rows,
        block_n=at.k.rows,
        stages=at.stages,
        warps=1,
        qk_cols=dim,
        v_cols=dim,
        row_tiles=1,
        overlap=False,
        key_blocks=key_blocks or SeenBlocks(),
        reads=(at.q_in, at.k_in, at.v_in),
        writes=(at.result, at.lse),
        scratch=(at.o_acc, at.saved_max, at.saved_sum),
        scheduler=Scheduler("heads" if schedule == "serial" else "query_blocks"),
        roles=tuple(Role(f"role {i}", 1, program) for i, program in enumerate(programs)),
        buffers=(at.q, at.k, at.v, at.out),
        params=(),
        blocks_per_sm=1,
        smem_bytes=at.v.offset + at.v.size_bytes,
    )


def call_of(plan: KernelPlan, **launched: Any) -> Call:
    """The call of a kernel, whose launch differs from the plan's in some fields."""
    call = assemble((plan,))
    (launch,) = call.manifest.launches
    return replace(call, manifest=replace(call.manifest, launches=(replace(launch, **launched),)))


TINY_WARPGROUPS = WarpgroupChoice(block_m=4, block_n=4, stages=2, warpgroups=2)


def warpgroup_places() -> WarpgroupPlaces:
    """Places of two consumer warpgroups, of two rows each, and their producer; f32, head dim 2."""
    spec = load({"target": "simulator", "problem": {"head_dim": 2}, "precision": {"inputs": "f32"}})
    features = Features.of(spec, ARCHS["simulator"])
    return warpgroups.places(TINY_WARPGROUPS, features, Decision.of(features, "pingpong", TINY_WARPGROUPS))


def warpgroup_plan(consumer: Program, producer: Program, persistent: bool = False) -> KernelPlan:
    """A plan on those places whose roles run these programs."""
    given = {"persistent": persistent, "warpgroups": 2}
    plan = lowered("pingpong", stages=2, block_m=4, block_n=4, head_dim=2, fields=given)
    programs = {"consumer": consumer, "producer": producer}
    roles = tuple(replace(role, program=programs[role.name]) for role in plan.roles)
    return replace(plan, roles=roles)


def lowered(
    schedule: str,
    mask: str = "full",
    stages: int = 1,
    *,
    block_m: int = 8,
    block_n: int = 2,
    head_dim: int = 4,
    head_dim_v: int | None = None,
    inputs: str = "f32",
    target: str = "simulator",
    fields: Mapping[str, Any] = MappingProxyType({}),
    score: str = "score",
    declarations: Mapping[str, Any] = MappingProxyType({}),
    precision: Mapping[str, Any] = MappingProxyType({}),
    problem: Mapping[str, Any] = MappingProxyType({}),
    **choices: Any,
) -> KernelPlan:
    """The plan of a spec, with tiles small enough for every range of a program to hold many blocks.

    `fields` is more of the spec's `schedule`, `precision` and `problem` of the blocks of these names, `declarations`
    its tensors and scalars; `choices` is what no spec says and lowering would decide.
    """
    spec = load(
        {
            "target": target,
            "problem": {"head_dim": {"qk": head_dim, "v": head_dim_v or head_dim}, **problem},
            "precision": {"inputs": inputs, **precision},
            "mask": mask,
            "score": score,
            **declarations,
            "tile": {"block_m": block_m, "block_n": block_n},
            "schedule": {"kind": schedule, "stages": 1 if schedule == "serial" else stages, **fields},
        }
    )
    features = Features.of(spec, ARCHS[target])
    choice = candidates(features, schedule)[0]
    plan = build(features, schedule, replace(choice, **choices))
    assert not verify(plan)
    return plan


@dataclass(frozen=True)
class Variant:
    """A schedule and the fields of the spec that change its program."""

    schedule: str
    stages: int = 2
    overlap: bool | None = None
    persistent: bool | None = None
    warpgroups: int | None = None

    def plan(self, mask: str = "full", **rest: Any) -> KernelPlan:
        """As `lowered`; three warpgroups share 12 rows."""
        named = {"overlap": self.overlap, "persistent": self.persistent, "warpgroups": self.warpgroups}
        fields = {name: value for name, value in named.items() if value is not None}
        rows = {"block_m": 12} if self.warpgroups == 3 else {}
        return lowered(self.schedule, mask, self.stages, fields=fields, **{**rows, **rest})

    def __str__(self) -> str:
        if self.warpgroups is None:
            return f"{self.schedule}-{self.stages}"
        overlap = "overlap" if self.overlap else "in-turn"
        return (
            f"{self.schedule}-{overlap}-{'persistent' if self.persistent else 'launched'}-{self.warpgroups}"
        )


KINDS = ("serial", "fa2", "warp_specialized", "pingpong")
WARPGROUP_VARIANTS = tuple(
    Variant(schedule, 2, overlap, persistent, warpgroups)
    for schedule, overlap, persistent, warpgroups in every(KINDS[2:], (True, False), (True, False), (2, 3))
)
VARIANTS = (Variant("serial", 1), *(Variant("fa2", stages) for stages in (1, 2, 3)), *WARPGROUP_VARIANTS)
"""Every kind of program, plans of which `lowered` makes without more ado where only the schedule matters."""
