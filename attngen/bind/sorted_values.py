"""Tensors that a spec declares sorted: calls trust them, and whoever asks has their values read."""

import torch

from attngen.errors import ArgumentError
from attngen.expr import TensorType
from attngen.torch_state import torch_defaults


@torch_defaults()
def check_sorted(declared: TensorType, x: torch.Tensor) -> None:
    """Refuse a tensor whose values fall along its last dimension; the host reads it, and waits for its device.

    Raises:
        ArgumentError: names the first place where they do, and the two values.
    """
    falls = (x[..., 1:] < x[..., :-1]).nonzero()
    if not len(falls):
        return
    *others, before = falls[0].tolist()
    here, left = (*others, before + 1), (*others, before)
    got = f"{x[here].item()} at {list(here)}, behind {x[left].item()} at {list(left)}"
    must = f"values that never fall along the last dimension: the spec declares {declared}"
    cure = f"sort them, or declare {declared.name}: {str(declared).removesuffix(' sorted')}"
    raise ArgumentError(declared.name, got, must, cure)
