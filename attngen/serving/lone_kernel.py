"""Kernels that belong to no call of a spec: what is known of one, and its launches.

A lone kernel is compiled at its first launch, through the cache of all kernels. Nothing here knows what one does.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch

from attngen.arch import ARCHS, Arch, arch_for_capability
from attngen.emit.device import used_by
from attngen.plan import KernelEntry, Param
from attngen.runtime.disk_cache import CompiledKernel, DiskCache
from attngen.runtime.driver import Module, launch
from attngen.runtime.loaded import LoadedKernels
from attngen.runtime.prepared import (
    WORD,
    Arguments,
    PreparedLaunch,
    PreparedStruct,
    offsets,
    pack,
)

LARGEST_GRID = 2**31 - 1
"""Blocks of a launch. Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""


@dataclass(frozen=True)
class LoneKernel(ABC):
    """A kernel whose text follows from its fields: the same fields give the same bytes.

    Attributes:
        arch: where it runs.
    """

    arch: Arch
    threads: ClassVar[int]
    """Threads of a block."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Entry name of the kernel."""

    @property
    @abstractmethod
    def params(self) -> tuple[Param, ...]:
        """Fields of the struct that it takes by value."""

    @abstractmethod
    def body(self) -> str:
        """The text of the kernel and its own functions, without the device library."""

    @property
    def source(self) -> str:
        """The whole CUDA C++ text."""
        body = self.body().strip("\n")
        return "\n\n".join([*used_by(body), body]) + "\n"

    @property
    def entry(self) -> KernelEntry:
        """The kernel as the runtime knows kernels."""
        return KernelEntry(
            self.name, self.name, self.threads, 0, self.params, (), False, self.arch.starts_early
        )

    def compiled(self) -> CompiledKernel:
        """The cubin, from the disk cache or fresh.

        Raises:
            ToolchainError: NVRTC is missing.
        """
        return DiskCache().get(self.source, self.arch.name)


@dataclass(frozen=True)
class ReadyLaunch:
    """A launch, all but for its addresses.

    Attributes:
        loaded: the kernel, ready on the device.
        struct: its parameters.
        device: number of the device; -1 for the CPU, where tests run kernels.
    """

    loaded: LoadedKernels
    struct: PreparedStruct
    device: int

    def start(self, tensors: Iterable[torch.Tensor]) -> None:
        """Launch on torch's current stream of the device.

        Args:
            tensors: in the order of the names that the launch was prepared for.
        """
        addresses = tuple([x.data_ptr() for x in tensors])
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        self.loaded.launch((self.struct,), addresses, self.device, stream)


class LoneLauncher:
    """Launches a lone kernel.

    Args:
        kernel: which.
        load: makes a module of a cubin; tests pass a recorder.
        start: launches; tests pass a recorder.
    """

    def __init__(
        self,
        kernel: LoneKernel,
        load: Callable[[bytes], Any] = Module,
        start: Callable[..., None] = launch,
    ) -> None:
        self.kernel = kernel
        self._entry = kernel.entry
        self._loaded = LoadedKernels(
            kernel.arch.name, (self._entry,), lambda module: kernel.compiled().cubin, load, start
        )

    def prepare(
        self, device: torch.device, names: Iterable[str], numbers: Mapping[str, int | float], grid: int
    ) -> ReadyLaunch:
        """Have a launch at hand.

        Args:
            device: of all tensors.
            names: of values, in the order in which their addresses will come; fields "<name>.ptr" point at them.
            numbers: what other fields carry, by their values' names; what is in neither is 0.
            grid: blocks.

        Raises:
            ToolchainError: this machine cannot compile or run the kernel.
        """
        index = -1 if device.index is None else device.index
        words = {value: start // WORD for value, start in offsets(self._entry).items()}
        patches = tuple((words[f"{name}.ptr"], number, 0) for number, name in enumerate(names))
        nothing: dict[str, int | float] = {param.value: 0 for param in self._entry.params}
        arguments = Arguments(pack(self._entry, {**nothing, **numbers}))
        with self._loaded.preparing(device):
            function = self._loaded.function(self._entry, index)
        ready = PreparedLaunch(function, grid, self.kernel.threads, smem_bytes=0)
        return ReadyLaunch(self._loaded, PreparedStruct(arguments, patches, (), (ready,)), index)


@lru_cache(maxsize=256)
def launcher_of(kernel: LoneKernel) -> LoneLauncher:
    """The launcher of a kernel, one a process."""
    return LoneLauncher(kernel)


@lru_cache(maxsize=64)
def arch_on(device: torch.device) -> Arch:
    """What tensors of a device run on: the simulator where it is the CPU.

    Raises:
        ToolchainError: no kernel of attngen runs on that GPU.
    """
    if device.type != "cuda":
        return ARCHS["simulator"]
    return arch_for_capability(torch.cuda.get_device_capability(device))
