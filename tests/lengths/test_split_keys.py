"""Keys in parts, on the simulator: what a sequence comes to is what it comes to in one piece, whoever works on it."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import attngen
from attngen.api import kernel_of_call
from attngen.bind import Bound, bind, check_arguments
from attngen.errors import PlanError, SpecError
from attngen.kernel import Kernel
from attngen.plan import TICKETS, Call, KernelPlan, Program, Step, body_of, part_shape, walk
from attngen.plan.steps import (
    Advance,
    CountPart,
    FenceAsync,
    JoinShares,
    LeaveShare,
    LoadTile,
    MergeParts,
    StageTile,
    StoreColumns,
    StoreRegisters,
    StoreTile,
    SyncThreads,
    SyncWarp,
    SyncWarpgroup,
    WaitCopies,
    When,
)
from attngen.simulate import SimulationFault
from attngen.simulate.launches import run_call
from tests.lengths.batches import Batch, batch

SEQLENS_Q, SEQLENS_K = (1, 4, 0, 21, 1), (300, 130, 7, 200, 0)
SLOPES = torch.tensor([-0.5, -0.1, -0.05, -0.01])
SINK = torch.tensor([0.5, -2.0, 3.0, -math.inf])
SPECS: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {
    "full": ({}, {}),
    "causal": ({"mask": "causal"}, {}),
    "window": ({"mask": "window(40, 0)"}, {}),
    "a walk": ({"mask": "causal and kv_idx % 5 != 3"}, {}),
    "bounded scores": ({"mask": "causal", "score": "softcap(score, 20.0)"}, {}),
    "a sink": ({"mask": "causal", "sink": "per_head"}, {"sink": SINK}),
    "heads asked for": (
        {"mask": "causal", "score": "score + alibi(slopes)", "tensors": {"slopes": "f32[num_heads_q]"}},
        {"slopes": SLOPES},
    ),
}
SPLITS: tuple[Any, ...] = ("auto", {"keys": 64}, {"keys": 192})
WARPGROUPS: dict[str, Any] = {"schedule": {"kind": "warp_specialized"}, "tile": {"block_n": 64}}
KINDS: dict[str, dict[str, Any]] = {
    "warps": {},
    "a warpgroup": WARPGROUPS,
    "two warpgroups": {**WARPGROUPS, "tile": {"block_m": 128, "block_n": 64}},
    "turns": {**WARPGROUPS, "schedule": {"kind": "pingpong", "warpgroups": 2}},
}
"""Whose rows a tile has."""


@cache
def _compiled(text: str) -> Kernel:
    return attngen.compile(eval(text))


def kernel(name: str = "causal", split: Any = "auto", queries: str = "ragged", **more: Any) -> Kernel:
    """A kernel of an emitted target, whose tiles have 16 rows."""
    problem = {
        "head_dim": 16 if more.get("target") == "simulator" else 32,
        "queries": queries,
        "keys": "padded",
    }
    spec = {"target": "sm_90a", "problem": problem, "split": split, **SPECS[name][0], **more}
    return _compiled(repr(spec))


def drawn(queries: str = "ragged", seqlens_q: tuple[int, ...] = SEQLENS_Q) -> Batch:
    return batch(queries, "padded", seqlens_q, SEQLENS_K, tail=3, poison=math.nan)


def widened(of: Batch) -> Batch:
    """The batch with heads of 32 columns."""
    return replace(
        of, **{name: torch.cat((x, -x), -1) for name, x in (("q", of.q), ("k", of.k), ("v", of.v))}
    )


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest, of what is no number none at all."""
    assert torch.equal(a.isfinite(), b.isfinite())
    return (a.float() - b.float()).nan_to_num(0, 0, 0).abs().max().item()


