"""FlashAttention-2's partition: one block per query tile, the rows of Q split over the warps.

K and V blocks pass from right to left; O stays unnormalised in registers until the end.
Source: Dao, "FlashAttention-2", arXiv 2307.08691, Algorithm 1 and section 3.3.
"""

from collections.abc import Callable

from attngen.plan import BlockIndex, Program, Range
from attngen.plan.steps import (
    Advance,
    Clear,
    CommitCopies,
    ConvertP,
    CopyTile,
    Exponentiate,
    FinishRows,
    ForBlocks,
    ForTiles,
    LoadTile,
    NegateTile,
    Note,
    OutputGemm,
    ReadTile,
    ReduceRows,
    RowMax,
    ScaleRows,
    ScoreGemm,
    Step,
    StoreRows,
    StoreTile,
    SyncThreads,
    WaitCopies,
    When,
    WhenBlock,
)
from attngen.schedules.tiles import M_BLOCK, N_MAX, N_MIN, N, Places


def fa2(at: Places) -> Program:
    """The program of every warp."""
    prologue, block = _single_buffered(at) if at.stages == 1 else _multi_buffered(at)
    return (
        ForTiles(
            (
                Clear(at.acc_o),
                Clear(at.row_max, "-inf"),
                Clear(at.row_sum),
                When(
                    "tile has blocks",
                    (
                        LoadTile(at.q.at(), at.q_in, M_BLOCK, bounded=True),
                        *prologue,
                        When(
                            "scale is negative",
                            (WaitCopies(0), SyncThreads(), NegateTile(at.q.at())),
                        ),
                        *(
                            ForBlocks(range_, "n", block(range_))
                            for range_ in at.ranges(last_is_peeled=False)
                        ),
                    ),
                ),
                Note("normalise once, at the end"),
                ReadTile(),
                ReduceRows(at.total, at.row_sum),
                FinishRows(at.row_max, at.total, at.inv_sum, at.row_lse),
                ScaleRows(at.acc_o, at.inv_sum),
                StoreRows(at.row_lse, at.lse, M_BLOCK),
                SyncThreads(),
                CopyTile(at.acc_o, at.out.at()),
                SyncThreads(),
                StoreTile(at.out.at(), at.result, M_BLOCK),
            )
        ),
    )


def _softmax(at: Places) -> Program:
    """One step of the online softmax; alpha rescales what was summed under the old maximum."""
    return (
        Note("online softmax"),
        RowMax(at.acc_s, at.row_max, at.alpha),
        Exponentiate(at.acc_s, at.row_max, at.row_sum, at.alpha),
        ScaleRows(at.acc_o, at.alpha),
        ConvertP(at.acc_s, at.p),
    )


def _mask(at: Places, range_: Range) -> tuple[Step, ...]:
    return () if range_.tile_class == "full" else (at.mask_scores(M_BLOCK, N),)


def _single_buffered(at: Places) -> tuple[Program, Callable[[Range], Program]]:
    """One stage, as FlashAttention-2: V[n] arrives under S = Q K, K[n - 1] under the softmax and P V."""

    def block(range_: Range) -> Program:
        may_be_last = range_.tile_class != "full"
        return (
            WaitCopies(0),
            SyncThreads(),
            LoadTile(at.v.at(), at.v_in, N, bounded=may_be_last),
            CommitCopies(),
            Note("S = Q Kᵀ"),
            ScoreGemm(at.acc_s, at.q.at(), at.k.at(), at.score_unroll),
            *_mask(at, range_),
            WaitCopies(0),
            SyncThreads(),
            WhenBlock(N - 1, N_MIN, (LoadTile(at.k.at(), at.k_in, N - 1, bounded=False),)),
            CommitCopies(),
            *_softmax(at),
            Note("O += P V"),
            OutputGemm(at.acc_o, at.p, at.v.at()),
        )

    return (LoadTile(at.k.at(), at.k_in, N_MAX - 1, bounded=True), CommitCopies()), block


def _multi_buffered(at: Places) -> tuple[Program, Callable[[Range], Program]]:
    """A ring of stages: K and V of block n - stages + 1 arrive under block n, one barrier a block."""
    ahead = at.stages - 1

    def load(block: BlockIndex, bounded: bool) -> Program:
        return (
            LoadTile(at.k.at(at.load_at), at.k_in, block, bounded),
            LoadTile(at.v.at(at.load_at), at.v_in, block, bounded),
        )

    prologue: Program = (*load(N_MAX - 1, bounded=True), CommitCopies(), Advance(at.load_at))
    for i in range(1, ahead):
        prologue += (
            WhenBlock(N_MAX - 1 - i, N_MIN, load(N_MAX - 1 - i, bounded=False)),
            CommitCopies(),
            Advance(at.load_at),
        )

    def block(range_: Range) -> Program:
        return (
            WaitCopies(ahead - 1),
            SyncThreads(),
            WhenBlock(N - ahead, N_MIN, load(N - ahead, bounded=False)),
            CommitCopies(),
            Advance(at.load_at),
            Note("S = Q Kᵀ"),
            ScoreGemm(at.acc_s, at.q.at(), at.k.at(at.read_at), at.score_unroll),
            *_mask(at, range_),
            *_softmax(at),
            Note("O += P V"),
            OutputGemm(at.acc_o, at.p, at.v.at(at.read_at)),
            Advance(at.read_at),
        )

    return prologue, block
