"""FlashAttention-3's forward: a producer feeds the copy engine, consumer warpgroups feed the tensor core.

K and V pass through rings guarded by mbarriers, so that nobody waits for a whole block of threads. A consumer issues
S of block n and O of block n + 1 together; with `overlap` the softmax of block n runs while the tensor core is still
at O. `pingpong` adds turns: one warpgroup's GEMMs run under the other's softmax.

Where keys are cut into parts, a tile's rows may be those of several heads, which the copy engine knows nothing of: each
warpgroup brings its own rows of Q, and stores its own rows of the result or of the part.
Source: Shah et al., "FlashAttention-3", arXiv 2407.08608, Algorithms 1 and 2.
"""

from dataclasses import dataclass

from attngen.plan import (
    DENSE,
    BlockIndex,
    Buffer,
    Cursor,
    Lengths,
    NamedBarriers,
    Program,
    RegTile,
    RegVec,
    Tensor,
    View,
)
from attngen.plan.steps import (
    Advance,
    Clear,
    CommitCopies,
    DrawTile,
    FenceAsync,
    FindPages,
    ForTiles,
    IssueGemm,
    LoadTile,
    Note,
    PassTurn,
    ReadTile,
    ReduceRows,
    Release,
    ScaleRows,
    StageTile,
    StoreRegisters,
    StoreTile,
    SyncWarpgroup,
    TakeTile,
    TakeTurn,
    TmaLoad,
    TmaStore,
    TmaStoreOwn,
    WaitCopies,
    WaitEmpty,
    WaitFull,
    WaitGemm,
    WaitStores,
    When,
    WhenAtEnd,
    ZeroTail,
)
from attngen.schedules.key_loop import M_BLOCK, VISIT, KeyBlock
from attngen.schedules.tile_places import TilePlaces
from attngen.schedules.warpgroup_output import Output


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
        output: O while its products are in flight.
        passes_late: the turn is passed when the GEMMs have landed, not when they have been issued.
        persistent: a block of threads works on many tiles.
        out_over_q: `out` has the bytes of `q`, which is then released only when the result has been read.
        producer, consumer: where the roles stand in the rings.
        turn, own: the named barriers by which warpgroups take turns, and by which one meets itself.
        lengths: of the sequences.
        reads_tile_again: what the end of a tile alone asks of it is not kept in registers until then.
    """

    output: Output
    passes_late: bool
    persistent: bool
    out_over_q: bool
    producer: RingCursors
    consumer: RingCursors
    turn: NamedBarriers
    own: NamedBarriers
    lengths: Lengths = DENSE
    reads_tile_again: bool = False

    @property
    def own_q(self) -> View:
        """The rows of Q that a warpgroup multiplies."""
        return (self.q.at() if self.parts else self.q.at(self.consumer.q)).own

    @property
    def reg_tiles(self) -> tuple[RegTile, ...]:
        """What of tiles is kept in registers."""
        return (*super().reg_tiles, *((self.output.part,) if self.output.part else ()))

    @property
    def reg_vecs(self) -> tuple[RegVec, ...]:
        """What is kept of each row."""
        scales, output = self.scores.scales, self.output
        of_promotion = (output.alpha_before,) if output.part else ()
        return (*self.softmax.vectors, *of_promotion, *(scales.vectors if scales else ()))


def warp_specialized(at: WarpgroupPlaces) -> dict[str, Program]:
    """The programs of a consumer warpgroup and of the producer thread."""
    return {"consumer": _consumer(at, turns=False), "producer": _producer(at)}


def pingpong(at: WarpgroupPlaces) -> dict[str, Program]:
    """The programs of warp_specialized, whose warpgroups take turns at issuing GEMMs."""
    return {"consumer": _consumer(at, turns=True), "producer": _producer(at)}


# ---- producer -------------------------------------------------------------------------------------------------------
def _producer(at: WarpgroupPlaces) -> Program:
    """K goes first and V one block behind it; the next tile's K and Q load under this tile's end."""
    rings, keys = at.producer, at.keys

    def load(buffer: Buffer, cursor: Cursor, src: Tensor, block: BlockIndex, beside: Program = ()) -> Program:
        once = src is at.q_in or at.parts
        return (
            *((FindPages(block),) if at.lengths.is_paged(src.axis) else ()),
            WaitEmpty(cursor),
            *beside,
            TmaLoad(buffer.at(cursor), src, block, "evict_first" if once else "evict_last"),
            Advance(cursor),
        )

    def load_k(block: BlockIndex) -> Program:
        return load(at.k, rings.k, at.k_in, block, at.scores.stage(rings.k, block))

    def load_v(block: BlockIndex) -> Program:
        return load(at.v, rings.v, at.v_in, block)

    def load_pair(block: KeyBlock) -> Program:
        return (*load_k(block.n), *load_v(block.before))

    draw = (WaitEmpty(rings.tile), DrawTile(rings.tile), Advance(rings.tile))
    return (
        ForTiles(
            (
                *keys.start(VISIT),
                keys.when_first(load_k(keys.first_block.n)),
                *(() if at.parts else load(at.q, rings.q, at.q_in, M_BLOCK)),
                keys.when_any((*keys.for_further_blocks(load_pair, split=False), *load_v(keys.last_block))),
                *(draw if at.persistent else ()),
            )
        ),
    )


# ---- consumer -------------------------------------------------------------------------------------------------------
def _consumer(at: WarpgroupPlaces, turns: bool) -> Program:
    rings, keys = at.consumer, at.keys
    release_q = () if at.parts else (Release(rings.q), Advance(rings.q))
    first_turn = When("last warpgroup", (Note("the first warpgroup goes first"), PassTurn(at.turn)))
    next_tile = (
        WaitFull(rings.tile, together=True),
        TakeTile(rings.tile),
        SyncWarpgroup(at.own),
        Release(rings.tile),
        Advance(rings.tile),
    )
    return (
        *((first_turn,) if turns else ()),
        ForTiles(
            (
                Clear(at.acc_o),
                *at.softmax.start_maximum,
                Clear(at.softmax.row_sum),
                *keys.start(VISIT),
                *at.scores.start(M_BLOCK),
                *_come_to_q(at),
                *at.scores.orient(at.own_q, after=(FenceAsync(), SyncWarpgroup(at.own))),
                keys.when_first(
                    (*_first_block(at), *keys.for_further_blocks(lambda block: _block(at, block, turns)))
                ),
                *(() if at.out_over_q or at.parts else (SyncWarpgroup(at.own), *release_q)),
                *at.softmax.read_sink,
                keys.when_any(
                    (
                        Note("O of the first block of keys"),
                        *at.output.issue,
                        *at.output.land(is_last=True),
                    )
                ),
                *_epilogue(at),
                *(release_q if at.out_over_q else ()),
                *(next_tile if at.persistent else ()),
            )
        ),
        *(() if at.out_over_q or at.out is None or at.parts else (WaitStores(),)),
    )


def _come_to_q(at: WarpgroupPlaces) -> Program:
    """Wait for Q, of which a warpgroup brings its own rows where keys are cut."""
    if at.parts:
        load = LoadTile(at.own_q, at.q_in, M_BLOCK, pads=True)
        return (load, CommitCopies(), WaitCopies(0), FenceAsync(), SyncWarpgroup(at.own))
    tail = zero_tail(at, at.own_q, M_BLOCK) if at.votes_on_products else ()
    return (WaitFull(at.consumer.q, together=True), *tail)


def zero_tail(at: WarpgroupPlaces, tile: View, block: BlockIndex, wait: Program = ()) -> Program:
    """Zeros where the copy engine left a neighbour's rows, as it leaves them itself at the end of a tensor."""
    axis = tile.axes[0]
    if not at.lengths.has_neighbours(axis):
        return ()
    return (WhenAtEnd(axis, block, (*wait, ZeroTail(tile, block), FenceAsync(), SyncWarpgroup(at.own))),)


