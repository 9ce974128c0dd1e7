"""The simulator: the living definition of a plan, on the CPU.

It runs each role's program, one function per Step, over simulated shared memory. It computes what the
kernel computes, and faults on races, on reads of what nobody wrote and on deadlocks. It times nothing and
emits nothing.
"""

from attngen.simulate.faults import SimulationFault
from attngen.simulate.roles import Event, RoleRun, StepFunction
from attngen.simulate.run import STEPS_SIMULATED, count, simulate
from attngen.simulate.tiles import BlockBounds, Sizes, block_bounds, tiles
from attngen.simulate.trace import Trace, trace
from attngen.simulate.traffic import Traffic, closed_form, standard_algorithm

__all__ = [
    "STEPS_SIMULATED",
    "BlockBounds",
    "Event",
    "RoleRun",
    "SimulationFault",
    "Sizes",
    "StepFunction",
    "Trace",
    "Traffic",
    "block_bounds",
    "closed_form",
    "count",
    "simulate",
    "standard_algorithm",
    "tiles",
    "trace",
]
