"""The kernels of a call on the GPUs of this process: loaded when first needed, launched with a call's addresses."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from attngen.plan import KernelEntry
from attngen.runtime.driver import Function, Module, check_device, launch, preparing
from attngen.runtime.prepared import PreparedStruct


class LoadedKernels:
    """Functions by kernel, and their launches.

    Args:
        arch: that the kernels are compiled for.
        kernels: of all modules.
        cubin_of: the machine code of a module, by its name.
        load: makes a module of a cubin; tests pass a recorder.
        start: launches; tests pass a recorder.
    """

    def __init__(
        self,
        arch: str,
        kernels: tuple[KernelEntry, ...],
        cubin_of: Callable[[str], bytes],
        load: Callable[[bytes], Any] = Module,
        start: Callable[..., None] = launch,
    ) -> None:
        self._arch = arch
        self._kernels = kernels
        self._cubin_of = cubin_of
        self._load = load
        self._start = start
        self._functions: dict[str, Function] = {}

    @contextmanager
    def preparing(self, device: torch.device) -> Iterator[None]:
        """Let this thread load functions on a device; where tensors are on the CPU, tests run kernels in its place.

        Raises:
            ToolchainError: the device is a GPU that the kernels do not run on.
        """
        if device.type != "cuda":
            yield
            return
        check_device(self._arch, torch.cuda.get_device_capability(device))
        with preparing(device.index):
            yield

    def function(self, kernel: KernelEntry, device: int) -> Function:
        """A kernel, loaded and ready on a device; to be called while `preparing`."""
        if kernel.name not in self._functions:
            module = self._load(self._cubin_of(kernel.module))
            self._functions |= {
                each.name: module.function(each.name, each.smem_bytes, each.starts_early)
                for each in self._kernels
                if each.module == kernel.module
            }
        function = self._functions[kernel.name]
        function.prepare(device)
        return function

    def launch(
        self, structs: tuple[PreparedStruct, ...], addresses: tuple[int, ...], device: int, stream: int
    ) -> None:
        """Put a call's addresses into its structs, and launch what reads them, in order.

        Args:
            structs: of the call's signature.
            addresses: as the structs number them.
            device: on which the functions are ready.
            stream: the raw handle of a stream of that device.
        """
        if torch._C._cuda_getDevice() != device:
            with torch.cuda.device(device):
                return self.launch(structs, addresses, device, stream)
        for each in structs:
            address = each.patch(addresses)
            for ready in each.launches:
                self._start(
                    ready.function, ready.grid, ready.threads, ready.smem_bytes, device, stream, address
                )
