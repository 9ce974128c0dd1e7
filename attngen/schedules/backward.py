"""The backward pass as two kernels that every warp runs alike: dQ of a block of queries, dK and dV of a block of keys.

P is recomputed from lse, so that nothing of the size of the scores is kept; each gradient has one owner, so that there
are no atomic additions and the same bits in every run. dK and dV work on transposed scores, whose accumulators are the
A operands of both. Seven matrix products a pair of blocks.
Source: Dao et al., "FlashAttention", arXiv 2205.14135, Algorithm 4; Dao, "FlashAttention-2", arXiv 2307.08691, 3.1.2.
"""

from collections.abc import Callable
from dataclasses import dataclass

from attngen.expr import Expr, IndexRange, free_names
from attngen.plan import BlockIndex, Buffer, Cursor, Program, Range, RegTile, Tensor, View
from attngen.plan.steps import (
    Advance,
    Clear,
    CommitCopies,
    ForBlocks,
    ForHeads,
    ForTiles,
    ForVisited,
    Gemm,
    HidePairs,
    LoadTile,
    Note,
    RecoverP,
    RowNumbers,
    ScaleGradient,
    ScoreGradient,
    StageTile,
    StartWalk,
    Step,
    StoreGradient,
    SyncThreads,
    WaitCopies,
    WhenBlock,
    WhenPartial,
    ZeroHidden,
)
from attngen.schedules.key_loop import LOAD, M_BLOCK, VISIT, KeyBlock, KeyLoop, Masked

M, N_BLOCK = BlockIndex("m"), BlockIndex("n_block")
M_MIN, M_FULL_BEGIN = BlockIndex("m_min"), BlockIndex("m_full_begin")
M_FULL_END, M_STOP = BlockIndex("m_full_end"), BlockIndex("m_stop")
LAND: Program = (WaitCopies(0), SyncThreads())


@dataclass(frozen=True)
class PairGradient:
    """What becomes of the products of a block of queries and one of keys.

    Attributes:
        s, dp: accumulators of the products, Q Kᵀ and dO Vᵀ, or both transposed.
        p, ds: rounded, as A operands; P where it is wanted.
        lse, delta: of every query, as `PrepareRows` makes them.
        score, slope: of the scaled product; None where the score is that.
        mask: of the spec.
        shown: what the mask asks of a key whatever the query; None where that is nothing.
    """

    s: RegTile
    dp: RegTile
    p: RegTile | None
    ds: RegTile
    lse: RowNumbers
    delta: RowNumbers
    score: Expr | None
    slope: Expr | None
    mask: Expr
    shown: Expr | None

    def of(self, rows: BlockIndex, block: BlockIndex, masked: Masked, wants_ds: bool = True) -> Program:
        """P and dS of a pair of blocks whose products are there."""
        recover = self.recover(rows, block, masked, wants_ds)
        return (*recover, self.gradient(rows)) if wants_ds else recover

    def zero_hidden(self, block: BlockIndex, *keys: View) -> Program:
        """Zeros over keys that the mask hides from every query, in K and V.

        P of them is 0, whatever their scores; times a slope, a dP or a K that is no number it would be none.
        """
        if self.shown is None:
            return ()
        by_group = self.s.axes[0] == "keys" and "h" in free_names(self.shown)
        return tuple(ZeroHidden(tile, block, self.shown, by_group) for tile in keys)

    def recover(self, rows: BlockIndex, block: BlockIndex, masked: Masked, wants_ds: bool = True) -> Program:
        """P of a pair of blocks out of their product."""
        slope = self.slope if wants_ds else None
        mask = self.mask if masked == "maybe" else None
        recover = RecoverP(self.s, self.p, self.lse, rows, block, self.score, slope, mask)
        if masked != "where the walk says so":
            return (recover,)
        return (recover, WhenPartial(VISIT, (HidePairs(self.s, self.p, rows, block, self.mask),)))

    def gradient(self, rows: BlockIndex) -> Step:
        """dS of a pair of blocks whose P is there."""
        return ScoreGradient(self.s, self.dp, self.delta, rows, self.ds)