@pytest.mark.matrix(classes=lambda kind, split, name: [(kind, str(split)), (kind, name), (name, str(split))])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_parts_come_to_what_the_whole_comes_to(name: str, split: Any, kind: str) -> None:
    """Within the rounding of O; no NaN behind a sequence reaches it, and rows that see nothing are 0."""
    of, passed = widened(drawn()), SPECS[name][1]
    call = (of.q, of.k, of.v)
    out, lse = kernel(name, split, **KINDS[kind])(*call, return_lse=True, **of.lengths, **passed)
    whole, whole_lse = kernel(name, "none", schedule={"kind": "fa2"})(
        *call, return_lse=True, **of.lengths, **passed
    )
    assert difference(out, whole) <= 0.02 and difference(lse, whole_lse) <= 1e-5
    assert whole.abs().max() > 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["causal", "window"])
def test_parts_of_so_many_keys_give_the_same_bits_whatever_else_a_call_has(name: str, kind: str) -> None:
    """Alone or beside others, and on however many multiprocessors."""
    of, fixed = widened(drawn("dense", (3,) * 5)), kernel(name, {"keys": 64}, "dense", **KINDS[kind])
    whole = fixed(of.q, of.k, of.v, **of.lengths)
    for b in range(len(SEQLENS_K)):
        one = slice(b, b + 1)
        alone = fixed(of.q[one], of.k[one], of.v[one], **{key: x[one] for key, x in of.lengths.items()})
        assert torch.equal(alone, whole[one])
    given = check_arguments(fixed.manifest, of.q, of.k, of.v, declared=of.lengths)
    for num_sms in (1, 2, 5):
        made = run_call(fixed.call, bind(fixed.manifest, given, ("out",), num_sms))
        assert torch.equal(made["out"], whole)


def test_equal_scores_and_small_integers_have_exact_parts() -> None:
    """Every sum is exact, so that parts of any length come to the bits of the whole."""
    of = widened(drawn("dense", (2,) * 5))
    q, v = torch.zeros_like(of.q), torch.randint(-4, 5, of.v.shape).to(of.v)
    made = [kernel("causal", split, "dense")(q, of.k.nan_to_num(1.0), v, **of.lengths) for split in SPLITS]
    whole = kernel("causal", "none", "dense", schedule={"kind": "fa2"})(
        q, of.k.nan_to_num(1.0), v, **of.lengths
    )
    assert all(torch.equal(each, whole) for each in made)


def test_dense_calls_are_cut_too() -> None:
    """A few queries of one length and many keys."""
    q, k, v = (torch.randn(2, n, heads, 32).bfloat16() for n, heads in ((2, 4), (333, 2), (333, 2)))
    spec: dict[str, Any] = {"target": "sm_90a", "problem": {"head_dim": 32}, "mask": "causal"}
    split, whole = (
        attngen.compile(spec | more) for more in ({"split": "auto"}, {"schedule": {"kind": "fa2"}})
    )
    assert difference(split(q, k, v), whole(q, k, v)) <= 0.01


def test_work_is_shared_by_calls_of_the_same_heads_alone() -> None:
    """How long parts are follows from how many heads share the GPU."""
    of, split = widened(drawn("dense", (1,) * 5)), kernel("causal", "auto", "dense")
    call = (of.q, of.k, of.v)
    work = split.work(*call, **of.lengths)
    assert torch.equal(split(*call, work=work, **of.lengths), split(*call, **of.lengths))
    with pytest.raises(ValueError, match=r"work.*num_heads_q 2"):
        split(of.q[:, :, :2], *(x[:, :, :1] for x in call[1:]), work=work, **of.lengths)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_a_bound_of_lengths_that_is_too_low_changes_nothing(split: Any) -> None:
    """Room for parts is made by what tensors hold."""
    of = batch("ragged", "ragged", SEQLENS_Q, SEQLENS_K, tail=3, poison=math.nan)
    problem = {"head_dim": 16, "queries": "ragged", "keys": "ragged"}
    spec = {
        "target": "simulator",
        "problem": problem,
        "mask": "causal",
        "tile": {"block_m": 4, "block_n": 64},
    }
    cut, whole = (attngen.compile(spec | {"split": each}) for each in (split, "none"))
    out = cut(of.q, of.k, of.v, **of.lengths, max_seqlen_q=1, max_seqlen_k=1)
    assert difference(out, whole(of.q, of.k, of.v, **of.lengths)) <= 0.02


