"""Which torch tensors a kernel can read: those whose numbers lie at their address, and whose derivative nobody wants.

Everything else is refused by what it is, with what to pass in its place.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.autograd import forward_ad

from attngen.arch import ARCHS
from attngen.errors import ArgumentError

ROW_ALIGNMENT = 16
"""Bytes: what one cp.async moves, and so where every row of head_dim numbers must start."""


def check_plain(name: str, x: torch.Tensor) -> None:
    """Refuse what only looks like a dense tensor; meta tensors, which have sizes and no numbers, are for the caller.

    Raises:
        ArgumentError: x is no tensor, nested, sparse, quantised, inside a transform of torch.func, a subclass with
            operations of its own, a view whose sign has not been resolved, or has lost its memory.
    """
    if not isinstance(x, torch.Tensor):
        raise ArgumentError(name, type(x).__name__, "a torch tensor")
    dense = "a dense tensor (torch.strided)"
    if x.is_nested:
        cure = f"pass a padded batch, {name}.to_padded_tensor(0.0), and a mask of its lengths"
        raise ArgumentError(name, "a nested tensor", dense, cure)
    if x.layout != torch.strided:
        raise ArgumentError(name, f"layout {x.layout}", dense, f"pass {name}.to_dense()")
    if x.is_quantized:
        raise ArgumentError(name, f"a quantised tensor ({x.dtype})", dense, f"pass {name}.dequantize()")
    _check_transforms(name, x)
    if type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise ArgumentError(
            name,
            f"a {type(x).__name__}",
            "a plain torch.Tensor, whose numbers lie at its address",
            f"pass what it holds: {name}.to_local() of a DTensor, {name}.get_data() of a MaskedTensor",
        )
    if x.is_neg():
        must = "numbers as they lie in memory"
        raise ArgumentError(name, "a view that negates its numbers", must, f"pass {name}.resolve_neg()")
    if x.numel() and not x.is_meta and not x.data_ptr():
        raise ArgumentError(name, f"{x.numel()} elements without memory", "a tensor whose storage is there")


def _check_transforms(name: str, x: torch.Tensor) -> None:
    """Refuse a tensor that stands for others, as torch.func's transforms pass to the function they call."""
    functorch = torch._C._functorch
    if functorch.is_batchedtensor(x):
        cure = "call it outside: a kernel takes whole batches, (batch, seqlen, heads, head_dim)"
        raise ArgumentError(name, "a tensor inside torch.vmap", "a plain tensor", cure)
    if functorch.is_gradtrackingtensor(x):
        raise ArgumentError(
            name,
            "a tensor inside torch.func.grad, vjp or jvp",
            "one whose derivative nobody asks for: there is neither backward nor forward derivative yet",
            "call it outside of the transform",
        )
    if torch._is_functional_tensor(x):
        cure = "call it outside of the transform"
        raise ArgumentError(name, "a tensor inside torch.func.functionalize", "a plain tensor", cure)


def check_no_derivative(name: str, x: torch.Tensor, is_declared: bool = False) -> None:
    """Refuse a tensor whose derivative would be wanted; the spec may ask for that of an input, or of what it declares.

    Raises:
        ArgumentError: x requires grad, or carries a tangent, and nobody has disabled that.
    """
    if x.requires_grad and torch.is_grad_enabled():
        key = "[q, k, v]" if name in ("q", "k", "v") else f"[q, k, v, {name}]" if is_declared else ""
        says = f"say gradients: {key} in the spec, " if key else ""
        raise ArgumentError(
            name,
            "a tensor that requires grad",
            f"one that does not: this kernel makes no gradient of {name}",
            f"{says}pass {name}.detach(), or call under torch.no_grad()",
        )
    check_no_tangent(name, x)


def check_no_tangent(name: str, x: torch.Tensor) -> None:
    """Refuse a tensor whose forward derivative would be wanted.

    Raises:
        ArgumentError: x carries a tangent, and nobody has disabled that.
    """
    if torch._C._is_fwd_grad_enabled() and forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
        raise ArgumentError(
            name,
            "a tensor with a tangent (torch.autograd.forward_ad)",
            "one without: there is no forward derivative yet",
            f"pass torch.autograd.forward_ad.unpack_dual({name}).primal",
        )


def check_kept(name: str, x: object) -> None:
    """Refuse a tensor that autograd can not keep for the backward pass.

    Raises:
        ArgumentError: x was made in inference mode.
    """
    if isinstance(x, torch.Tensor) and x.is_inference():
        must = "one that autograd can keep for the backward pass"
        raise ArgumentError(name, "an inference tensor", must, f"pass {name}.clone()")


def check_not_recorded(tensors: Mapping[str, Any]) -> None:
    """Refuse what autograd, if it is enabled, would record of a backward pass: gradients are not differentiated.

    Raises:
        ArgumentError: a tensor requires grad.
    """
    for name, x in tensors.items():
        if getattr(x, "requires_grad", False):
            raise ArgumentError(
                name,
                "a tensor that requires grad",
                "one that does not: there are no second derivatives",
                f"pass {name}.detach(), or call under torch.no_grad()",
            )


def check_rows(arch: str, name: str, x: torch.Tensor) -> None:
    """Refuse a tensor whose rows a kernel of an arch cannot read, or whose derivative would be wanted.

    Raises:
        ArgumentError: rows are not contiguous, do not start on 16 bytes on a GPU, or x requires grad or has a tangent.
    """
    if x.shape[-1] > 1 and x.stride(-1) != 1 and x.numel():
        raise ArgumentError(
            name,
            f"stride {x.stride(-1)} in the last dimension",
            "1 (contiguous head_dim)",
            f"pass {name}.contiguous()",
        )
    check_no_derivative(name, x)
    if ARCHS[arch].emits:
        check_alignment(name, x)


def check_alignment(name: str, x: torch.Tensor, unit: int = ROW_ALIGNMENT) -> None:
    """Refuse a tensor whose rows do not all start on so many bytes.

    Raises:
        ArgumentError: the address or a stride is off.
    """
    if not x.numel():
        return
    size = x.element_size()
    if x.data_ptr() % unit:
        raise ArgumentError(
            name,
            f"an address that is {x.data_ptr() % unit} bytes past a multiple of {unit}",
            f"rows that start on {unit} bytes",
            f"pass {name}.clone()",
        )
    for dim, (extent, step) in enumerate(zip(x.shape[:-1], x.stride()[:-1], strict=True)):
        if extent > 1 and step * size % unit:
            raise ArgumentError(
                name,
                f"stride {step} in dimension {dim} ({step * size} bytes)",
                f"a multiple of {unit // size} elements ({unit} bytes)",
                f"pass {name}.contiguous()",
            )