def zero_hidden(at: WarpgroupPlaces, tile: View, block: KeyBlock, wait: Program = ()) -> Program:
    """Zeros over keys of a block that the mask hides from every query, before a product reads them."""
    if not (zeros := at.zero_hidden(block.n, tile)):
        return ()
    if block != at.keys.first_block and not at.scores.pairs.hides_beside_end:
        return ()
    return block.where_masked((*wait, *zeros, FenceAsync(), SyncWarpgroup(at.own)))


def _first_block(at: WarpgroupPlaces) -> Program:
    """Only the block that is visited first may reach past the end of the keys."""
    k, v, block = at.consumer.k, at.consumer.v, at.keys.first_block
    return (
        Note("the last block of keys: scores only, O follows one block behind"),
        *at.scores.begin(block, is_first=True),
        WaitFull(k),
        *(zero_tail(at, at.k.at(k), block.n) if at.votes_on_products else ()),
        *(zero_hidden(at, at.k.at(k), block) if at.votes_on_products else ()),
        *at.scores.read_stage(k),
        _issue_scores(at),
        WaitGemm(0, (at.scores.acc_s,)),
        *_leave_k(at),
        *at.scores.finish(block),
        *at.softmax.update_maximum,
        *at.softmax.exponentiate,
        at.softmax.convert,
        *zero_tail(at, at.v.at(v), block.n, wait=(WaitFull(v, together=True),)),
        *zero_hidden(at, at.v.at(v), block, wait=(WaitFull(v, together=True),)),
    )