# ---- every Step is needed --------------------------------------------------------------------------------------------
def _without(program: Program, gone: Step) -> Program:
    kept = (step for step in program if step is not gone)
    return tuple(
        replace(step, body=_without(body, gone)) if (body := body_of(step)) else step for step in kept
    )  # type: ignore[call-arg]


NEEDED = (
    *(WaitCopies, SyncWarp, SyncThreads, Advance, LoadTile, LeaveShare, JoinShares, StoreColumns),
    *(CountPart, MergeParts, When, FenceAsync, SyncWarpgroup, StageTile, StoreTile),
)
"""Steps of which none may be left out, whatever they are of."""


def _lost(plan: KernelPlan) -> Iterator[Step]:
    """Steps by which warps and parts meet, and the numbers of parts."""
    program = plan.worker.program
    parts = next(
        step for step in walk(program) if isinstance(step, When) and step.condition == "tile is a part"
    )
    yield from (step for step in walk(parts.body) if isinstance(step, StoreRegisters))
    yield from (step for step in walk(program) if isinstance(step, NEEDED))


def _comes_to(call: Call, bound: Bound, wanted: dict[str, torch.Tensor]) -> bool:
    try:
        made = run_call(call, bound)
    except SimulationFault:
        return False
    return all(torch.equal(made[name].nan_to_num(7.0), wanted[name].nan_to_num(7.0)) for name in wanted)


@pytest.mark.parametrize(("kind", "most"), [("warps", 20), ("two warpgroups", 15)])
def test_every_step_of_parts_is_needed(kind: str, most: int) -> None:
    """Without it the simulator faults or something else comes out, where a scale turns Q or where none does."""
    of, split = widened(drawn()), kernel("causal", {"keys": 192}, **KINDS[kind])
    given = check_arguments(split.manifest, of.q, of.k, of.v, declared=of.lengths)
    calls = [bind(split.manifest, given, ("out", "lse"), 2, scale) for scale in (-0.2, 0.2)]
    expected = [run_call(split.call, bound) for bound in calls]
    has_rings = (
        len(split.plan.roles) > 1
    )  # whose last advance is for a tile that another block of threads has
    lost = [step for step in _lost(split.plan) if not (has_rings and isinstance(step, Advance))]
    assert len(lost) > most
    idle = []
    for step in lost:
        role = replace(split.plan.worker, program=_without(split.plan.worker.program, step))
        plan = replace(split.plan, roles=(role, *split.plan.roles[1:]))
        kernels = tuple(plan if each is split.plan else each for each in split.call.kernels)
        cut = replace(split.call, kernels=kernels)
        if all(_comes_to(cut, bound, wanted) for bound, wanted in zip(calls, expected, strict=True)):
            idle.append(str(step))
    assert not idle, idle


def test_parts_have_a_place_and_a_ticket_for_each_tile_that_shapes_allow() -> None:
    """The list, the grid and what parts are left in grow with one formula; a launch is given as many tickets."""
    made = kernel("causal")
    plan = made.plan
    assert {part_shape(place, plan)[0] == plan.tiles for place in plan.parts} == {True}
    assert plan.grid == plan.tiles
    (entry,) = (each for each in made.manifest.kernels if each.name == plan.name)
    assert TICKETS in {param.value for param in entry.params}


# ---- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"split": {"keys": 100}}, r"split.keys.*a multiple of 64.*128"),
        ({"split": "some"}, r"none, auto or \{keys: 1024\}"),
        (
            {"split": "auto", "schedule": {"kind": "serial"}},
            r"schedule.kind.*must be fa2 or one for warpgroups where keys are split",
        ),
        (
            {"split": "auto", "schedule": {"kind": "pingpong", "persistent": True}},
            r"schedule.persistent.*must be false where keys are split",
        ),
        ({"split": "auto", "gradients": ["q", "k", "v"]}, r"gradients.*must be \[\] where keys are split"),
        ({"split": "auto", "precision": {"inputs": "e4m3"}}, r"must be bf16 or f16 where keys are split"),
        ({"split": {"keys": 64}, "tile": {"block_n": 48}}, r"tile.block_n.*must divide 64.*16"),
    ],
)
def test_what_cannot_be_split_is_refused(more: dict[str, Any], words: str) -> None:
    with pytest.raises((SpecError, PlanError), match=rf"(?s){words}"):
        attngen.compile({"problem": {"head_dim": 64}, **more})


