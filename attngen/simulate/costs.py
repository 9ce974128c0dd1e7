"""What a Step costs: one frozen table for each GPU whose timeline can be drawn. Numbers and sources only.

Rates are per cycle of one multiprocessor (SM), latencies in cycles. Where no source is named the number is assumed:
nothing here has been fitted to a measured attention kernel. `benchmarks/timeline_vs_measured.py` compares.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from attngen.arch import Arch
from attngen.errors import ToolchainError
from attngen.plan.steps import (
    Clear,
    ConvertP,
    Exponentiate,
    HidePairs,
    MaskScores,
    MaskScoresEach,
    ModifyScores,
    RecoverP,
    RowMax,
    ScaleGradient,
    ScaleRows,
    ScoreGradient,
    SeedScores,
    Step,
)


@dataclass(frozen=True)
class Costs:
    """The cost table of one GPU.

    Attributes:
        num_sms: multiprocessors.
        clock_hz: cycles a second, only for turning cycles into time.
        flops_of_16_bit: of wgmma on 16-bit inputs a cycle, an addition and a multiplication counted each; half as
            many on inputs twice as wide.
        mma_share: what mma.sync reaches of that.
        gemm_issue: from the fence to the last wgmma of a group, for the warpgroup that issues it.
        gemm_latency: from the last operation of a group to where a wait for it returns.
        exponentials: ex2.approx a cycle.
        lanes: lanes of instructions issued a cycle, by four warp schedulers.
        lane_slots: of those, what one element takes in each Step.
        step_latency: until the last element of a Step has passed the pipelines.
        reduction_latency: of the shuffles over the four lanes of a row, and of alpha.
        copy_bytes: from L2 to the shared memory of one SM while all SMs load.
        copy_latency: from the issue of a copy to its first bytes in shared memory.
        copy_issue: what a copy costs the thread that asks the copy engine for it.
        chunk_slots: lanes that one cp.async of 16 bytes takes, with its address.
        shared_bytes: stored to shared memory by threads.
        memory_latency: of a load or an atomic that a thread waits for.
        barrier_latency: from the last arrival to where a wait returns.
        block_start: from the end of a block of threads to the first Step of the next in its place.
    """

    name: str
    num_sms: int
    clock_hz: float
    flops_of_16_bit: int
    mma_share: float
    gemm_issue: int
    gemm_latency: int
    exponentials: int
    lanes: int
    lane_slots: Mapping[type[Step], float]
    step_latency: int
    reduction_latency: int
    copy_bytes: float
    copy_latency: int
    copy_issue: int
    chunk_slots: int
    shared_bytes: int
    memory_latency: int
    barrier_latency: int
    block_start: int


H200 = Costs(
    name="H200",
    num_sms=132,
    # Boost is 1.98 GHz, but the power limit of 700 W rules: long kernels at head_dim 128 are reported to hold 1.4 to
    # 1.75 GHz (1.77 after benchmarks/results/fa2_vs_flash.json). The top of that: what the schedule would allow.
    clock_hz=1.755e9,
    # 989.5 TFLOPS / (132 SMs x 1.83 GHz). Source: NVIDIA H100 Tensor Core GPU Architecture, dense BF16, SXM5.
    flops_of_16_bit=4096,
    # Source: Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture", arXiv 2402.13499: 62.9 %.
    mma_share=0.63,
    gemm_issue=40,
    gemm_latency=40,
    # Measured on an H200, 2026-11-21: 16.0 elements a cycle. Source: CUDA C++ Programming Guide, "Arithmetic
    # Instructions", compute capability 9.0, of which the two rows below are too.
    exponentials=16,
    lanes=128,
    # FFMA, FADD, FMUL and the issue of MUFU take one slot; minimum, maximum, compare, select and conversions two, for
    # there are 64 a cycle of them.
    lane_slots=MappingProxyType(
        {
            Clear: 1,
            RowMax: 2,  # FMNMX
            Exponentiate: 3,  # FFMA, MUFU, FADD
            ConvertP: 1,  # one F2FP packs two
            ScaleRows: 1,  # FMUL
            SeedScores: 2,  # FFMA, and what it multiplies
            ModifyScores: 12,  # a scale and a handful of operations
            MaskScores: 4,  # ISETP and FSEL
            MaskScoresEach: 12,  # the mask itself, then as above
            RecoverP: 2,  # FFMA, MUFU; rounding, a mask and a score as above, and the slope as a score
            HidePairs: 12,  # as MaskScoresEach
            ScoreGradient: 3,  # FADD, FMUL, and F2FP as above
            ScaleGradient: 1,  # FMUL
        }
    ),
    step_latency=30,
    reduction_latency=100,
    # 5120 bytes a cycle of L2, shared by all. Source: NVIDIA A100 Tensor Core GPU Architecture; assumed unchanged.
    copy_bytes=5120 / 132,
    copy_latency=700,
    copy_issue=20,
    chunk_slots=6,
    # Source: CUDA C++ Programming Guide, "Shared Memory", 32 banks of 4 bytes.
    shared_bytes=128,
    memory_latency=700,
    barrier_latency=30,
    block_start=600,
)

COSTS: Mapping[str, Costs] = MappingProxyType({"sm_90a": H200})
"""The table of a GPU of each target."""


def costs_of(arch: Arch) -> Costs:
    """The table of a target.

    Raises:
        ToolchainError: nobody has stated what its Steps cost.
    """
    if arch.name not in COSTS:
        raise ToolchainError(
            f"no timeline for {arch.name}: what a Step costs is stated for {', '.join(COSTS)} alone",
            f"lower the spec for it: --arch {next(iter(COSTS))}",
        )
    return COSTS[arch.name]
