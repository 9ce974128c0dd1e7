"""What a call passes by name for the scalars and tensors of its spec: checked like every other argument."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch

from attngen.dtypes import element_dtype
from attngen.emit.manifest import Manifest, ScalarEntry, TensorEntry
from attngen.errors import ArgumentError
from attngen.expr import SIZE_NAMES
from attngen.plan import evaluate_formula, formula_text
from attngen.runtime.numbers import scalar_of
from attngen.runtime.tensors import check_no_derivative, check_plain


@dataclass(frozen=True)
class DeclaredValues:
    """What a call passes for what its spec declares.

    Attributes:
        scalars: a value each, defaults included.
        tensors, descales: in the manifest's order.
        sizes: of the dimensions that tensors bind.
    """

    scalars: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    descales: dict[str, torch.Tensor]
    sizes: dict[str, int]

    @property
    def parameters(self) -> dict[str, Any]:
        """What kernels' parameters carry of it, addresses apart."""
        strides = {
            f"tensor.{name}.stride_{i}": stride
            for name, tensor in (self.tensors | self.descales).items()
            for i, stride in enumerate(tensor.stride())
        }
        scalars = {f"scalar.{name}": value for name, value in self.scalars.items()}
        return strides | scalars | {f"size.{name}": size for name, size in self.sizes.items()}


def check_declared(
    manifest: Manifest, passed: Mapping[str, Any], sizes: Mapping[str, int], device: torch.device
) -> DeclaredValues:
    """Check what a call passes by name.

    Args:
        manifest: of the kernel.
        passed: by name.
        sizes: of the call: batch, lengths, heads.
        device: that tensors must be on.

    Raises:
        ArgumentError: the first fault found.
    """
    of_tensors = [entry.name for entry in (*manifest.tensors, *manifest.descales)]
    known = of_tensors + [scalar.name for scalar in manifest.scalars]
    for name in passed:
        if name not in known:
            near = get_close_matches(name, known, n=1) or known
            declared = f"one of what the spec declares: {', '.join(near)}" if known else "no such argument"
            raise ArgumentError(name, "an argument", declared)
    scalars = {entry.name: _scalar(entry, passed) for entry in manifest.scalars}
    sizes = {name: sizes[name] for name in SIZE_NAMES}  # all others are for tensors to bind
    bound: dict[str, int] = {}
    tensors, descales = (
        {entry.name: _tensor(entry, says, passed, {**sizes, **bound}, bound, device) for entry in entries}
        for entries, says in (
            (manifest.tensors, "the spec declares"),
            (manifest.descales, "e4m3 tensors have"),
        )
    )
    return DeclaredValues(scalars, tensors, descales, {**sizes, **bound})


def _scalar(entry: ScalarEntry, passed: Mapping[str, Any]) -> bool | int | float:
    value = passed.get(entry.name, entry.default)
    if value is None:
        raise ArgumentError(entry.name, "nothing", f"a value: the spec declares {entry.type} without default")
    return scalar_of(entry.name, entry.type, value)


def _tensor(
    entry: TensorEntry,
    says: str,
    passed: Mapping[str, Any],
    sizes: Mapping[str, int],
    bound: dict[str, int],
    device: torch.device,
) -> torch.Tensor:
    """The tensor, whose dimensions of new names bind these."""
    declared = f"{entry.dtype}[{', '.join(map(formula_text, entry.dims))}]"
    x = passed.get(entry.name)
    if not isinstance(x, torch.Tensor):
        got = "nothing" if x is None else type(x).__name__
        raise ArgumentError(entry.name, got, f"a torch tensor: {says} {declared}")
    check_plain(entry.name, x)
    if x.dtype != element_dtype(entry.dtype):
        cure = f"pass {entry.name}.to({element_dtype(entry.dtype)})"
        raise ArgumentError(entry.name, f"dtype {x.dtype}", f"{element_dtype(entry.dtype)}", cure)
    if x.device != device:
        raise ArgumentError(entry.name, f"device {x.device}", f"{device}, the device of q")
    check_no_derivative(entry.name, x)
    if x.dim() != len(entry.dims):
        raise ArgumentError(entry.name, f"{x.dim()} dimensions", f"{len(entry.dims)}: {declared}")
    for dim, size in zip(entry.dims, x.shape, strict=True):
        is_bound_here = isinstance(dim, str) and dim not in sizes
        if isinstance(dim, str) and is_bound_here:
            bound.setdefault(dim, size)
        expected = evaluate_formula(dim, {**sizes, **bound})
        if size != expected:
            raise ArgumentError(
                entry.name, f"shape {tuple(x.shape)}", f"{declared}, where {formula_text(dim)} is {expected}"
            )
        if not size and (is_bound_here or isinstance(dim, int)):
            raise ArgumentError(entry.name, f"shape {tuple(x.shape)}", f"at least one {dim}")
    return x
