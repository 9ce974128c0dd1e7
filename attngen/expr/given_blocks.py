"""Given blocks: a map of a call's own that says which blocks of queries and keys are kept, as a conjunct of its mask.

The map is a tensor that no spec can declare, of four dimensions: batch or 1, query heads or 1, blocks of queries,
blocks of keys. Lookups clamp, so that a size of 1 stands for all. Where a tile of a kernel lies in one block of the
map, no pair of it need be asked; how many blocks it may lie in follows from both sizes.
"""

from math import gcd

from attngen.expr.arithmetic import floor_divide
from attngen.expr.declarations import TensorType
from attngen.expr.intervals import Bounds
from attngen.expr.logic import conjunction
from attngen.expr.tree import Expr, const, lookup, name, nodes, steps_of

GIVEN_BLOCKS = TensorType("blocks", "bool", ("blocks_batch", "blocks_heads", "blocks_m", "blocks_n"))
"""The map; its name and those of its dimensions are reserved."""
SOME_KEPT, ALL_KEPT = f"{GIVEN_BLOCKS.name}.any", f"{GIVEN_BLOCKS.name}.all"
"""What trees about tiles look up that lie in several blocks: whether some, and whether all blocks of a batch and head
are kept between a first and a last row, and a first and a last column, each of both included."""


def kept_block(block_m: int, block_n: int) -> Expr:
    """Whether the map keeps the block that a query and a key lie in.

    Args:
        block_m: queries of a block of the map.
        block_n: keys of one.
    """
    row = floor_divide(name("q_idx"), const(block_m))
    return GIVEN_BLOCKS.at(name("b"), name("h"), row, floor_divide(name("kv_idx"), const(block_n)))


def some_and_all_kept(kept: Expr, rows: Bounds, columns: Bounds) -> tuple[Expr, Expr]:
    """Whether some, and whether all blocks are kept in rows and columns of the map.

    Args:
        kept: the lookup of one of them, see `kept_block`.
        rows: the first and the last.
        columns: the first and the last.
    """
    batch, head, *_ = kept.args
    if rows.is_exact and columns.is_exact:
        one = lookup(kept.name, (batch, head, rows.lo, columns.lo), kept.type)
        return one, one
    places = (batch, head, rows.lo, rows.hi, columns.lo, columns.hi)
    return lookup(SOME_KEPT, places, kept.type), lookup(ALL_KEPT, places, kept.type)


def without_blocks(mask: Expr) -> Expr:
    """What a mask asks besides whether a block is kept."""
    parts = mask.args if mask.op == "and" else (mask,)
    return conjunction(part for part in parts if not _is_kept(part))


def block_sizes(mask: Expr) -> tuple[int, int] | None:
    """How many queries and keys a block of the map has that a mask asks; None where it asks none."""
    kept = next((each for each in nodes(mask) if _is_kept(each)), None)
    return None if kept is None else (max(1, steps_of(kept.args[2])), max(1, steps_of(kept.args[3])))


def blocks_of_tile(mask: Expr, block_m: int, block_n: int) -> tuple[int, int] | None:
    """In how many blocks of the map the rows, and the keys, of a tile lie at most; None where a mask asks no map.

    Args:
        mask: of the tile.
        block_m: rows of the tile, which begins at a multiple of them.
        block_n: its keys, likewise.
    """
    sizes = block_sizes(mask)
    return None if sizes is None else (most_blocks(block_m, sizes[0]), most_blocks(block_n, sizes[1]))


def most_blocks(tile: int, block: int) -> int:
    """In how many blocks of so many rows or keys those of a tile lie at most, which begins at a multiple of its own."""
    return (block - gcd(tile, block) + tile - 1) // block + 1


def mask_of_pairs(mask: Expr, block_m: int, block_n: int) -> Expr:
    """What is asked of a pair of a tile that is visited: not whether its block is kept, where that is the tile's."""
    return without_blocks(mask) if blocks_of_tile(mask, block_m, block_n) == (1, 1) else mask


def _is_kept(condition: Expr) -> bool:
    return condition.op == "lookup" and condition.name == GIVEN_BLOCKS.name
