"""The rule table: named hardware rules that every plan passes before any compiler runs.

Each rule looks at a finished plan and names the value of the spec that breaks it. What would be the nearest valid
value is lowering's to find, since only it can make another plan.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from attngen.plan.plan import Plan

SPARE_REGISTERS = 47
"""Registers a thread needs beside its accumulators for operands, addresses and row values.

128x64 tiles of head_dim 128 over 4 warps (208 - 16 in accumulators) compile without spills on NVRTC 13.0.88.
"""


@dataclass(frozen=True)
class Violation:
    """A rule that a plan breaks, by the value of the spec that is most easily changed."""

    rule: str
    path: str
    value: int
    must: str
    note: str


def _mma_rows(plan: Plan) -> Iterator[Violation]:
    step = plan.arch.mma.m * plan.warps
    if plan.block_m % step:
        yield Violation(
            "mma-rows",
            "tile.block_m",
            plan.block_m,
            f"must be a multiple of {step}",
            f"each of {plan.warps} warps owns rows in steps of {plan.arch.mma.m}",
        )


def _mma_k_step(plan: Plan) -> Iterator[Violation]:
    step = plan.arch.mma.k
    if plan.block_n % step:
        yield Violation(
            "mma-k-step",
            "tile.block_n",
            plan.block_n,
            f"must be a multiple of {step}",
            f"P·V consumes block_n in k-steps of {step} for {plan.inputs.name}",
        )


def _shared_memory(plan: Plan) -> Iterator[Violation]:
    limit = plan.arch.smem_bytes_per_block
    for kernel in plan.kernels:
        if kernel.smem_bytes > limit:
            parts = " + ".join(f"{b.name} {b.size_bytes}" for b in kernel.buffers if b.overlays is None)
            yield Violation(
                "shared-memory",
                "tile.block_n",
                plan.block_n,
                f"asks for {kernel.smem_bytes} bytes of shared memory and {plan.arch.name} has {limit}",
                f"{parts} = {kernel.smem_bytes} bytes",
            )


def _registers(plan: Plan) -> Iterator[Violation]:
    limit = plan.arch.registers_per_thread - SPARE_REGISTERS
    for kernel in plan.kernels:
        (role,) = kernel.roles
        tiles = [tile for tile in kernel.reg_tiles if tile.layout == "accumulator"]
        used = sum(tile.registers_per_thread(role.warps) for tile in tiles)
        if used > limit:
            parts = " + ".join(f"{tile.name} {tile.registers_per_thread(role.warps)}" for tile in tiles)
            yield Violation(
                "registers",
                "tile.block_n",
                plan.block_n,
                f"asks for {used} accumulator registers a thread and {limit} are free",
                f"{parts} = {used}; {SPARE_REGISTERS} of {plan.arch.registers_per_thread} do the rest",
            )


def _threads(plan: Plan) -> Iterator[Violation]:
    limit = plan.arch.threads_per_block // 32
    if plan.warps > limit:
        yield Violation(
            "threads-per-block",
            "schedule.warps",
            plan.warps,
            f"must be at most {limit}",
            f"a block has at most {plan.arch.threads_per_block} threads",
        )


def _stages(plan: Plan) -> Iterator[Violation]:
    if plan.schedule == "serial" and plan.stages != 1:
        yield Violation(
            "serial-stages", "schedule.stages", plan.stages, "must be 1", "serial overlaps nothing"
        )
    if plan.stages > 8:
        yield Violation(
            "stages", "schedule.stages", plan.stages, "must be at most 8", "copies in flight are few"
        )


RULES: dict[str, Callable[[Plan], Iterator[Violation]]] = {
    "threads-per-block": _threads,
    "stages": _stages,
    "mma-rows": _mma_rows,
    "mma-k-step": _mma_k_step,
    "shared-memory": _shared_memory,
    "registers": _registers,
}


def verify(plan: Plan) -> tuple[Violation, ...]:
    """Every violation of every rule."""
    return tuple(violation for rule in RULES.values() for violation in rule(plan))
