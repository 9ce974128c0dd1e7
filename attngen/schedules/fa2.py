"""FlashAttention-2's partition: one block per query tile, the rows of Q split over the warps.

K and V blocks pass from right to left; O stays unnormalised in registers until the end.
Source: Dao, "FlashAttention-2", arXiv 2307.08691, Algorithm 1 and section 3.3.
"""

from collections.abc import Callable

from attngen.plan import BlockIndex, Program
from attngen.plan.steps import (
    Advance,
    Clear,
    CommitCopies,
    ConvertP,
    ForTiles,
    Gemm,
    LoadTile,
    Note,
    ReadTile,
    ReduceRows,
    ScaleRows,
    StageTile,
    Step,
    StoreRegisters,
    StoreTile,
    SyncThreads,
    WaitCopies,
    WhenBlock,
    WhenNext,
)
from attngen.schedules.tiles import LOAD, M_BLOCK, N_MAX, N_MIN, VISIT, KeyBlock, Places


def fa2(at: Places) -> Program:
    """The program of every warp."""
    prologue, block = _single_buffered(at) if at.stages == 1 else _multi_buffered(at)
    return (
        ForTiles(
            (
                Clear(at.acc_o),
                *at.start_maximum,
                Clear(at.row_sum),
                *at.start_keys(LOAD, VISIT),
                at.when_first(
                    (
                        LoadTile(at.q.at(), at.q_in, M_BLOCK, bounded=True),
                        *prologue,
                        *at.negate_q(at.q.at(), ((WaitCopies(0), SyncThreads()), ())),
                        *at.for_all_blocks(block),
                    ),
                    LOAD,
                ),
                Note("normalise once, at the end"),
                ReadTile(),
                ReduceRows(at.total, at.row_sum),
                at.finish_rows,
                ScaleRows(at.acc_o, at.inv_sum),
                StoreRegisters(at.row_lse, at.lse, M_BLOCK),
                SyncThreads(),
                StageTile(at.acc_o, at.out.at()),
                SyncThreads(),
                StoreTile(at.out.at(), at.result, M_BLOCK),
            )
        ),
    )


def _softmax(at: Places) -> Program:
    """One step of the online softmax; alpha rescales what was summed under the old maximum."""
    return (
        Note("online softmax"),
        *at.row_max_of_scores,
        *at.exponentials,
        *at.rescale_output(),
        ConvertP(at.acc_s, at.p),
    )


def _when_ahead(at: Places, block: BlockIndex, load: Callable[[BlockIndex], Program]) -> Step:
    """Load a block to the left, if there is one: that number, or where the walk of the loads comes to."""
    return WhenNext(LOAD, load(LOAD.n)) if at.walks else WhenBlock(block, N_MIN, load(block))


def _single_buffered(at: Places) -> tuple[Program, Callable[[KeyBlock], Program]]:
    """One stage, as FlashAttention-2: V[n] arrives under S = Q K, K[n - 1] under the softmax and P V."""

    def load_k(block: BlockIndex) -> Program:
        return (LoadTile(at.k.at(), at.k_in, block, bounded=False),)

    def block(at_block: KeyBlock) -> Program:
        n = at_block.n
        return (
            WaitCopies(0),
            SyncThreads(),
            LoadTile(at.v.at(), at.v_in, n, at_block.may_be_last),
            CommitCopies(),
            Note("S = Q Kᵀ"),
            Gemm(at.acc_s, at.q.at(), at.k.at(), starts_at_zero=True, unroll=at.score_unroll),
            *at.modify(M_BLOCK, n),
            *at_block.mask,
            WaitCopies(0),
            SyncThreads(),
            _when_ahead(at, n - 1, load_k),
            CommitCopies(),
            *_softmax(at),
            Note("O += P V"),
            Gemm(at.acc_o, at.p, at.v.at(), starts_at_zero=False),
        )

    return (LoadTile(at.k.at(), at.k_in, _first(at), bounded=True), CommitCopies()), block


def _multi_buffered(at: Places) -> tuple[Program, Callable[[KeyBlock], Program]]:
    """A ring of stages: K and V of block n - stages + 1 arrive under block n, one barrier a block."""
    ahead = at.stages - 1

    def load(block: BlockIndex, bounded: bool = False) -> Program:
        return (
            LoadTile(at.k.at(at.load_at), at.k_in, block, bounded),
            LoadTile(at.v.at(at.load_at), at.v_in, block, bounded),
        )

    prologue: Program = (*load(_first(at), bounded=True), CommitCopies(), Advance(at.load_at))
    for i in range(1, ahead):
        prologue += (_when_ahead(at, N_MAX - 1 - i, load), CommitCopies(), Advance(at.load_at))

    def block(at_block: KeyBlock) -> Program:
        n = at_block.n
        return (
            WaitCopies(ahead - 1),
            SyncThreads(),
            _when_ahead(at, n - ahead, load),
            CommitCopies(),
            Advance(at.load_at),
            Note("S = Q Kᵀ"),
            Gemm(at.acc_s, at.q.at(), at.k.at(at.read_at), starts_at_zero=True, unroll=at.score_unroll),
            *at.modify(M_BLOCK, n),
            *at_block.mask,
            *_softmax(at),
            Note("O += P V"),
            Gemm(at.acc_o, at.p, at.v.at(at.read_at), starts_at_zero=False),
            Advance(at.read_at),
        )

    return prologue, block


def _first(at: Places) -> BlockIndex:
    """The block that is loaded first."""
    return LOAD.n if at.walks else at.first_block.n
