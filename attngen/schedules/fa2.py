"""FlashAttention-2's partition: one block per query tile, the rows of Q split over the warps.

K and V blocks pass from right to left; O stays unnormalised in registers until the end. Where the keys of rows
are cut into parts, a tile leaves what its own has come to, as it is.
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
from attngen.schedules.key_parts import KeyParts
from attngen.schedules.tile_places import Places


def fa2(at: Places) -> Program:
    """The program of every warp."""
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
                *(_finish_whole(at, at.parts) if at.parts else _finish(at)),
            )
        ),
    )


def _finish(at: Places) -> Program:
    """O and lse, once all keys have been visited."""
    return (
        *at.softmax.read_sink,
        ReduceRows(at.softmax.total, at.softmax.row_sum),
        *_normalise(at),
    )


def _finish_whole(at: Places, parts: KeyParts) -> Program:
    """O and lse of a tile that is not cut; of one that is, what its part has come to."""
    finish = (*at.softmax.read_sink, *_normalise(at))
    return (
        ReduceRows(at.softmax.total, at.softmax.row_sum),
        *parts.store_or_finish(at.acc_o, at.softmax, M_BLOCK, finish),
    )


def _normalise(at: Places) -> Program:
    return (
        at.softmax.finish,
        *at.softmax.join_sink,
        ScaleRows(at.acc_o, at.softmax.inv_sum),
        StoreRegisters(at.softmax.row_lse, at.lse, M_BLOCK),
        *at.store_result(M_BLOCK),
    )


def _softmax(at: Places) -> Program:
    """One step of the online softmax; alpha rescales what was summed under the old maximum."""
    return (
        Note("online softmax"),
        *at.softmax.update_maximum,
        *at.softmax.exponentiate,
        *(at.cache.weigh(at.scores.acc_s, at.acc_o) if at.cache else ()),
        *at.softmax.rescale(at.acc_o, votes=at.parts is not None),
        at.softmax.convert,
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
            *_softmax(at),
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
            *_softmax(at),
            Note("O += P V"),
            Gemm(at.acc_o, at.softmax.p, v, starts_at_zero=False),
            Advance(at.read_at),
        )

    return prologue, block
