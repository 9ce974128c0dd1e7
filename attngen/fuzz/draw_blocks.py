"""Sizes of given blocks that are drawn for a spec, beside those of its tiles; maps are in block_maps.py."""

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn


@st.composite
def given_blocks(draw: DrawFn, block_m: int, block_n: int) -> dict[str, Any]:
    """What a spec says of given blocks: mostly nothing, else sizes that a tile is, holds, lies in or lies across."""
    if draw(st.integers(0, 4)) < 4:
        return {}
    blocks = {
        name: draw(st.sampled_from((tile, 2 * tile, max(1, tile // 2), max(1, tile * 3 // 4))))
        for name, tile in (("block_m", block_m), ("block_n", block_n))
    }
    return {"blocks": blocks}
