"""Compiling a call with torch.compile beside the eager one: outputs, strides, gradients and how often it compiled."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.testing import CompileCounterWithBackend

HEADS, HEAD_DIM = 2, 32
LENGTHS = (5, 6, 7, 8, 9)
Function = Callable[..., torch.Tensor]


def inputs(length: int, requires_grad: bool = False, batch: int = 1) -> list[torch.Tensor]:
    """q, k and v in bf16, the same for the same length."""
    generator = torch.Generator().manual_seed(length)
    made = [torch.randn(batch, length, HEADS, HEAD_DIM, generator=generator).bfloat16() for _ in range(3)]
    return [x.requires_grad_(requires_grad) for x in made]


def frames_of(
    function: Function,
    calls: Sequence[Sequence[Any]],
    dynamic: bool | None = None,
    backend: str = "aot_eager",
) -> int:
    """How many frames torch.compile makes of calls with these arguments; each is held against the eager one.

    Results, their strides, and the gradients of all that requires one must be the same, and gradients not 0.
    """
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
    for arguments in calls:
        found, right = compiled(*arguments), function(*arguments)
        assert torch.equal(found, right) and found.stride() == right.stride()
        leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
        if leaves:
            dout = torch.randn(right.shape, generator=torch.Generator().manual_seed(0)).to(right.dtype)
            of_found, of_right = (torch.autograd.grad(out, leaves, dout) for out in (found, right))
            assert all(torch.equal(x, y) and x.any() for x, y in zip(of_found, of_right, strict=True))
    return counter.frame_count
