"""Keys that lie in pages of a cache: how a drawn call is laid out, and how the oracles read one.

Pages of a drawn call are shuffled in a pool of twice as many; all that no sequence counts is poison, and entries of the
table that no sequence needs name pages that are not there.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attngen.check.cuts import NO_PAGE, Cut
from attngen.plan import BLOCK_TABLE, CACHE_ROWS, Lengths


def in_pages(x: Tensor, cut: Cut, poison: Tensor) -> Tensor:
    """Rows of heads of padded sequences, (batch, rows, heads, cols), as a cache: (pages, page, heads, cols).

    Rows of pages that the table does not name hold the numbers of `poison` in turn.
    """
    table = cut.block_table.to(x.device).long()
    pages, own = x.view(*table.shape, cut.page, *x.shape[2:]), table != NO_PAGE
    numbers = torch.arange(cut.pool_pages * cut.page, device=x.device) % len(poison)
    cache = poison[numbers].view(-1, cut.page, 1, 1).repeat(1, 1, *x.shape[2:])
    cache[table[own]] = pages[own]
    return cache


def as_padded(
    lengths: Lengths, k: Tensor, v: Tensor, passed: Mapping[str, Any]
) -> tuple[Lengths, Tensor, Tensor, dict[str, Any]]:
    """A call whose keys lie in pages as one of padded keys; any other as it is.

    What it says is read as the arguments are documented; numbers that no table or cache has are kept within it. Rows
    that no sequence counts hold NaN, whatever pages the table names there.

    Returns:
        lengths, k, v and what is passed by name: k and v (batch, max_pages * page, heads, cols).
    """
    if not lengths.is_paged("keys"):
        return lengths, k, v, dict(passed)
    table, used = passed[BLOCK_TABLE.name].long(), passed["seqused_k"].long()
    if passed.get(CACHE_ROWS.name) is not None:
        table = table[passed[CACHE_ROWS.name].long().clamp(0, table.shape[0] - 1)]
    stored = torch.arange(table.shape[1] * k.shape[1], device=k.device)
    counts = (stored < used.unsqueeze(1))[..., None, None]
    k, v = (x[table.clamp(0, x.shape[0] - 1)].flatten(1, 2).masked_fill(~counts, torch.nan) for x in (k, v))
    others = {name: x for name, x in passed.items() if name not in (BLOCK_TABLE.name, CACHE_ROWS.name)}
    return replace(lengths, keys="padded"), k, v, others
