"""Every rule of the simulator is broken by a short program, and kept by the same program mended."""

from typing import Any

import pytest
import torch
from small_plans import call_of, places, plan_of

from attngen.errors import InternalError
from attngen.plan import STEPS, BlockIndex, Program, Range, Step
from attngen.plan.steps import (
    Clear,
    CommitCopies,
    FinishRows,
    ForBlocks,
    ForTiles,
    Gemm,
    LoadRegisters,
    LoadTile,
    NegateTile,
    ReduceRows,
    ScaleRows,
    StageTile,
    StoreRegisters,
    StoreTile,
    SyncThreads,
    WaitCopies,
    When,
)
from attngen.schedules import SCHEDULES
from attngen.simulate import STEPS_SIMULATED, SimulationFault, simulate

AT = places(stages=2)
SOFTMAX = AT.softmax
M, ZERO, ONE = BlockIndex("m_block"), BlockIndex("zero"), BlockIndex("zero", 1)
SYNC, COMMIT, WAIT = SyncThreads(), CommitCopies(), WaitCopies(0)
LOAD_Q = LoadTile(AT.q.at(), AT.q_in, M, pads=True)
LOAD_K = LoadTile(AT.k.at(AT.read_at), AT.k_in, ZERO, pads=False)
LOAD_K_1 = LoadTile(AT.k.at(AT.read_at), AT.k_in, ONE, pads=False)
LOAD_K_1_BOUNDED = LoadTile(AT.k.at(AT.read_at), AT.k_in, ONE, pads=True)
LOAD_K_LEFT = LoadTile(AT.k.at(AT.read_at), AT.k_in, BlockIndex("zero", -1), pads=True)
LOAD_V = LoadTile(AT.v.at(AT.read_at), AT.v_in, ZERO, pads=True)
LAND = (COMMIT, WAIT, SYNC)
SCORES = Gemm(AT.scores.acc_s, AT.q.at(), AT.k.at(AT.read_at), starts_at_zero=True)
CLEAR_O = Clear(AT.acc_o)
COPY_OUT, STORE_OUT = StageTile(AT.acc_o, AT.out.at()), StoreTile(AT.out.at(), AT.result, M)
END = (CLEAR_O, SYNC, COPY_OUT, SYNC, STORE_OUT)
FINISH = FinishRows(SOFTMAX.row_max, SOFTMAX.total, SOFTMAX.inv_sum, SOFTMAX.row_lse)
STATISTICS = (Clear(SOFTMAX.row_max), Clear(SOFTMAX.total))
SAVE, RESTORE = (
    StoreRegisters(SOFTMAX.row_max, AT.saved_max, M),
    LoadRegisters(SOFTMAX.alpha, AT.saved_max, M),
)
OVER_N = ForBlocks(Range("keys", ZERO, ONE, False, "any"), "n", (LOAD_Q, *LAND))
SEES = When("m sees n", (LOAD_Q, *LAND))

