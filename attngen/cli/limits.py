"""How near a plan is to what its target offers: the margin of every rule, and the resident blocks.

The verdicts are `plan.rules`'; here the same quantities are read off a plan that passed, to be shown.
"""

from collections.abc import Callable
from dataclasses import dataclass

from attngen.arch import RESERVED_SMEM_BYTES, Arch
from attngen.expr import LARGEST_TILE
from attngen.plan import KernelPlan
from attngen.plan.rules import (
    MOST_STAGES,
    MOST_WARPGROUPS,
    MOST_WGMMA_COLUMNS,
    free_registers,
    staged_groups,
    takes_warpgroups,
    tiles_in_registers,
)

REGISTERS_PER_ALLOCATION = 8
"""Registers of a thread come in eights (256 a warp). Source: CUDA occupancy data, compute capability 8.0 to 12.0."""
SUBPARTITIONS = 4
"""Parts of a multiprocessor; each has a quarter of the registers, and a warp lives in one. Source: cuda_occupancy.h."""


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


def tile_registers(plan: KernelPlan) -> int:
    """32-bit registers that a thread of the computing role spends on tiles that share none."""
    return sum(tile.registers_per_thread(plan.worker.warps) for tile in tiles_in_registers(plan))


def _registers(plan: KernelPlan) -> Margin:
    unit = "tile registers" if takes_warpgroups(plan) else "accumulator registers"
    return Margin("registers", tile_registers(plan), free_registers(plan), unit)


def _shared_memory(plan: KernelPlan) -> Margin:
    return Margin("shared-memory", plan.smem_bytes, plan.arch.smem_bytes_per_block, "bytes")


def _largest_tile(plan: KernelPlan) -> Margin:
    return Margin("largest-tile", max(plan.block_m, plan.block_n), LARGEST_TILE, "rows or keys")


def _mma_rows(plan: KernelPlan) -> Margin | None:
    if takes_warpgroups(plan):
        return None
    return Margin("mma-rows", plan.block_m, plan.arch.mma.m * plan.warps, "rows", is_amount=False)


def _wgmma_rows(plan: KernelPlan) -> Margin | None:
    if not takes_warpgroups(plan) or plan.arch.wgmma is None:
        return None
    step = plan.arch.wgmma.m * plan.worker.warpgroups
    return Margin("wgmma-rows", plan.block_m, step, "rows", is_amount=False)


def _wgmma_columns(plan: KernelPlan) -> Margin | None:
    if not takes_warpgroups(plan) or not plan.arch.emits:
        return None
    return Margin("wgmma-columns", plan.block_n, MOST_WGMMA_COLUMNS, "keys")


def _k_step(plan: KernelPlan) -> Margin:
    return Margin("mma-k-step", plan.block_n, plan.arch.k_step(plan.inputs), "keys", is_amount=False)


def _staged_scales(plan: KernelPlan) -> Margin | None:
    found = staged_groups(plan)
    return Margin("staged-scales", *found, "groups of columns") if found else None


def _threads(plan: KernelPlan) -> Margin:
    return Margin("threads-per-block", plan.threads, plan.arch.threads_per_block, "threads")


def _warpgroups(plan: KernelPlan) -> Margin | None:
    if not takes_warpgroups(plan):
        return None
    return Margin("warpgroups", plan.worker.warpgroups, MOST_WARPGROUPS, "consumer warpgroups")


def _stages(plan: KernelPlan) -> Margin:
    return Margin("stages", plan.stages, 1 if plan.schedule == "serial" else MOST_STAGES, "stages")


MARGINS: dict[str, Callable[[KernelPlan], Margin | None]] = {
    "threads-per-block": _threads,
    "stages": _stages,
    "warpgroups": _warpgroups,
    "largest-tile": _largest_tile,
    "mma-rows": _mma_rows,
    "wgmma-rows": _wgmma_rows,
    "wgmma-columns": _wgmma_columns,
    "mma-k-step": _k_step,
    "shared-memory": _shared_memory,
    "registers": _registers,
    "staged-scales": _staged_scales,
}
"""One margin for every rule of `plan.rules.RULES`; None where the rule says nothing of the plan's schedule."""

CHOSEN = frozenset({"stages", "threads-per-block", "warpgroups"})
"""Rules about what the spec counts out itself; a tile is bound by what it costs."""


def margins(plan: KernelPlan) -> tuple[Margin, ...]:
    """The margin of every rule that says something of the plan's schedule."""
    return tuple(found for margin in MARGINS.values() if (found := margin(plan)) is not None)


def binding(plan: KernelPlan) -> Margin:
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
    """Resident blocks per multiprocessor, from what a block takes of each resource.

    Args:
        arch: whose multiprocessor.
        threads: of a block.
        registers: of a thread at launch; setmaxnreg hands them on within the block and takes no others.
        smem_bytes: of a block.
    """
    warps = -(-threads // 32)
    granted = -(-registers // REGISTERS_PER_ALLOCATION) * REGISTERS_PER_ALLOCATION
    held_warps = arch.registers_per_sm // SUBPARTITIONS // (32 * granted) * SUBPARTITIONS
    fits = {
        "registers": held_warps // warps,
        "shared memory": arch.smem_bytes_per_sm // (smem_bytes + RESERVED_SMEM_BYTES),
        "threads": arch.threads_per_sm // threads,
    }
    limited_by = min(fits, key=lambda resource: fits[resource])
    blocks = fits[limited_by]
    return Occupancy(blocks, blocks * warps, blocks * threads / arch.threads_per_sm, limited_by)
