"""A block of threads: what its roles share, and the small scheduler that drives them.

A role is resumed when what it waits for has come. When every role that is left waits, and no other block can help, the
block is deadlocked, and the fault says who waits for what. Which blocks of a launch run, and in what order, is the
caller's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from attngen.plan import KernelPlan, Step
from attngen.scaling import scale_values
from attngen.simulate.barriers import Barrier, NamedBarrier, StageBarriers, stage_barriers
from attngen.simulate.clocks import Stamp
from attngen.simulate.device_memory import DeviceMemory
from attngen.simulate.faults import SimulationFault
from attngen.simulate.roles import Event, RoleRun, StepFunction, Wait
from attngen.simulate.shared_memory import Cell, divided_buffers, lay_out
from attngen.simulate.tile_source import TileSource
from attngen.simulate.visits import Blocks, Member, Sizes, Visits, decoded


@dataclass(frozen=True)
class KernelRun:
    """What one launch of a kernel fixes for all its blocks.

    Attributes:
        scale: what softmax_scale becomes, by the names of the parameters that carry it.
        device: the tensors; without values in them the program is only counted.
        steps: the function of every Step.
        observer: called after every Step, or None.
        accumulates: gradients are added to what stands there.
    """

    plan: KernelPlan
    sizes: Sizes
    scale: Mapping[str, float]
    device: DeviceMemory
    steps: Mapping[type[Step], StepFunction]
    observer: Callable[[Event], None] | None = None
    accumulates: bool = False

    @cached_property
    def visits(self) -> Visits:
        """Which blocks visit each other."""
        return Visits(self.plan, self.sizes)

    @cached_property
    def tile_numbers(self) -> Mapping[tuple[Blocks, Member], int]:
        """The numbers of tiles, by what they work on."""
        return {tile: number for number, tile in enumerate(decoded(self.plan, self.sizes))}

    @cached_property
    def divided(self) -> dict[str, int]:
        """By name, in how many parts those buffers fall of which a warpgroup touches its own rows."""
        names = (name for role in self.plan.roles for name in divided_buffers(role.program))
        return dict.fromkeys(names, self.plan.worker.warpgroups)


def scale_params(plan: KernelPlan, softmax_scale: float) -> dict[str, float]:
    """`KernelRun.scale`, each rounded to f32."""
    values = scale_values(float(softmax_scale), plan.score_factor)
    values |= {param.name: values[param.value] for param in plan.params if param.value in values}
    return {name: torch.tensor(value, dtype=torch.float32).item() for name, value in values.items()}


class Block:
    """One block of threads: its shared memory, its barriers and its roles.

    Attributes:
        tiles: where it gets its tiles from; `first` is its own.
        is_last_part: whether all parts of its tile's rows have been counted.
    """

    def __init__(self, run: KernelRun, tiles: TileSource, first: int) -> None:
        self.call = run
        kernel = run.plan
        self.tiles = tiles
        self.first = first
        self.is_last_part = False
        self.cells = lay_out(kernel.buffers, run.divided)
        self.tile_slot = Cell("the tile slot")
        self.rings: dict[str, tuple[StageBarriers, ...]] = {
            ring.name: stage_barriers(ring, kernel.worker.warpgroups) for ring in kernel.rings
        }
        self.roles = [RoleRun(self, role, i) for role in kernel.roles for i in range(role.warpgroups)]
        self.barrier = Barrier(len(self.roles))
        self.named: dict[tuple[str, int], NamedBarrier] = {}
        self.rows_written: dict[tuple[str, int], Stamp] = {}  # block m of a workspace
        self._runs = {role: role.run(role.program) for role in self.roles}
        self._waits: dict[RoleRun, Wait] = {}

    @property
    def is_done(self) -> bool:
        """Whether every role has come to its end."""
        return not self._runs

    @property
    def due(self) -> int:
        """When the first of those roles wants to go on that can."""
        return min(map(self._due, self._ready()), default=0)

    def _ready(self) -> list[RoleRun]:
        return [role for role in self._runs if role not in self._waits or self._waits[role].has_come()]

    def _due(self, role: RoleRun) -> int:
        return self._waits[role].due if role in self._waits else 0

    @property
    def deadlock(self) -> SimulationFault:
        """The fault that no role can ever go on."""
        who = "; ".join(f"{role.name} waits for {wait.what()}" for role, wait in self._waits.items())
        return SimulationFault("deadlock", who, where=str(self.roles[0].tile))

    def go_on(self) -> bool:
        """Run every role that is due to where it waits, and say whether there was one.

        Raises:
            SimulationFault: a program broke a rule.
        """
        ready = self._ready()
        if not ready:
            return False
        first = min(map(self._due, ready))
        for role in [role for role in ready if self._due(role) == first]:
            self._waits.pop(role, None)
            try:
                self._waits[role] = next(self._runs[role])
            except StopIteration:
                del self._runs[role]
                role.finish()
        if self.is_done:
            self._look_for_copies()
        return True

    def _look_for_copies(self) -> None:
        cells = (cell for parts in self.cells.values() for cell in parts)
        for cell in cells:
            if cell.in_flight:
                message = f"the block ends with a copy into {cell.name} in flight"
                raise SimulationFault("never landed", message, place=cell.name)
