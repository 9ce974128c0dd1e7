"""Steps of short programs for two consumer warpgroups of two rows each and a producer, by name; blocks of 4 keys."""

import torch
from small_plans import warpgroup_places, warpgroup_plan

from attngen.plan import BlockIndex, KernelPlan, Program
from attngen.plan.steps import (
    Advance,
    Clear,
    ConvertP,
    DrawTile,
    FenceAsync,
    ForTiles,
    IssueGemm,
    NegateTile,
    PassTurn,
    Release,
    StageTile,
    SyncWarpgroup,
    TakeTile,
    TakeTurn,
    TmaLoad,
    TmaStore,
    WaitEmpty,
    WaitFull,
    WaitGemm,
    WaitStores,
    When,
)
from attngen.simulate import simulate

AT = warpgroup_places()
SOFTMAX = AT.softmax
M = BlockIndex("m_block")
OURS, FILLS = AT.consumer, AT.producer

# ---- producer -------------------------------------------------------------------------------------------------------
FILL_Q = TmaLoad(AT.q.at(FILLS.q), AT.q_in, M, "evict_first")
FILL_K = TmaLoad(AT.k.at(FILLS.k), AT.k_in, BlockIndex("zero"), "evict_last")
FILL_V = TmaLoad(AT.v.at(FILLS.v), AT.v_in, BlockIndex("zero"), "evict_last")
LOAD_Q = (WaitEmpty(FILLS.q), FILL_Q, Advance(FILLS.q))
LOAD_K = (WaitEmpty(FILLS.k), FILL_K, Advance(FILLS.k))
LOAD_V = (WaitEmpty(FILLS.v), FILL_V, Advance(FILLS.v))
ALL = (*LOAD_Q, *LOAD_K, *LOAD_V)
DRAW = (WaitEmpty(FILLS.tile), DrawTile(FILLS.tile), Advance(FILLS.tile))

# ---- consumer -------------------------------------------------------------------------------------------------------
FULL_Q, FULL_K, FULL_V = WaitFull(OURS.q), WaitFull(OURS.k), WaitFull(OURS.v)
FREE_Q, FREE_K, FREE_V = ((Release(at), Advance(at)) for at in (OURS.q, OURS.k, OURS.v))
LAST_FREES = (When("last warpgroup", (Release(OURS.k),)),)
SCORES = IssueGemm(AT.scores.acc_s, AT.q.at(OURS.q).own, AT.k.at(OURS.k), starts_at_zero=True)
OUTPUT = IssueGemm(AT.acc_o, SOFTMAX.p, AT.v.at(OURS.v), starts_at_zero=False)
LAND_S, LAND_O, LAND_ALL = (
    WaitGemm(0, (AT.scores.acc_s,)),
    WaitGemm(0, (AT.acc_o, SOFTMAX.p)),
    WaitGemm(0, (AT.scores.acc_s, AT.acc_o, SOFTMAX.p)),
)
USE_K = (FULL_K, SCORES, LAND_S, *FREE_K)
CLEAR_P, CLEAR_O, CLEAR_S = Clear(SOFTMAX.p), Clear(AT.acc_o), Clear(AT.scores.acc_s)
CONVERT = ConvertP(AT.scores.acc_s, SOFTMAX.p)
BOTH = (CLEAR_O, CLEAR_P, FULL_Q, FULL_K, FULL_V, SCORES, OUTPUT)
NEGATE = NegateTile(AT.q.at(OURS.q).own)
FENCE, MEET, STORED = FenceAsync(), SyncWarpgroup(AT.own), WaitStores()
STAGE = StageTile(AT.acc_o, AT.out.at().own)
STORE = TmaStore(AT.out.at().own, AT.result, M)
TAKE = (WaitFull(OURS.tile), TakeTile(OURS.tile), MEET, Release(OURS.tile), Advance(OURS.tile))
TAKE_TURN, PASS_TURN = TakeTurn(AT.turn), PassTurn(AT.turn)
FIRST_TURN = When("last warpgroup", (PASS_TURN,))
END = (CLEAR_O, STAGE, FENCE, MEET, STORE, STORED, MEET)


def programs(consumer: Program, producer: Program, persistent: bool = False) -> KernelPlan:
    return warpgroup_plan((ForTiles(consumer),), (ForTiles(producer),), persistent)


def run(plan: KernelPlan, seqlen_q: int = 4) -> None:
    q, kv = torch.ones(1, seqlen_q, 1, 2), torch.ones(1, 4, 1, 2)
    simulate(plan, q, kv, kv)
