"""The backward pass on warpgroups: a producer feeds the copy engine, consumers feed the tensor core.

The kernels are those of `backward`: dQ of a block of queries, dK and dV of a block of keys, or one of the two. Each
consumer owns 64 rows of the gradients, and none waits for another in the loop, so that one multiplies while another is
at P and dS.
Source: Shah et al., "FlashAttention-3", arXiv 2407.08608, section 3.1 and appendix B.1.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial

from attngen.expr import IndexRange
from attngen.plan import (
    BlockIndex,
    Buffer,
    Cursor,
    Lengths,
    NamedBarriers,
    Program,
    RegVec,
    Rows,
    Tensor,
    View,
)
from attngen.plan.steps import (
    Advance,
    Clear,
    FenceAsync,
    ForHeads,
    ForTiles,
    IssueGemm,
    Keep,
    LoadRegisters,
    Note,
    Release,
    ScaleGradient,
    StageTile,
    Step,
    StoreGradient,
    SyncWarpgroup,
    SyncWarpgroups,
    TmaLoad,
    TmaLoadRows,
    WaitEmpty,
    WaitFull,
    WaitGemm,
    WhenAtEnd,
    ZeroTail,
)
from attngen.schedules.backward import N_BLOCK, OwnGradient, PairGradient, for_queries
from attngen.schedules.key_loop import M_BLOCK, VISIT, KeyBlock, KeyLoop, Masked


@dataclass(frozen=True)
class Stream:
    """A tensor whose blocks come through a ring, to be read by every consumer. Two may share a ring.

    Attributes:
        tensor, tile: where a block comes from, and the stages that it goes to.
        fills, reads: where the producer and a consumer stand in the ring.
        numbers, beside: a number of each row that comes along, and its stages; None where none does.
        keep: what the L2 cache is to do with its lines.
    """

    tensor: Tensor
    tile: Buffer
    fills: Cursor
    reads: Cursor
    numbers: Rows | None = None
    beside: Buffer | None = None
    keep: Keep = "evict_last"

    @property
    def here(self) -> View:
        """The block that a consumer stands at."""
        return self.tile.at(self.reads)

    def load(self, block: BlockIndex) -> Program:
        """Have the copy engine bring a block."""
        along: Program = ()
        if self.numbers and self.beside:
            along = (TmaLoadRows(self.beside.at(self.fills), self.numbers, block),)
        return (*along, TmaLoad(self.tile.at(self.fills), self.tensor, block, self.keep))

    def wait_beside(self, other: "Stream") -> Program:
        """Wait until the block has come, after the other's has."""
        return () if self.reads == other.reads else (WaitFull(self.reads),)


def load_next(block: BlockIndex, *streams: Stream) -> Program:
    """Have the copy engine bring the next block of each, as soon as its stage is free."""
    steps: list[Step] = []
    for fills in dict.fromkeys(each.fills for each in streams):
        loads = (step for each in streams if each.fills == fills for step in each.load(block))
        steps += (WaitEmpty(fills), *loads, Advance(fills))
    return tuple(steps)


def wait_once(*streams: Stream) -> Program:
    """Wait for the only blocks of these that a tile has."""
    return tuple(WaitFull(reads, together=True) for reads in dict.fromkeys(each.reads for each in streams))


def leave(stream: Stream) -> Program:
    """Hand a block back, and what shares its ring; go on to the next."""
    return (Release(stream.reads), Advance(stream.reads))


