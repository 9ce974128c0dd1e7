"""The backward pass as one kernel of five products a pair of blocks: dK and dV of a block of keys, and its part of dQ.

A block of threads owns a block of keys and goes over the queries that see it. dK and dV stay in registers; what the
block adds to dQ of a block of queries is a product of dS with K, contracted over the keys of both warpgroups: dS goes
through shared memory, and the product from there to device memory, where the copy engine adds it to sums of f32.

Nothing but that exchange holds the warpgroups together, so that one multiplies while the other is at P and dS. A visit
ends with the product for the visit before it, whose dS the other warpgroup has stored by then. The first visit has none
before it: it multiplies zeros, and nobody adds what comes of them.

Sums of f32 hang on the order in which blocks of keys add to them. Where that is to be one order, it is the order in
which blocks of threads start: a head's last keys first, each going over queries from the first to the last. So under a
causal mask or a window each comes to a block of queries later than the one before it, by itself; and since nobody waits
but for who started earlier, all come to their end however few run at a time.
Source: Dao et al., "FlashAttention", arXiv 2205.14135, Algorithm 4; Shah et al., "FlashAttention-3", arXiv 2407.08608,
appendix B.1.
"""

from dataclasses import dataclass
from functools import partial

from attngen.expr import Expr, IndexRange, affine_parts, const, free_names, name, scale
from attngen.expr.arithmetic import floor_divide, times
from attngen.expr.intervals import lesser
from attngen.expr.tree import add, sub
from attngen.plan import (
    KEYS,
    QUERIES,
    BlockIndex,
    Buffer,
    Cursor,
    NamedBarriers,
    Program,
    QuerySums,
    RegTile,
    View,
)
from attngen.plan.steps import (
    AddSums,
    Advance,
    Clear,
    ClearTile,
    FenceAsync,
    ForHeads,
    ForTiles,
    HidePairs,
    IssueGemm,
    KeepColumns,
    Note,
    PassRank,
    PassTurn,
    Publish,
    Release,
    StageSums,
    StageTransposed,
    Step,
    TakeRank,
    TakeTurn,
    WaitAdded,
    WaitEmpty,
    WaitFull,
    WaitGemm,
    WaitStores,
    When,
)
from attngen.schedules.backward import N_BLOCK, for_queries
from attngen.schedules.key_loop import Masked
from attngen.schedules.warpgroup_backward import WarpgroupKeyPlaces, leave, load_next, wait_once


@dataclass(frozen=True)
class Exchange:
    """A tile that warpgroups store to shared memory for others to read.

    Attributes:
        tile: where it goes; each warpgroup has a part of it.
        fills, reads: where who stores and who reads stand in its ring.
    """

    tile: Buffer
    fills: Cursor
    reads: Cursor

    @property
    def own(self) -> View:
        """The part that a warpgroup stores next."""
        return self.tile.at(self.fills).own

    @property
    def here(self) -> View:
        """What a reader stands at."""
        return self.tile.at(self.reads)

    def publish(self) -> Program:
        """Hand over what has been stored."""
        return (Publish(self.fills), Advance(self.fills))


@dataclass(frozen=True)
class FusedPlaces(WarpgroupKeyPlaces):
    """What the kernel of all gradients of inputs may name.

    Attributes:
        pairs: dS, for both warpgroups.
        products: dS K, each warpgroup's part for a warp of its own.
        dq: that in registers.
        sums: of all blocks of keys.
        kept_k, kept_v: of K and V what stays in registers, so that shared memory is not read for it in each visit;
            None where nothing does.
        turn: at which a warpgroup waits to begin a visit until the other has P of its own; None where nothing holds
            them apart.
        is_tight: a score is worked out, for which registers are few: dP is issued when P is there, and pairs are hidden
            by a Step of its own behind the score.
    """

    pairs: Exchange
    products: Exchange
    dq: RegTile
    sums: QuerySums
    kept_k: RegTile | None
    kept_v: RegTile | None
    turn: NamedBarriers | None
    is_tight: bool

    @property
    def first_turn(self) -> Program:
        """Let the first warpgroup begin."""
        return (When("last warpgroup", (PassTurn(self.turn),)),) if self.turn else ()

    @property
    def keep(self) -> Program:
        """Read what stays in registers."""
        kept = ((self.kept_k, self.k), (self.kept_v, self.v))
        return tuple(KeepColumns(tile, of.here.own) for tile, of in kept if tile and of)


def earlier_keys(visible: IndexRange) -> Expr | None:
    """How many blocks of keys that see a block of queries come before one that does, by the numbers of both.

    All behind it, up to the last one whose rows begin in the block of queries or before it: rows of later keys must
    neither begin nor end earlier, so that who sees a block of queries are neighbours.

    Args:
        visible: the rows that see a key.

    Returns:
        that number, or None where rows of later keys may begin or end earlier.
    """
    key = name(KEYS.index)
    last_row = add(times(QUERIES.tile, name(QUERIES.block)), add(name(QUERIES.block), const(-1)))
    last = add(KEYS.blocks(name(KEYS.seqlen)), const(-1))
    for bound in (*visible.lower, *visible.upper):
        factors, _ = affine_parts(bound)
        factor = factors.get(key, 0)
        if factor < 0 or any(atom is not key and key.name in free_names(atom) for atom in factors):
            return None
        if factor and bound in visible.lower:
            past = sub(last_row, sub(bound, scale(factor, key)))
            last = lesser(floor_divide(past, scale(factor, name(KEYS.block))), last)
    return sub(last, KEYS.tile)


