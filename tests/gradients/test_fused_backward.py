"""The kernel that adds dQ up beside dK and dV: values, who waits for whom, and what is taken when."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import attngen
from attngen.bind import bind
from attngen.lower import fused_gradients
from attngen.lower.features import Features
from attngen.lower.fused_gradients import why_split
from attngen.plan import BlockIndex, FinishSums, PrepareRows, Step
from attngen.plan.steps import AddSums, FenceAsync, StageSums, StageTransposed, WaitEmpty, WaitFull
from attngen.runtime import disassemble
from attngen.simulate import STEPS_SIMULATED, RoleRun, SimulationFault, launches
from attngen.simulate.launches import run_call
from attngen.simulate.visits import Sizes, decoded
from attngen.spec_call import GRADIENTS
from tests.emit.sass import done_before_waiting
from tests.gradients.backward_cases import BackwardCase, given_backward, run_backward, run_given
from tests.gradients.test_backward_programs import plans_without_one

FREE: dict[str, Any] = {"deterministic": False}
LENGTHS = (
    *((length, length) for length in (1, 64, 113, 128, 203, 256)),
    *((113, 203), (256, 512), (512, 256)),
)
CASE = BackwardCase(
    "window(150, 70)", lengths=(300, 330), heads=(4, 2), head_dim=(64, 64), batch=1, spec=FREE
)
"""Blocks of keys are seen by more blocks of queries than there are stages; some pairs are masked and some are not."""


def fused(case: BackwardCase) -> attngen.Kernel:
    """The kernel of a case, whose backward pass is one kernel of programs."""
    kernel = case.kernel("sm_90a")
    assert [plan.schedule for plan in kernel.call.gradients] == ["fused_gradients"]
    return kernel


def assert_compiles(kernel: attngen.Kernel) -> None:
    """Nothing spills, products stay in flight, and nothing is touched before a kernel has waited."""
    beside = [each for each in kernel.call.kernels if isinstance(each, FinishSums | PrepareRows)]
    for each in (*kernel.call.gradients, *beside):
        compiled = kernel.modules[each.module].compiled
        assert all(used.spill_stores == used.spill_loads == 0 for used in compiled.resources), each.name
        assert "C75" not in str(compiled.warnings), each.name
        assert done_before_waiting(disassemble(compiled.cubin)) == []


def assert_right(case: BackwardCase) -> None:
    """Gradients are within the rule."""
    kernel = fused(case)
    drawn, declared = case.inputs_on("cpu")
    q, k, v, dout = drawn
    out, lse = kernel(q, k, v, case.scale, return_lse=True, **declared)
    got = kernel.backward(dout, q, k, v, out, lse, softmax_scale=case.scale, **declared)
    verdict = case.verdict(got, drawn, declared, out=out, lse=lse)
    assert verdict.ok, verdict.failures


@pytest.mark.matrix
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("mask", ["full", "causal", "window(100, 30)"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_gradients_are_within_the_rule(lengths: tuple[int, int], mask: str, head_dim: int) -> None:
    """Of lengths beside the edges of tiles, and of rows without keys, against fp64; two heads share one of keys."""
    assert_right(BackwardCase(mask, lengths=lengths, head_dim=(head_dim, head_dim), spec=FREE))


@pytest.mark.parametrize(
    "case",
    [
        replace(CASE, heads=(6, 2), inputs="f16"),
        replace(CASE, mask="causal", heads=(8, 1), batch=3),
        replace(CASE, mask="window(20 * (h + 1), 0)", heads=(4, 1)),
        replace(CASE, mask="causal and q_idx > 40"),
        replace(CASE, mask="false"),
        replace(CASE, scale=-0.3),
        replace(CASE, score="score * 0.5"),
        replace(CASE, score="softcap(score, 3.0)", head_dim=(128, 128)),
        replace(CASE, mask="causal", score="softcap(score, 3.0)", head_dim=(128, 128), lengths=(113, 203)),
        replace(CASE, score="score + alibi(slopes)", head_dim=(128, 128)),
    ],
    ids=str,
)
def test_groups_masks_and_scales(case: BackwardCase) -> None:
    """Heads of a group that see different queries, or none, a scale of either sign, f16."""
    assert_right(case)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)])
def test_no_pair_has_no_gradient(lengths: tuple[int, int], mask: str) -> None:
    """Without queries or without keys the gradients are zeros, written."""
    case = replace(CASE, mask=mask, lengths=lengths)
    kernel = fused(case)
    (q, k, v, dout), _ = case.inputs_on("cpu")
    out, lse = kernel(q, k, v, return_lse=True)
    for x, like in zip(kernel.backward(dout, q, k, v, out, lse), (q, k, v), strict=True):
        assert x.shape == like.shape and not x.any()


@pytest.mark.parametrize("num_sms", [1, 2, 3])
@pytest.mark.parametrize("backwards", [False, True])
def test_any_order_of_blocks_will_do(num_sms: int, backwards: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever block adds first, dQ is what it was but for the order of sums of f32, dK and dV to the bit."""
    kernel = fused(CASE)
    given = given_backward(CASE, kernel)
    first = run_given(kernel.call, given, GRADIENTS)
    own = launches.tiles
    if backwards:
        monkeypatch.setattr(launches, "tiles", lambda *of: reversed(list(own(*of))))
    made = run_call(kernel.call, bind(kernel.call.manifest, given, GRADIENTS, num_sms))
    dq, dk, dv = first
    assert torch.equal(made["dk"], dk) and torch.equal(made["dv"], dv)
    torch.testing.assert_close(made["dq"], dq, rtol=2.0**-7, atol=1e-4)
    assert torch.equal(made["dq"], dq) or backwards


