"""How near a plan is to what its target offers: the margin of every rule, and the resident blocks.

The verdicts are `plan.rules`'; here the same quantities are read off a plan that passed, to be shown.
"""

from collections.abc import Callable
from dataclasses import dataclass

from attngen.arch import Arch
from attngen.plan import Plan
from attngen.plan.rules import SPARE_REGISTERS

REGISTERS_PER_ALLOCATION = 8
"""Registers of a thread come in eights (256 a warp). Source: CUDA occupancy data, compute capability 8.0 to 12.0."""
RESERVED_SMEM_BYTES = 1024
"""What the system takes of every resident block. Source: CUDA C++ Programming Guide, "Shared Memory" of 8.x on."""


@dataclass(frozen=True)
class Margin:
    """What a plan uses of what one rule allows.

    Attributes:
        used, limit: of a rule about an amount; of a rule about a multiple, the number and its step.
        unit: of both.
        is_amount: whether more would break the rule; a multiple has no margin and never binds.
    """

    rule: str
    used: int
    limit: int
    unit: str
    is_amount: bool = True

    @property
    def share(self) -> float:
        """What part of the allowance is used."""
        return self.used / self.limit if self.is_amount else 0.0

    def __str__(self) -> str:
        if not self.is_amount:
            return f"{self.used} = {self.used // self.limit} x {self.limit} {self.unit}"
        return f"{self.used} of {self.limit} {self.unit} ({self.limit - self.used} left)"


def _registers(plan: Plan) -> Margin:
    kernel = plan.kernel
    (role,) = kernel.roles
    tiles = [tile for tile in kernel.reg_tiles if tile.layout == "accumulator"]
    used = sum(tile.registers_per_thread(role.warps) for tile in tiles)
    limit = plan.arch.registers_per_thread - SPARE_REGISTERS
    return Margin("registers", used, limit, "accumulator registers")


def _shared_memory(plan: Plan) -> Margin:
    used = max(kernel.smem_bytes for kernel in plan.kernels)
    return Margin("shared-memory", used, plan.arch.smem_bytes_per_block, "bytes")


def _rows(plan: Plan) -> Margin:
    return Margin("mma-rows", plan.block_m, plan.arch.mma.m * plan.warps, "rows", is_amount=False)


def _k_step(plan: Plan) -> Margin:
    return Margin("mma-k-step", plan.block_n, plan.arch.mma.k, "keys", is_amount=False)


def _threads(plan: Plan) -> Margin:
    return Margin("threads-per-block", plan.kernel.threads, plan.arch.threads_per_block, "threads")


def _stages(plan: Plan) -> Margin:
    return Margin("stages", plan.stages, 1 if plan.schedule == "serial" else 8, "stages")


MARGINS: dict[str, Callable[[Plan], Margin]] = {
    "threads-per-block": _threads,
    "stages": _stages,
    "mma-rows": _rows,
    "mma-k-step": _k_step,
    "shared-memory": _shared_memory,
    "registers": _registers,
}
"""One margin for every rule of `plan.rules.RULES`."""

CHOSEN = frozenset({"stages", "threads-per-block"})
"""Rules about what the spec counts out itself; a tile is bound by what it costs."""


def margins(plan: Plan) -> tuple[Margin, ...]:
    """The margin of every rule."""
    return tuple(margin(plan) for margin in MARGINS.values())


def binding(plan: Plan) -> Margin:
    """The rule that a larger tile would break first: the one whose allowance is most used up."""
    return max((m for m in margins(plan) if m.rule not in CHOSEN), key=lambda m: m.share)


@dataclass(frozen=True)
class Occupancy:
    """How many blocks of a kernel one multiprocessor holds at a time.

    Attributes:
        blocks: of the kernel.
        warps: of these blocks.
        share: of the threads that the multiprocessor could hold.
        limited_by: which resource runs out first.
    """

    blocks: int
    warps: int
    share: float
    limited_by: str

    def __str__(self) -> str:
        plural = "" if self.blocks == 1 else "s"
        return f"{self.blocks} block{plural}, {self.warps} warps ({self.share:.0%}), by {self.limited_by}"


def occupancy(arch: Arch, threads: int, registers: int, smem_bytes: int) -> Occupancy:
    """Resident blocks per multiprocessor, from what a block takes of each resource."""
    granted = -(-registers // REGISTERS_PER_ALLOCATION) * REGISTERS_PER_ALLOCATION
    fits = {
        "registers": arch.registers_per_sm // (granted * threads),
        "shared memory": arch.smem_bytes_per_sm // (smem_bytes + RESERVED_SMEM_BYTES),
        "threads": arch.threads_per_sm // threads,
    }
    limited_by = min(fits, key=lambda resource: fits[resource])
    blocks = fits[limited_by]
    return Occupancy(blocks, blocks * threads // 32, blocks * threads / arch.threads_per_sm, limited_by)
