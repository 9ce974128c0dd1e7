"""Schedules: places -> program. One file each; a new schedule is one function and one line of this table."""

from collections.abc import Callable

from attngen.plan import Program
from attngen.schedules.fa2 import fa2
from attngen.schedules.serial import serial
from attngen.schedules.tiles import Places

SCHEDULES: dict[str, Callable[[Places], Program]] = {"serial": serial, "fa2": fa2}

__all__ = ["SCHEDULES", "Places"]
