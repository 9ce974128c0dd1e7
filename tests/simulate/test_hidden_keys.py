"""Keys that a mask hides from every query may hold anything: their K and V reach neither out nor lse."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch

import attngen
from attngen.expr import evaluate, shown_keys
from attngen.plan import Program, Step, body_of, walk
from attngen.plan.steps import FenceAsync, SyncThreads, SyncWarpgroup, WaitFull, ZeroHidden
from attngen.simulate import SimulationFault, simulate

TENSORS = {"pad": "bool[batch, seqlen_k]", "lens": "i32[batch]"}
MASKS = (
    "causal and pad[b, kv_idx]",
    "kv_idx < lens[b]",
    "window(10, 4) and kv_idx < lens[b] + 2 * h",
    "kv_idx % 3 != 0",
    "sinks(11)",
    "causal and kv_idx >= lens[b] - 5 * h_kv",
)
BATCH, HEADS, HEADS_KV, QUERIES, KEYS, DIM = 2, 4, 2, 19, 29, 16
POISONS = (math.nan, math.inf, -math.inf)


def passed(mask: str) -> dict[str, torch.Tensor]:
    """What a mask declares: padding here and there, and on the right."""
    pad = torch.rand(BATCH, KEYS, generator=torch.Generator().manual_seed(3)) > 0.4
    pad[1, 8:24] = False
    values = {"pad": pad, "lens": torch.tensor([13, 20], dtype=torch.int32)}
    return {name: x for name, x in values.items() if f"{name}[" in mask}


def hidden_keys(kernel: attngen.Kernel, declared: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which keys no query sees that shares them, (batch, keys, heads of K and V), found pair by pair."""
    b, h, q_idx, kv_idx = torch.meshgrid(*map(torch.arange, (BATCH, HEADS, QUERIES, KEYS)), indexing="ij")
    names = {"b": b, "h": h, "q_idx": q_idx, "kv_idx": kv_idx, "h_kv": h // 2}
    names |= {"seqlen_q": QUERIES, "seqlen_k": KEYS}
    seen = torch.as_tensor(evaluate(kernel.spec.mask_expr, names, declared)).expand(b.shape)
    return ~seen.any(2).view(BATCH, HEADS_KV, -1, KEYS).any(2).transpose(1, 2)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    q = torch.randn(BATCH, QUERIES, HEADS, DIM, generator=random)
    k, v = torch.randn(2, BATCH, KEYS, HEADS_KV, DIM, generator=random)
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


@cache
def compiled(schedule: str, stages: int, mask: str, score: str = "score", **problem: str) -> attngen.Kernel:
    return attngen.compile(
        {
            "target": "simulator",
            "problem": {"head_dim": DIM, **problem},
            "mask": mask,
            "score": score,
            "tensors": {name: text for name, text in TENSORS.items() if f"{name}[" in mask},
            "tile": {"block_m": 8, "block_n": 8},
            "schedule": {"kind": schedule, "stages": stages},
        }
    )


@pytest.mark.matrix
@pytest.mark.parametrize("score", ["score", "softcap(score, 5.0)"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("schedule", "stages"), [("serial", 1), ("fa2", 1), ("fa2", 2), ("warp_specialized", 2), ("pingpong", 2)]
)
def test_hidden_keys_reach_nobody(schedule: str, stages: int, mask: str, score: str) -> None:
    """The bits are those of a clean call; of a softcap too, where warps vote on products before they are masked."""
    kernel, declared, (q, k, v) = compiled(schedule, stages, mask, score), passed(mask), inputs()
    hidden = hidden_keys(kernel, declared)
    assert hidden.any(2).any(1).all() and not hidden.all(1).any()
    expected = kernel(q, k, v, return_lse=True, **declared)
    assert expected[0].count_nonzero() > expected[0].numel() / 4
    for poison in POISONS:
        k[hidden], v[hidden] = poison, poison
        found = kernel(q, k, v, return_lse=True, **declared)
        assert all(map(torch.equal, found, expected)), poison


@pytest.mark.parametrize("schedule", ["fa2", "pingpong"])
def test_padded_sequences_have_hidden_keys_too(schedule: str) -> None:
    """Behind the end of a sequence, and hidden inside it."""
    kernel = compiled(schedule, 2, MASKS[0], keys="padded")
    declared, (q, k, v) = passed(MASKS[0]), inputs()
    ends = torch.tensor([[29], [17]], dtype=torch.int32)
    call = {**declared, "seqused_k": ends.flatten()}
    expected = kernel(q, k, v, **call)
    hidden = ~declared["pad"] | (torch.arange(KEYS) >= ends)
    k[hidden], v[hidden] = math.nan, math.nan
    assert torch.equal(kernel(q, k, v, **call), expected) and expected.any()


def test_what_queries_tell_apart_is_not_promised() -> None:
    """A key that a mask hides from a row of a tile that takes it in: its V makes that row's NaN, as the page says."""
    kernel, (q, k, v) = compiled("fa2", 2, "causal"), inputs()
    v[:, -1] = math.nan
    assert kernel(q, k, v)[:, -2].isnan().all()


@pytest.mark.parametrize("schedule", ["fa2", "pingpong"])
@pytest.mark.parametrize("mask", ["full", "causal", "kv_idx % 3 != q_idx % 2", "prefix(4)"])
def test_other_masks_have_no_step_for_it(schedule: str, mask: str) -> None:
    """What depends on both, or on the query alone."""
    assert shown_keys(compiled(schedule, 2, mask).spec.mask_expr) is None
    assert not any(
        isinstance(step, ZeroHidden) for step in walk(compiled(schedule, 2, mask).plan.worker.program)
    )


# ---- every Step is needed -------------------------------------------------------------------------------------------
CASES = [
    ("serial", 1, "kv_idx % 3 != 0"),
    ("fa2", 1, MASKS[0]),
    ("fa2", 2, MASKS[1]),
    ("warp_specialized", 2, MASKS[0]),
    ("pingpong", 2, MASKS[1]),
    ("pingpong", 2, "kv_idx % 3 != 0"),
]
"""Of masks in closed form one that asks nothing of keys but an end; a beginning alone is met on the left edge alone."""
BESIDE = (WaitFull, SyncThreads, FenceAsync, SyncWarpgroup)


def without_one(program: Program) -> Iterator[tuple[Step, Program]]:
    """A program without one of the Steps that are there for hidden keys, for each of them, and that Step.

    These write zeros, and are those around that wait, fence or let threads meet.
    """
    of_zeros = {i for i, step in enumerate(program) if isinstance(step, ZeroHidden)}
    for i, step in enumerate(program):
        is_before = i + 1 in of_zeros and isinstance(step, WaitFull)
        behind = {i - 1, i - 2} & of_zeros and all(
            isinstance(each, BESIDE) for each in program[max(of_zeros) + 1 : i]
        )
        if i in of_zeros or is_before or (behind and isinstance(step, BESIDE)):
            yield step, program[:i] + program[i + 1 :]
        for left_out, body in without_one(body_of(step)):
            yield left_out, (*program[:i], replace(step, body=body), *program[i + 1 :])  # type: ignore[call-arg]


@pytest.mark.parametrize(("schedule", "stages", "mask"), CASES)
def test_every_step_for_hidden_keys_is_needed(schedule: str, stages: int, mask: str) -> None:
    """Without one of them a kernel faults, or a NaN of a hidden key comes out."""
    kernel, declared, (q, k, v) = compiled(schedule, stages, mask), passed(mask), inputs()
    hidden = hidden_keys(kernel, declared)
    k[hidden], v[hidden] = math.nan, math.nan
    expected = kernel(q, k, v, **declared)
    left_out = []
    for step, program in without_one(kernel.plan.worker.program):
        left_out.append(type(step))
        worker = replace(kernel.plan.worker, program=program)
        plan = replace(kernel.plan, roles=(worker, *kernel.plan.roles[1:]))
        try:
            found, _ = simulate(plan, q, k, v, declared=declared)
        except SimulationFault:
            continue
        turns_order_them = schedule == "pingpong" and isinstance(step, SyncWarpgroup)
        assert torch.equal(found, expected) == turns_order_them, step
    wanted = {"serial": {ZeroHidden}, "fa2": {ZeroHidden, SyncThreads}}
    assert set(left_out) == wanted.get(schedule, {ZeroHidden, WaitFull, FenceAsync, SyncWarpgroup})
