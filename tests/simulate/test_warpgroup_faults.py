"""Every rule between roles that run at once is broken by short programs, and kept by the same programs mended.

The programs are of the Steps in `warpgroup_steps`; one tile unless said otherwise.
"""

import re
from dataclasses import dataclass

import pytest
from warpgroup_steps import (
    ALL,
    AT,
    BOTH,
    CLEAR_O,
    CLEAR_P,
    CLEAR_S,
    CONVERT,
    DRAW,
    END,
    FENCE,
    FILL_K,
    FILLS,
    FIRST_TURN,
    FREE_K,
    FREE_Q,
    FREE_V,
    FULL_K,
    FULL_Q,
    FULL_V,
    LAND_ALL,
    LAND_O,
    LAND_S,
    LAST_FREES,
    LOAD_K,
    LOAD_Q,
    LOAD_V,
    MEET,
    NEGATE,
    OURS,
    PASS_TURN,
    SCORES,
    STAGE,
    STORE,
    STORED,
    TAKE,
    TAKE_TURN,
    USE_K,
    programs,
    run,
)

from attngen.plan import Program, Step
from attngen.plan.steps import (
    Advance,
    Clear,
    ConvertP,
    DrawTile,
    IssueGemm,
    NegateTile,
    PassTurn,
    Release,
    StageTile,
    TakeTile,
    TmaLoad,
    TmaStore,
    WaitEmpty,
    WaitFull,
    WaitGemm,
    When,
)
from attngen.simulate import SimulationFault


@dataclass(frozen=True)
class Case:
    """Programs that break a rule, and the same mended; all are bodies of ForTiles.

    Attributes:
        consumer, producer: as they break it; what END does is added to the consumer's.
        step: the Step to blame; None where it is a fault of a whole program.
        rule, place, text: of the fault.
        mended_consumer, mended_producer: the same where None.
        persistent: whether blocks draw their tiles.
        end: the consumer's, in both.
    """

    consumer: Program
    producer: Program
    step: type[Step] | None
    rule: str
    place: str
    text: str
    mended_consumer: Program | None = None
    mended_producer: Program | None = None
    persistent: bool = False
    end: Program = END


