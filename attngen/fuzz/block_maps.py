"""Maps of given blocks that a fuzzed call passes, each by its seed alone."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from attngen.expr import GIVEN_BLOCKS


def _without_some_rows(kept: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(kept.shape[2], device=kept.device).view(-1, 1) % 3 != 1
    return kept & rows


MAPS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "random": lambda kept: kept,
    "all": torch.ones_like,
    "none": torch.zeros_like,
    "without some rows": _without_some_rows,
    "one for all": lambda kept: kept[:1, :1],
    "repeated": lambda kept: kept[:1, :1].expand(kept.shape),
}
"""What becomes of a map of which half the blocks are kept, for each batch and head."""


def with_drawn_map(declared: dict[str, Any], seed: int) -> dict[str, Any]:
    """What a call passes by name, its map of blocks one of `MAPS`, by a seed."""
    if GIVEN_BLOCKS.name not in declared:
        return declared
    change = list(MAPS.values())[seed % len(MAPS)]
    return {**declared, GIVEN_BLOCKS.name: change(declared[GIVEN_BLOCKS.name])}
