"""Sums of dQ that blocks of keys add to in one order: the same bits however blocks run, and no Step of it is spare."""

import random
from dataclasses import replace

import pytest
import torch

import attngen
from attngen.bind import bind
from attngen.check.inputs import Shape
from attngen.cli.gradient_facts import gradient_facts
from attngen.plan import PrepareRows, QueryRanks, in_f32
from attngen.plan.steps import PassRank, TakeRank, WaitAdded
from attngen.runtime import disassemble
from attngen.simulate import RoleRun, SimulationFault, launches
from attngen.simulate.blocks import Block
from attngen.simulate.launches import run_call
from attngen.spec_call import GRADIENTS
from tests.emit.sass import done_before_waiting
from tests.gradients.backward_cases import BackwardCase, given_backward, run_given
from tests.gradients.sheets_on_cpu import run_on_cpu
from tests.gradients.test_backward_programs import plans_without_one

CASE = BackwardCase("window(150, 70)", lengths=(300, 330), heads=(4, 2), head_dim=(64, 64), batch=1)
"""Blocks of keys share blocks of queries with neighbours on either side."""
ADDS = (TakeRank, WaitAdded, PassRank)


def ordered(case: BackwardCase) -> attngen.Kernel:
    """The kernel of a case, whose blocks wait for their ranks."""
    kernel = case.kernel("sm_90a")
    assert [bool(plan.query_ranks) for plan in kernel.call.gradients] == [True]
    return kernel


@pytest.mark.matrix
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("mask", ["full", "causal", "window(100, 30)", "causal and q_idx > 40"])
@pytest.mark.parametrize("lengths", [(1, 64), (64, 1), (128, 128), (70, 330), (330, 70), (300, 330)], ids=str)
def test_the_same_bits_on_any_number_of_multiprocessors(
    lengths: tuple[int, int], mask: str, head_dim: int
) -> None:
    """With one block at a time, two or three, every block comes to its rank, and gradients are within the rule."""
    case = replace(CASE, mask=mask, lengths=lengths, head_dim=(head_dim, head_dim))
    kernel = ordered(case)
    given = given_backward(case, kernel)
    made = [run_call(kernel.call, bind(kernel.call.manifest, given, GRADIENTS, n)) for n in (1, 2, 3)]
    for each in made[1:]:
        assert all(torch.equal(each[name], made[0][name]) for name in GRADIENTS)
    drawn, declared = case.inputs_on("cpu")
    got = tuple(made[0][name] for name in GRADIENTS)
    out, lse = kernel(*drawn[:3], return_lse=True)
    verdict = case.verdict(got, drawn, declared, out=out, lse=lse)
    assert verdict.ok, verdict.failures