def test_numbers_that_are_none_stay_in_their_rows() -> None:
    """A query that holds NaN is no fault of the kernel's."""
    q, k, v = (torch.randn(1, n, heads, 16) for n, heads in ((3, 4), (700, 2), (700, 2)))
    q[0, 1, 2, 5] = math.nan
    spec = {"target": "simulator", "problem": {"head_dim": 16}, "precision": {"inputs": "f32"}}
    split, whole = (attngen.compile(spec | {"split": of})(q, k, v) for of in ({"keys": 64}, "none"))
    assert split[0, 1, 2].isnan().all() and split.isnan().sum() == 16
    assert difference(split, whole) <= 1e-6


def test_a_list_serves_calls_that_pass_another_scalar() -> None:
    """What a declared scalar says of keys is not in the list."""
    of = batch("dense", "padded", (1, 1, 1), (300, 130, 700))
    mask = {"mask": "kv_idx >= seqlen_k - w", "scalars": {"w": "i32"}}
    spec = {"target": "simulator", "problem": {"head_dim": 16, "keys": "padded"}, **mask}
    split, whole = (attngen.compile(spec | {"split": cut}) for cut in ("auto", "none"))
    work = split.work(of.q, of.k, of.v, **of.lengths, w=20)
    for w in (20, 650):
        out = split(of.q, of.k, of.v, **of.lengths, work=work, w=w)
        assert difference(out, whole(of.q, of.k, of.v, **of.lengths, w=w)) <= 0.02


# ---- who gets them ---------------------------------------------------------------------------------------------------
def test_a_few_queries_of_a_call_have_their_keys_split() -> None:
    """Up to 32 rows that share their keys, of 512 keys or more; where gradients are wanted nothing is split."""
    q, k, v = (torch.randn(1, n, heads, 16) for n, heads in ((4, 8), (600, 2), (600, 2)))
    few, many = kernel_of_call(q, k, v), kernel_of_call(q.repeat(1, 3, 1, 1), k, v)
    assert isinstance(few, Kernel) and few.spec.split == "auto" and few.plan.scheduler.packs_group
    assert isinstance(many, Kernel) and many.spec.split == "none"
    assert kernel_of_call(q, k[:, :511], v[:, :511]).spec.split == "none"  # type: ignore[union-attr]
    assert kernel_of_call(q.requires_grad_(), k, v).spec.split == "none"  # type: ignore[union-attr]
    heads_first = [x.transpose(1, 2) for x in (q.detach(), k, v)]
    assert kernel_of_call(*heads_first, passed={"layout": "bhsd"}).spec.split == "auto"  # type: ignore[union-attr]
    whole = attngen.attention(q, k, v, "causal")
    assert isinstance(whole, torch.Tensor)
    assert difference(attngen.attention(q.detach(), k, v, "causal"), whole.detach()) <= 1e-6  # type: ignore[arg-type]


def test_masks_by_document_are_walked_without_tables() -> None:
    """Tables are of blocks of queries, and a tile's rows are of several heads."""
    doc = torch.randint(0, 3, (1, 700), dtype=torch.int32).sort().values
    call = tuple(torch.randn(1, n, heads, 16) for n, heads in ((3, 4), (700, 2), (700, 2)))
    for declared in ("i32[batch, seqlen_k]", "i32[batch, seqlen_k] sorted"):
        spec: dict[str, Any] = {
            "target": "simulator",
            "problem": {"head_dim": 16},
            "precision": {"inputs": "f32"},
        }
        spec |= {"mask": "document(doc) and causal", "tensors": {"doc": declared}}
        split, whole = (attngen.compile(spec | {"split": of}) for of in ("auto", "none"))
        assert not split.plan.tables and not split.plan.boundaries
        assert difference(split(*call, doc=doc), whole(*call, doc=doc)) <= 1e-6