CASES: dict[str, Case] = {
    # ---- rings ----
    "stage read under its copy": Case(
        (FULL_Q, SCORES, LAND_S),
        (*LOAD_K, *LOAD_Q),
        IssueGemm,
        "race",
        "k[0]",
        "k[0] is read while a copy into it is in flight",
        mended_consumer=(FULL_Q, FULL_K, SCORES, LAND_S),
    ),
    "stage read before its copy": Case(
        (SCORES, LAND_S, FULL_Q, FULL_K),
        (*LOAD_Q, *LOAD_K),
        IssueGemm,
        "uninitialised read",
        "q",
        "q holds nothing",
        mended_consumer=(FULL_Q, FULL_K, SCORES, LAND_S),
    ),
    "copy that nobody waits for": Case(
        (FULL_Q,),
        (*LOAD_Q, *LOAD_K),
        None,
        "never landed",
        "k[0]",
        "the block ends with a copy into k[0] in flight",
        mended_consumer=(FULL_Q, FULL_K),
    ),
    "copy into a stage that is being filled": Case(
        (FULL_Q, *3 * USE_K),
        (*LOAD_Q, *2 * LOAD_K, FILL_K),
        TmaLoad,
        "race",
        "k[0]",
        "k[0] is written while a copy into it is in flight",
        mended_producer=(*LOAD_Q, *3 * LOAD_K),
    ),
    "copy into a stage that others may be reading": Case(
        (FULL_Q, FULL_V, MEET, *FREE_V, *3 * USE_K, FULL_V),
        (*LOAD_Q, *2 * LOAD_V, *2 * LOAD_K, WaitEmpty(FILLS.v), FILL_K),
        TmaLoad,
        "race",
        "k[0]",
        "a GEMM of consumer 0 read it, and nothing orders the two",
        mended_producer=(*LOAD_Q, *2 * LOAD_V, *2 * LOAD_K, WaitEmpty(FILLS.v), *LOAD_K),
    ),
    "stage released under the GEMM that reads it": Case(
        (FULL_Q, FULL_K, MEET, SCORES, *FREE_K, LAND_S, *2 * USE_K),
        (*LOAD_Q, *3 * LOAD_K),
        TmaLoad,
        "race",
        "k[0]",
        "a GEMM of consumer 0 read it, and nothing orders the two",
        mended_consumer=(FULL_Q, *3 * USE_K),
    ),
    "stage released twice by one": Case(
        (FULL_Q, FULL_K, SCORES, LAND_S, *2 * LAST_FREES, Advance(OURS.k), *2 * USE_K),
        (*LOAD_Q, *3 * LOAD_K),
        TmaLoad,
        "race",
        "k[0]",
        "a GEMM of consumer 0 read it, and nothing orders the two",
        mended_consumer=(FULL_Q, *3 * USE_K),
    ),
    "the same stage filled again for want of an Advance": Case(
        (FULL_Q, *2 * USE_K),
        (*LOAD_Q, WaitEmpty(FILLS.k), FILL_K, *LOAD_K),
        TmaLoad,
        "race",
        "k[0]",
        "k[0] is written while a copy into it is in flight",
        mended_producer=(*LOAD_Q, *2 * LOAD_K),
    ),
    # ---- GEMMs in flight ----
    "accumulator read under its GEMM": Case(
        (FULL_Q, FULL_K, SCORES, CONVERT, LAND_S),
        (*LOAD_Q, *LOAD_K),
        ConvertP,
        "race",
        "acc_s",
        "acc_s is read, and no WaitGemm has given it back",
        mended_consumer=(FULL_Q, FULL_K, SCORES, LAND_S, CONVERT),
    ),
    "accumulator written under its GEMM": Case(
        (FULL_Q, FULL_K, SCORES, CLEAR_S, LAND_S),
        (*LOAD_Q, *LOAD_K),
        Clear,
        "race",
        "acc_s",
        "acc_s is written, and no WaitGemm has given it back",
        mended_consumer=(FULL_Q, FULL_K, SCORES, LAND_S, CLEAR_S),
    ),
    "operand in registers written under its GEMM": Case(
        (*BOTH, CLEAR_P, LAND_ALL),
        ALL,
        Clear,
        "race",
        "p",
        "p is written, and no WaitGemm has given it back",
        mended_consumer=(*BOTH, LAND_ALL, CLEAR_P),
    ),
    "operand in registers that the wait does not name": Case(
        (*BOTH, WaitGemm(0, (AT.scores.acc_s, AT.acc_o)), CONVERT),
        ALL,
        ConvertP,
        "race",
        "p",
        "p is written, and no WaitGemm has given it back",
        mended_consumer=(*BOTH, LAND_ALL, CONVERT),
    ),
    "accumulator taken back in flight": Case(
        (*BOTH, WaitGemm(1, (AT.scores.acc_s, AT.acc_o)), LAND_ALL),
        ALL,
        WaitGemm,
        "race",
        "acc_o",
        "acc_o is taken back from a GEMM in flight",
        mended_consumer=(*BOTH, WaitGemm(1, (AT.scores.acc_s,)), LAND_O),
    ),
    "operand in shared memory written under its GEMM": Case(
        (FULL_Q, FULL_K, SCORES, NEGATE, LAND_S),
        (*LOAD_Q, *LOAD_K),
        NegateTile,
        "race",
        "q",
        "a GEMM of consumer 0 read it, and nothing orders the two",
        mended_consumer=(FULL_Q, FULL_K, SCORES, LAND_S, NEGATE),
    ),
    "GEMM that nobody waits for": Case(
        (FULL_Q, FULL_K, SCORES),
        (*LOAD_Q, *LOAD_K),
        None,
        "never landed",
        "acc_s",
        "the program ends with a GEMM on acc_s in flight",
        mended_consumer=(FULL_Q, FULL_K, SCORES, LAND_S),
    ),
    # ---- ordinary stores and asynchronous reads ----
    "stores that wgmma may not see": Case(
        (FULL_Q, FULL_K, NEGATE, MEET, SCORES, LAND_S),
        (*LOAD_Q, *LOAD_K),
        IssueGemm,
        "not fenced",
        "q",
        "q holds what threads stored, and no FenceAsync followed",
        mended_consumer=(FULL_Q, FULL_K, NEGATE, FENCE, MEET, SCORES, LAND_S),
    ),
    "stores behind the fence": Case(
        (FULL_Q, FULL_K, FENCE, NEGATE, MEET, SCORES, LAND_S),
        (*LOAD_Q, *LOAD_K),
        IssueGemm,
        "not fenced",
        "q",
        "q holds what threads stored, and no FenceAsync followed",
        mended_consumer=(FULL_Q, FULL_K, NEGATE, MEET, FENCE, SCORES, LAND_S),
    ),
    "stores of threads that have not met since": Case(
        (FULL_Q, FULL_K, NEGATE, FENCE, SCORES, LAND_S),
        (*LOAD_Q, *LOAD_K),
        IssueGemm,
        "race",
        "q",
        "other threads wrote it, and have not met this one since",
        mended_consumer=(FULL_Q, FULL_K, NEGATE, FENCE, MEET, SCORES, LAND_S),
    ),
    "stores that the copy engine may not see": Case(
        (CLEAR_O, STAGE, MEET, STORE, STORED),
        (),
        TmaStore,
        "not fenced",
        "out",
        "out holds what threads stored, and no FenceAsync followed",
        mended_consumer=END,
        end=(),
    ),
    "staged result stored before the threads have met": Case(
        (CLEAR_O, STAGE, FENCE, STORE, STORED),
        (),
        TmaStore,
        "race",
        "out",
        "other threads wrote it, and have not met this one since",
        mended_consumer=END,
        end=(),
    ),
    "result staged over one that is being stored": Case(
        (CLEAR_O, STAGE, FENCE, MEET, STORE, STAGE, STORED),
        (),
        StageTile,
        "race",
        "out",
        "a store of consumer 0 read it, and nothing orders the two",
        mended_consumer=(*END, STAGE),
        end=(),
    ),
    "result staged when one thread alone has waited for the stores": Case(
        (CLEAR_O, STAGE, FENCE, MEET, STORE, STORED, STAGE),
        (),
        StageTile,
        "race",
        "out",
        "a store of consumer 0 read it, and nothing orders the two",
        mended_consumer=(*END, STAGE),
        end=(),
    ),
    "store that nobody waits for": Case(
        (CLEAR_O, STAGE, FENCE, MEET, STORE),
        (),
        None,
        "never landed",
        "out",
        "the program ends while a store may still read out",
        mended_consumer=END,
        end=(),
    ),
    # ---- tiles drawn by the producer ----
    "tile drawn over one that was not taken": Case(
        (FULL_Q, MEET, *FREE_Q),
        (*LOAD_Q, *DRAW, DrawTile(FILLS.tile)),
        DrawTile,
        "race",
        "the tile slot",
        "the tile slot is written, and 0 of 2 have taken the number in it",
        mended_producer=(*LOAD_Q, *DRAW),
        persistent=True,
        end=(*END, *TAKE),
    ),
    "tile drawn without asking whether the one before was taken": Case(
        (FULL_Q, MEET, *FREE_Q),
        (*LOAD_Q, DrawTile(FILLS.tile), Advance(FILLS.tile)),
        DrawTile,
        "race",
        "the tile slot",
        "consumer 0 read it, and nothing orders the two",
        mended_producer=(*LOAD_Q, *DRAW),
        persistent=True,
        end=(*END, *TAKE),
    ),
    "tile slot released before all threads have read it": Case(
        (*END, WaitFull(OURS.tile), TakeTile(OURS.tile), Release(OURS.tile), MEET, Advance(OURS.tile)),
        DRAW,
        Release,
        "race",
        "tile",
        "tile is released, and not all threads have seen it full",
        mended_consumer=(*END, *TAKE),
        persistent=True,
        end=(),
    ),
    "stage released that a slow warp has not seen full": Case(
        (FULL_Q, *FREE_Q),
        LOAD_Q,
        Release,
        "race",
        "q",
        "q is released, and not all threads have seen it full",
        mended_consumer=(FULL_Q, MEET, *FREE_Q),
    ),
    # ---- turns ----
    "turn passed twice": Case(
        (When("last warpgroup", (PASS_TURN, PASS_TURN)), TAKE_TURN, PASS_TURN),
        (),
        PassTurn,
        "deadlock",
        "turn",
        "the turn is passed to warpgroup 0 twice before it has taken it",
        mended_consumer=(FIRST_TURN, TAKE_TURN, PASS_TURN),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_fault_is_reported(name: str) -> None:
    """Programs that break one rule fault, naming the Step and the place; mended they run through."""
    case = CASES[name]
    rows = 20 if case.persistent else 4
    with pytest.raises(SimulationFault, match=re.escape(case.text)) as caught:
        run(programs((*case.consumer, *case.end), case.producer, case.persistent), rows)
    fault = caught.value
    assert (fault.rule, fault.place) == (case.rule, case.place)
    assert fault.step is None if case.step is None else type(fault.step) is case.step
    consumer = case.consumer if case.mended_consumer is None else case.mended_consumer
    producer = case.producer if case.mended_producer is None else case.mended_producer
    run(programs((*consumer, *case.end), producer, case.persistent), rows)
