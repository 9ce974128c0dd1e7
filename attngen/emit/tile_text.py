"""The plan's expressions of tiles and blocks as CUDA: constants, and fields of the structs Tile and KeyBlocks.

No arithmetic stands here: it is that of `attngen.plan.scheduler` and `attngen.plan.seen`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from attngen.expr import (
    INDEX_NAMES,
    TILE_NAMES,
    Expr,
    Leaves,
    const,
    found_of,
    free_names,
    name,
    to_cuda,
    with_nodes,
)
from attngen.plan import (
    ENTRY_FIELDS,
    KEYS,
    PART_FIELDS,
    PART_NAMES,
    QUERIES,
    Scheduler,
    SeenBlocks,
    SequenceAxis,
    entry_says,
)

VARIABLES = {name: name.replace("_idx.", "_") for name in (*INDEX_NAMES, *TILE_NAMES)}
"""Indices and bounds of a tile as variables of a function: `q_first`."""
FIELDS = {
    "h": "tile.head",
    "b": "tile.batch",
    "h_kv": "tile.kv_head",
    "seqlen_q": "tile.seqlen_q",
    "seqlen_k": "tile.seqlen_k",
    "q_idx.start": "tile.q_start",
    "kv_idx.start": "tile.k_start",
    **{name: f"tile.{field}" for name, field in zip(PART_NAMES, PART_FIELDS, strict=True)},
}
"""What the language's names are once a tile has been decoded."""
_CALL = {
    **{
        f"call.{size}": f"params.{size}" for size in ("batch", "seqlen_q", "seqlen_k", "num_heads_q", "group")
    },
    "tile.block_m": "kBlockM",
    "tile.block_n": "kBlockN",
    "tiles.count": "num_entries(params)",
}
_ENTRY = (*ENTRY_FIELDS, *PART_FIELDS)
_READ = {entry_says(field): found_of(entry_says(field)) for field in _ENTRY}
"""What stands for the fields of an entry of a list of tiles, once that has been read."""
_DECODED = {
    **FIELDS,
    **_CALL,
    QUERIES.tile.name: "tile.m_block",
    KEYS.tile.name: "tile.n_block",
    "tile.index": "index",
    "tile.m_max": "m_max",
    "tile.n_max": "n_max",
    "tile.row": "row",
    **{f"tile.{each}": each for each in ("side", "section", "rest", "width")},
    **{read.name: f"entry.{field}" for field, read in zip(_ENTRY, _READ.values(), strict=True)},
}


def count(scheduler: Scheduler) -> str:
    """How many tiles a call has."""
    return to_cuda(scheduler.count, Leaves(_CALL, narrow=True))


def fields(scheduler: Scheduler) -> list[str]:
    """The integers that a tile is decoded to; those that are 0 for every tile are left out."""
    return [_DECODED[each].removeprefix("tile.") for each in _kept(scheduler) if not each.startswith("tile.")]


def decoding(scheduler: Scheduler) -> list[str]:
    """A statement for each part of a tile, of its number `index`."""
    kept = {each: with_nodes(value, _READ) for each, value in _kept(scheduler).items()}
    statements = list(_statements(kept, Leaves(_DECODED, narrow=True)))
    if scheduler.is_listed:
        statements.insert(list(kept).index("tile.row") + 1, f"const Entry entry = {_entry(scheduler)};")
    return statements


def blocks(axis: SequenceAxis, sequence: str = "tile") -> str:
    """How many blocks of rows or keys the sequence of a tile has, or the longest of a "call"."""
    length = name(f"call.{axis.seqlen}" if sequence == "call" else axis.seqlen)
    return to_cuda(axis.blocks(length), Leaves(FIELDS | _CALL))


def span(axis: SequenceAxis, number: str, *read_by: Expr) -> str:
    """Constants for the first and the last of a block, of its number, as far as expressions read them."""
    read = frozenset[str]().union(*map(free_names, read_by))
    found = axis.span if axis.last.name in read else {axis.first.name: axis.span[axis.first.name]}
    return _constants(found, axis, number) if read & axis.span.keys() else ""


def whole_span(axis: SequenceAxis, number: str) -> str:
    """Constants for the first and the last of a block of which all exists."""
    return _constants(axis.whole_span, axis, number)


def seen(blocks: SeenBlocks, leaves: Leaves, queries: SequenceAxis = QUERIES) -> list[str]:
    """A statement for each bound of the blocks that block `m` of rows sees, or block `n` of keys.

    `queries` says how rows of tiles are cut.
    """
    found, letter = blocks.definitions, blocks.axis.letter
    results = {f"seen.{end}": f"seen.{letter}_{end}" for end in ("min", "full_begin", "full_end", "max")}
    constants = {each: each.removeprefix("seen.") for each in found if each not in results}
    names = {**leaves.names, **_CALL, **constants, **results, "seen.last": f"{letter}_last"}
    own = queries if blocks.axis is KEYS else KEYS
    of_block = span(own, own.letter, *found.values())
    return [*filter(None, [of_block]), *_statements(found, replace(leaves, names=names))]


def rank_of_keys(rank: Expr, leaves: Leaves) -> str:
    """How many blocks of keys come before a tile's, of those that see block `m` of queries.

    It is worked out where it is asked for: who asks has few registers.
    """
    lengths = {axis.seqlen: f"stay_in_loop({FIELDS[axis.seqlen]})" for axis in (QUERIES, KEYS)}
    names = {**leaves.names, **_CALL, **lengths, QUERIES.tile.name: "m", KEYS.tile.name: "tile.n_block"}
    return to_cuda(rank, replace(leaves, names=names))


def _entry(scheduler: Scheduler) -> str:
    """The entry of a tile; blocks that draw tiles also come to numbers that no tile has."""
    read = "read_entry(params, row)"
    return f"index < num_tiles(params) ? {read} : Entry{{}}" if scheduler.persistent else read


def _kept(scheduler: Scheduler) -> Mapping[str, Expr]:
    return {
        each: value
        for each, value in scheduler.decoding.items()
        if value is not const(0) or each in ("b", "h", "h_kv")  # which loops of a tile may count up
    }


def _constants(found: Mapping[str, Expr], axis: SequenceAxis, number: str) -> str:
    names = VARIABLES | FIELDS | _CALL | {axis.tile.name: number}
    texts = (f"{names[each]} = {to_cuda(value, Leaves(names, narrow=True))}" for each, value in found.items())
    return f"const int {', '.join(texts)};"


def _statements(found: Mapping[str, Expr], leaves: Leaves) -> Iterator[str]:
    """Definitions of constants, and assignments to fields of a struct."""
    for each, value in found.items():
        is_field = "." in leaves.names[each]
        yield f"{'' if is_field else 'const int '}{leaves.names[each]} = {to_cuda(value, leaves)};"