@pytest.mark.parametrize("wanted", ["dq", "dk", "dv"])
def test_one_gradient_alone(wanted: str) -> None:
    """What one gradient needs is launched, and no sums are made where nobody wants dQ."""
    kernel = fused(CASE)
    given = given_backward(CASE, kernel)
    whole = dict(zip(GRADIENTS, run_given(kernel.call, given, GRADIENTS), strict=True))
    (alone,) = run_given(kernel.call, given, (wanted,))
    assert torch.equal(alone, whole[wanted])
    bound = bind(kernel.call.manifest, given, (wanted,), 2)
    finishes = [launch.kernel for launch in bound.launches if launch.kernel.endswith("_finish")]
    assert len(finishes) == (wanted == "dq")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_are_added_to_memory_that_is_given(dtype: torch.dtype) -> None:
    """In the inputs' type and in f32, of which the latter keeps what the former rounds away."""
    kernel = fused(CASE)
    (q, k, v, dout), _ = CASE.inputs_on("cpu")
    out, lse = kernel(q, k, v, return_lse=True)
    whole = [torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)]
    kernel.backward(dout, q, k, v, out, lse, grads=whole)
    held = [torch.ones_like(x, dtype=dtype) for x in (q, k, v)]
    kernel.backward(dout, q, k, v, out, lse, grads=held, accumulate=True)
    for x, y in zip(held, whole, strict=True):
        assert torch.equal(x, (1.0 + y).to(dtype))


