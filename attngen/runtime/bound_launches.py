"""The launches of a call whose tensors stay where they are: nothing is looked at any more when they start."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attngen.runtime.counters import COUNTERS
from attngen.runtime.loaded import LoadedKernels
from attngen.runtime.prepared import PreparedStruct


@dataclass(frozen=True)
class BoundLaunches:
    """Starts them on the current stream of their device.

    Attributes:
        kernels: whose launches they are.
        structs: that hold all addresses but those of counters.
        counters: how many there are of these, which streams have of their own.
        cleared: memory that is 0 when they begin.
        device: on which the functions are ready.
        held: memory that must live as long.
    """

    kernels: LoadedKernels
    structs: tuple[PreparedStruct, ...]
    counters: int
    cleared: Sequence[torch.Tensor]
    device: int
    held: object

    def __call__(self) -> None:
        """Start them."""
        for memory in self.cleared:
            memory.zero_()
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        counters = (COUNTERS.address(self.device, stream, self.counters),) if self.counters else ()
        self.kernels.launch(self.structs, counters, self.device, stream)
