"""What `auto` stands for: tile, stages and warps per schedule and head dim. Numbers only."""

from dataclasses import dataclass

from attngen.arch import Arch


@dataclass(frozen=True)
class Choice:
    """The numbers a spec leaves open, decided.

    Attributes:
        blocks_per_sm: resident blocks the compiler must leave registers for.
        longest_first: start the blocks of rows that see the most keys first.
    """

    block_m: int
    block_n: int
    stages: int
    warps: int
    blocks_per_sm: int = 1
    longest_first: bool = False


def choices(schedule: str, head_dim: int, arch: Arch) -> tuple[Choice, ...]:
    """Candidates from best to smallest; lowering takes the first that passes the rules."""
    if not arch.has_mma_granularity:
        return (Choice(64, 64, 1 if schedule == "serial" else 2, 1),)
    if schedule == "serial":
        return (Choice(64, 64, 1, 4), Choice(64, 32, 1, 4), Choice(32, 32, 1, 2))
    if head_dim <= 64:
        return (Choice(128, 64, 2, 4), Choice(128, 64, 1, 4), Choice(64, 64, 1, 4))
    if head_dim <= 128:
        return (Choice(128, 64, 2, 4), Choice(128, 64, 1, 4), Choice(64, 64, 1, 4), Choice(64, 32, 1, 4))
    return (
        Choice(128, 64, 1, 8),
        Choice(128, 32, 1, 8),
        Choice(64, 64, 1, 4),
        Choice(64, 32, 1, 4),
    )