@dataclass(frozen=True)
class WarpgroupGradientPlaces(ABC):
    """What the kernels for warpgroups may name.

    Attributes:
        pair: what becomes of products.
        q, k, v, do: tensors on their way through shared memory; no V where dV alone is wanted.
        gradients: what the kernel is for: dQ; or dV, dK, or both.
        own, common: the named barriers at which a warpgroup meets itself, and the other.
        lengths: of the sequences of its calls.
    """

    pair: PairGradient
    q: Stream
    k: Stream
    v: Stream | None
    do: Stream
    gradients: tuple[OwnGradient, ...]
    own: NamedBarriers
    common: NamedBarriers
    lengths: Lengths

    def zero_tails(self, block: BlockIndex, first: Stream, second: Stream, owned: bool = False) -> Program:
        """Zeros where the copy engine left a neighbour's rows in a block of two tensors of one side.

        What is 0 of these rows, P or dS, times what is no number is no number. Both are waited for ahead of the
        products, since nothing may branch between those that are issued and their landing. Of a block whose rows the
        warpgroups own (`owned`) each zeroes its own.
        """
        (axis,) = {each.tensor.axis for each in (first, second)}
        if not self.lengths.has_neighbours(axis):
            return ()
        tiles = (each.here.own if owned else each.here for each in (first, second))
        tails = (*wait_once(first, second), *(ZeroTail(tile, block) for tile in tiles))
        return (WhenAtEnd(axis, block, (*tails, FenceAsync(), SyncWarpgroup(self.own))),)

    def zero_hidden(self, block: BlockIndex, k: View, v: View, wait: Program = ()) -> Program:
        """Zeros over keys of a block that the mask hides from every query, before products read them."""
        if not (zeros := self.pair.zero_hidden(block, k, v)):
            return ()
        return (*wait, *zeros, FenceAsync(), SyncWarpgroup(self.own))

    @property
    @abstractmethod
    def walks(self) -> bool:
        """Whether blocks are come to in a walk, which a whole warp goes."""

    def put_out(self, block: BlockIndex) -> Program:
        """Bring the warpgroup's rows of the gradients to device memory; they are staged over what nobody reads."""
        return (
            *(ScaleGradient(each.acc) for each in self.gradients if each.is_scaled),
            SyncWarpgroups(self.common),
            *(StageTile(each.acc, each.staged.at().own) for each in self.gradients),
            SyncWarpgroup(self.own),
            *(StoreGradient(each.staged.at().own, each.results, block) for each in self.gradients),
        )


# ---- dQ of a block of queries ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class WarpgroupQueryPlaces(WarpgroupGradientPlaces):
    """What the kernel of dQ may name.

    Attributes:
        keys: how it comes to the blocks of keys of a tile.
        numbers: of every row what the pairs ask for, and where that comes from.
    """

    keys: KeyLoop
    numbers: tuple[tuple[RegVec, Rows], ...]

    @property
    def walks(self) -> bool:
        """Whether blocks of keys are come to in a walk."""
        return self.keys.walks


def query_gradients(at: WarpgroupQueryPlaces) -> dict[str, Program]:
    """The programs of a consumer warpgroup and of the producer: dQ over the keys that a block of queries sees."""
    (gradient,) = at.gradients
    pair, k, v = at.pair, at.k, at.v
    assert v is not None

    def block(of: KeyBlock) -> Program:
        return (
            *(at.zero_tails(of.n, k, v) if of.may_be_last else ()),
            *of.where_masked(
                at.zero_hidden(of.n, k.here, v.here, wait=(WaitFull(k.reads), *v.wait_beside(k)))
            ),
            Note("S = Q Kᵀ, dP = dO Vᵀ"),
            WaitFull(k.reads),
            IssueGemm(pair.s, at.q.here.own, k.here, starts_at_zero=True),
            *v.wait_beside(k),
            IssueGemm(pair.dp, at.do.here.own, v.here, starts_at_zero=True),
            WaitGemm(1, (pair.s,)),
            *pair.recover(M_BLOCK, of.n, of.masked),
            WaitGemm(0, (pair.dp,)),
            *(() if v.reads == k.reads else leave(v)),
            pair.gradient(M_BLOCK),
            Note("dQ += dS K"),
            IssueGemm(gradient.acc, gradient.pairs, gradient.times, starts_at_zero=False),
            WaitGemm(0, (gradient.acc, gradient.pairs)),
            *leave(k),
        )

    def load(of: KeyBlock) -> Program:
        return load_next(of.n, k, v)

    start = at.keys.start(VISIT)
    consumer = (
        Clear(gradient.acc),
        *start,
        *wait_once(at.q, at.do),
        *(LoadRegisters(vector, rows, M_BLOCK) for vector, rows in at.numbers),
        *at.keys.for_all_blocks(block),
        *at.put_out(M_BLOCK),
    )
    producer = (
        *at.q.load(M_BLOCK),
        *at.do.load(M_BLOCK),
        *start,
        *at.keys.for_all_blocks(load, split=False),
    )
    return {"consumer": (ForTiles(consumer),), "producer": (ForTiles(producer),)}