# name: (a program that breaks the rule, the Step to blame, the same program mended, the rule, the place)
CASES: dict[str, tuple[Program, type[Step] | None, Program, str, str]] = {
    "read under a copy": (
        (LOAD_Q, LOAD_K, COMMIT, SYNC, SCORES, WAIT),
        Gemm,
        (LOAD_Q, LOAD_K, COMMIT, WAIT, SYNC, SCORES),
        "race",
        "q",
    ),
    "read of a copy that was not committed in time": (
        (LOAD_Q, COMMIT, LOAD_K, WAIT, SYNC, SCORES, *LAND),
        Gemm,
        (LOAD_Q, COMMIT, LOAD_K, *LAND, SCORES),
        "race",
        "k[0]",
    ),
    "read of a group that the wait leaves out": (
        (LOAD_Q, COMMIT, LOAD_K, COMMIT, WaitCopies(1), SYNC, SCORES, WAIT),
        Gemm,
        (LOAD_Q, LOAD_K, COMMIT, COMMIT, WaitCopies(1), SYNC, SCORES, WAIT),
        "race",
        "k[0]",
    ),
    "read of what other threads copied": (
        (LOAD_Q, LOAD_K, COMMIT, WAIT, SCORES),
        Gemm,
        (LOAD_Q, LOAD_K, COMMIT, WAIT, SYNC, SCORES),
        "race",
        "q",
    ),
    "read of what other threads stored": (
        (CLEAR_O, COPY_OUT, STORE_OUT),
        StoreTile,
        (),
        "race",
        "out",
    ),
    "negation of what other threads copied": (
        (LOAD_Q, COMMIT, WAIT, NegateTile(AT.q.at())),
        NegateTile,
        (LOAD_Q, COMMIT, WAIT, SYNC, NegateTile(AT.q.at())),
        "race",
        "q",
    ),
    "read of what other threads negated": (
        (LOAD_Q, LOAD_K, *LAND, NegateTile(AT.q.at()), SCORES),
        Gemm,
        (LOAD_Q, LOAD_K, *LAND, NegateTile(AT.q.at()), SYNC, SCORES),
        "race",
        "q",
    ),
    "copy over what others may be reading": (
        (LOAD_Q, LOAD_K, *LAND, SCORES, LOAD_K, *LAND),
        LoadTile,
        (LOAD_Q, LOAD_K, *LAND, SCORES, SYNC, LOAD_K, *LAND),
        "race",
        "k[0]",
    ),
    "negation of what others may be reading": (
        (LOAD_Q, LOAD_K, *LAND, SCORES, NegateTile(AT.q.at())),
        NegateTile,
        (LOAD_Q, LOAD_K, *LAND, SCORES, SYNC, NegateTile(AT.q.at())),
        "race",
        "q",
    ),
    "two copies into one stage": (
        (LOAD_K, COMMIT, LOAD_K, *LAND),
        LoadTile,
        (LOAD_K, *LAND, LOAD_K, *LAND),
        "race",
        "k[0]",
    ),
    "store to bytes that others may be reading": (
        (LOAD_Q, LOAD_K, *LAND, SCORES, CLEAR_O, COPY_OUT),
        StageTile,
        (LOAD_Q, LOAD_K, *LAND, SCORES, CLEAR_O, SYNC, COPY_OUT),
        "race",
        "out",
    ),
    "store to bytes under a copy": (
        (LOAD_Q, COMMIT, CLEAR_O, SYNC, COPY_OUT, WAIT),
        StageTile,
        (LOAD_Q, COMMIT, CLEAR_O, WAIT, SYNC, COPY_OUT),
        "race",
        "out",
    ),
    "row values of another lane": (
        (*STATISTICS, SAVE, RESTORE),
        LoadRegisters,
        (*STATISTICS, SAVE, SYNC, RESTORE),
        "race",
        "saved_max",
    ),
    "buffer nobody filled": (
        (LOAD_Q, *LAND, SCORES),
        Gemm,
        (LOAD_Q, LOAD_K, *LAND, SCORES),
        "uninitialised read",
        "k[0]",
    ),
    "buffer whose bytes were given away": (
        (LOAD_Q, LOAD_K, *LAND, CLEAR_O, COPY_OUT, SYNC, SCORES),
        Gemm,
        (LOAD_Q, LOAD_K, *LAND, CLEAR_O, SCORES),
        "uninitialised read",
        "q",
    ),
    "register nobody wrote": (
        (ScaleRows(AT.acc_o, SOFTMAX.alpha),),
        ScaleRows,
        (CLEAR_O, Clear(SOFTMAX.alpha), ScaleRows(AT.acc_o, SOFTMAX.alpha)),
        "uninitialised read",
        "acc_o",
    ),
    "accumulator that a GEMM adds to": (
        (
            Clear(SOFTMAX.p),
            LOAD_V,
            *LAND,
            Gemm(AT.acc_o, SOFTMAX.p, AT.v.at(AT.read_at), starts_at_zero=False),
        ),
        Gemm,
        (
            CLEAR_O,
            Clear(SOFTMAX.p),
            LOAD_V,
            *LAND,
            Gemm(AT.acc_o, SOFTMAX.p, AT.v.at(AT.read_at), starts_at_zero=False),
        ),
        "uninitialised read",
        "acc_o",
    ),
    "workspace nobody wrote": (
        (LoadRegisters(AT.acc_o, AT.o_acc, M),),
        LoadRegisters,
        (CLEAR_O, StoreRegisters(AT.acc_o, AT.o_acc, M), LoadRegisters(AT.acc_o, AT.o_acc, M)),
        "uninitialised read",
        "o_acc",
    ),
    "rows past the end": (
        (LOAD_K_1, *LAND),
        LoadTile,
        (LOAD_K_1_BOUNDED, *LAND),
        "out of bounds",
        "k",
    ),
    "rows before the beginning": (
        (LOAD_K_LEFT, *LAND),
        LoadTile,
        (LOAD_K, *LAND),
        "out of bounds",
        "k",
    ),
    "copy nobody waits for": (
        (LOAD_K, COMMIT),
        None,
        (LOAD_K, COMMIT, WAIT),
        "never landed",
        "k[0]",
    ),
    "copy nobody commits": (
        (LOAD_K, WAIT),
        None,
        (LOAD_K, COMMIT, WAIT),
        "never landed",
        "k[0]",
    ),
    "one lane's part for the whole": (
        (
            Clear(SOFTMAX.row_max),
            Clear(SOFTMAX.row_sum),
            FinishRows(SOFTMAX.row_max, SOFTMAX.row_sum, SOFTMAX.inv_sum, SOFTMAX.row_lse),
        ),
        FinishRows,
        (
            Clear(SOFTMAX.row_max),
            Clear(SOFTMAX.row_sum),
            ReduceRows(SOFTMAX.total, SOFTMAX.row_sum),
            FINISH,
        ),
        "partial sum",
        "row_sum",
    ),
    "index of a loop that is not there": (
        (LoadTile(AT.k.at(AT.read_at), AT.k_in, BlockIndex("n"), pads=True), *LAND),
        LoadTile,
        (LOAD_K, *LAND),
        "undefined index",
        "n",
    ),
    "loop inside a loop of the same index": (
        (ForBlocks(OVER_N.range, "n", (OVER_N,)),),
        ForBlocks,
        (OVER_N,),
        "undefined index",
        "n",
    ),
    "condition on a loop that is not there": (
        (SEES,),
        When,
        (LOAD_Q, *LAND),
        "undefined index",
        "m",
    ),
}


