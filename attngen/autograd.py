"""Attention as a function that torch's autograd differentiates: a kernel's call, and its backward pass.

Neither second derivatives nor forward-mode ones are there, and both are refused.
"""

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any, NoReturn

import torch

from attngen.capture import capture_gradients, pack
from attngen.errors import ArgumentError
from attngen.torch_state import are_transformed, is_recorded, is_watched, may_be_watched


def is_differentiated(*inputs: Any) -> bool:
    """Whether autograd records what is done to these."""
    if not torch.is_grad_enabled():
        return False
    for x in inputs:
        if isinstance(x, torch.Tensor) and x.requires_grad:
            return True
    return are_transformed(inputs) and any(map(is_recorded, inputs))


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
            refuse_second_derivatives()
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        declared = ctx.scalars | dict(zip(ctx.names, tensors, strict=True))
        kernel, needed = ctx.kernel, ctx.needs_input_grad[5:]
        given = (dout, dlse, q, k, v, out, lse)
        if may_be_watched(q) and is_watched():
            softmax_scale, layout = ctx.rest
            packed = pack(softmax_scale, layout, None, declared)
            found = iter(capture_gradients(kernel.text, needed, *given, packed))
            made = [next(found) if is_needed else None for is_needed in needed]
        else:
            made = needed_gradients(kernel, needed, *given, declared, *ctx.rest)
        of_declared = map(to_declared, made[3:], map(declared.get, kernel.declared_gradients))
        return None, None, None, None, None, *made[:3], *of_declared


def refuse_second_derivatives() -> NoReturn:
    """Say that gradients are not differentiated.

    Raises:
        ArgumentError: always.
    """
    must = "False: there are no second derivatives"
    raise ArgumentError("create_graph", "True", must, "differentiate once")


def needed_gradients(
    kernel: Any,
    needed: Sequence[bool],
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    declared: Mapping[str, Any],
    softmax_scale: float | None,
    layout: str,
    keeps: bool = True,
) -> list[torch.Tensor | None]:
    """The gradients of a call of which autograd asks, in the order of `Kernel.gradients_of`; None for the others.

    Args:
        kernel: that made out and lse.
        needed: which gradients.
        dout: of out; of an output that nobody used the gradient is 0.
        dlse: of lse, likewise.
        q: of the call, like all that follow.
        k: see q.
        v: see q.
        out: see q.
        lse: see q.
        declared: what the call passed by name.
        softmax_scale: see q.
        layout: see q.
        keeps: see `Kernel.make_gradients`.
    """
    if dout is None:
        dout = torch.zeros_like(out, dtype=q.dtype)
    elif dout.dtype != q.dtype:  # of an f32 output; it is multiplied by inputs
        dout = dout.to(q.dtype, memory_format=torch.contiguous_format)
    elif dout.stride(-1) != 1 and dout.shape[-1] > 1:  # of a sum it is one number, expanded
        dout = dout.contiguous()
    named = {**declared, "dout": dout, "out": out, "lse": lse}
    if dlse is not None:
        named["dlse"] = dlse
    gradients = kernel.gradients_of(named)
    wanted = tuple(compress(gradients, needed))
    made = kernel.make_gradients(wanted, q, k, v, named, softmax_scale, layout, keeps=keeps)
    by_name = dict(zip(wanted, made, strict=True))
    return [by_name.get(name) for name in gradients]


def to_declared(gradient: torch.Tensor | None, declared: Any) -> torch.Tensor | None:
    """The gradient of a declared value: of a scalar it goes where that tensor is, in its format."""
    return None if gradient is None else gradient.to(declared)
