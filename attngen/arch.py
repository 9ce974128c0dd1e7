"""Frozen facts about the targets attngen knows, each with its source. No rule is applied here.

Shared memory, register and thread limits: CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability". Instruction shapes: PTX ISA, "Matrix Fragments for mma.m16n8k16".
"""

from dataclasses import dataclass

from attngen.dtypes import DType
from attngen.errors import ToolchainError

RESERVED_SMEM_BYTES = 1024
"""What the system takes of every resident block. Source: CUDA C++ Programming Guide, "Shared Memory" of 8.x on."""


@dataclass(frozen=True)
class Mma:
    """Shape of the warp-wide matrix instruction a target uses: D (m x n) += A (m x k) B (k x n)."""

    m: int
    n: int
    k: int


@dataclass(frozen=True)
class Arch:
    """What a target offers.

    Attributes:
        name: what NVRTC calls it (`sm_90a`), or `simulator`.
        compute_capability: (major, minor), None on the simulator.
        runs_on_later_minor: a cubin for this target also runs on later minor versions of the same major one.
        smem_bytes_per_block: most shared memory one block may ask for.
        smem_bytes_per_sm: shared memory of one multiprocessor; each resident block takes `RESERVED_SMEM_BYTES` more.
        registers_per_sm: 32-bit registers of one multiprocessor.
        registers_per_thread: most registers one thread may hold.
        threads_per_block: most threads in one block.
        threads_per_sm: most resident threads on one multiprocessor.
        mma: the matrix instruction of the schedules `serial` and `fa2`; 1x1x1 on the simulator, where any
            tile is legal.
        wgmma: the matrix instruction of a warpgroup, for schedules that specialise warps; None where there is none.
        input_dtypes: names of the formats that Q, K and V may have.
        starts_early: kernels are emitted that may be launched before the one ahead of them in the stream has ended, and
            wait for that themselves. Source: PTX ISA, "griddepcontrol"; CUDA C++ Programming Guide, "Programmatic
            Dependent Launch".
        num_sms: multiprocessors of the largest part; what is assumed where no GPU is at hand.
        emits: whether CUDA text can be made for it.
    """

    name: str
    compute_capability: tuple[int, int] | None
    smem_bytes_per_block: int
    smem_bytes_per_sm: int
    registers_per_sm: int = 65536
    registers_per_thread: int = 255
    threads_per_block: int = 1024
    threads_per_sm: int = 2048
    runs_on_later_minor: bool = True
    mma: Mma = Mma(16, 8, 16)
    wgmma: Mma | None = None
    input_dtypes: tuple[str, ...] = ("f16", "bf16")
    starts_early: bool = False
    num_sms: int = 108
    emits: bool = True

    @property
    def converts_e4m3(self) -> bool:
        """Whether there are instructions that make f16 of e4m3. Source: PTX ISA, cvt.f16x2.e4m3x2, sm_89 and later."""
        return self.compute_capability is None or self.compute_capability >= (8, 9)

    @property
    def has_mma_granularity(self) -> bool:
        """Whether tiles must be multiples of a matrix instruction."""
        return self.mma != Mma(1, 1, 1)

    def k_step(self, dtype: DType) -> int:
        """Numbers of a format that one matrix instruction contracts; `mma.k` is of 16 bits."""
        return self.mma.k * 16 // dtype.bits if self.has_mma_granularity else 1

    @property
    def token(self) -> str:
        """The target as part of an identifier: `sm90a`."""
        return self.name.replace("_", "")

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a cubin of this target loads on a GPU of that compute capability."""
        if self.compute_capability is None:
            return False
        major, minor = self.compute_capability
        if self.runs_on_later_minor:
            return capability[0] == major and capability[1] >= minor
        return capability == (major, minor)


_KB = 1024
_UNBOUNDED = 1 << 40

ARCHS: dict[str, Arch] = {
    arch.name: arch
    for arch in (
        Arch("sm_80", (8, 0), 163 * _KB, 164 * _KB),
        Arch("sm_86", (8, 6), 99 * _KB, 100 * _KB, threads_per_sm=1536, num_sms=84),
        Arch("sm_89", (8, 9), 99 * _KB, 100 * _KB, threads_per_sm=1536, num_sms=144),
        Arch(
            "sm_90a",
            (9, 0),
            227 * _KB,
            228 * _KB,
            runs_on_later_minor=False,
            wgmma=Mma(64, 8, 16),
            input_dtypes=("f16", "bf16", "e4m3"),
            starts_early=True,
            num_sms=132,
        ),
        Arch("sm_120", (12, 0), 99 * _KB, 100 * _KB, threads_per_sm=1536, num_sms=188),
        Arch(
            "simulator",
            None,
            _UNBOUNDED,
            _UNBOUNDED,
            registers_per_sm=_UNBOUNDED,
            registers_per_thread=_UNBOUNDED,
            mma=Mma(1, 1, 1),
            wgmma=Mma(1, 1, 1),
            num_sms=2,
            input_dtypes=("f16", "bf16", "e4m3", "f32"),
            emits=False,
        ),
    )
}


def arch_for_capability(capability: tuple[int, int]) -> Arch:
    """The best target for a GPU of that compute capability.

    Raises:
        ToolchainError: no target of attngen runs there.
    """
    candidates = [arch for arch in ARCHS.values() if arch.runs_on(capability)]
    if not candidates:
        major, minor = capability
        raise ToolchainError(
            f"a GPU of compute capability {major}.{minor} runs none of attngen's targets",
            f"use a GPU of one of {', '.join(a.name for a in ARCHS.values() if a.emits)}, "
            "or run on CPU tensors",
        )
    return max(candidates, key=lambda arch: arch.compute_capability or (0, 0))
