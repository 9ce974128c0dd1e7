"""The simulator: the living definition of a plan, on the CPU.

It runs each role's program, one function per Step, over simulated shared memory. It computes what the
kernel computes, and faults on races, on reads of what nobody wrote and on deadlocks. With
a cost for each Step it draws the timeline of one SM. It emits nothing.
"""

from attngen.simulate.costs import COSTS, Costs, costs_of
from attngen.simulate.faults import SimulationFault
from attngen.simulate.gradient_trace import BackwardTrace, trace_backward
from attngen.simulate.launches import STEPS_SIMULATED, count, run_call, simulate
from attngen.simulate.prediction import Prediction, Timeline, predict, timeline
from attngen.simulate.progress import Progress
from attngen.simulate.roles import Event, RoleRun, StepFunction
from attngen.simulate.simulator import Simulator
from attngen.simulate.threads import one_thread
from attngen.simulate.tile_lists import call_sizes
from attngen.simulate.tile_source import tiles
from attngen.simulate.trace import Trace, trace
from attngen.simulate.traffic import Traffic, added, closed_form, standard_algorithm
from attngen.simulate.units import UNITS, Interval, Unit
from attngen.simulate.visits import SIMULATED_SMS, BlockBounds, Sizes, block_bounds, visited_blocks

__all__ = [
    "COSTS",
    "SIMULATED_SMS",
    "STEPS_SIMULATED",
    "UNITS",
    "BackwardTrace",
    "BlockBounds",
    "Costs",
    "Event",
    "Interval",
    "Prediction",
    "Progress",
    "RoleRun",
    "SimulationFault",
    "Simulator",
    "Sizes",
    "StepFunction",
    "Timeline",
    "Trace",
    "Traffic",
    "Unit",
    "added",
    "block_bounds",
    "call_sizes",
    "closed_form",
    "costs_of",
    "count",
    "one_thread",
    "predict",
    "run_call",
    "simulate",
    "standard_algorithm",
    "tiles",
    "timeline",
    "trace",
    "trace_backward",
    "visited_blocks",
]