@dataclass(frozen=True)
class GradientPlaces:
    """What both kernels may name.

    Attributes:
        pair: what becomes of products.
        score_unroll: k-steps of a product that are written out.
        q, k, v, do: tiles in shared memory.
        q_in, k_in, v_in, do_in: tensors in device memory.
        load_at, read_at: where the next copy goes in the ring of the side that is looped over, and which stage of it is
            worked on; of two stages one is filled while the other is read. None where there is one stage, which is
            filled when all are done with it.
    """

    pair: PairGradient
    score_unroll: int
    q: Buffer
    k: Buffer
    v: Buffer
    do: Buffer
    q_in: Tensor
    k_in: Tensor
    v_in: Tensor
    do_in: Tensor
    load_at: Cursor | None
    read_at: Cursor | None

    def load_queries(self, rows: BlockIndex, stage: Cursor | None = None) -> Program:
        """Start loading Q and dO of a block of queries."""
        return (
            LoadTile(self.q.at(stage), self.q_in, rows, pads=True),
            LoadTile(self.do.at(stage), self.do_in, rows, pads=True),
        )

    def alone(self, load: Program, work: Program) -> Program:
        """Work on a block once it has come, where there is one stage for it."""
        return (SyncThreads(), *load, CommitCopies(), *LAND, *work)

    def ahead(self, load_next: Step, work: Program) -> Program:
        """Work on a block that is on its way, while the next one comes to the other stage."""
        assert self.load_at is not None and self.read_at is not None
        return (*LAND, load_next, CommitCopies(), Advance(self.load_at), *work, Advance(self.read_at))

    def load_keys(self, block: BlockIndex, stage: Cursor | None = None) -> Program:
        """Start loading K and V of a block of keys."""
        return (
            LoadTile(self.k.at(stage), self.k_in, block, pads=True),
            LoadTile(self.v.at(stage), self.v_in, block, pads=True),
        )

    def zero_hidden(self, block: BlockIndex, stage: Cursor | None = None) -> Program:
        """Zeros over keys of a block, which has come, that the mask hides from every query."""
        return self.pair.zero_hidden(block, self.k.at(stage), self.v.at(stage))

    def own_keys(self, wants_v: bool = True) -> Program:
        """Load the keys of a tile that owns them, in one group with the first queries where those go ahead.

        Where the mask may hide some of them from every query they are waited for; who meets next finds zeros.
        """
        load = self.load_keys(N_BLOCK)[: 2 if wants_v else 1]
        if wants_v and (zeros := self.zero_hidden(N_BLOCK)):
            return (*load, CommitCopies(), *LAND, *zeros)
        return (*load, *((CommitCopies(),) if self.load_at is None else ()))


@dataclass(frozen=True)
class OwnGradient:
    """A gradient that a block of keys, or of queries, owns, and how it leaves the registers.

    Attributes:
        acc: (block_n or block_m, columns).
        pairs: the A operand that it sums: dSᵀ for dK, Pᵀ for dV, dS for dQ.
        times: the tile that this is multiplied by: of dK Q, of dV dO, of dQ K.
        staged: in shared memory, over tiles that nobody needs any more: in f32, since a call may want it so, or want it
            added to what it has.
        results: where it goes: a tensor for each format that a call may want.
        is_scaled: its pairs were left without softmax_scale.
    """

    acc: RegTile
    pairs: RegTile
    times: View
    staged: Buffer
    results: tuple[Tensor, ...]
    is_scaled: bool


def leave(gradients: tuple[OwnGradient, ...], block: BlockIndex, meet: Step) -> Program:
    """Bring the gradients of a block to device memory; no warp reads a tile any more.

    Args:
        gradients: of the block.
        block: its number.
        meet: lets all who stage them meet.
    """
    return (
        *(ScaleGradient(each.acc) for each in gradients if each.is_scaled),
        *(StageTile(each.acc, each.staged.at()) for each in gradients),
        meet,
        *(StoreGradient(each.staged.at(), each.results, block) for each in gradients),
    )


@dataclass(frozen=True)
class OverKeysPlaces(GradientPlaces):
    """What a kernel may name that loops over the keys of a block of queries.

    Attributes:
        keys: how it comes to the blocks of keys of a tile.
    """

    keys: KeyLoop


@dataclass(frozen=True)
class QueryGradientPlaces(OverKeysPlaces):
    """What the kernel of dQ may name.

    Attributes:
        dq: the gradient.
    """

    dq: OwnGradient


@dataclass(frozen=True)
class OverQueriesPlaces(GradientPlaces):
    """What a kernel may name that loops over the queries that see a block of keys.

    Attributes:
        visible: the queries that see a key, where they have a closed form.
    """

    visible: IndexRange | None


@dataclass(frozen=True)
class KeyGradientPlaces(OverQueriesPlaces):
    """What the kernel of dK and dV may name.

    Attributes:
        gradients: dV, dK, or both: of wide heads registers hold one.
    """

    gradients: tuple[OwnGradient, ...]


OverQueries = Callable[[BlockIndex, Masked], Program]
"""What is done with a block of queries: its number, and whether some pairs of it are hidden."""


def for_queries(visible: IndexRange | None, body: OverQueries, split: bool = True) -> Program:
    """Run a body for every block of queries that sees the tile's keys, unmasked ones apart if `split`.

    Without a closed form they are come to in a walk.
    """
    if visible is None:
        return (StartWalk(VISIT), ForVisited(VISIT, body(VISIT.n, "where the walk says so")))
    if not split:
        every = Range("all", M_MIN, M_STOP, descending=False, tile_class="any")
        return (ForBlocks(every, "m", body(M, "no")),)
    left = Range("left", M_MIN, M_FULL_BEGIN, descending=False, tile_class="partial")
    full = Range("full", M_FULL_BEGIN, M_FULL_END, descending=False, tile_class="full")
    right = Range("right", M_FULL_END, M_STOP, descending=False, tile_class="partial")
    ranges = (*((left,) if visible.lower else ()), full, right)
    return tuple(ForBlocks(each, "m", body(M, "no" if each is full else "maybe")) for each in ranges)


