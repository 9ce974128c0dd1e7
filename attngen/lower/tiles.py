"""What `auto` stands for: tile, stages and warps per schedule and head dim. Numbers only."""

from dataclasses import dataclass

from attngen.arch import Arch


@dataclass(frozen=True)
class Choice:
    """The numbers a spec leaves open, decided.

    Attributes:
        blocks_per_sm: resident blocks the compiler must leave registers for.
        score_unroll: k-steps of the score GEMM that are written out.
    """

    block_m: int
    block_n: int
    stages: int
    warps: int
    blocks_per_sm: int = 1
    score_unroll: int = 4


def choices(schedule: str, head_dim: int, arch: Arch) -> tuple[Choice, ...]:
    """Candidates from best to smallest; lowering takes the first that passes the rules.

    fa2 at head_dim 64 and 128: benchmarks/results/tune_fa2.json (H200, 2026-11-21). The other head dims follow the
    nearest of the two that fits.
    """
    if not arch.has_mma_granularity:
        return (Choice(64, 64, 1 if schedule == "serial" else 2, 1),)
    if schedule == "serial":
        wide = (Choice(64, 64, 1, 4),) if head_dim <= 192 else ()
        return (*wide, Choice(64, 32, 1, 4), Choice(32, 32, 1, 2))
    if head_dim <= 64:
        return (Choice(128, 64, 2, 4), Choice(128, 64, 1, 4))
    if 80 < head_dim <= 96:  # 128x64 spills 8 bytes (NVRTC 13.0.88)
        return (Choice(128, 48, 2, 4), Choice(64, 48, 1, 4))
    if head_dim <= 128:
        return (Choice(128, 64, 1, 4), Choice(64, 64, 1, 4), Choice(64, 32, 1, 4))
    return (
        Choice(128, 64, 1, 8, score_unroll=2),
        Choice(128, 32, 1, 8, score_unroll=2),
        Choice(64, 64, 1, 4, score_unroll=2),
        Choice(64, 32, 1, 4, score_unroll=2),
    )
