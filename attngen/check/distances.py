"""How far two tensors are apart, where NaN and inf may stand in either."""

import math

from torch import Tensor


def distance(x: Tensor, ref: Tensor) -> Tensor:
    """|x - ref|, with 0 for the same inf or NaN and inf for NaN or inf against anything else."""
    same = (x == ref) | (x.isnan() & ref.isnan())
    return (x - ref).abs_().nan_to_num_(nan=math.inf, posinf=math.inf).masked_fill_(same, 0.0)


def largest(x: Tensor) -> float:
    """The largest element, 0 where there is none."""
    return float(x.max()) if x.numel() else 0.0


def root_mean_square(x: Tensor) -> float:
    """Over all elements, 0 where there is none."""
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def where_largest(x: Tensor) -> tuple[int, ...]:
    """The index of the largest element; there must be one."""
    rest, at = int(x.argmax()), []
    for extent in reversed(x.shape):  # torch.unravel_index would load sympy, which takes a second
        rest, index = divmod(rest, extent)
        at.append(index)
    return tuple(reversed(at))
