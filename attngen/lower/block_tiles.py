"""Tiles for given blocks: those that lie in one block of a call's map, or hold whole ones: none is visited in vain.

What is fitted is made smaller, never larger: a rule about a cost is kept by every smaller tile.
"""

from dataclasses import replace

from attngen.expr import most_blocks
from attngen.lower.choice import Choice, WarpgroupChoice
from attngen.lower.features import Features
from attngen.plan import PADDED_ROWS, Axis

MOST_BLOCKS = 8
"""Of the map, along rows and along keys, in which a tile had better lie: each is a load of who classes it."""
WIDE = 64
"""Rows or keys from which on a tile that lies in one block is worth more than a larger one that holds several."""


ASKED_COLUMNS = 128
ASKED = (64, 32)
"""Rows or keys of a tile, up to so many columns of a head and beyond, in which each pair is asked whether its block is
kept: NVRTC 13.0.88 compiles these without spills."""
ASKED_BACKWARD = 32
"""Of a tile of the backward pass, along the side that is looped over, likewise."""


def fitted_size(size: int, step: int, block: int, whole: int = 0) -> int:
    """The rows or the keys of a tile for blocks of a map, at most as many as are fast without.

    Args:
        size: what is fast.
        step: of which it is a multiple.
        block: rows or keys of a block.
        whole: what it divides, unless 0.

    Returns:
        The largest part of a block, where that is wide; else the largest number of whole blocks; else what part of a
        block there is; else what lies in few blocks.
    """
    dividing = [each for each in range(step, size + 1, step) if whole % each == 0]
    sizes = [each for each in dividing if most_blocks(each, block) <= MOST_BLOCKS]
    parts = [each for each in sizes if block % each == 0]
    wholes = [each for each in sizes if each % block == 0]
    if parts and (parts[-1] >= WIDE or not wholes):
        return parts[-1]
    return (wholes or sizes or [size])[-1]


def fitted(choice: Choice, features: Features) -> Choice:
    """A choice of the tables, its tile fitted to the blocks of a spec; as it is where the spec has none."""
    step = features.arch.mma.m * choice.warps if features.fits_instructions else 1
    most = max(step, ASKED[0]) if features.asks_for_blocks and features.fits_instructions else choice.block_m
    block_m, block_n = _fitted_tile(min(choice.block_m, most), choice.block_n, step, features)
    return replace(choice, block_m=block_m, block_n=block_n)


def fitted_warpgroups(choice: WarpgroupChoice, features: Features) -> WarpgroupChoice:
    """A choice of the tables, as `fitted` makes it; on a GPU each warpgroup keeps its rows, and there may be fewer."""
    rows, count = choice.block_m // choice.warpgroups, choice.warpgroups
    step = rows if features.fits_instructions else count
    block_m, block_n = _fitted_tile(choice.block_m, choice.block_n, step, features)
    if features.fits_instructions:
        count = block_m // rows
    return replace(choice, block_m=block_m, block_n=block_n, warpgroups=count)


def _fitted_tile(block_m: int, block_n: int, rows: int, features: Features) -> tuple[int, int]:
    """Rows and keys of a tile whose rows are a multiple of a number."""
    if features.blocks is None:
        return block_m, block_n
    of_map, keys = features.blocks, features.arch.k_step(features.inputs) if features.fits_instructions else 1
    if features.asks_for_blocks and features.fits_instructions:
        block_n = min(block_n, ASKED[features.head_dim > ASKED_COLUMNS])
    return fitted_size(block_m, rows, of_map[0]), fitted_size(block_n, keys, of_map[1])


def fitted_loop(size: int, axis: Axis, features: Features) -> int:
    """The rows, or the keys, of a tile of the backward pass that loops over them, which are `size` without blocks.

    Rows are of blocks in which D and lse are padded: of a tile that lies across them nothing would be there.
    """
    if features.blocks is None:
        return size
    step = features.arch.k_step(features.inputs)
    most = min(size, ASKED_BACKWARD) if features.asks_for_blocks else size
    if axis == "keys":
        return fitted_size(most, step, features.blocks[1])
    return fitted_size(most, step, features.blocks[0], PADDED_ROWS)
