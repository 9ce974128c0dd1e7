"""Attention as a function that torch's autograd differentiates: a kernel's call, and its backward pass.

Neither second derivatives nor forward-mode ones are there, and both are refused.
"""

from collections.abc import Mapping
from itertools import compress
from typing import Any

import torch

from attngen.errors import ArgumentError


def is_differentiated(*inputs: Any) -> bool:
    """Whether autograd records what is done to these."""
    return torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in inputs)


class Attention(torch.autograd.Function):
    """Out and lse of q, k, v and what the spec names in `gradients` besides; what else is passed has no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: Any,
        softmax_scale: float | None,
        layout: str,
        work: Any,
        declared: Mapping[str, Any],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *differentiated: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Call the kernel, and keep what its backward pass takes; `differentiated` is declared as well."""
        out, lse = kernel(q, k, v, softmax_scale, True, None, layout, work=work, **declared)
        tensors = {name: x for name, x in declared.items() if isinstance(x, torch.Tensor)}
        ctx.save_for_backward(q, k, v, out, lse, *tensors.values())
        ctx.kernel, ctx.names, ctx.rest = kernel, tuple(tensors), (softmax_scale, layout)
        ctx.scalars = {name: x for name, x in declared.items() if name not in tensors}
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(
        ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """The gradients of what requires grad among q, k, v and what is declared; nothing is launched for the others.

        Of an output that nobody used the gradient is 0.

        Raises:
            ArgumentError: the gradients are to be differentiated themselves.
        """
        if torch.is_grad_enabled():
            raise ArgumentError(
                "create_graph", "True", "False: there are no second derivatives", "differentiate once"
            )
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out, dtype=q.dtype)
        elif dout.dtype != q.dtype:  # of an f32 output; it is multiplied by inputs
            dout = dout.to(q.dtype, memory_format=torch.contiguous_format)
        elif dout.stride(-1) != 1 and dout.shape[-1] > 1:  # of a sum it is one number, expanded
            dout = dout.contiguous()
        declared = ctx.scalars | dict(zip(ctx.names, tensors, strict=True))
        named = {**declared, "dout": dout, "out": out, "lse": lse}
        if dlse is not None:
            named["dlse"] = dlse
        kernel, needed = ctx.kernel, ctx.needs_input_grad[5:]
        gradients = kernel.gradients_of(named)
        wanted = tuple(compress(gradients, needed))
        made = dict(zip(wanted, kernel.make_gradients(wanted, q, k, v, named, *ctx.rest), strict=True))
        for value, name in zip(gradients[3:], kernel.declared_gradients, strict=True):
            if value in made:  # of a scalar it goes where that tensor is, in its format
                made[value] = made[value].to(declared[name])
        return None, None, None, None, None, *map(made.get, gradients)
