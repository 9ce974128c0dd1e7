"""torch's functions, methods and attributes on traced values, by name."""

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any

from attngen.errors import shown
from attngen.expr.arithmetic import FUNCTIONS
from attngen.expr.traced import Traced, condition, number, operand, operate, refuse
from attngen.expr.traced_calls import call
from attngen.expr.traced_tensors import TracedTensor, traced_tensor

if TYPE_CHECKING:
    import torch


def apply(name: str, *arguments: Any, **named: Any) -> Any:
    """What torch's function or method of this name gives.

    Raises:
        ExpressionError: the language has nothing of the kind.
    """
    word = name.partition(".")[0]  # of an overload, `tanh.default`
    word = word[2:-2] if word.startswith("__") and word.endswith("__") else word
    if word.endswith("_") or word in ("setitem", "iadd", "isub", "imul", "iand", "ior"):
        note = "write what it returns: x = x.add(y) for x.add_(y), attngen.where(c, y, x) for x[c] = y"
        refuse(
            f"torch.{name} writes to a tensor, which the kernel only reads", "traced-operators", name, note
        )
    function = _FUNCTIONS.get(word) or (partial(call, word) if word in FUNCTIONS else None)
    if function is None:
        known = tuple(get_close_matches(word, [*FUNCTIONS, *_FUNCTIONS], n=2)) or tuple(FUNCTIONS)
        refuse(f"the language has no torch.{word}", "traced-operators", word, "", known)
    try:
        inspect.signature(function).bind(*arguments, **named)
        if word in FUNCTIONS and word not in _FUNCTIONS and len(arguments) != FUNCTIONS[word].arity:
            raise TypeError(f"it takes {FUNCTIONS[word].arity} arguments")
    except TypeError as error:
        refuse(f"the language has no torch.{word} with these arguments", "traced-operators", word, str(error))
    return function(*arguments, **named)


def attribute(value: Traced, name: str) -> Any:
    """A method or an attribute of a tensor without dimensions, which a traced value is taken for.

    Raises:
        AttributeError: a traced value has none of this name.
    """
    import torch

    attributes = {
        "dtype": {"bool": torch.bool, "i32": torch.int32, "f32": torch.float32}[value.kind],
        "device": torch.device("cpu"),
        "shape": torch.Size(()),
        "ndim": 0,
    }
    if name in attributes:
        return attributes[name]
    if name == "where":  # whose method has the condition second
        return lambda condition, other: call("where", condition, value, other)
    if name.startswith("__") or (name not in _FUNCTIONS and name not in FUNCTIONS and not name.endswith("_")):
        raise AttributeError(f"`{value.text}` has no {name!r}: it is one value", name=name, obj=value)
    return partial(apply, name, value)


def converted(value: object, like: object) -> Traced:
    """A value in a format of torch, or in that of another value or a tensor."""
    import torch

    traced = operand(value)
    dtype = like.dtype if isinstance(like, torch.Tensor | Traced | TracedTensor) else like
    if dtype == torch.bool:
        return condition(traced)
    if dtype == torch.float32:
        return traced if traced.kind == "f32" else call("f32", traced)
    if dtype in (torch.int32, torch.int64):
        return call("i32", traced) if traced.kind == "f32" else number(traced)
    note = "values are bool, 32-bit integers (int32, int64) and float32"
    refuse(
        f"the language does not convert to {dtype}, as of `{traced.text}`",
        "traced-operators",
        str(dtype),
        note,
    )


def _to(
    value: Traced,
    *targets: object,
    device: object = None,
    dtype: object = None,
    other: object = None,
    **how: object,
) -> Traced:
    """`x.to(torch.int32)`, `x.to(device)`, `x.to(other)`, `x.to(device, dtype)`."""
    import torch

    named = [each for each in (device, dtype, other) if each is not None]
    # Behind the targets stand non_blocking and copy.
    given = [each for place, each in enumerate(targets) if not (place and isinstance(each, bool))] + named
    formats = [each for each in given if not _is_device(each)]
    wrong = [
        each for each in formats if not isinstance(each, torch.dtype | torch.Tensor | Traced | TracedTensor)
    ]
    if wrong or not given or not how.keys() <= {"non_blocking", "copy", "memory_format"}:
        what = ", ".join(map(shown, wrong or how))
        message = (
            f"the language has no `{operand(value).text}.to({what})`, which names no dtype, tensor or device"
        )
        refuse(message, "traced-operators", what, "write x.to(torch.int32), of float32 or of bool")
    return converted(value, formats[0]) if formats else value


def _is_device(target: object) -> bool:
    """Whether torch moves a tensor there: a device, or the text of one."""
    import torch

    try:
        return isinstance(target, torch.device | str) and bool(torch.device(target))
    except RuntimeError:
        return False


def _filled(
    like: Traced, size: Any, value: object, dtype: "torch.dtype | None" = None, **where: Any
) -> Traced:
    """A number as `new_full` makes it."""
    if tuple(size):
        message = f"a function makes a tensor of shape {tuple(size)}, where there is one number of each"
        refuse(message, "traced-operators", str(size), "the shape is ()")
    return converted(value, like if dtype is None else dtype)


