"""Which tile a block of threads works on, and where its blocks of rows and keys lie, as trees of the language.

They are written here once: `emit` prints them to CUDA and `simulate` evaluates them. Definitions stand in order, each
by the name that later ones have for it; what decides lengths and offsets is the tile's own, never the call's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from attngen.expr import Expr, add, const, name, sub
from attngen.expr.arithmetic import floor_divide, modulo, times
from attngen.expr.intervals import greater, lesser
from attngen.expr.tree import lookup
from attngen.plan.places import LENGTHS, Axis

Definitions = Mapping[str, Expr]


@dataclass(frozen=True)
class SequenceAxis:
    """Queries, or keys, cut into blocks.

    Attributes:
        axis: which.
        letter: of a block's number, m or n.
        index: the language's name for one of them.
        block: the name of how many make a block.
    """

    axis: Axis
    letter: Literal["m", "n"]
    index: Literal["q_idx", "kv_idx"]
    block: Literal["tile.block_m", "tile.block_n"]

    @property
    def seqlen(self) -> str:
        """The name of how many the tile's sequence has."""
        return LENGTHS[self.axis]

    @property
    def other(self) -> "SequenceAxis":
        """The keys that rows see, the rows that see keys."""
        return KEYS if self.axis == "queries" else QUERIES

    @property
    def tile(self) -> Expr:
        """The number of a block."""
        return name(f"{self.index}.tile")

    @property
    def first(self) -> Expr:
        """The first of a block."""
        return name(f"{self.index}.first")

    @property
    def last(self) -> Expr:
        """The last of a block that exists."""
        return name(f"{self.index}.last")

    @cached_property
    def span(self) -> Definitions:
        """From where to where a block reaches that exists, by its number."""
        return self._up_to(lesser(add(self.first, name(self.block)), name(self.seqlen)))

    @cached_property
    def whole_span(self) -> Definitions:
        """From where to where a block reaches if all of it exists."""
        return self._up_to(add(self.first, name(self.block)))

    def _up_to(self, end: Expr) -> Definitions:
        return {self.first.name: times(self.tile, name(self.block)), self.last.name: sub(end, const(1))}

    def blocks(self, length: Expr) -> Expr:
        """How many blocks hold so many of them."""
        block = name(self.block)
        return length if length is const(0) else floor_divide(sub(add(length, block), const(1)), block)


class PackedQueries(SequenceAxis):
    """Queries of all heads that share their keys, cut into blocks of rows: row i * group + j is query i of head j."""

    @cached_property
    def span(self) -> Definitions:
        """The queries of the first and the last row of a block that exist, by its number."""
        block, group = name(self.block), name("call.group")
        start = times(self.tile, block)
        end = lesser(add(start, block), times(name(self.seqlen), group))
        last = floor_divide(sub(end, const(1)), group)
        return {self.first.name: floor_divide(start, group), self.last.name: last}


QUERIES = SequenceAxis("queries", "m", "q_idx", "tile.block_m")
PACKED_QUERIES = PackedQueries("queries", "m", "q_idx", "tile.block_m")
KEYS = SequenceAxis("keys", "n", "kv_idx", "tile.block_n")


_HEADS_KV = floor_divide(name("call.num_heads_q"), name("call.group"))

MOST_HEADS = 16
"""That are worked on side by side."""
ENTRY_FIELDS = ("sequence", "block", "q_start", "seqlen_q", "k_start", "seqlen_k")
"""What an entry of a list of tiles says: which sequence, which block of its rows or keys, and where its queries and its
keys begin among the rows of the tensors, and how many there are."""


PART_FIELDS = ("n_begin", "n_end", "part", "parts")
"""What it says besides where the keys of rows are cut: blocks n_begin .. n_end - 1 are the tile's, which is one part of
so many."""
PART_NAMES = tuple(f"part.{field}" for field in PART_FIELDS)
"""The names that expressions have for these."""
PART_BEGIN, PART_END = map(name, PART_NAMES[:2])


def entry_field(field: str) -> str:
    """The name of a field of all entries of a tile list, which is looked up by the number of an entry."""
    return f"tiles.{field}"


def entry_says(field: str) -> Expr:
    """A field of the entry that a tile is listed by."""
    return lookup(entry_field(field), (name("tile.row"),), "i32")


