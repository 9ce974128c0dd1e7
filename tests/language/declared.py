"""Random values for what is declared: scalars and tensors of every type."""

from collections.abc import Mapping
from typing import Any

import torch

from attngen.expr import Declarations, Scalar, TensorType

_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
_WILD_REALS = (0.0, -0.0, 1.0, -2.5, 1e-40, 3e38, float("nan"), float("inf"), -float("inf"))
_WILD_INTEGERS = (-(2**31), 2**31 - 1, -(2**30), 100_000, -1)
_ROWS_BOUND_BY_TENSORS = 5  # of a dimension that has a name of its own


def random_tensors(
    declarations: Declarations,
    sizes: Mapping[str, int],
    generator: torch.Generator,
    device: str = "cpu",
    is_wild: bool = False,
) -> dict[str, torch.Tensor]:
    """A tensor for each that is declared.

    Args:
        declarations: of a spec.
        sizes: of the call; other dimensions have a few elements.
        generator: on the CPU.
        device: of the tensors.
        is_wild: also the ends of i32, NaN and infinities, and strides of 2; else document numbers and N(0, 1).
    """
    draw = _draw_wild if is_wild else _draw_tame
    tensors = {}
    for tensor in declarations.tensors.values():
        shape = [
            dim if isinstance(dim, int) else sizes.get(dim, _ROWS_BOUND_BY_TENSORS) for dim in tensor.dims
        ]
        tensors[tensor.name] = draw(tensor, shape, generator).to(device)
    return tensors


def random_scalars(
    declarations: Declarations, generator: torch.Generator, is_wild: bool = False
) -> dict[str, Any]:
    """A value for each declared scalar: its default half of the time, where it has one."""
    return {scalar.name: _scalar(scalar, generator, is_wild) for scalar in declarations.scalars.values()}


def _scalar(scalar: Scalar, generator: torch.Generator, is_wild: bool) -> Any:
    chance, number = torch.rand(2, generator=generator).tolist()
    if scalar.default is not None and chance < 0.5:
        return scalar.default
    if scalar.type == "bool":
        return number < 0.5
    if scalar.type == "i32":
        return _WILD_INTEGERS[int(5 * number)] if is_wild and chance < 0.75 else int(24 * number) - 4
    return torch.tensor(60 * number + 0.5).item()  # an f32


def _draw_tame(tensor: TensorType, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    if tensor.dtype == "bool":
        return torch.rand(shape, generator=generator) < 0.7
    if tensor.dtype == "u8":
        return torch.randint(0, 4, shape, generator=generator, dtype=torch.uint8)
    if tensor.dtype == "i32":
        return torch.randint(0, 4, shape, generator=generator).sort(dim=-1)[0].to(torch.int32)
    return torch.randn(shape, generator=generator).to(_DTYPES[tensor.dtype])


def _draw_wild(tensor: TensorType, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    shape = [*shape[:-1], 2 * shape[-1]]
    if tensor.dtype == "bool":
        drawn = torch.rand(shape, generator=generator) < 0.7
    elif tensor.dtype == "u8":
        drawn = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    elif tensor.dtype == "i32":
        small = torch.randint(-6, 20, shape, generator=generator)
        drawn = _mixed(small, torch.tensor(_WILD_INTEGERS), generator).to(torch.int32)
    else:
        usual = 4 * torch.randn(shape, generator=generator)
        drawn = _mixed(usual, torch.tensor(_WILD_REALS), generator).to(_DTYPES[tensor.dtype])
    return drawn[..., ::2]


def _mixed(usual: torch.Tensor, rare: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A rare value in one of four places."""
    picked = rare[torch.randint(0, len(rare), usual.shape, generator=generator)]
    return torch.where(torch.rand(usual.shape, generator=generator) < 0.25, picked.to(usual.dtype), usual)
