"""Batches of `tests.lengths.batches` whose keys lie in pages: shuffled, in a pool of NaN."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from attngen.check.cuts import NO_PAGE
from tests.lengths.batches import Batch


@dataclass(frozen=True)
class Paged:
    """Keys of a batch in pages.

    Attributes:
        k, v: caches, (pages, page, heads, head_dim).
        passed: what the call says by name, lengths of queries too.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    passed: dict[str, Any]


def paged(of: Batch, page: int, seed: int = 0) -> Paged:
    """The padded keys of a batch in pages, twice as many as are needed, of which the others hold NaN."""
    used = of.lengths["seqused_k"].tolist()
    needed = sum(-(-n // page) for n in used)
    shuffled = iter(torch.randperm(2 * needed + 1, generator=torch.Generator().manual_seed(seed)).tolist())
    table = torch.full((len(used), -(-max(used, default=0) // page) + 1), NO_PAGE, dtype=torch.int32)
    caches = [torch.full((2 * needed + 1, page, *x.shape[2:]), math.nan, dtype=x.dtype) for x in (of.k, of.v)]
    for request, n in enumerate(used):
        for place, first in enumerate(range(0, n, page)):
            number = table[request, place] = next(shuffled)
            for cache, x in zip(caches, (of.k, of.v), strict=True):
                cache[number, : min(page, n - first)] = x[request, first : min(n, first + page)]
    return Paged(of.q, *caches, {**of.lengths, "block_table": table})
