"""FlashAttention-2's partition: one block per query tile, the rows of Q split over the warps.

K and V blocks pass from right to left; O stays unnormalised in registers until the end. Where the keys of rows
are cut into parts, rows are few, and the warps share out keys instead (`warps_over_keys.py`).
Source: Dao, "FlashAttention-2", arXiv 2307.08691, Algorithm 1 and section 3.3.
"""

from collections.abc import Callable

from attngen.plan import BlockIndex, Program, View
from attngen.plan.steps import (
    Advance,
    Clear,
    CommitCopies,
    ForTiles,
    Gemm,
    LoadTile,
    Note,
    ReadTile,
    ReduceRows,
    ScaleRows,
    StoreRegisters,
    SyncThreads,
    WaitCopies,
)
from attngen.schedules.key_loop import LOAD, M_BLOCK, N_MAX, VISIT, KeyBlock
from attngen.schedules.tile_places import Places
from attngen.schedules.warps_over_keys import warps_over_keys


def fa2(at: Places) -> Program:
    """The program of every warp."""
    if at.shares and at.parts:
        return warps_over_keys(at, at.shares, at.parts)
    prologue, block = _single_buffered(at) if at.stages == 1 else _multi_buffered(at)
    return (
        ForTiles(
            (
                Clear(at.acc_o),
                *at.softmax.start_maximum,
                Clear(at.softmax.row_sum),
                *(at.cache.start if at.cache else ()),
                *at.keys.start(LOAD, VISIT),
                at.keys.when_first(
                    (
                        LoadTile(at.q.at(), at.q_in, M_BLOCK, pads=True),
                        *prologue,
                        *(at.cache.fit(at.q.at()) if at.cache else ()),
                        *at.scores.orient(at.q.at(), before=(WaitCopies(0), SyncThreads())),
                        *at.keys.for_all_blocks(block),
                        *(at.cache.settle(at.acc_o) if at.cache else ()),
                    ),
                    LOAD,
                ),
                Note("normalise once, at the end"),
                ReadTile(),
                *at.softmax.read_sink,
                ReduceRows(at.softmax.total, at.softmax.row_sum),
                at.softmax.finish,
                *at.softmax.join_sink,
                ScaleRows(at.acc_o, at.softmax.inv_sum),
                StoreRegisters(at.softmax.row_lse, at.lse, M_BLOCK),
                *at.store_result(M_BLOCK),
            )
        ),
    )


def _zero_hidden(at: Places, block: KeyBlock, *tiles: View) -> Program:
    """Zeros over keys of a block that the mask hides from every query, once it has come."""
    if not (zeros := at.zero_hidden(block.n, *tiles)):
        return ()
    return block.where_masked((*zeros, SyncThreads()))


def _single_buffered(at: Places) -> tuple[Program, Callable[[KeyBlock], Program]]:
    """One stage, as FlashAttention-2: V[n] arrives under S = Q K, K[n - 1] under the softmax and P V."""

    def load_k(block: BlockIndex) -> Program:
        return at.load_k(at.load_at, block, pads=False)

    def block(at_block: KeyBlock) -> Program:
        n = at_block.n
        return (
            WaitCopies(0),
            SyncThreads(),
            *at.load_v(at.load_at, n, at_block.may_be_last),
            CommitCopies(),
            *(_zero_hidden(at, at_block, at.k.at()) if at.votes_on_products else ()),
            Note("S = Q Kᵀ"),
            Gemm(at.scores.acc_s, at.q.at(), at.k.at(), starts_at_zero=True, unroll=at.score_unroll),
            *at.scores.finish(at_block),
            WaitCopies(0),
            SyncThreads(),
            at.keys.when_ahead(n - 1, load_k),
            CommitCopies(),
            *_zero_hidden(at, at_block, at.v.at()),
            *at.softmax.of_block(at.acc_o),
            Note("O += P V"),
            Gemm(at.acc_o, at.softmax.p, at.v.at(), starts_at_zero=False),
        )

    return (*at.load_k(at.load_at, at.keys.first_to_load, pads=True), CommitCopies()), block


def _multi_buffered(at: Places) -> tuple[Program, Callable[[KeyBlock], Program]]:
    """A ring of stages: K and V of block n - stages + 1 arrive under block n, one barrier a block."""
    ahead = at.stages - 1
    k, v = at.k.at(at.read_at), at.v.at(at.read_at)

    def load(block: BlockIndex, pads: bool = False) -> Program:
        return (*at.load_k(at.load_at, block, pads), *at.load_v(at.load_at, block, pads))

    prologue: Program = (*load(at.keys.first_to_load, pads=True), CommitCopies(), Advance(at.load_at))
    for i in range(1, ahead):
        prologue += (at.keys.when_ahead(N_MAX - 1 - i, load), CommitCopies(), Advance(at.load_at))

    def block(at_block: KeyBlock) -> Program:
        n = at_block.n
        return (
            WaitCopies(ahead - 1),
            SyncThreads(),
            at.keys.when_ahead(n - ahead, load),
            CommitCopies(),
            Advance(at.load_at),
            *_zero_hidden(at, at_block, *((k, v) if at.votes_on_products else (v,))),
            Note("S = Q Kᵀ"),
            Gemm(at.scores.acc_s, at.q.at(), k, starts_at_zero=True, unroll=at.score_unroll),
            *at.scores.finish(at_block),
            *at.softmax.of_block(at.acc_o),
            Note("O += P V"),
            Gemm(at.acc_o, at.softmax.p, v, starts_at_zero=False),
            Advance(at.read_at),
        )

    return prologue, block
