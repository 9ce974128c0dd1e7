"""The timeline of a backward pass: what its Steps are charged, and what a tile of a block of keys is made of."""

from typing import Any

import pytest

import attngen
from attngen.plan import KernelPlan
from attngen.plan.steps import RecoverP, ScaleGradient, ScoreGradient, walk
from attngen.simulate import COSTS, UNITS, Sizes, count, predict, tiles, timeline
from attngen.simulate.charges import CHARGES
from attngen.simulate.prediction import _pairs_of

H200 = COSTS["sm_90a"]
LENGTH = 512
WALKED = "kv_idx % 100 <= q_idx % 70"


def gradients(
    head_dim: int = 64, mask: str = "full", score: str = "score", kind: str = "fa2"
) -> dict[str, KernelPlan]:
    """The kernels of a backward pass that are programs, by their schedules."""
    spec: dict[str, Any] = {
        "target": "sm_90a",
        "problem": {"head_dim": head_dim},
        "mask": mask,
        "score": score,
        "gradients": ["q", "k", "v"],
        "schedule": {"kind": kind},
    }
    return {plan.schedule: plan for plan in attngen.compile(spec).call.gradients}


@pytest.mark.parametrize(("kind", "slots"), [("fa2", 1), ("fa2", 2), ("auto", 1)])
@pytest.mark.parametrize(("head_dim", "mask"), [(64, "causal"), (128, WALKED), (256, "causal")])
def test_a_unit_does_one_thing_at_a_time(head_dim: int, mask: str, kind: str, slots: int) -> None:
    """Each unit, and each role, is busy with one thing at a time, and every unit is used by every kernel."""
    for plan in gradients(head_dim, mask, kind=kind).values():
        found = timeline(plan, LENGTH, LENGTH, heads=2, heads_kv=1, slots=slots)
        for lane in (*UNITS, *found.roles):
            end = 0
            there = [each for each in found.intervals if (each.unit or each.role) == lane]
            for interval in sorted(there, key=lambda each: each.begin):
                assert interval.begin >= end and interval.end > interval.begin, interval
                end = interval.end
            assert there, lane


@pytest.mark.parametrize("name", ["query_gradients", "key_gradients"])
def test_units_are_busy_for_what_a_tile_asks(name: str) -> None:
    """The tensor core for the FLOPs that are counted, at mma.sync's rate; 16 exponentials a cycle, one a pair."""
    plan, heads = gradients()[name], 2 if name == "key_gradients" else 1
    found = timeline(plan, LENGTH, LENGTH, heads=heads, heads_kv=1)
    blocks = LENGTH // 64
    launch = 8 * (heads if name == "query_gradients" else 1)
    exact = count(plan, LENGTH, LENGTH, 1, heads, 1).flops / launch / (H200.flops_of_16_bit * H200.mma_share)
    gemms = blocks * heads * len({each.acc for each in found.intervals if each.acc})
    assert exact <= found.busy("tensor core") <= exact + gemms
    assert found.busy("exponential unit") == LENGTH * 64 * heads / H200.exponentials


def test_a_gemm_is_named_after_what_it_makes() -> None:
    """Of each pair of blocks S, dP and the owner's gradients have a GEMM, which stands in the loop's block."""
    for name, made in (("query_gradients", {"acc_dq"}), ("key_gradients", {"acc_dv", "acc_dk"})):
        found = timeline(gradients()[name], 256, 256)
        on_core = {(each.acc, each.block) for each in found.intervals if each.unit == "tensor core"}
        assert on_core == {(acc, block) for acc in {"acc_s", "acc_dp"} | made for block in range(4)}


@pytest.mark.parametrize(
    ("plain", "dear"),
    [
        ({}, {"score": "softcap(score, 30.0)"}),
        ({"score": "score * score"}, {"score": "softcap(score, 30.0)", "mask": WALKED}),
        ({}, {"mask": WALKED}),
    ],
)
def test_scores_slopes_and_masks_are_paid_for(plain: dict[str, str], dear: dict[str, str]) -> None:
    """Where P takes more instructions, the schedulers are busy for longer over as many pairs."""
    for name in ("query_gradients", "key_gradients"):
        less, more = (timeline(gradients(**kind)[name], 256, 256) for kind in (plain, dear))
        per_pair = [each.busy("arithmetic") / each.busy("exponential unit") for each in (less, more)]
        assert 1.2 * per_pair[0] < per_pair[1]


@pytest.mark.parametrize("head_dim", [64, 256])
def test_every_step_on_registers_is_charged(head_dim: int) -> None:
    """Nothing of a pass's arithmetic is free."""
    met = {type(step) for plan in gradients(head_dim).values() for step in walk(plan.worker.program)}
    assert {RecoverP, ScoreGradient, ScaleGradient} <= met & set(CHARGES)
    for kind in (RecoverP, ScoreGradient, ScaleGradient):
        assert H200.lane_slots[kind] > 0


@pytest.mark.parametrize("mask", ["full", "causal", "window(100, 30)", WALKED])
@pytest.mark.parametrize("lengths", [(512, 512), (200, 700), (700, 200)])
def test_both_kernels_meet_each_pair_once(mask: str, lengths: tuple[int, int]) -> None:
    """Tiles of a block of keys are made of as many pairs, over the heads of their group, as those of queries."""
    seqlen_q, seqlen_k = lengths
    sizes = Sizes(2, seqlen_q, seqlen_k, 4, 2)
    pairs = {}
    for name, plan in gradients(mask=mask).items():
        pairs_of = _pairs_of(plan, sizes)
        pairs[name] = sum(pairs_of(tile) * len(tile.members) for tile in tiles(plan, sizes))
    assert pairs["query_gradients"] == pairs["key_gradients"] > 0


@pytest.mark.parametrize("name", ["query_gradients", "key_gradients"])
def test_prediction_follows_the_work(name: str) -> None:
    """Twice the batch takes about twice the time, causal between half and the whole, and a group as its heads."""
    full, causal = gradients()[name], gradients(mask="causal")[name]
    once, twice = (predict(full, 1024, 1024, batch, 32) for batch in (8, 16))
    assert 1.8 < twice.cycles / once.cycles < 2.1
    assert 0.5 < predict(causal, 1024, 1024, 8, 32).cycles / once.cycles < 0.75
    grouped = predict(full, 1024, 1024, 16, 32, 4)
    assert 0.9 < grouped.cycles / twice.cycles < 1.1
    assert once.seconds == once.cycles / H200.clock_hz


def test_no_query_takes_no_time_but_that_of_zeros() -> None:
    """Without queries nobody owns dQ, and blocks of keys still write their zeros; without keys likewise."""
    kernels = gradients()
    assert predict(kernels["query_gradients"], 0, 128).seconds == 0
    for name, lengths in (("key_gradients", (0, 128)), ("query_gradients", (128, 0))):
        found = timeline(kernels[name], *lengths)
        assert found.busy("tensor core") == 0 and found.cycles > 0
