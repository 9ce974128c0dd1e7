"""One SM at work: blocks of threads in its slots, whose Steps run without values, each at its charge.

Whoever is due first goes first, over all slots. A block that ends makes room for the next. The warps of a role run as
one: the four of `fa2` never drift apart here, as they may on a GPU.
"""

from collections.abc import Generator, Mapping
from typing import Any

from attngen.plan import KernelPlan, Step
from attngen.simulate.blocks import Block, KernelRun, scale_params
from attngen.simulate.charges import CHARGES, MEETINGS, Charge
from attngen.simulate.costs import Costs
from attngen.simulate.device_memory import DeviceMemory
from attngen.simulate.launches import STEPS_SIMULATED
from attngen.simulate.roles import RoleRun, Run, StepFunction
from attngen.simulate.tile_source import Tile, TileSource
from attngen.simulate.units import TIME, Units, now
from attngen.simulate.visits import Sizes


class Multiprocessor:
    """One SM.

    Attributes:
        units: what its blocks share, with the intervals of what has happened.
        slots: how many blocks share it at a time.
    """

    def __init__(
        self,
        plan: KernelPlan,
        sizes: Sizes,
        costs: Costs,
        slots: int,
        steps: Mapping[type[Step], StepFunction] | None = None,
    ) -> None:
        self.units = Units(costs)
        self.slots = slots
        self._kernel = plan
        simulated = {**STEPS_SIMULATED, **(steps or {})}
        timed = {
            kind: self._timed(kind, function, CHARGES[kind]) if kind in CHARGES else function
            for kind, function in simulated.items()
        }
        self._call = KernelRun(plan, sizes, scale_params(plan, 1.0), DeviceMemory(None, None), timed)

    def run(self, work: list[Tile]) -> None:
        """Let the slots work on these tiles.

        Raises:
            SimulationFault: a program broke a rule, or no role can go on.
        """
        source = TileSource(work, self._kernel.scheduler.persistent, self.slots)
        waiting = list(range(source.blocks))
        running = [
            (slot, self._start(source, waiting.pop(0), slot, 0))
            for slot in range(min(self.slots, source.blocks))
        ]
        while running:
            slot, block = min(running, key=lambda pair: pair[1].due)
            if not block.go_on():
                raise block.deadlock
            if block.is_done:
                running.remove((slot, block))
                if waiting:
                    begin = max(map(now, block.roles)) + self.units.costs.block_start
                    running.append((slot, self._start(source, waiting.pop(0), slot, begin)))

    def _start(self, source: TileSource, number: int, slot: int, begin: int) -> Block:
        block = Block(self._call, source, number)
        for role in block.roles:
            name = role.name if self.slots == 1 else f"block {slot}, {role.name}"
            self.units.admit(role, name, begin)
        return block

    def _timed(self, kind: type[Step], function: StepFunction, charge: Charge) -> StepFunction:
        """The Step, at its cost: its work first, then what it does; a meeting moves the role's time."""
        latency = self.units.costs.barrier_latency if kind in MEETINGS else 0

        def run(step: Any, role: RoleRun) -> Run:
            begin = now(role)
            paid = charge(self.units, step, role)
            goes_on = (yield from paid) if isinstance(paid, Generator) else paid
            inner = function(step, role)
            if inner is not None:
                yield from inner
            role.clock[TIME] = now(role) + latency if goes_on is None else goes_on
            self.units.note(None, step, role, begin, now(role))

        return run
