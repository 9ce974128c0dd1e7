"""Keys that a mask hides from every query may hold anything: their K and V reach neither out nor lse."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch

import attngen
from attngen.expr import shown_keys
from attngen.plan import walk
from attngen.plan.steps import FenceAsync, SyncThreads, SyncWarpgroup, WaitFull, ZeroHidden
from attngen.simulate import SimulationFault, simulate
from tests.hidden_keys import POISONS, declared_by, hidden_keys, inputs, passed, without_one

MASKS = (
    "causal and pad[b, kv_idx]",
    "kv_idx < lens[b]",
    "window(10, 4) and kv_idx < lens[b] + 2 * h",
    "kv_idx % 3 != 0",
    "sinks(11)",
    "causal and kv_idx >= lens[b] - 5 * h_kv",
    "keep[h, kv_idx]",
)
QUERIES, KEYS, DIM = 19, 29, 16


@cache
def compiled(schedule: str, stages: int, mask: str, score: str = "score", **problem: str) -> attngen.Kernel:
    return attngen.compile(
        {
            "target": "simulator",
            "problem": {"head_dim": DIM, **problem},
            "mask": mask,
            "score": score,
            "tensors": declared_by(mask),
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
    kernel, declared, (q, k, v) = (
        compiled(schedule, stages, mask, score),
        passed(mask, KEYS),
        inputs(QUERIES, KEYS, DIM),
    )
    hidden = hidden_keys(kernel.spec.mask_expr, declared, QUERIES, KEYS)
    assert hidden.any(1).any() and not hidden.all(1).any()
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
    declared, (q, k, v) = passed(MASKS[0], KEYS), inputs(QUERIES, KEYS, DIM)
    ends = torch.tensor([[29], [17]], dtype=torch.int32)
    call = {**declared, "seqused_k": ends.flatten()}
    expected = kernel(q, k, v, **call)
    hidden = ~declared["pad"] | (torch.arange(KEYS) >= ends)
    k[hidden], v[hidden] = math.nan, math.nan
    assert torch.equal(kernel(q, k, v, **call), expected) and expected.any()


def test_what_queries_tell_apart_is_not_promised() -> None:
    """A key that a mask hides from some rows of a tile: its V makes theirs NaN too, as the page says."""
    kernel, (q, k, v) = compiled("fa2", 2, "causal"), inputs(QUERIES, KEYS, DIM)
    v[:, -1] = math.nan
    assert kernel(q, k, v)[:, -2].isnan().all()


@pytest.mark.parametrize("schedule", ["fa2", "pingpong"])
@pytest.mark.parametrize("mask", ["full", "causal", "kv_idx % 3 != q_idx % 2", "prefix(4)"])
def test_other_masks_have_no_step_for_it(schedule: str, mask: str) -> None:
    """What depends on both, or on the query alone."""
    kernel = compiled(schedule, 2, mask)
    assert shown_keys(kernel.spec.mask_expr) is None
    assert not any(isinstance(step, ZeroHidden) for step in walk(kernel.plan.worker.program))


CASES = [
    ("serial", 1, "kv_idx % 3 != 0"),
    ("fa2", 1, MASKS[0]),
    ("fa2", 2, MASKS[1]),
    ("warp_specialized", 2, MASKS[0]),
    ("pingpong", 2, MASKS[1]),
    ("pingpong", 2, "kv_idx % 3 != 0"),
]
"""Of masks in closed form one that asks nothing of keys but an end; a beginning alone is met on the left edge alone."""


@pytest.mark.parametrize(("schedule", "stages", "mask"), CASES)
def test_every_step_for_hidden_keys_is_needed(schedule: str, stages: int, mask: str) -> None:
    """Without one of them a kernel faults, or a NaN of a hidden key comes out."""
    kernel, declared, (q, k, v) = (
        compiled(schedule, stages, mask),
        passed(mask, KEYS),
        inputs(QUERIES, KEYS, DIM),
    )
    hidden = hidden_keys(kernel.spec.mask_expr, declared, QUERIES, KEYS)
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
