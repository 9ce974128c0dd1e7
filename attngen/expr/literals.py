"""Words of declarations: the types of scalars, the number formats of tensors, and defaults."""

import math
import re
from difflib import get_close_matches

from attngen.expr.declarations import VALUE_TYPES
from attngen.expr.tree import Expr, Type, const, real, round_to_f32

SCALAR_TYPES: tuple[Type, ...] = ("f32", "i32", "bool")

DEFAULTS = {
    "bool": "true or false",
    "i32": "an integer from -2^31 to 2^31 - 1",
    "f32": "a number of at most 3.4028e38 in size, or inf",
}
"""What a default of each type is, in words."""

_MEANT = {
    **dict.fromkeys(("boolean",), "bool"),
    **dict.fromkeys(("uint8", "byte"), "u8"),
    **dict.fromkeys(("int", "int32", "integer", "i64", "int64"), "i32"),
    **dict.fromkeys(("half", "float16", "fp16"), "f16"),
    **dict.fromkeys(("bfloat16",), "bf16"),
    **dict.fromkeys(("float", "float32", "fp32", "f64", "double"), "f32"),
}
_INTEGER = re.compile(r"[-+]?[0-9]{1,400}")
_REAL = re.compile(r"[-+]?([0-9]{1,400}\.?[0-9]{0,400}|\.[0-9]{1,400})([eE][-+]?[0-9]{1,9})?|[-+]?inf")
_LARGEST_I32 = 2**31 - 1
_LARGEST_F32 = 3.4028234663852886e38


def read_integer(text: str) -> int | None:
    """The integer that a text writes; None where it writes none."""
    return int(text) if _INTEGER.fullmatch(text) else None


def read_default(type: Type, text: str) -> int | float | bool | None:
    """The value of a default; None where it is no value of the type."""
    if type == "bool":
        return {"true": True, "false": False}.get(text)
    if type == "i32":
        number = read_integer(text)
        return number if number is not None and -_LARGEST_I32 - 1 <= number <= _LARGEST_I32 else None
    if not _REAL.fullmatch(text):
        return None
    real = float(text)
    return real if text.endswith("inf") or math.isfinite(round_to_f32(real)) else None


def read_constant(text: str) -> Expr | None:
    """The constant that a text writes; None where it is anything else, or an integer beyond i32."""
    types: tuple[Type, ...] = ("i32",) if read_integer(text) is not None else ("bool", "f32")
    for type in types:
        value = read_default(type, text)
        if value is not None:
            return real(value) if isinstance(value, float) else const(value)
    return None


def nearest_defaults(type: Type, text: str) -> tuple[str, ...]:
    """The defaults of a type that a text may have meant."""
    if type == "bool":
        return ("true", "false")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        return ("0",) if type == "i32" else ("0.0",)
    if type == "i32":
        return (str(int(max(-_LARGEST_I32 - 1.0, min(float(_LARGEST_I32), number)))),)
    return (repr(max(-_LARGEST_F32, min(_LARGEST_F32, number))),)


def nearest_types(word: str, types: tuple[str, ...]) -> tuple[str, ...]:
    """The types that a word may have meant."""
    meant = _MEANT.get(word.lower(), word)
    if meant in VALUE_TYPES and meant not in types:
        meant = VALUE_TYPES[meant]
    return (meant,) if meant in types else tuple(get_close_matches(meant, types, n=2, cutoff=0.5)) or types


def nearest_declarations(text: str) -> tuple[str, ...]:
    """The declarations of a scalar that a text may have meant: of `30.0` it is `f32 = 30.0`."""
    word, _, default = (part.strip() for part in text.partition("="))
    values = tuple(
        f"{type} = {word}" for type in ("bool", "i32", "f32") if read_default(type, word) is not None
    )
    types = nearest_types(word, SCALAR_TYPES) if word else SCALAR_TYPES
    return values or tuple(f"{type} = {default}" if default else type for type in types)
