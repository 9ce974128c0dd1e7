"""FlashAttention-3's forward: a producer feeds the copy engine, consumer warpgroups feed the tensor core.

K and V pass through rings guarded by mbarriers, so that nobody waits for a whole block of threads. A consumer issues
S of block n and O of block n + 1 together; with `overlap` the softmax of block n runs while the tensor core is still
at O. `pingpong` adds turns: one warpgroup's GEMMs run under the other's softmax.
Source: Shah et al., "FlashAttention-3", arXiv 2407.08608, Algorithms 1 and 2.
"""

from dataclasses import dataclass
from typing import Literal

from attngen.plan import (
    BlockIndex,
    Buffer,
    Cursor,
    NamedBarriers,
    Program,
    RegTile,
    RegVec,
    Tensor,
)
from attngen.plan.steps import (
    Advance,
    Clear,
    ConvertP,
    CopyRows,
    DrawTile,
    FenceAsync,
    ForTiles,
    IssueGemm,
    Note,
    PassTurn,
    Promote,
    ReduceRows,
    Release,
    ScaleRows,
    StageTile,
    Step,
    StoreRegisters,
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
from attngen.schedules.tiles import M_BLOCK, VISIT, KeyBlock, TilePlaces

Rescale = Literal["middle", "last"]


@dataclass(frozen=True)
class RingCursors:
    """Where one role stands in each ring."""

    q: Cursor
    k: Cursor
    v: Cursor
    tile: Cursor


@dataclass(frozen=True)
class WarpgroupPlaces(TilePlaces):
    """What the schedules for warpgroups may name; their tiles in shared memory are in panels.

    Attributes:
        overlap: the softmax of a block runs under the output GEMM of the one before.
        rescale: where O is rescaled: "last", after everything else of a block; "middle", between maximum and
            exponentials, which then wait for O's GEMM.
        rescale_votes: a warp none of whose maxima grew does not rescale.
        passes_late: the turn is passed when the GEMMs have landed, not when they have been issued.
        persistent: a block of threads works on many tiles.
        out_over_q: `out` has the bytes of `q`, which is then released only when the result has been read.
        producer, consumer: where the roles stand in the rings.
        turn, own: the named barriers by which warpgroups take turns, and by which one meets itself.
        part: what the tensor core adds up of one block where O itself is kept in true f32; None where it adds to O.
            With fewer columns than O it is worked out slice by slice.
        alpha_before: the rescale factor of the block before, which `part` is behind.
    """

    overlap: bool
    rescale: Rescale
    rescale_votes: bool
    passes_late: bool
    persistent: bool
    out_over_q: bool
    producer: RingCursors
    consumer: RingCursors
    turn: NamedBarriers
    own: NamedBarriers
    part: RegTile | None
    alpha_before: RegVec


def warp_specialized(at: WarpgroupPlaces) -> dict[str, Program]:
    """The programs of a consumer warpgroup and of the producer thread."""
    return {"consumer": _consumer(at, turns=False), "producer": _producer(at)}


def pingpong(at: WarpgroupPlaces) -> dict[str, Program]:
    """The same, and the warpgroups take turns at issuing GEMMs."""
    return {"consumer": _consumer(at, turns=True), "producer": _producer(at)}


# ---- producer -------------------------------------------------------------------------------------------------------
def _producer(at: WarpgroupPlaces) -> Program:
    """K goes first and V one block behind it; the next tile's K and Q load under this tile's end."""
    rings = at.producer

    def load(buffer: Buffer, cursor: Cursor, src: Tensor, block: BlockIndex, beside: Program = ()) -> Program:
        once = src is at.q_in
        return (
            WaitEmpty(cursor),
            *beside,
            TmaLoad(buffer.at(cursor), src, block, "evict_first" if once else "evict_last"),
            Advance(cursor),
        )

    def load_k(block: BlockIndex) -> Program:
        return load(at.k, rings.k, at.k_in, block, at.stage_scales(rings.k, block))

    def load_v(block: BlockIndex) -> Program:
        return load(at.v, rings.v, at.v_in, block)

    def load_pair(block: KeyBlock) -> Program:
        return (*load_k(block.n), *load_v(block.before))

    return (
        ForTiles(
            (
                *at.start_keys(VISIT),
                at.when_first(load_k(at.first_block.n)),
                *load(at.q, rings.q, at.q_in, M_BLOCK),
                at.when_any((*at.for_further_blocks(load_pair, split=False), *load_v(at.last_block))),
                *(
                    (WaitEmpty(rings.tile), DrawTile(rings.tile), Advance(rings.tile))
                    if at.persistent
                    else ()
                ),
            )
        ),
    )


# ---- consumer -------------------------------------------------------------------------------------------------------
def _consumer(at: WarpgroupPlaces, turns: bool) -> Program:
    rings = at.consumer
    release_q = (Release(rings.q), Advance(rings.q))
    next_tile = (
        WaitFull(rings.tile, together=True),
        TakeTile(rings.tile),
        SyncWarpgroup(at.own),
        Release(rings.tile),
        Advance(rings.tile),
    )
    return (
        *(
            (When("last warpgroup", (Note("the first warpgroup goes first"), PassTurn(at.turn))),)
            if turns
            else ()
        ),
        ForTiles(
            (
                Clear(at.acc_o),
                *at.start_maximum,
                Clear(at.row_sum),
                *at.start_keys(VISIT),
                *at.start_scales(M_BLOCK),
                WaitFull(rings.q, together=True),
                *at.negate_q(at.q.at(rings.q).own, ((), (FenceAsync(), SyncWarpgroup(at.own)))),
                at.when_first(
                    (*_first_block(at), *at.for_further_blocks(lambda block: _block(at, block, turns)))
                ),
                *(() if at.out_over_q else (SyncWarpgroup(at.own), *release_q)),
                at.when_any(_last_output(at)),
                *_epilogue(at),
                *(release_q if at.out_over_q else ()),
                *(next_tile if at.persistent else ()),
            )
        ),
        *(() if at.out_over_q else (WaitStores(),)),
    )


def _first_block(at: WarpgroupPlaces) -> Program:
    rings = at.consumer
    return (
        Note("the last block of keys: scores only, O follows one block behind"),
        *at.look_up(M_BLOCK, at.first_block.n),
        *at.seed(M_BLOCK, at.first_block.n),
        WaitFull(rings.k),
        *at.read_scales(rings.k),
        _issue_scores(at),
        WaitGemm(0, (at.acc_s,)),
        *at.scale_keys(rings.k),
        Release(rings.k),
        Advance(rings.k),
        *at.modify(M_BLOCK, at.first_block.n),
        *at.first_block.mask,
        *at.row_max_of_scores,
        *at.exponentials,
        ConvertP(at.acc_s, at.p),
    )


def _block(at: WarpgroupPlaces, block: KeyBlock, turns: bool) -> Program:
    """S of a block and O of the block before; alpha rescales what was summed under the old maximum."""
    rings = at.consumer
    pass_turn = (PassTurn(at.turn),) if turns else ()
    when_issued, when_landed = ((), pass_turn) if at.passes_late else (pass_turn, ())
    issue = (
        *at.look_up_here(M_BLOCK, block.n),
        *at.seed(M_BLOCK, block.n),
        WaitFull(rings.k),
        *at.read_scales(rings.k),
        *((TakeTurn(at.turn),) if turns else ()),
        Note(f"S = Q K[{block.n}]ᵀ, and behind it O += P V[{block.before}]"),
        _issue_scores(at),
        WaitFull(rings.v),
        _issue_output(at),
        *when_issued,
    )
    scores_done = (*at.scale_keys(rings.k), Release(rings.k), Advance(rings.k))
    row_max = (
        Note("online softmax of block n"),
        *at.modify(M_BLOCK, block.n),
        *block.mask,
        *((CopyRows(at.alpha_before, at.alpha),) if at.part and at.overlap else ()),
        *at.row_max_of_scores,
    )
    exponentiate = at.exponentials
    # A late turn is passed ahead of the vote on maxima: ptxas would put it off until the end of the softmax.
    land_scores = (WaitGemm(1, (at.acc_s,)), *when_landed, *scores_done)
    if not at.overlap:
        land_both = (WaitGemm(0, (at.acc_s,)), *when_landed, *scores_done, *_land_output(at, at.alpha))
        softmax = (*land_both, *row_max, *_rescale(at, "middle"), *exponentiate)
    elif at.rescale == "middle":
        output = _land_output(at, at.alpha_before)
        softmax = (*land_scores, *row_max, *output, *_rescale(at, "middle"), *exponentiate)
    else:
        softmax = (*land_scores, *row_max, *_land_output(at, at.alpha_before, meanwhile=exponentiate))
    return (
        *issue,
        *softmax,
        ConvertP(at.acc_s, at.p),
        *_rescale(at, "last"),
    )


def _rescale(at: WarpgroupPlaces, where: Rescale) -> Program:
    """O under the new maximum, if this is the place for it; a promotion does it one block later."""
    is_here = at.rescale == where and at.part is None
    return at.rescale_output(at.rescale_votes) if is_here else ()


def _issue_scores(at: WarpgroupPlaces) -> IssueGemm:
    rings = at.consumer
    q, k = at.q.at(rings.q).own, at.k.at(rings.k)
    return IssueGemm(at.acc_s, q, k, starts_at_zero=at.pairs.added is None)


def _issue_output(at: WarpgroupPlaces, first_column: int = 0) -> IssueGemm:
    v = at.v.at(at.consumer.v)
    return IssueGemm(at.part or at.acc_o, at.p, v, at.part is not None, first_column)


def _land_output(at: WarpgroupPlaces, alpha: RegVec, meanwhile: Program = ()) -> Program:
    """Wait for O of the block before and hand V back; a part is added to what alpha rescales, slice by slice.

    Args:
        at: the places.
        alpha: the rescale factor of the block before.
        meanwhile: what is done before the last wait.
    """
    v, part, last = at.consumer.v, at.part or at.acc_o, at.acc_o.cols - (at.part or at.acc_o).cols
    steps: list[Step] = []
    for first in range(0, last + 1, part.cols):
        steps += (
            *((_issue_output(at, first),) if first else ()),
            *(meanwhile if first == last else ()),
            WaitGemm(0, (part, at.p)),
            *((Release(v), Advance(v)) if first == last else ()),
            *((Promote(at.acc_o, part, alpha, first),) if at.part else ()),
        )
    return tuple(steps)


def _last_output(at: WarpgroupPlaces) -> Program:
    return (
        Note("O of the first block of keys"),
        WaitFull(at.consumer.v),
        _issue_output(at),
        *_land_output(at, at.alpha),
    )


def _epilogue(at: WarpgroupPlaces) -> Program:
    """Each warpgroup normalises and stores its own rows; the copy engine writes them while the next tile begins."""
    return (
        Note("normalise once, at the end"),
        ReduceRows(at.total, at.row_sum),
        at.finish_rows,
        ScaleRows(at.acc_o, at.inv_sum),
        StoreRegisters(at.row_lse, at.lse, M_BLOCK),
        *(() if at.out_over_q else (WaitStores(), SyncWarpgroup(at.own))),
        StageTile(at.acc_o, at.out.at().own),
        FenceAsync(),
        SyncWarpgroup(at.own),
        TmaStore(at.out.at().own, at.result, M_BLOCK),
        *((WaitStores(),) if at.out_over_q else ()),
    )
