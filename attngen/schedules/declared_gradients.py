"""Gradients of what a spec declares: of each pair P (dP - D) times the derivative of the score, added up.

Each has a kernel of its own, of two products a pair of blocks, so that those of dQ, dK and dV need not know. What is
added up has one owner, as in `backward`: a pair of blocks an element for each pair, a block of queries or of keys a sum
for each of its rows, of every head by itself; `SumRows` adds those up where an element belongs to several rows. What is
looked up here and there is summed in a table of each thread, or where it stands, in no order.
"""

from dataclasses import dataclass, replace

from attngen.expr import Expr
from attngen.plan import (
    BlockIndex,
    BlockTables,
    Elements,
    PairMatrix,
    PrivateTable,
    Program,
    RegTile,
    RegVec,
    Rows,
    View,
)
from attngen.plan.steps import (
    AddPairs,
    AddToElements,
    AddToTable,
    Clear,
    ClearTable,
    ForHeads,
    ForSummed,
    ForTiles,
    Gemm,
    Note,
    ReduceRows,
    StorePairs,
    StoreRegisters,
    StoreTable,
    SumPairs,
    SyncThreads,
    WaitCopies,
    When,
)
from attngen.schedules.backward import (
    N_BLOCK,
    GradientPlaces,
    OverKeysPlaces,
    OverQueriesPlaces,
    over_keys,
    over_queries,
)
from attngen.schedules.key_loop import M_BLOCK, Masked


@dataclass(frozen=True)
class RowSums:
    """A sum for each row of a tile of pairs, a query or a key, of one head.

    Attributes:
        part, total: what a lane holds of it, and the whole.
        result: where it goes.
    """

    part: RegVec
    total: RegVec
    result: Rows


@dataclass(frozen=True)
class PairSumPlaces(GradientPlaces):
    """What the kernel of an element for each pair may name.

    Attributes:
        acc: (block_m, block_n), the sums over batches and heads.
        result: where they go.
    """

    acc: RegTile
    result: PairMatrix


@dataclass(frozen=True)
class QuerySumPlaces(OverKeysPlaces):
    """What the kernel of a sum for each query may name."""

    sums: RowSums


@dataclass(frozen=True)
class KeySumPlaces(OverQueriesPlaces):
    """What the kernel of a sum for each key may name."""

    sums: RowSums


@dataclass(frozen=True)
class TableSumPlaces(OverKeysPlaces):
    """What the kernel of a table for each block of queries may name.

    Attributes:
        table: of each thread.
        entry: which one a pair reads.
        result: where the sums over threads go.
    """

    table: PrivateTable
    entry: Expr
    result: BlockTables


@dataclass(frozen=True)
class ElementSumPlaces(OverKeysPlaces):
    """What the kernel may name that adds to elements where they stand.

    Attributes:
        read: the lookup of each pair.
        result: the tensor.
    """

    read: Expr
    result: Elements


def _slopes(at: GradientPlaces, rows: BlockIndex, block: BlockIndex, masked: Masked) -> Program:
    """S and dP of a pair of blocks, or their transposes, and P times the derivative of the score in the place of S."""
    pair = replace(at.pair, p=None)
    is_transposed = pair.s.axes[0] == "keys"

    def products(acc: RegTile, queries: View, keys: View) -> Gemm:
        a, b = (keys, queries) if is_transposed else (queries, keys)
        return Gemm(acc, a, b, starts_at_zero=True, unroll=at.score_unroll)

    of_queries, of_keys = (at.read_at, None) if is_transposed else (None, at.read_at)
    return (
        Note("Sᵀ = K Qᵀ, dPᵀ = V dOᵀ" if is_transposed else "S = Q Kᵀ, dP = dO Vᵀ"),
        products(pair.s, at.q.at(of_queries), at.k.at(of_keys)),
        products(pair.dp, at.do.at(of_queries), at.v.at(of_keys)),
        *pair.recover(rows, block, masked),
    )


def pair_sums(at: PairSumPlaces) -> Program:
    """The program of every warp: the elements of a pair of blocks, each summed over batches and heads that share it."""
    pair = at.pair
    zeros = at.zero_hidden(N_BLOCK)
    work = (
        *((*zeros, SyncThreads()) if zeros else ()),
        *_slopes(at, M_BLOCK, N_BLOCK, "maybe"),
        AddPairs(pair.s, pair.dp, pair.delta, M_BLOCK, at.acc),
    )
    visit = When("m sees n", at.alone((*at.load_queries(M_BLOCK), *at.load_keys(N_BLOCK)), work))
    return (ForTiles((Clear(at.acc), ForSummed((visit,)), StorePairs(at.acc, at.result, M_BLOCK, N_BLOCK))),)


def query_sums(at: QuerySumPlaces) -> Program:
    """The program of every warp: a sum for each query of a block, over the keys that it sees."""
    pair, sums = at.pair, at.sums

    def work(n: BlockIndex, masked: Masked) -> Program:
        add = SumPairs(pair.s, pair.dp, pair.delta, M_BLOCK, sums.part)
        return (*_slopes(at, M_BLOCK, n, masked), add)

    return (
        ForTiles(
            (
                Clear(sums.part),
                *over_keys(at, work),
                ReduceRows(sums.total, sums.part),
                StoreRegisters(sums.total, sums.result, M_BLOCK),
            )
        ),
    )


def table_sums(at: TableSumPlaces) -> Program:
    """The program of every warp: a table of sums over the pairs of a block of queries."""
    pair = at.pair

    def work(n: BlockIndex, masked: Masked) -> Program:
        add = AddToTable(pair.s, pair.dp, pair.delta, M_BLOCK, n, at.table, at.entry)
        return (*_slopes(at, M_BLOCK, n, masked), add)

    store = (SyncThreads(), StoreTable(at.table, at.result, M_BLOCK))
    return (ForTiles((ClearTable(at.table), *over_keys(at, work), *store)),)


def element_sums(at: ElementSumPlaces) -> Program:
    """The program of every warp: what the pairs of a block of queries read, added to where it stands."""
    pair = at.pair

    def work(n: BlockIndex, masked: Masked) -> Program:
        add = AddToElements(pair.s, pair.dp, pair.delta, M_BLOCK, n, at.result, at.read)
        return (*_slopes(at, M_BLOCK, n, masked), add)

    return (ForTiles(over_keys(at, work)),)


def key_sums(at: KeySumPlaces) -> Program:
    """The program of every warp: a sum for each key of a block and each head, over the queries that see it."""
    pair, sums = at.pair, at.sums

    def work(m: BlockIndex, masked: Masked) -> Program:
        add = SumPairs(pair.s, pair.dp, pair.delta, m, sums.part)
        return (*_slopes(at, m, N_BLOCK, masked), add)

    of_head = (
        Clear(sums.part),
        *over_queries(at, work),
        ReduceRows(sums.total, sums.part),
        StoreRegisters(sums.total, sums.result, N_BLOCK),
    )
    return (ForTiles((*at.own_keys(), ForHeads(of_head), WaitCopies(0))),)
