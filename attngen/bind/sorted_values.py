"""Tensors that a spec declares sorted: calls trust them, and whoever asks has their values read."""

import torch

from attngen.errors import ArgumentError
from attngen.expr import TensorType
from attngen.torch_state import torch_defaults


@torch_defaults()
def check_sorted(declared: TensorType, x: torch.Tensor, starts: torch.Tensor | None = None) -> None:
    """Refuse a tensor whose values fall along its last dimension; the host reads it, and waits for its device.

    Args:
        declared: as the spec has it.
        x: what a call passes.
        starts: where sequences begin along the last dimension, and where the last one ends; one sequence where None.

    Raises:
        ArgumentError: names the first place where they fall, and the two values.
    """
    falls = (x[..., 1:] < x[..., :-1]).nonzero()
    if starts is not None:
        here = falls[:, -1] + 1
        falls = falls[~torch.isin(here, starts) & (here < starts[-1])]
    if not len(falls):
        return
    *others, before = falls[0].tolist()
    at, left = (*others, before + 1), (*others, before)
    got = f"{x[at].item()} at {list(at)}, behind {x[left].item()} at {list(left)}"
    must = f"values that never fall along the last dimension: the spec declares {declared}"
    cure = f"sort them, or declare {declared.name}: {str(declared).removesuffix(' sorted')}"
    raise ArgumentError(declared.name, got, must, cure)