@pytest.mark.parametrize(
    ("batch", "heads", "heads_kv", "seqlen"),
    [(16, 16, 16, 1024), (3, 6, 2, 4096), (1, 5, 1, 60000), (2, 40, 40, 1)],
)
def test_heads_are_side_by_side_where_their_rows_fit_the_cache(
    batch: int, heads: int, heads_kv: int, seqlen: int
) -> None:
    """Each block of keys of each head has one tile; in a section of heads those that most queries see come first."""
    plan = fused(BackwardCase("causal", head_dim=(128, 128), spec=FREE)).call.gradients[0]
    found = [
        (member.batch * heads_kv + member.head_kv, block)
        for block, member in decoded(plan, Sizes(batch, seqlen, seqlen, heads, heads_kv))
    ]
    blocks, group = -(-seqlen // plan.block_n), heads // heads_kv
    side = min(16, max(1, plan.scheduler.rows_at_hand // (seqlen + 1) // group))
    expected = [
        (head, block)
        for first in range(0, batch * heads_kv, side)
        for block in range(blocks)
        for head in range(first, min(first + side, batch * heads_kv))
    ]
    assert found == expected


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("more", "score"),
    [
        ({"sink": "per_head", "gradients": ["q", "k", "v", "sink"]}, "score"),
        (
            {"tensors": {"slopes": "f32[num_heads_q]"}, "gradients": ["q", "k", "v", "slopes"]},
            "score + alibi(slopes)",
        ),
    ],
)
def test_what_is_declared_has_its_gradient_besides(
    more: dict[str, Any], score: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By kernels of its own, which know nothing of those of inputs: the bits that they make beside split kernels."""
    case = BackwardCase("causal", score, (150, 150), (4, 2), (128, 128))
    (q, k, v, dout), declared = case.inputs_on("cpu")
    declared |= {"sink": torch.randn(4)} if "sink" in more else {}
    made = []
    for tiles in ({}, fused_gradients.TILES):
        monkeypatch.setattr(fused_gradients, "TILES", tiles)
        spec = {**more, "deterministic": deterministic, "name": f"tiles{len(tiles)}"}
        kernel = replace(case, spec=spec).kernel("sm_90a")
        assert any(each.name.endswith("fused_gradients") for each in kernel.call.kernels) == bool(tiles)
        out, lse = kernel(q, k, v, return_lse=True, **declared)
        made.append(kernel.backward(dout, q, k, v, out, lse, **declared))
    (dq, *split), (fused_dq, *found) = made
    assert all(torch.equal(x, y) for x, y in zip(split, found, strict=True)) and len(found) == 3
    torch.testing.assert_close(fused_dq, dq, rtol=2.0**-7, atol=1e-4)


@pytest.mark.matrix(most=2)
@pytest.mark.parametrize("mask", ["full", "causal", "window(100, 30)"])
@pytest.mark.parametrize(
    ("score", "deterministic"),
    [
        ("score", False),
        ("score + alibi(slopes)", False),
        ("softcap(score, 3.0)", False),
        ("softcap(score, 3.0)", True),
    ],
)
@pytest.mark.parametrize("lengths", [(300, 330), (64, 1)])
def test_heads_of_96_columns(
    lengths: tuple[int, int],
    score: str,
    mask: str,
    deterministic: bool,
    nvdisasm: None,
) -> None:
    """Their dQ is made in halves of 64, the second half of it zeros, of which nothing is written; nothing spills."""
    case = replace(
        CASE,
        mask=mask,
        score=score,
        lengths=lengths,
        head_dim=(96, 96),
        spec={"deterministic": deterministic},
    )
    assert_right(case)
    assert_compiles(fused(case))


# ---- the program ----------------------------------------------------------------------------------------------------
def test_every_step_is_needed() -> None:
    """Without any one of them the simulator faults, or another gradient comes out."""
    cases = [
        replace(CASE, mask="window(400, 300)", lengths=lengths, heads=(2, 1))
        for lengths in ((20, 300), (900, 900))
    ]
    kernel = fused(cases[0])
    given = [given_backward(case, kernel) for case in cases]
    (plan,) = kernel.call.gradients
    whole = [run_given(kernel.call, each, GRADIENTS) for each in given]
    spare = []
    for missing, shorter in plans_without_one(plan):
        kernels = tuple(shorter if each is plan else each for each in kernel.call.kernels)
        made = (run_given(replace(kernel.call, kernels=kernels), each, GRADIENTS) for each in given)
        try:
            if all(
                torch.equal(x, y)
                for xs, ys in zip(made, whole, strict=True)
                for x, y in zip(xs, ys, strict=True)
            ):
                spare.append(missing)
        except SimulationFault:
            continue
    assert spare == []


def test_sums_without_the_zeros_ahead_of_them_are_none() -> None:
    """The kernel that prepares rows clears the sums; without it dQ is what lay in memory."""
    kernel = fused(CASE)
    given = given_backward(CASE, kernel)
    kernels = tuple(
        replace(each, clears=None) if isinstance(each, PrepareRows) else each for each in kernel.call.kernels
    )
    (dq,) = run_given(replace(kernel.call, kernels=kernels), given, ("dq",))
    assert dq.isnan().all()


def times(count: int, kind: type[Step], chosen: Callable[[RoleRun], bool]) -> dict[type[Step], Callable]:
    """A simulator whose Steps of a kind are done so often, where a condition holds."""

    def run(step: Step, role: RoleRun) -> None:
        for _ in range(count if chosen(role) else 1):
            STEPS_SIMULATED[kind](step, role)

    return {kind: run}


def in_block(m: int) -> Callable[[RoleRun], bool]:
    """Whether a role works on a block of queries, of the first block of keys, as the first warpgroup."""
    return lambda role: (role.variables.get("m"), role.tile.n_block, role.warpgroup) == (m, 0, 0)


@pytest.mark.parametrize("count", [0, 2])
def test_what_is_added_counts_once(count: int) -> None:
    """Skipped or doubled, for one block: the fault says which."""
    message = (
        f"not once: rows of block 1 and keys of block 0, head ., batch 0 count {count} times, warpgroup 0"
    )
    with pytest.raises(SimulationFault, match=message):
        run_backward(CASE, fused(CASE), steps=times(count, AddSums, in_block(1)))


def test_a_product_is_added_to_the_queries_that_it_is_for() -> None:
    """A block beside is another's: told by where dS came from, whatever the values are."""

    def add(step: AddSums, role: RoleRun) -> None:
        STEPS_SIMULATED[AddSums](replace(step, block=BlockIndex("m", 1 if in_block(0)(role) else 0)), role)

    message = "not once: dq.* is for queries of block 0, .* and is added for queries of block 1"
    with pytest.raises(SimulationFault, match=message):
        run_backward(CASE, fused(CASE), steps={AddSums: add})


@pytest.mark.parametrize("warpgroup", [0, 1])
def test_a_stale_stage_of_ds_is_told(warpgroup: int) -> None:
    """Where an older dS stands in a part of a stage, the product is not for the queries at hand alone."""

    def is_second(role: RoleRun) -> bool:
        return (role.variables.get("m"), role.tile.n_block, role.warpgroup) == (1, 0, warpgroup)

    with pytest.raises(
        SimulationFault, match="not once: dq.* is for queries of .*added for queries of block 1"
    ):
        run_backward(CASE, fused(CASE), steps=times(0, StageTransposed, is_second))


def without(kind: type[Step], where: str) -> dict[type[Step], Callable]:
    """A simulator that passes over Steps of a kind whose line has some words in it."""

    def run(step: Step, role: RoleRun) -> Any:
        return None if where in f"{role.name}: {step}" else STEPS_SIMULATED[kind](step, role)

    return {kind: run}


@pytest.mark.parametrize(
    ("kind", "where", "rule"),
    [
        (FenceAsync, "consumer", "not fenced"),
        (FenceAsync, "adder", "not fenced"),
        (WaitFull, "until ds_reads", "race|not once"),
        (WaitFull, "until dq_reads", "race|uninitialised read|not once"),
        (WaitEmpty, "until ds_fills", "race"),
        (WaitEmpty, "until dq_fills", "race|not once"),
        (StageSums, "consumer 1", "uninitialised read|not once"),
    ],
)
def test_who_goes_ahead_is_found_out(kind: type[Step], where: str, rule: str) -> None:
    """Each wait and each fence of the exchange orders something; one fence by who reads is enough, and no less."""
    with pytest.raises(SimulationFault) as raised:
        run_backward(CASE, fused(CASE), steps=without(kind, where))
    assert re.fullmatch(rule, raised.value.rule), raised.value


# ---- what is taken --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"deterministic": True, "problem": {"head_dim": 96}}, "in one order take longer"),
        ({"deterministic": True, "mask": "q_idx + kv_idx > 100"}, "which keys add to dQ of a query earlier"),
        ({"problem": {"head_dim": 192}}, "head_dim 64, 96, 128"),
        ({"problem": {"head_dim": {"qk": 128, "v": 64}}}, "head_dim 64, 96, 128"),
        ({"mask": "kv_idx % 3 != q_idx % 2"}, "no range in closed form"),
        ({"score": "tanh(score) + sqrt(abs(score))"}, "the score is worked out in registers"),
        ({"score": "score * score"}, "the score is worked out in registers"),
        ({"problem": {"head_dim": 64}, "score": "softcap(score, 30.0)"}, "the score is worked out in registers"),
        ({"schedule": {"kind": "fa2"}}, "not for warpgroups"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_elsewhere_each_gradient_has_an_owner(changed: dict[str, Any], why: str) -> None:
    """The split kernels are taken, and why is said."""
    spec = {"problem": {"head_dim": 128}, "gradients": ["q", "k", "v"], **FREE, **changed}
    kernel = attngen.compile(spec, arch="sm_90a")
    assert not any(plan.query_sums for plan in kernel.call.gradients)
    features = Features.of(kernel.spec, kernel.call.arch)
    assert why in why_split(features, len(kernel.plan.roles) > 1)
