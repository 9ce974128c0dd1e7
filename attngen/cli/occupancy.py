"""How many blocks of a kernel one multiprocessor holds at a time."""

from dataclasses import dataclass

from attngen.arch import RESERVED_SMEM_BYTES, Arch
from attngen.plan.hardware_rules import REGISTERS_PER_ALLOCATION, SUBPARTITIONS


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