def _block(at: WarpgroupPlaces, block: KeyBlock, turns: bool) -> Program:
    """S of a block and O of the block before; alpha rescales what was summed under the old maximum."""
    k, v, output, softmax = at.consumer.k, at.consumer.v, at.output, at.softmax
    pass_turn = (PassTurn(at.turn),) if turns else ()
    when_issued, when_landed = ((), pass_turn) if at.passes_late else (pass_turn, ())
    issue = (
        *at.scores.begin(block),
        WaitFull(k),
        *(zero_hidden(at, at.k.at(k), block) if at.votes_on_products else ()),
        *at.scores.read_stage(k),
        *((TakeTurn(at.turn),) if turns else ()),
        Note(f"S = Q K[{block.n}]ᵀ, and behind it O += P V[{block.before}]"),
        _issue_scores(at),
        *output.issue,
        *when_issued,
    )
    row_max = (
        Note("online softmax of block n"),
        *at.scores.finish(block),
        *output.keep_alpha,
        *softmax.update_maximum,
    )
    # A late turn is passed ahead of the vote on maxima: ptxas would put it off until the end of the softmax.
    landed = (*when_landed, *_leave_k(at))
    land_scores = (WaitGemm(1, (at.scores.acc_s,)), *landed)
    land_output, exponentiate = output.land(), softmax.exponentiate
    if not output.overlap:
        land_both = (WaitGemm(0, (at.scores.acc_s,)), *landed, *land_output)
        steps = (*land_both, *row_max, *output.rescale_at("middle"), *exponentiate)
    elif output.rescale == "middle":
        steps = (*land_scores, *row_max, *land_output, *output.rescale_at("middle"), *exponentiate)
    else:
        steps = (*land_scores, *row_max, *output.land(meanwhile=exponentiate))
    hidden = zero_hidden(at, at.v.at(v), block, wait=(WaitFull(v),))
    return (*issue, *steps, softmax.convert, *hidden, *output.rescale_at("last"))


def _issue_scores(at: WarpgroupPlaces) -> IssueGemm:
    return IssueGemm(at.scores.acc_s, at.own_q, at.k.at(at.consumer.k), at.scores.starts_at_zero)


def _leave_k(at: WarpgroupPlaces) -> Program:
    """Hand the stage of K back, once its product is there."""
    k = at.consumer.k
    return (*at.scores.leave_stage(k), Release(k), Advance(k))


def _epilogue(at: WarpgroupPlaces) -> Program:
    """Each warpgroup normalises and stores its own rows, or leaves them as a part."""
    reduce = (
        Note("normalise once, at the end"),
        *((ReadTile(),) if at.reads_tile_again else ()),
        ReduceRows(at.softmax.total, at.softmax.row_sum),
    )
    finish = (
        at.softmax.finish,
        *at.softmax.join_sink,
        ScaleRows(at.acc_o, at.softmax.inv_sum),
        StoreRegisters(at.softmax.row_lse, at.lse, M_BLOCK),
        *_store_result(at),
    )
    if at.parts is None:
        return (*reduce, *finish)
    leave = (
        StoreRegisters(at.acc_o, at.parts.out, M_BLOCK),
        *at.parts.leave_numbers(at.softmax, M_BLOCK),
    )
    return (*reduce, *at.parts.finish(at.softmax, M_BLOCK, at.result, at.lse, leave, finish))


def _store_result(at: WarpgroupPlaces) -> Program:
    """Bring the warpgroup's rows of O to device memory; the copy engine writes them while the next tile begins."""
    if at.out is None:
        return (StoreRegisters(at.acc_o, at.result, M_BLOCK),)
    own = at.out.at().own
    if at.parts:
        return (StageTile(at.acc_o, own), SyncWarpgroup(at.own), StoreTile(own, at.result, M_BLOCK))
    has_neighbours = at.lengths.has_neighbours(at.result.axis)
    store = TmaStoreOwn if has_neighbours else TmaStore
    return (
        *(() if at.out_over_q else (WaitStores(), SyncWarpgroup(at.own))),
        StageTile(at.acc_o, own),
        FenceAsync(),
        SyncWarpgroup(at.own),
        store(own, at.result, M_BLOCK),
        *((WaitStores(),) if at.out_over_q else ()),
        *((SyncWarpgroup(at.own),) if at.out_over_q and has_neighbours else ()),
    )
