"""A call on tensors that stay where they are, which `attngen.Kernel.bind` makes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BoundCall:
    """Starts one call again and again, on what its tensors hold then, on the current stream of their device.

    It writes to memory of its own: calls of it must not overlap on two streams. Graphs may capture it.

    Attributes:
        start: the launches, and nothing else.
        out: the result, as of a call: the same memory every time.
        lse: if it was asked for, likewise.
    """

    start: Callable[[], object]
    out: torch.Tensor
    lse: torch.Tensor | None = None

    def __call__(self) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Start it; returns out, or (out, lse)."""
        self.start()
        return self.out if self.lse is None else (self.out, self.lse)
