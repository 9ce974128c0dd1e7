"""What a call is given by operands of `kernel.quantize`: checked, and each as the value that a kernel reads."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from attngen.errors import ArgumentError
from attngen.plan import OPERANDS, OPERANDS_INTAKE, Manifest
from attngen.quantize import DESCALES, Operands


def spread_operands(
    manifest: Manifest, operands: Operands, k: object, v: object, layout: str, declared: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Mapping[str, Any], str]:
    """Q, K and V of a call of operands, everything by name with their descales, and the intake.

    Args:
        manifest: of the call.
        operands: that it is given in the place of q.
        k: nothing, like v.
        v: see k.
        layout: of the call; operands are the same in both, and Q and K are transposed for it.
        declared: what is passed by name.

    Raises:
        ArgumentError: something is passed that operands have themselves, or they are of another kernel.
    """
    for name, x in (("k", k), ("v", v)):
        if x is not None:
            raise ArgumentError(name, type(x).__name__, "nothing beside operands of kernel.quantize")
    for name in DESCALES:
        if name in declared:
            raise ArgumentError(name, "descales", "none: q is quantised by the call, or has its own")
    _check_operands(manifest, operands)
    q8, k8 = (x.transpose(1, 2) if layout == "bhsd" else x for x in (operands.q, operands.k))
    named = {**declared, **{name: getattr(operands, name) for name in DESCALES}}
    return q8, k8, operands.v, named, OPERANDS_INTAKE


def _check_operands(wanted: Manifest, operands: Operands) -> None:
    """Refuse operands whose scales or whose basis are another kernel's."""
    if wanted.scales is None:
        raise ArgumentError("q", "operands of kernel.quantize", f"a tensor of {wanted.inputs}")
    if operands.scales != wanted.scales:
        must = f"scales {wanted.scales}, as the spec has them"
        raise ArgumentError("q", f"operands with scales {operands.scales}", must)
    if operands.hadamard != wanted.hadamard:
        basis, must = ("hadamard", "none") if operands.hadamard else ("none", "hadamard")
        raise ArgumentError(
            "q", f"operands of incoherent: {basis}", f"incoherent: {must}, as the spec has it"
        )


def operands_of(manifest: Manifest, made: Sequence[torch.Tensor]) -> Operands:
    """The operands of a call out of the values `OPERANDS`; a descale that stands for a tensor is expanded."""
    values = dict(zip(OPERANDS, made, strict=True))
    assert manifest.scales is not None
    if manifest.scales == "per_tensor":
        heads = values["v"].shape[:2]
        values |= {name: values[name].expand(heads) for name in DESCALES}
    return Operands(**values, scales=manifest.scales, hadamard=manifest.hadamard)
