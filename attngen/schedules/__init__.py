"""Schedules: places -> a program for each role. One file each; a new schedule is one function and one line here."""

from collections.abc import Callable

from attngen.plan import Program
from attngen.schedules.fa2 import fa2
from attngen.schedules.pairs import Pairs
from attngen.schedules.serial import serial
from attngen.schedules.tiles import Places, Scales, TilePlaces
from attngen.schedules.warp_specialized import RingCursors, WarpgroupPlaces, pingpong, warp_specialized

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
    "Pairs",
    "Places",
    "RingCursors",
    "Scales",
    "TilePlaces",
    "WarpgroupPlaces",
]