def over_keys(at: OverKeysPlaces, work: Callable[[BlockIndex, Masked], Program]) -> Program:
    """Work on every block of keys that the tile's queries see: its number, and whether some pairs of it are hidden."""

    def load(block: BlockIndex) -> Program:
        return at.load_keys(block, at.load_at)

    def block(at_block: KeyBlock) -> Program:
        n, masked = at_block.n, at_block.masked
        zeros = at.zero_hidden(n, at.read_at)
        on_block = (*at_block.where_masked((*zeros, SyncThreads()) if zeros else ()), *work(n, masked))
        if at.load_at is None:
            return at.alone(load(n), on_block)
        return at.ahead(at.keys.when_ahead(n - 1, load), on_block)

    if at.load_at is None:
        walks: Program = at.keys.start(VISIT)
        loop = at.keys.for_all_blocks(block)
        return (*walks, *at.load_queries(M_BLOCK), CommitCopies(), *loop, WaitCopies(0))
    first = (CommitCopies(), Advance(at.load_at))
    visits = (
        *at.load_queries(M_BLOCK),
        *load(at.keys.first_to_load),
        *first,
        *at.keys.for_all_blocks(block),
    )
    return (*at.keys.start(LOAD, VISIT), at.keys.when_first(visits, LOAD))


def query_gradients(at: QueryGradientPlaces) -> Program:
    """The program of every warp: dQ of a block of queries, over the keys that it sees."""
    k, v = at.k.at(at.read_at), at.v.at(at.read_at)

    def work(n: BlockIndex, masked: Masked) -> Program:
        return (
            Note("S = Q Kᵀ, dP = dO Vᵀ"),
            Gemm(at.pair.s, at.q.at(), k, starts_at_zero=True, unroll=at.score_unroll),
            Gemm(at.pair.dp, at.do.at(), v, starts_at_zero=True, unroll=at.score_unroll),
            *at.pair.of(M_BLOCK, n, masked),
            Note("dQ += dS K"),
            Gemm(at.dq.acc, at.pair.ds, k, starts_at_zero=False),
        )

    return (
        ForTiles(
            (
                Clear(at.dq.acc),
                *over_keys(at, work),
                SyncThreads(),
                *leave((at.dq,), M_BLOCK, SyncThreads()),
            )
        ),
    )


def over_queries(at: OverQueriesPlaces, work: OverQueries) -> Program:
    """Work on every block of queries, of one head, that see the tile's keys."""

    def block(m: BlockIndex, masked: Masked) -> Program:
        if at.load_at is None:
            return at.alone(at.load_queries(m), work(m, masked))
        return at.ahead(WhenBlock(M_STOP - 1, m + 1, at.load_queries(m + 1, at.load_at)), work(m, masked))

    loops = for_queries(at.visible, block)
    if at.load_at is None:
        return loops
    return (
        WhenBlock(M_STOP - 1, M_MIN, at.load_queries(M_MIN, at.load_at)),
        CommitCopies(),
        Advance(at.load_at),
        *loops,
        Advance(at.load_at),  # past the stage that no block was left for, to the one that is free
    )


def key_gradients(at: KeyGradientPlaces) -> Program:
    """The program of every warp: dK and dV of a block of keys, over the queries that see it, head after head."""
    wants_ds = any(each.pairs is at.pair.ds for each in at.gradients)
    q, do = at.q.at(at.read_at), at.do.at(at.read_at)
    dp = Gemm(at.pair.dp, at.v.at(), do, starts_at_zero=True, unroll=at.score_unroll)

    def work(m: BlockIndex, masked: Masked) -> Program:
        return (
            Note("Sᵀ = K Qᵀ, dPᵀ = V dOᵀ"),
            Gemm(at.pair.s, at.k.at(), q, starts_at_zero=True, unroll=at.score_unroll),
            *((dp,) if wants_ds else ()),
            *at.pair.of(m, N_BLOCK, masked, wants_ds),
            Note("dV += Pᵀ dO, dK += dSᵀ Q"),
            *(Gemm(each.acc, each.pairs, each.times, starts_at_zero=False) for each in at.gradients),
        )

    return (
        ForTiles(
            (
                *(Clear(each.acc) for each in at.gradients),
                *at.own_keys(wants_v=wants_ds),
                ForHeads(over_queries(at, work)),
                *LAND,
                *leave(at.gradients, N_BLOCK, SyncThreads()),
            )
        ),
    )
