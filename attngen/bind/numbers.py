"""Numbers that a call passes: Python's, numpy's and those of 0-dimensional CPU tensors, each taken as what it is."""

import ctypes
import math
import sys
from collections.abc import Callable
from typing import Any

import torch

from attngen.bind.tensors import check_no_derivative, check_plain
from attngen.errors import ArgumentError, shown
from attngen.torch_state import subnormal_numbers

LARGEST_SCALE = 2.0**127
"""Times log2(e) it is still an f32."""
LARGEST_I32 = 2**31 - 1


def python_number(name: str, value: Any, is_declared: bool = False) -> Any:
    """The Python number that a scalar of numpy or a 0-dimensional tensor stands for; other values as they are.

    A bool stays one, and so do an integer and a real number; an f32 is the same number as a float.

    Raises:
        ArgumentError: a tensor whose number is not at hand, or of which a derivative is wanted.
    """
    if isinstance(value, torch.Tensor):
        check_plain(name, value)
        check_no_derivative(name, value, is_declared)
        if value.dim():
            cure = f"pass {name}.item()" if value.numel() == 1 else None
            raise ArgumentError(name, f"a tensor of shape {tuple(value.shape)}", "a number", cure)
        if value.device.type != "cpu":
            must = "a number, or a 0-dimensional tensor on the CPU: to read another one waits for its device"
            raise ArgumentError(name, f"a tensor on {value.device}", must, f"pass {name}.item()")
        return value.item()
    numpy = sys.modules.get("numpy")  # what has not been imported has made no number
    if numpy is not None and isinstance(value, numpy.generic | numpy.ndarray) and not value.ndim:
        number = value.item()
        # The number of a longdouble is still one of numpy's.
        return float(number) if isinstance(number, numpy.floating) else number
    return value


def softmax_scale_of(value: Any) -> float:
    """The softmax_scale of a call as a float.

    Raises:
        ArgumentError: it is no number, or too large.
    """
    number = python_number("softmax_scale", value)
    if not _is_real(number) or abs(number) > LARGEST_SCALE:
        raise ArgumentError("softmax_scale", shown(number), f"a finite number of at most {LARGEST_SCALE:.3g}")
    return float(number)


def scalar_of(name: str, type: str, value: Any) -> bool | int | float:
    """The value of a declared scalar, an f32 as the float that equals it.

    Args:
        name: of the scalar.
        type: "bool", "i32" or "f32".
        value: what a call passes.

    Raises:
        ArgumentError: it is not of that type.
    """
    number = python_number(name, value, is_declared=True)
    is_right, must = _RULES[type]
    if not is_right(number):
        raise ArgumentError(name, shown(number), must)
    return _as_f32(number) if type == "f32" else number


def _as_f32(number: float) -> float:
    """The nearest f32, subnormal ones too, infinite where it is beyond all of them."""
    with subnormal_numbers():
        return ctypes.c_float(number).value


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_i32(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_I32


def _is_real(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, float) and not math.isnan(value)


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bool": (_is_bool, "True or False"),
    "i32": (_is_i32, "an integer between -2^31 and 2^31"),
    "f32": (_is_real, "a number"),
}
"""Which values a scalar of each type takes, and how that is said."""