def fused_gradients(at: FusedPlaces) -> dict[str, Program]:
    """The programs of a consumer warpgroup, of the producer, and of a warpgroup's adder."""
    k, v, visible = at.k, at.v, at.visible
    assert v is not None
    consumer = (
        *(Clear(each.acc) for each in at.gradients),
        *wait_once(k, v),
        *at.zero_tails(N_BLOCK, k, v, owned=True),
        *at.zero_hidden(N_BLOCK, k.here.own, v.here.own),
        *at.keep,
        Note("no visit is before the first: zeros in its place"),
        ClearTile(at.pairs.own),
        *at.pairs.publish(),
        *at.first_turn,
        ForHeads(for_queries(visible, partial(_block_of_queries, at))),
        Note("dQ of the last visit"),
        *_multiply_late(at),
        WaitGemm(0, (at.dq,)),
        *_hand_over(at)[:-1],
        *at.put_out(N_BLOCK),
    )
    producer = (
        *k.load(N_BLOCK),
        *v.load(N_BLOCK),
        ForHeads(for_queries(visible, lambda m, _: load_next(m, at.q, at.do), split=False)),
    )
    adder = (
        *_leave_products(at, WaitFull(at.products.reads)),
        ForHeads(for_queries(visible, lambda m, _: _add(at, m), split=False)),
    )
    return {name: (ForTiles(program),) for name, program in
            (("consumer", consumer), ("producer", producer), ("adder", adder))}  # fmt: skip


def _block_of_queries(at: FusedPlaces, m: BlockIndex, masked: Masked) -> Program:
    """Products of a block of queries, and dQ of the one before."""
    pair, q, v, do, pairs = at.pair, at.q, at.v, at.do, at.pairs
    assert v is not None
    dv, dk = at.gradients
    dp = (
        *do.wait_beside(q),
        IssueGemm(pair.dp, v.here.own, do.here, starts_at_zero=True, kept=at.kept_v),
    )
    early, late = ((), dp) if at.is_tight else (dp, ())
    return (
        *(() if masked == "no" else at.zero_tails(m, q, do)),
        Note("Sᵀ = K Qᵀ, dPᵀ = V dOᵀ"),
        WaitFull(q.reads),
        *((TakeTurn(at.turn),) if at.turn else ()),
        IssueGemm(pair.s, at.k.here.own, q.here, starts_at_zero=True, kept=at.kept_k),
        *early,
        WaitGemm(len(early and (pair.dp,)), (pair.s,)),
        *_recover(at, m, masked),
        *late,
        *((PassTurn(at.turn),) if at.turn else ()),
        WaitEmpty(pairs.fills),
        WaitGemm(0, (pair.dp,)),
        pair.gradient(m),
        StageTransposed(pair.ds, pairs.own, m),
        Note("dV += Pᵀ dO, dK += dSᵀ Q, dQ of the visit before = dS K"),
        IssueGemm(dv.acc, dv.pairs, dv.times, starts_at_zero=False),
        *pairs.publish(),
        IssueGemm(dk.acc, dk.pairs, dk.times, starts_at_zero=False),
        *_multiply_late(at),
        WaitGemm(1, (dv.acc, dv.pairs, dk.acc, dk.pairs)),
        *(() if do.reads == q.reads else leave(do)),
        *leave(q),
        WaitGemm(0, (at.dq,)),
        Release(pairs.reads),
        Advance(pairs.reads),
        *_hand_over(at),
    )


def _recover(at: FusedPlaces, m: BlockIndex, masked: Masked) -> Program:
    """P of a pair of blocks whose product is there."""
    pair = at.pair
    if masked == "maybe" and at.is_tight:
        return (*pair.recover(m, N_BLOCK, "no"), HidePairs(pair.s, pair.p, m, N_BLOCK, pair.mask))
    return pair.recover(m, N_BLOCK, masked)


def _multiply_late(at: FusedPlaces) -> Program:
    """Start dS K of the visit before, once both warpgroups have stored their part of that dS.

    Who reads fences, for what both have stored: who stores would wait there for its stores to end.
    """
    pairs = at.pairs
    return (
        WaitFull(pairs.reads),
        FenceAsync(),
        IssueGemm(at.dq, pairs.here, at.k.here, starts_at_zero=True),
    )


def _hand_over(at: FusedPlaces) -> Program:
    """Leave dQ of a visit to the warpgroup's adder."""
    products = at.products
    return (WaitEmpty(products.fills), StageSums(at.dq, products.own), *products.publish())


def _add(at: FusedPlaces, m: BlockIndex) -> Program:
    """Add what the warpgroup has made for a block of queries, at its rank where there are ranks.

    The stage is free before the sum stands in device memory, for which who comes next waits.
    """
    products, ranks = at.products, at.sums.ranks
    add_up = _leave_products(
        at,
        WaitFull(products.reads),
        FenceAsync(),
        AddSums(products.here.own, at.dq, at.sums, m),
        WaitStores(),
    )
    if ranks is None:
        return add_up
    rank = earlier_keys(at.visible) if at.visible else None
    assert rank is not None
    return (TakeRank(ranks, m, rank), *add_up, WaitAdded(), PassRank(ranks, m))


def _leave_products(at: FusedPlaces, *after: Step) -> Program:
    """Do something with a product, then make room for another."""
    reads = at.products.reads
    return (*after, Release(reads), Advance(reads))
