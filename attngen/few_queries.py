"""Calls of few queries that read many keys: whether their keys are cut into parts, and the tiles that are."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attngen.plan import BLOCK_TABLE, Lengths, why_by_row

ONE_TILE, TWO_TILES, OF_WARPGROUP, OF_TWO = 16, 32, 64, 128
"""Rows of a tile whose keys are cut: of a matrix instruction or of two, of a warpgroup or of two."""
MANY_KEYS, KEYS_OF_A_QUERY = 512, 8
"""From how many keys on they are cut; by tiles of warpgroups, from how many for each query on."""
NARROW = 128
"""Columns of a head up to which there are registers for two instructions of a warp, and for two warpgroups."""
IN_L2 = 48 * 2**20
"""Bytes of keys and values that two tiles read from an L2 of Hopper as fast as one does, and merge in half the time."""
MOST_PACKED = 64
"""Queries up to which rows of all heads of a group fill their tiles better than those of one head do theirs."""
MOST_ROWS, HALF_A_GPU = 1024, 64
"""Rows of a group, and tiles in one piece of all heads, up to which half of a Hopper GPU has nothing to do."""
ASKING_FOR_HEADS = re.compile(r"\b(h|alibi|relative_bias)\b")
"""Words by which a mask or a score asks for a query head: rows of a group are not packed then."""


def cut_into(rows: int) -> dict[str, Any]:
    """The fields of a spec whose keys are cut for tiles of so many rows, or are not for 0."""
    if not rows:
        return {"split": "none"}
    return {
        "split": "auto",
        "tile": {"block_m": rows} if rows > ONE_TILE else {},
        "schedule": {"kind": "warp_specialized"} if rows >= OF_WARPGROUP else {},
    }


@dataclass(frozen=True)
class _Few:
    """A call of few queries: what decides how it is cut. `keys` is the most that a request may have."""

    requests: int
    queries: int
    heads: int
    group: int
    keys: int
    key_bytes: int
    is_narrow: bool

    @property
    def rows(self) -> int:
        """Rows of all heads that share their keys."""
        return self.queries * self.group

    @property
    def is_in_l2(self) -> bool:
        """Whether all keys and values of the call are."""
        return self.requests * self.keys * self.key_bytes <= IN_L2

    @property
    def of_instructions(self) -> int:
        """Rows of a tile that warps multiply; 0 where it is not worth it."""
        if self.rows > TWO_TILES:
            return 0
        return TWO_TILES if self.rows > ONE_TILE and self.is_narrow and not self.is_in_l2 else ONE_TILE

    def of_warpgroups(self, is_packed: bool) -> int:
        """Rows of a tile that warpgroups multiply; 0 where tiles in one piece fill their rows, and a GPU."""
        rows = self.rows if is_packed else self.queries
        if self.keys < KEYS_OF_A_QUERY * self.queries or rows > MOST_ROWS:
            return 0
        fills_tiles = rows < 2 * self.queries or self.queries > MOST_PACKED
        if fills_tiles and self.requests * self.heads * -(-self.queries // OF_TWO) > HALF_A_GPU:
            return 0
        fits_one = rows <= (OF_TWO if self.is_in_l2 else OF_WARPGROUP)
        return OF_WARPGROUP if fits_one or not self.is_narrow else OF_TWO


def tile_of_few(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    texts: tuple[str, str],
    lengths: Lengths,
    passed: Mapping[str, Any],
    has_warpgroups: bool,
) -> int:
    """Rows of a tile whose keys are to be cut; 0 where they are not. What is wrong with a call, the call will say.

    Args:
        q: of the call, like k and v.
        k: see q.
        v: see q.
        texts: the mask and the score.
        lengths: how queries and keys are cut into sequences.
        passed: what the call passes by name.
        has_warpgroups: the target has.
    """
    few = _few(q, k, v, lengths, passed)
    if few is None:
        return 0
    if few.rows <= ONE_TILE or not has_warpgroups or not _in_pieces(q, k, lengths, passed):
        return few.of_instructions
    return few.of_warpgroups(not any(ASKING_FOR_HEADS.search(text) for text in texts))


def _few(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Lengths, passed: Mapping[str, Any]
) -> _Few | None:
    """The call, unless it has few keys, or of queries or keys nobody says how many."""
    is_plain = isinstance(k, torch.Tensor) and k.layout is torch.strided and not k.is_nested
    if not is_plain or k.dim() != 4 or lengths.keys == "ragged":
        return None
    layout, swapped, plain = passed.get("layout"), (2, 1), (1, 2)
    rows, heads = swapped if layout in ("bhsd", "hnd") else plain
    q_rows, q_heads = swapped if layout == "bhsd" else plain
    keys = _most_keys(k.shape[rows], lengths, passed)
    if not k.shape[heads] or keys < MANY_KEYS:
        return None
    is_ragged = lengths.queries == "ragged"
    queries = passed.get("max_seqlen_q") if is_ragged else q.shape[q_rows]
    if not isinstance(queries, int):
        return None
    cut = passed.get("cu_seqlens_q") if is_ragged else None
    heads_q, columns = q.shape[1 if is_ragged else q_heads], q.shape[-1] + v.shape[-1]
    return _Few(
        requests=cut.numel() - 1 if isinstance(cut, torch.Tensor) else q.shape[0],
        queries=queries,
        heads=heads_q,
        group=heads_q // k.shape[heads],
        keys=keys,
        key_bytes=k.shape[heads] * columns * k.element_size(),
        is_narrow=max(q.shape[-1], v.shape[-1]) <= NARROW,
    )


def _most_keys(rows: int, lengths: Lengths, passed: Mapping[str, Any]) -> int:
    """How many keys a sequence may have, of so many rows of K: of pages what a row of the table has room for."""
    if not lengths.is_paged("keys"):
        return rows
    table = passed.get(BLOCK_TABLE.name)
    return rows * table.shape[-1] if isinstance(table, torch.Tensor) and table.dim() else 0


def _in_pieces(q: torch.Tensor, k: torch.Tensor, lengths: Lengths, passed: Mapping[str, Any]) -> bool:
    """Whether the copy engine can bring K and V as warpgroups multiply them."""
    if k.dtype is not q.dtype or q.dtype is torch.float32:
        return False
    page_size = k.shape[-2 if passed.get("layout") == "hnd" else -3]
    return not (lengths.is_paged("keys") and why_by_row(page_size, passed.get("leftpad_k") is not None))
