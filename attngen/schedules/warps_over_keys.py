"""FlashAttention-2's partition turned by a quarter: the warps of a block share out the keys of a tile, not its rows.

For tiles of few rows that read many keys. Each warp has all rows, some keys of every block, and a ring of its own, so
that no warp waits for another before the end. There they leave what their keys have come to in shared memory, and each
adds up some columns of O. What the tile then has is a result, or a part of one: the block that comes last adds up the
parts, in their order.
Source: Dao et al., "Flash-Decoding for long-context inference", 2023, for keys in parts.
"""

from attngen.plan import BlockIndex, Program
from attngen.plan.steps import (
    Advance,
    Clear,
    CommitCopies,
    ForTiles,
    Gemm,
    LoadTile,
    Note,
    ReduceRows,
    ScaleRows,
    StoreColumns,
    StoreRegisters,
    SyncThreads,
    SyncWarp,
    WaitCopies,
    When,
)
from attngen.schedules.key_loop import LOAD, M_BLOCK, N_MAX, VISIT, KeyBlock
from attngen.schedules.key_parts import KeyParts, WarpShares
from attngen.schedules.tile_places import Places


def warps_over_keys(at: Places, shares: WarpShares, parts: KeyParts) -> Program:
    """The program of each warp."""
    leave = (
        StoreColumns(shares.joined, parts.out, M_BLOCK),
        When("first warp", parts.leave_numbers(at.softmax, M_BLOCK)),
    )
    return (
        ForTiles(
            (
                Clear(at.acc_o),
                *at.softmax.start_maximum,
                Clear(at.softmax.row_sum),
                *(at.cache.start if at.cache else ()),
                *at.keys.start(LOAD, VISIT),
                at.keys.when_first(_visit_all(at), LOAD),
                Note("what the keys of all warps have come to"),
                *at.softmax.read_sink,
                ReduceRows(at.softmax.total, at.softmax.row_sum),
                SyncThreads(),
                shares.leave(at.acc_o, at.softmax),
                SyncThreads(),
                shares.join(at.softmax),
                *parts.finish(at.softmax, M_BLOCK, at.result, at.lse, leave, _normalise(at, shares)),
            )
        ),
    )


def _normalise(at: Places, shares: WarpShares) -> Program:
    return (
        at.softmax.finish,
        *at.softmax.join_sink,
        ScaleRows(shares.joined, at.softmax.inv_sum),
        When("first warp", (StoreRegisters(at.softmax.row_lse, at.lse, M_BLOCK),)),
        StoreColumns(shares.joined, at.result, M_BLOCK),
    )


def _visit_all(at: Places) -> Program:
    """Q, which the first warp brings, and the ring: a stage is filled anew when its block has been worked on."""
    k, v = at.k.at(at.read_at).own, at.v.at(at.read_at).own
    go_on: Program = (Advance(at.read_at),) if at.stages > 1 else ()

    def load(block: BlockIndex) -> Program:
        return (*at.load_k(at.read_at, block, pads=True), *at.load_v(at.read_at, block, pads=True))

    def block(at_block: KeyBlock) -> Program:
        zeros = at.zero_hidden(at_block.n, *((k, v) if at.votes_on_products else (v,)))
        return (
            WaitCopies(at.stages - 1),
            SyncWarp(),
            *at_block.where_masked((*zeros, SyncWarp()) if zeros else ()),
            Note("S = Q Kᵀ"),
            Gemm(at.scores.acc_s, at.q.at(), k, starts_at_zero=True, unroll=at.score_unroll),
            *at.scores.finish(at_block),
            *at.softmax.of_block(at.acc_o, votes=True),
            Note("O += P V"),
            Gemm(at.acc_o, at.softmax.p, v, starts_at_zero=False),
            SyncWarp(),
            at.keys.when_ahead(at_block.n - at.stages, load),
            CommitCopies(),
            *go_on,
        )

    load_q = LoadTile(at.q.at(), at.q_in, M_BLOCK, pads=True)
    prologue: Program = (When("first warp", (load_q,)), CommitCopies())
    prologue += (*load(at.keys.first_to_load), CommitCopies(), *go_on)
    for i in range(1, at.stages):
        prologue += (at.keys.when_ahead(N_MAX - 1 - i, load), CommitCopies(), *go_on)
    fitted = (SyncThreads(), at.cache.fitted(at.q.at())) if at.cache and at.cache.fits_q else ()
    oriented = at.scores.orient(at.q.at(), before=(SyncWarp(),))
    return (
        *prologue,
        WaitCopies(at.stages),
        *fitted,
        *((When("first warp", oriented),) if oriented else ()),
        SyncThreads(),
        *at.keys.for_all_blocks(block),
        *(at.cache.settle(at.acc_o) if at.cache else ()),
    )
