"""FlashAttention-1 as its Algorithm 1: one block per head, KV blocks outside, Q blocks inside.

O, row_max and row_sum live in device memory and O is normalised at every step; nothing overlaps. It is here to be
read and to be compared with, not to be fast.
Source: Dao et al., "FlashAttention", arXiv 2205.14135, Algorithm 1; the comments give its lines.
"""

from attngen.plan import BlockIndex, Program, Range
from attngen.plan.steps import (
    Clear,
    CommitCopies,
    ForBlocks,
    ForTiles,
    Gemm,
    LoadRegisters,
    LoadTile,
    Note,
    ReduceRows,
    ScaleRows,
    StoreRegisters,
    SyncThreads,
    WaitCopies,
    When,
)
from attngen.schedules.key_loop import KeyBlock
from attngen.schedules.tile_places import Places

M, N, ZERO = BlockIndex("m"), BlockIndex("n"), BlockIndex("zero")
ALL_ROWS = Range("rows", ZERO, BlockIndex("m_max"), descending=False, tile_class="any")
ALL_KEYS = Range("keys", ZERO, BlockIndex("n_end"), descending=False, tile_class="any")


def _join_sink(at: Places) -> Program:
    """What the learned sink has of rows, whose O has been normalised by the sum over keys."""
    if not at.softmax.join_sink:
        return ()
    return (
        Note("the sink joins the sum: O = row_sum O / new row_sum"),
        ScaleRows(at.acc_o, at.softmax.total),
        *at.softmax.join_sink,
        ScaleRows(at.acc_o, at.softmax.inv_sum),
    )


def serial(at: Places) -> Program:
    """The program of every warp."""
    land = (CommitCopies(), WaitCopies(0), SyncThreads())
    initialise = (
        Clear(at.acc_o),
        *at.softmax.start_maximum,
        Clear(at.softmax.total),
        StoreRegisters(at.acc_o, at.o_acc, M),
        StoreRegisters(at.softmax.row_max, at.saved_max, M),
        StoreRegisters(at.softmax.total, at.saved_sum, M),
    )
    update = (
        SyncThreads(),
        Note("line 8: load Q, O, row_sum, row_max"),
        LoadTile(at.q.at(), at.q_in, M, pads=True),
        *land,
        *at.scores.orient(at.q.at(), after=(SyncThreads(),)),
        LoadRegisters(at.acc_o, at.o_acc, M),
        LoadRegisters(at.softmax.row_max, at.saved_max, M),
        LoadRegisters(at.softmax.row_sum, at.saved_sum, M),
        LoadRegisters(at.softmax.total, at.saved_sum, M),
        Note("line 9: S = Q Kᵀ"),
        Gemm(at.scores.acc_s, at.q.at(), at.k.at(), starts_at_zero=True, unroll=at.score_unroll),
        *at.scores.finish(KeyBlock(M, N, N, "maybe", may_be_last=True)),
        Note("lines 10 and 11: new row_max and row_sum"),
        *at.softmax.update_maximum,
        *at.softmax.exponentiate,
        Note("line 12: O = (row_sum alpha O + P V) / new row_sum"),
        ScaleRows(at.acc_o, at.softmax.total),
        ScaleRows(at.acc_o, at.softmax.alpha),
        at.softmax.convert,
        Gemm(at.acc_o, at.softmax.p, at.v.at(), starts_at_zero=False),
        ReduceRows(at.softmax.total, at.softmax.row_sum),
        at.softmax.finish,
        ScaleRows(at.acc_o, at.softmax.inv_sum),
        StoreRegisters(at.acc_o, at.o_acc, M),
        Note("line 13: write row_sum and row_max"),
        StoreRegisters(at.softmax.row_max, at.saved_max, M),
        StoreRegisters(at.softmax.total, at.saved_sum, M),
    )
    finish = (
        *at.softmax.read_sink,
        LoadRegisters(at.acc_o, at.o_acc, M),
        LoadRegisters(at.softmax.row_max, at.saved_max, M),
        LoadRegisters(at.softmax.total, at.saved_sum, M),
        at.softmax.finish,
        *_join_sink(at),
        StoreRegisters(at.softmax.row_lse, at.lse, M),
        *at.store_result(M),
    )
    return (
        ForTiles(
            (
                Note("line 2: O = 0, row_sum = 0, row_max = lowest in device memory"),
                ForBlocks(ALL_ROWS, "m", initialise),
                Note("line 5: every block of keys"),
                ForBlocks(
                    ALL_KEYS,
                    "n",
                    (
                        SyncThreads(),
                        LoadTile(at.k.at(), at.k_in, N, pads=True),
                        LoadTile(at.v.at(), at.v_in, N, pads=True),
                        *land,
                        *at.zero_hidden(N, *((at.k.at(),) if at.votes_on_products else ()), at.v.at()),
                        Note("line 7: every block of rows that sees it"),
                        ForBlocks(ALL_ROWS, "m", (When("m sees n", update),)),
                    ),
                ),
                Note("round O to the output type, lse = row_max + log row_sum"),
                SyncThreads(),
                ForBlocks(ALL_ROWS, "m", finish),
            )
        ),
    )
