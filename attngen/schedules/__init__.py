"""Schedules: places -> a program for each role. One file each; a new schedule is one function and one line here."""

from collections.abc import Callable

from attngen.plan import Program
from attngen.schedules.cache_scales import CacheScales, StagedDescales
from attngen.schedules.fa2 import fa2
from attngen.schedules.key_loop import KeyLoop
from attngen.schedules.key_parts import KeyParts, WarpShares
from attngen.schedules.online_softmax import OnlineSoftmax
from attngen.schedules.operand_scales import Scales
from attngen.schedules.pairs import Pairs
from attngen.schedules.scores import Scores
from attngen.schedules.serial import serial
from attngen.schedules.tile_places import Places, TilePlaces
from attngen.schedules.warp_specialized import RingCursors, WarpgroupPlaces, pingpong, warp_specialized
from attngen.schedules.warpgroup_output import Output

SCHEDULES: dict[str, Callable[[Places], Program]] = {"serial": serial, "fa2": fa2}
"""Schedules that every warp runs alike."""

WARPGROUP_SCHEDULES: dict[str, Callable[[WarpgroupPlaces], dict[str, Program]]] = {
    "warp_specialized": warp_specialized,
    "pingpong": pingpong,
}
"""Schedules of a producer and consumer warpgroups."""

__all__ = [
    "SCHEDULES",
    "WARPGROUP_SCHEDULES",
    "CacheScales",
    "KeyLoop",
    "KeyParts",
    "OnlineSoftmax",
    "Output",
    "Pairs",
    "Places",
    "RingCursors",
    "Scales",
    "Scores",
    "StagedDescales",
    "TilePlaces",
    "WarpShares",
    "WarpgroupPlaces",
]