def _clamped(value: object, min: object = None, max: object = None) -> Traced:
    if min is not None and max is not None:
        return call("clamp", value, min, max)
    if min is None and max is None:
        raise TypeError("it takes min, max or both")
    return call("max", value, min) if max is None else call("min", value, max)


def _divided(a: object, b: object, *, rounding_mode: str | None = None) -> Traced:
    if rounding_mode == "trunc":
        note = "// rounds down, and so does rounding_mode='floor'"
        refuse("the language has no division that rounds to zero", "traced-operators", "trunc", note)
    return operate(a, "//" if rounding_mode == "floor" else "/", b)


def _item(tensor: Any, indices: Any) -> Any:
    traced = tensor if isinstance(tensor, TracedTensor) else traced_tensor(tensor)
    if not isinstance(traced, TracedTensor):
        refuse(
            "a number is indexed", "traced-operators", str(indices), "a tensor is, with one index a dimension"
        )
    return traced[indices]


def _operator(sign: str) -> Callable[[object, object], Traced]:
    return lambda a, b: operate(a, sign, b)


def _of_conditions(sign: str) -> Callable[[object, object], Traced]:
    return lambda a, b: operate(condition(a), sign, condition(b))


def _extreme(name: str, sign: str, a: object, b: object) -> Traced:
    """The smaller or the larger of two numbers; of two conditions, whether both hold or one does."""
    a, b = operand(a), operand(b)
    return operate(a, sign, b) if a.kind == b.kind == "bool" else call(name, a, b)


def _kept(value: Traced, *how: Any, **named: Any) -> Traced:
    return value


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{word: _operator(sign) for sign, words in {
        "+": "add", "-": "sub subtract", "*": "mul multiply", "//": "floor_divide floordiv", "%": "remainder",
        "<": "lt less", "<=": "le less_equal", ">": "gt greater", ">=": "ge greater_equal", "==": "eq",
        "!=": "ne not_equal", "&": "and bitwise_and", "|": "or bitwise_or", "^": "xor bitwise_xor",
        "<<": "lshift bitwise_left_shift", ">>": "rshift bitwise_right_shift",
    }.items() for word in words.split()},
    **dict.fromkeys(("div", "divide", "true_divide"), _divided),
    **dict.fromkeys(("neg", "negative"), lambda x: -operand(x)),
    **dict.fromkeys(("bitwise_not", "invert"), lambda x: ~operand(x)),
    "logical_and": _of_conditions("&"),
    "logical_or": _of_conditions("|"),
    "logical_xor": _of_conditions("^"),
    "logical_not": lambda x: ~condition(x),
    **dict.fromkeys(("minimum", "fmin", "min"), lambda a, b: _extreme("min", "&", a, b)),
    **dict.fromkeys(("maximum", "fmax", "max"), lambda a, b: _extreme("max", "|", a, b)),
    **dict.fromkeys(("clamp", "clip"), _clamped),
    "clamp_min": lambda x, min: call("max", x, min),
    "clamp_max": lambda x, max: call("min", x, max),
    "absolute": lambda x: call("abs", x),
    "special_expit": lambda x: call("sigmoid", x),
    "relu": lambda x, inplace=False: call("max", x, 0),
    "square": lambda x: operate(x, "*", x),
    "reciprocal": lambda x: operate(1, "/", x),
    "rsqrt": lambda x: operate(1, "/", call("sqrt", x)),
    "where": lambda condition, a, b: call("where", condition, a, b),
    "masked_fill": lambda x, mask, value: call("where", mask, value, x),
    "to": _to,
    "type": lambda x, dtype: converted(x, dtype),
    "type_as": lambda x, other: converted(x, other),
    "bool": lambda x: converted(x, _dtype("bool")),
    **dict.fromkeys(("int", "long"), lambda x: converted(x, _dtype("int32"))),
    "float": lambda x: converted(x, _dtype("float32")),
    **{word: lambda x, format=format: converted(x, _dtype(format)) for word, format in {
        "half": "float16", "bfloat16": "bfloat16", "double": "float64", "short": "int16", "char": "int8",
        "byte": "uint8",
    }.items()},
    "new_full": lambda x, size, fill_value, **how: _filled(x, size, fill_value, **how),
    "new_ones": lambda x, size, **how: _filled(x, size, 1, **how),
    "new_zeros": lambda x, size, **how: _filled(x, size, 0, **how),
    "new_tensor": lambda x, data, **how: _filled(x, (), data, **how),
    "full_like": lambda x, fill_value, **how: _filled(x, (), fill_value, **how),
    "ones_like": lambda x, **how: _filled(x, (), 1, **how),
    "zeros_like": lambda x, **how: _filled(x, (), 0, **how),
    "getitem": _item,
    "size": lambda x: (),
    "dim": lambda x: 0,
    **dict.fromkeys(("clone", "detach", "contiguous", "cpu", "cuda", "positive"), _kept),
}  # fmt: skip
"""What torch calls otherwise than the language, or with other arguments."""


def _dtype(name: str) -> "torch.dtype":
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype
