"""What gradients are of, and where they go: memory that a caller gives, of the format that it has."""

from collections.abc import Sequence

import torch

from attngen.bind.tensors import check_no_tangent, check_plain
from attngen.bind.writable import check_writable
from attngen.dtypes import element_dtype
from attngen.errors import ArgumentError, shown
from attngen.plan import GRADIENTS_INTAKE, Manifest, in_f32


def check_differentiable(manifest: Manifest, name: str, x: object) -> None:
    """Refuse an input of which a backward pass could not make the gradient, or of which more than that is wanted.

    Raises:
        ArgumentError: Q, K or V is no plain tensor, has a tangent, or a type that the backward pass does not take.
    """
    check_plain(name, x)  # type: ignore[arg-type]
    assert isinstance(x, torch.Tensor)
    check_no_tangent(name, x)
    (intake,) = (each for each in manifest.intakes if each.name == GRADIENTS_INTAKE)
    dtypes = {manifest.value_of[each].passed_as: manifest.value_of[each].dtype for each in intake.tensors}
    expected = element_dtype(dtypes[name])
    if x.dtype != expected:
        must = f"{expected}, which gradients are worked out in"
        raise ArgumentError(name, f"dtype {x.dtype}", must, f"pass {name}.to({expected})")


def gradient_memory(
    manifest: Manifest, gradients: Sequence[str], grads: Sequence[torch.Tensor] | None, accumulate: bool
) -> dict[str, torch.Tensor]:
    """The memory of each gradient, by the value of its format; nothing where the call allocates them.

    Shapes, strides and overlaps are looked at by `check_arguments`.

    Args:
        manifest: of the call.
        gradients: their names, in the order of `grads`.
        grads: memory of the caller's, or None.
        accumulate: whether the gradients are added to what it holds.

    Raises:
        ArgumentError: memory is missing, or cannot hold a gradient.
    """
    if not isinstance(accumulate, bool):
        raise ArgumentError("accumulate", shown(accumulate), "True or False")
    if grads is None:
        if accumulate:
            raise ArgumentError(
                "accumulate", "True without grads", f"grads=({', '.join(gradients)}) to add to"
            )
        return {}
    if not isinstance(grads, tuple | list) or len(grads) != len(gradients):
        got = f"{len(grads)} of them" if isinstance(grads, tuple | list) else type(grads).__name__
        raise ArgumentError("grads", got, f"({', '.join(gradients)}), a tensor each")
    return {_value_of(manifest, name, memory): memory for name, memory in zip(gradients, grads, strict=True)}


def _value_of(manifest: Manifest, gradient: str, memory: torch.Tensor) -> str:
    """The value that is a gradient in the format of its memory."""
    check_plain(gradient, memory)
    check_writable(gradient, memory)
    values = {element_dtype(manifest.value_of[name].dtype): name for name in (in_f32(gradient), gradient)}
    if memory.dtype not in values:
        must = " or ".join(str(dtype) for dtype in reversed(values))
        raise ArgumentError(gradient, f"dtype {memory.dtype}", must)
    return values[memory.dtype]