# ---- dK and dV of a block of keys -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class WarpgroupKeyPlaces(WarpgroupGradientPlaces):
    """What a kernel of dK, of dV or of both may name.

    Attributes:
        visible: the queries that see a key, where they have a closed form.
        dv_late: dV is issued when dS is there, not when P is; while dS is worked out S and P share registers.
    """

    visible: IndexRange | None
    dv_late: bool

    @property
    def walks(self) -> bool:
        """Whether blocks of queries are come to in a walk."""
        return self.visible is None


def key_gradients(at: WarpgroupKeyPlaces) -> dict[str, Program]:
    """The programs of a consumer warpgroup and of the producer: over the queries that see a block of keys."""
    own_keys = (at.k, at.v) if at.v else (at.k,)
    consumer = (
        *(Clear(each.acc) for each in at.gradients),
        *wait_once(*own_keys),
        *(at.zero_hidden(N_BLOCK, at.k.here.own, at.v.here.own) if at.v else ()),
        ForHeads(for_queries(at.visible, partial(_block_of_queries, at))),
        *at.put_out(N_BLOCK),
    )
    producer = (
        *(step for each in own_keys for step in each.load(N_BLOCK)),
        ForHeads(for_queries(at.visible, lambda m, _: load_next(m, at.q, at.do), split=False)),
    )
    return {"consumer": (ForTiles(consumer),), "producer": (ForTiles(producer),)}


def _block_of_queries(at: WarpgroupKeyPlaces, m: BlockIndex, masked: Masked) -> Program:
    """Products of a block of queries; each gradient's is issued as soon as its operand is there."""
    pair, q, v, do = at.pair, at.q, at.v, at.do
    of_p = [each for each in at.gradients if each.pairs is pair.p]
    of_ds = [each for each in at.gradients if each.pairs is pair.ds]
    scores = (WaitFull(q.reads), IssueGemm(pair.s, at.k.here.own, q.here, starts_at_zero=True))
    dp = (*do.wait_beside(q), IssueGemm(pair.dp, v.here.own, do.here, starts_at_zero=True)) if v else ()

    def issue(gradients: list[OwnGradient]) -> Program:
        return tuple(IssueGemm(each.acc, each.pairs, each.times, starts_at_zero=False) for each in gradients)

    def land(pending: int, gradients: list[OwnGradient]) -> Program:
        return tuple(WaitGemm(pending, (each.acc, each.pairs)) for each in gradients)

    dv = (Note("dV += Pᵀ dO"), *issue(of_p)) if of_p else ()
    early, late = ((), dv) if at.dv_late else (dv, ())
    return (
        *at.zero_tails(m, q, do),
        Note("Sᵀ = K Qᵀ, dPᵀ = V dOᵀ" if v else "Sᵀ = K Qᵀ"),
        *scores,
        *dp,
        WaitGemm(1 if v else 0, (pair.s,)),
        *pair.recover(m, N_BLOCK, masked, wants_ds=v is not None),
        *(() if v else do.wait_beside(q)),
        *early,
        *((WaitGemm(1 if early else 0, (pair.dp,)), pair.gradient(m)) if v else ()),
        *late,
        *((Note("dK += dSᵀ Q"), *issue(of_ds)) if of_ds else ()),
        *land(len(of_ds), of_p),
        *(() if do.reads == q.reads else leave(do)),
        *land(0, of_ds),
        *leave(q),
    )
