"""Kernels that belong to no call of a spec: what is known of one, and its launches.

A lone kernel is compiled at its first launch, through the cache of all kernels. Nothing here knows what one does.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
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
    remember,
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
        self._loaded = LoadedKernels(
            kernel.arch.name, (self._entry,), lambda module: kernel.compiled().cubin, load, start
        )
        self._structs: dict[tuple[Any, ...], PreparedStruct] = {}

    @cached_property
    def _entry(self) -> KernelEntry:
        return self.kernel.entry

    def launch(
        self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, int | float], grid: int
    ) -> None:
        """Launch on torch's current stream of the tensors' device.

        Args:
            tensors: by the names of their values, of which fields "<name>.ptr" point at them.
            numbers: what other fields carry, by their values' names; what is in neither is 0.
            grid: blocks.

        Raises:
            ToolchainError: this machine cannot compile or run the kernel.
        """
        device = next(iter(tensors.values())).device
        index = -1 if device.index is None else device.index  # tests run kernels on the CPU
        key = (index, grid, *tensors, *numbers.values())
        struct = self._structs.get(key)
        if struct is None:
            struct = self._prepare(device, index, tensors, numbers, grid)
            remember(self._structs, key, struct)
        addresses = tuple([x.data_ptr() for x in tensors.values()])
        self._loaded.launch((struct,), addresses, index, torch._C._cuda_getCurrentRawStream(index))

    def _prepare(
        self,
        device: torch.device,
        index: int,
        tensors: Mapping[str, torch.Tensor],
        numbers: Mapping[str, int | float],
        grid: int,
    ) -> PreparedStruct:
        """The struct of a signature, all but its addresses, and the kernel ready on the device."""
        words = {value: start // WORD for value, start in offsets(self._entry).items()}
        patches = tuple((words[f"{name}.ptr"], number, 0) for number, name in enumerate(tensors))
        nothing: dict[str, int | float] = {param.value: 0 for param in self._entry.params}
        arguments = Arguments(pack(self._entry, {**nothing, **numbers}))
        with self._loaded.preparing(device):
            function = self._loaded.function(self._entry, index)
        ready = PreparedLaunch(function, grid, self.kernel.threads, smem_bytes=0)
        return PreparedStruct(arguments, patches, (), (ready,))


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