def run(program: Program, end: Program = END, **launched: Any) -> None:
    """Simulate a program on 4 queries and 6 keys: the second block of 4 keys is half beyond the end."""
    plan = plan_of(AT, (ForTiles((*program, *end)),))
    simulate(
        call_of(plan, **launched), torch.ones(1, 4, 1, 2), torch.ones(1, 6, 1, 2), torch.ones(1, 6, 1, 2)
    )


@pytest.mark.parametrize("name", CASES)
def test_fault_is_reported(name: str) -> None:
    """A program that breaks one rule faults, naming the Step and the place; mended it runs through."""
    program, step, mended, rule, place = CASES[name]
    with pytest.raises(SimulationFault) as caught:
        run(program)
    fault = caught.value
    assert (fault.rule, fault.place) == (rule, place)
    assert fault.step is None if step is None else type(fault.step) is step
    run(mended)


def test_message_names_everything() -> None:
    """A fault's text has rule, step with its line, buffer, tile and the indices of the loops around it."""
    at, n = AT, BlockIndex("n")
    load = LoadTile(at.k.at(at.read_at), at.k_in, n, pads=True)
    loop = ForBlocks(
        Range("keys", ZERO, BlockIndex("n_end"), True, "any"), "n", (LOAD_Q, load, *LAND, SCORES)
    )
    with pytest.raises(SimulationFault) as caught:
        run((loop,))
    for part in ("race", "LoadTile", "q", str(LOAD_Q), "m_block 0, head 0, batch 0", "n = 0"):
        assert part in str(caught.value)
    assert isinstance(caught.value, InternalError)


def test_deadlock_says_who_waits_for_what() -> None:
    """A role that waits at a SyncThreads to which the other never comes is a deadlock, told by name."""
    plan = plan_of(AT, (ForTiles((*END, SYNC)),), (ForTiles((SYNC, SYNC)),))
    with pytest.raises(SimulationFault, match=r"role 0 waits for all roles at SyncThreads, 1 of 2") as caught:
        simulate(plan, *(torch.ones(1, 4, 1, 2),) * 3)
    assert caught.value.rule == "deadlock"


def test_roles_meet_at_sync_threads() -> None:
    """Two roles that share a buffer run through when SyncThreads orders them, and race when it does not."""
    loads = ForTiles((LOAD_Q, LOAD_K, COMMIT, WAIT, SYNC, *END))
    good = ForTiles((SYNC, SCORES, SYNC, SYNC))
    bad = ForTiles((SCORES, SYNC, SYNC, SYNC))
    ones = (torch.ones(1, 4, 1, 2),) * 3
    simulate(plan_of(AT, (loads,), (good,)), *ones)
    with pytest.raises(SimulationFault, match="role 1|q"):
        simulate(plan_of(AT, (loads,), (bad,)), *ones)


def test_grid_must_match_the_tiles() -> None:
    """A launch on more or fewer blocks than there are tiles is a fault."""
    with pytest.raises(SimulationFault, match="launched on 2 blocks for 1 tiles and has 1"):
        run((), grid=2)


@pytest.mark.parametrize(
    "end",
    [(), (CLEAR_O, COPY_OUT, SYNC), (*END, SYNC, STORE_OUT)],
    ids=["empty", "not stored", "stored twice"],
)
def test_output_is_written_once(end: Program) -> None:
    """An output block that nobody writes, or that is written twice, is a fault."""
    with pytest.raises(SimulationFault) as caught:
        run((), end=end)
    assert (caught.value.rule, caught.value.place) == ("never written", "out")


def test_asked_for_lse_is_written() -> None:
    """An lse that the user asked for and no Step stores is a fault; not asked for it is none."""
    plan = plan_of(AT, (ForTiles(END),))
    ones = (torch.ones(1, 4, 1, 2),) * 3
    simulate(plan, *ones)
    with pytest.raises(SimulationFault, match="lse"):
        simulate(plan, *ones, return_lse=True)


def test_override_of_a_step() -> None:
    """`steps` replaces what a Step does: where ScaleRows does nothing, two blocks of keys come out wrong."""
    plan = plan_of(AT, SCHEDULES["fa2"](AT))
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 8, 1, 2) * 3 for _ in range(3))
    expected, _ = simulate(plan, q, k, v)
    found, _ = simulate(plan, q, k, v, steps={ScaleRows: lambda step, role: None})
    assert (expected - found).abs().max() > 0.1


def test_every_step_has_its_function() -> None:
    """Each kind of Step is simulated by the function of its name, and there is no other."""
    assert set(STEPS_SIMULATED) == set(STEPS)
    for step, function in STEPS_SIMULATED.items():
        assert function.__name__.replace("_", "") == step.__name__.lower()