@dataclass(frozen=True)
class Scheduler:
    """Which tiles a block works on.

    Attributes:
        kind: "query_blocks", one block of query rows of one head; "heads", one whole head; "key_blocks", one block of
            keys of one head of K and V, for all query heads that share it; "pair_blocks", one block of query rows and
            one of keys.
        sums_batch, sums_heads: over which batches and heads a tile of pairs is for: its own or all, and its own, those
            that share its head of K and V, or all.
        longest_first: blocks of rows that see the most keys (the last ones) start first.
        rows_at_hand: of blocks of keys: as many heads as have so many rows of queries together, `MOST_HEADS` at most,
            are side by side, so that their first blocks start before their second ones; 0: one head follows another,
            or in a list all are side by side.
        persistent: a block works on many tiles, each drawn from a counter in device memory when it is due.
        is_listed: sequences have lengths of their own, and tiles are those of a list in device memory (`ListTiles`),
            for each of the heads.
        is_split: an entry of the list is one of several parts of the keys of its rows.
        packs_group: a tile's rows are those of all query heads that share its keys.
        in_turn: of key blocks; the number of a tile is drawn when its block starts, so that all blocks of smaller
            numbers have started, and who waits for none but these is never waited for in turn. Those of a head start
            with its last keys.
    """

    kind: Literal["query_blocks", "key_blocks", "pair_blocks", "heads"]
    longest_first: bool = False
    persistent: bool = False
    sums_batch: bool = False
    sums_heads: Literal["own", "group", "all"] = "own"
    is_listed: bool = False
    is_split: bool = False
    packs_group: bool = False
    rows_at_hand: int = 0
    in_turn: bool = False

    @property
    def axis(self) -> SequenceAxis | None:
        """Of which a tile is a block; None where it is a whole head, or a block of each."""
        queries = PACKED_QUERIES if self.packs_group else QUERIES
        return {"query_blocks": queries, "key_blocks": KEYS}.get(self.kind)

    @property
    def starts_last(self) -> bool:
        """Whether the last block of a sequence starts before all others."""
        return self.longest_first or self.in_turn

    @property
    def is_for_groups(self) -> bool:
        """Whether a tile is for all query heads that share a head of K and V."""
        return self.kind == "key_blocks" or self.packs_group

    @property
    def entry_fields(self) -> tuple[str, ...]:
        """The fields of an entry of its list."""
        return (*ENTRY_FIELDS, *PART_FIELDS) if self.is_split else ENTRY_FIELDS

    @property
    def heads(self) -> Expr:
        """How many heads a batch has tiles for."""
        return {"own": name("call.num_heads_q"), "group": _HEADS_KV, "all": const(1)}[self.sums_heads]

    @cached_property
    def count(self) -> Expr:
        """How many tiles a call has: the number that the formula of its grid gives, or the simulator faults."""
        if self.is_listed:
            return times(name("tiles.count"), self._listed_heads)
        heads = times(name("call.batch"), name("call.num_heads_q"))
        if self.kind == "pair_blocks":
            blocks = times(QUERIES.blocks(name("call.seqlen_q")), KEYS.blocks(name("call.seqlen_k")))
            return times(times(const(1) if self.sums_batch else name("call.batch"), self.heads), blocks)
        if self.kind == "key_blocks":
            return times(times(name("call.batch"), _HEADS_KV), KEYS.blocks(name("call.seqlen_k")))
        return heads if self.kind == "heads" else times(heads, QUERIES.blocks(name("call.seqlen_q")))

    @cached_property
    def decoding(self) -> Definitions:
        """What a tile works on, by its number `tile.index`.

        Names of the language are fields of the tile: head (the first of those that share its keys, where it is for all
        of them), batch, head of K and V, block of rows or of keys (unless it works on all of a head's), the lengths of
        its sequence, and where that starts among the rows of the tensors. What begins
        with `tile.` is there to define them.
        """
        if self.is_listed:
            return self._listed_decoding
        index, heads = name("tile.index"), name("call.num_heads_q")
        if self.kind == "key_blocks":
            n_max, row = name("tile.n_max"), name("tile.row")
            block = {"tile.n_max": KEYS.blocks(name("call.seqlen_k"))}
            of_row, n = floor_divide(index, n_max), modulo(index, n_max)
            if self.rows_at_hand:
                more, of_row, n = self._side_by_side(times(name("call.batch"), _HEADS_KV), n_max)
                block |= more
            block["tile.row"] = of_row
            block[KEYS.tile.name] = sub(sub(n_max, const(1)), n) if self.in_turn else n
            head = times(modulo(row, _HEADS_KV), name("call.group"))
            batch = floor_divide(row, _HEADS_KV)
        elif self.kind == "pair_blocks":
            m_max, n_max, row = name("tile.m_max"), name("tile.n_max"), name("tile.row")
            block = {
                "tile.m_max": QUERIES.blocks(name("call.seqlen_q")),
                "tile.n_max": KEYS.blocks(name("call.seqlen_k")),
                KEYS.tile.name: modulo(index, n_max),
                "tile.row": floor_divide(index, n_max),
                QUERIES.tile.name: modulo(row, m_max),
            }
            of_head = floor_divide(row, m_max)
            first = {"own": const(1), "group": name("call.group"), "all": const(0)}[self.sums_heads]
            head = times(modulo(of_head, self.heads), first)
            batch = const(0) if self.sums_batch else floor_divide(of_head, self.heads)
        elif self.kind == "heads":
            head, batch, block = modulo(index, heads), floor_divide(index, heads), {}
        else:
            m_max, row = name("tile.m_max"), name("tile.row")
            block = {"tile.m_max": QUERIES.blocks(name("call.seqlen_q"))}
            if self.longest_first:
                block["tile.row"], head = floor_divide(index, heads), modulo(index, heads)
                batch = floor_divide(row, m_max)
                block[QUERIES.tile.name] = sub(sub(m_max, const(1)), modulo(row, m_max))
            else:
                block["tile.row"], head = floor_divide(index, m_max), modulo(row, heads)
                batch = floor_divide(row, heads)
                block[QUERIES.tile.name] = modulo(index, m_max)
        return {
            **block,
            "h": head,
            "b": batch,
            "h_kv": floor_divide(name("h"), name("call.group")),
            "seqlen_q": name("call.seqlen_q"),
            "seqlen_k": name("call.seqlen_k"),
            "q_idx.start": const(0),
            "kv_idx.start": const(0),
        }

    def _side_by_side(self, heads: Expr, blocks: Expr) -> tuple[Definitions, Expr, Expr]:
        """Which of so many heads, and of as many blocks of each, behind what defines them.

        Sections of heads follow each other, and in a section the first blocks of all, the second ones, and so on.
        """
        index, side, section = map(name, ("tile.index", "tile.side", "tile.section"))
        rows = add(name("call.seqlen_q"), const(1))  # keys that no query sees have tiles too
        of_group = floor_divide(floor_divide(const(self.rows_at_hand), rows), name("call.group"))
        found = {
            "tile.side": lesser(greater(of_group, const(1)), const(MOST_HEADS)),
            "tile.section": floor_divide(index, times(side, blocks)),
            "tile.rest": sub(index, times(section, times(side, blocks))),
            "tile.width": lesser(side, sub(heads, times(section, side))),
        }
        rest, width = name("tile.rest"), name("tile.width")
        return found, add(times(section, side), modulo(rest, width)), floor_divide(rest, width)

    @property
    def _listed_decoding(self) -> Definitions:
        """The list is in the order in which tiles start, of all heads side by side, or of `rows_at_hand`."""
        index, heads = name("tile.index"), self._listed_heads
        says = {field: entry_says(field) for field in self.entry_fields}
        more: Definitions = {}
        row, head = floor_divide(index, heads), modulo(index, heads)
        if self.rows_at_hand:
            more, head, row = self._side_by_side(heads, name("tiles.count"))
        return {
            **more,
            "tile.row": row,
            **({self.axis.tile.name: says["block"]} if self.axis else {}),
            "h": times(head, name("call.group")) if self.is_for_groups else head,
            "b": says["sequence"],
            "h_kv": floor_divide(name("h"), name("call.group")),
            "seqlen_q": says["seqlen_q"],
            "seqlen_k": says["seqlen_k"],
            "q_idx.start": says["q_start"],
            "kv_idx.start": says["k_start"],
            **(
                {of: says[field] for of, field in zip(PART_NAMES, PART_FIELDS, strict=True)}
                if self.is_split
                else {}
            ),
        }

    @property
    def _listed_heads(self) -> Expr:
        """How many tiles an entry is."""
        return _HEADS_KV if self.is_for_groups else name("call.num_heads_q")