@pytest.mark.parametrize("num_sms", [1, 2, 3])
def test_another_order_of_tiles_never_ends(num_sms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose smaller numbers have not started waits for ever where no other block fits: a deadlock, and told."""
    case = replace(CASE, lengths=(300, 900), mask="full")
    kernel = ordered(case)
    given = given_backward(case, kernel)
    own = launches.tiles
    monkeypatch.setattr(launches, "tiles", lambda *of: reversed(list(own(*of))))
    with pytest.raises(SimulationFault, match="deadlock: .*dq_ranks"):
        run_call(kernel.call, bind(kernel.call.manifest, given, GRADIENTS, num_sms))


@pytest.mark.parametrize("seed", range(4))
def test_the_same_bits_in_any_interleaving(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that stand still for any time, at any place, change nothing; without ranks they would."""
    case = replace(CASE, mask="full", lengths=(300, 700), heads=(2, 1))
    kernel = ordered(case)
    given = given_backward(case, kernel)
    bound = bind(kernel.call.manifest, given, tuple(map(in_f32, GRADIENTS)), 4)
    first = run_call(kernel.call, bound)
    draw, goes_on = random.Random(seed), Block.go_on
    monkeypatch.setattr(Block, "go_on", lambda block: draw.random() < 0.7 or goes_on(block))
    made = run_call(kernel.call, bound)
    assert all(torch.equal(made[name], x) for name, x in first.items())

    def pass_over(step: TakeRank, role: RoleRun) -> None:
        role.rank = (step.ranks.name, role.index(step.block))

    made = run_call(kernel.call, bound, steps={TakeRank: pass_over})
    assert not torch.equal(made["dq_f32"], first["dq_f32"])


def test_every_step_of_the_order_is_needed() -> None:
    """Without any one of them the simulator faults."""
    kernel = ordered(CASE)
    given, (plan,) = given_backward(CASE, kernel), kernel.call.gradients
    words = {str(step).split("[")[0] for step in _steps_of_order(plan)}
    missing_ones = [
        (missing, shorter)
        for missing, shorter in plans_without_one(plan)
        if any(missing.split(": ")[-1].startswith(word) or f" {word}" in missing for word in words)
    ]
    assert len(missing_ones) == len(ADDS)
    for _missing, shorter in missing_ones:
        kernels = tuple(shorter if each is plan else each for each in kernel.call.kernels)
        with pytest.raises(SimulationFault):
            run_given(replace(kernel.call, kernels=kernels), given, GRADIENTS)


def _steps_of_order(plan: attngen.plan.KernelPlan) -> list[attngen.plan.Step]:
    return [
        step
        for role in plan.roles
        for step in attngen.plan.steps.walk(role.program)
        if isinstance(step, ADDS)
    ]


@pytest.mark.matrix
@pytest.mark.parametrize("inputs", ["bf16", "f16"])
@pytest.mark.parametrize("mask", ["full", "causal", "window(100, 30)"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_kernels_compile_without_spills(head_dim: int, mask: str, inputs: str, nvdisasm: None) -> None:
    """Products stay in flight; a block waits for nothing but a count before it adds, and releases the next."""
    kernel = ordered(BackwardCase(mask, head_dim=(head_dim, head_dim), inputs=inputs))
    (plan,) = kernel.call.gradients
    compiled = kernel.modules[plan.module].compiled
    assert all(used.spill_stores == used.spill_loads == 0 for used in compiled.resources)
    assert "C75" not in str(compiled.warnings)
    sass = disassemble(compiled.cubin)
    assert done_before_waiting(sass) == []
    counts = [sass.count(each) for each in ("ATOMG.E.INC", "UBLKRED", "REDG.E.ADD.STRONG.GPU")]
    assert counts == [1, 1, 1]
    assert sass.index("LDG.E.STRONG.GPU") < sass.index("UBLKRED") < sass.index("REDG.E.ADD.STRONG.GPU")


@pytest.mark.parametrize(
    ("mask", "is_known"),
    [
        ("full", True),
        ("q_idx >= 2 * kv_idx", True),
        ("q_idx + kv_idx >= 90", False),
        ("q_idx >= kv_idx // 3", False),
    ],
)
def test_masks_whose_ranks_have_a_closed_form(mask: str, is_known: bool) -> None:
    """Where rows of later keys begin earlier nothing says who comes before; the split kernels are taken."""
    kernel = BackwardCase(mask, head_dim=(64, 64)).kernel("sm_90a")
    assert any(plan.query_ranks for plan in kernel.call.gradients) == is_known


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_text_that_prepares_rows_clears_all_ranks(head_dim: int) -> None:
    """By g++: every count of every head is 0, and nothing beside them is written."""
    (sheet,) = (
        each
        for each in ordered(BackwardCase(head_dim=(head_dim, head_dim))).call.kernels
        if isinstance(each, PrepareRows)
    )
    batch, heads, seqlen, padded = 2, 3, 150, 256
    x = torch.ones(batch, seqlen, heads, head_dim, dtype=torch.bfloat16)
    values = {"out": x, "dout": x, "lse": torch.zeros(batch, heads, seqlen)}
    values |= {each: torch.empty(batch, heads, padded) for each in sheet.writes}
    sums, ranks = sheet.cleared
    assert isinstance(ranks, QueryRanks)
    counts = batch * heads * padded // ranks.block_m * ranks.owners
    memory = torch.full((counts + 64,), 7, dtype=torch.int32)
    values |= {sums.name: torch.empty(batch, heads, padded, head_dim), ranks.name: memory}
    run_on_cpu(sheet, values, {"batch": batch, "seqlen_q": seqlen, "num_heads_q": heads})
    assert not memory[:counts].any() and (memory[counts:] == 7).all()


@pytest.mark.parametrize("wanted", GRADIENTS)
def test_one_gradient_alone(wanted: str) -> None:
    """Where dQ is not wanted blocks add to it in turn all the same."""
    kernel = ordered(CASE)
    given = given_backward(CASE, kernel)
    whole = dict(zip(GRADIENTS, run_given(kernel.call, given, GRADIENTS), strict=True))
    (alone,) = run_given(kernel.call, given, (wanted,))
    assert torch.equal(alone, whole[wanted])


def test_explain_says_the_order() -> None:
    """Which order additions have, and, where that is not worth it, why another kernel has dQ."""
    shape = Shape(batch=1, heads=2, heads_kv=1, seqlen_q=300, seqlen_k=300)
    lines = gradient_facts(ordered(CASE), False, shape, {})
    assert "add to dQ in one order" in lines["order of sums"]
    kernel = replace(CASE, head_dim=(96, 96)).kernel("sm_90a")
    lines = gradient_facts(kernel, False, shape, {})
    assert "one owner" in lines["order of sums"] and "take longer" in lines["order of sums"]
