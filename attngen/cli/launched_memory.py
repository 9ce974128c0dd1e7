"""What the launches of a call allocate, without launching any: from the manifest that they are launched by."""

from collections.abc import Mapping
from typing import Any

import torch

from attngen.arch import ARCHS
from attngen.bind import Bound, bind, check_arguments
from attngen.kernel import Kernel
from attngen.plan import GRADIENTS_INTAKE
from attngen.spec import INPUTS


@torch.no_grad()
def launched_bytes(
    kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, passed: Mapping[str, Any]
) -> int:
    """The most memory that a call has at once beyond its arguments, with the gradients of q, k and v where it has any.

    Args:
        kernel: of the call; memory that it keeps for the next one counts.
        q: (batch, seqlen_q, num_heads_q, head_dim_qk), on any device, like k and v; nothing is read.
        k: see q.
        v: see q.
        passed: what the call passes by name.
    """
    if not kernel.gradients:
        forward = _bound(kernel, ("out",), q, k, v, passed)
        return forward.kept.size_bytes + _of_call(forward)
    forward = _bound(kernel, ("out", "lse"), q, k, v, passed)
    out, lse = (
        q.new_empty(each.shape, dtype=each.dtype) for each in map(forward.made.__getitem__, ("out", "lse"))
    )
    named = {**passed, "out": out, "lse": lse, "dout": out.to(q.dtype)}
    backward = _bound(kernel, tuple(f"d{name}" for name in INPUTS), q, k, v, named, GRADIENTS_INTAKE)
    # Autograd has a thread of its own for each GPU, and memory is kept by thread.
    of_backward = out.nbytes + lse.nbytes + backward.kept.size_bytes + _of_call(backward)
    return forward.kept.size_bytes + max(_of_call(forward), of_backward)


def _bound(kernel: Kernel, wanted: tuple[str, ...], *call: Any) -> Bound:
    q, k, v, named, *intake = call
    given = check_arguments(kernel.manifest, q, k, v, None, {}, "bshd", named, *intake)
    return bind(kernel.manifest, given, wanted, ARCHS[kernel.manifest.arch].num_sms)


def _of_call(bound: Bound) -> int:
    """What is wanted of a pass, and what it needs on the way."""
    wanted = sum(bound.made[name].size_bytes for name in bound.wanted)
    return wanted + bound.scratch.size_bytes + bound.zeroed.size_bytes
