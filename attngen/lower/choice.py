"""Choices: the numbers of a kernel that a spec may leave open, decided."""

from dataclasses import dataclass
from typing import Literal

WARP_FIELDS = ("warps",)
WARPGROUP_FIELDS = ("warpgroups", "overlap", "persistent")
"""Fields that a spec may say to one family of schedules and not to the other; first who shares the rows of a tile."""
KNOBS = {
    "tile.block_m": "block_m",
    "tile.block_n": "block_n",
    "schedule.stages": "stages",
    "schedule.warps": "warps",
    "schedule.warpgroups": "warpgroups",
}
"""The numbers of a choice that a spec may say, by their paths in it."""


@dataclass(frozen=True)
class Choice:
    """The numbers of a schedule that every warp runs alike.

    Attributes:
        blocks_per_sm: resident blocks the compiler must leave registers for.
        score_unroll: k-steps of the score GEMM that are written out.
        longest_first: blocks of rows that see the most keys (the last ones) start first.
    """

    block_m: int
    block_n: int
    stages: int
    warps: int
    blocks_per_sm: int = 1
    score_unroll: int = 4
    longest_first: bool = False


@dataclass(frozen=True)
class WarpgroupChoice:
    """The numbers of a schedule of a producer and consumer warpgroups.

    Attributes:
        warpgroups: consumers; each owns a matrix instruction's rows of block_m.
        rescale: where in a block O is rescaled, see `WarpgroupPlaces`.
        rescale_votes: a warp none of whose maxima grew skips it.
        passes_late: the turn is passed when the GEMMs have landed, not when they have been issued.
        out_over_q: the result is staged over Q, for want of shared memory of its own.
        q_stages: with two, one warpgroup may begin the next tile while another is still at this one.
        part_cols: columns of O that the tensor core adds up at a time, before they join O in true f32; 0 where it adds
            to O itself.
        integer_maxima: see `RowMax.by_integers`.
    """

    block_m: int
    block_n: int
    stages: int
    warpgroups: int
    overlap: bool = True
    persistent: bool = True
    longest_first: bool = True
    rescale: Literal["middle", "last"] = "middle"
    rescale_votes: bool = False
    passes_late: bool = False
    out_over_q: bool = False
    q_stages: int = 1
    blocks_per_sm: int = 1
    part_cols: int = 0
    integer_maxima: bool = False


AnyChoice = Choice | WarpgroupChoice


def fields_of(choice: AnyChoice) -> tuple[str, ...]:
    """What a spec may say to the choice's family of schedules and not to the other."""
    return WARPGROUP_FIELDS if isinstance(choice, WarpgroupChoice) else WARP_FIELDS


def owners(choice: AnyChoice) -> int:
    """How many warps or warpgroups share out the rows of a tile."""
    return choice.warpgroups if isinstance(choice, WarpgroupChoice) else choice.warps
