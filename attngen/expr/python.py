"""Python functions to texts of the language: FlexAttention's mask_mod and score_mod, as they are.

`expression` calls the function once, on objects that write down what is done to them. It gives a text, and the
parser says what is wrong with it: types, ranges and names are no business of this module.
"""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from attngen.errors import ExpressionError
from attngen.expr.declare import read_declarations
from attngen.expr.parse import parse_mask, parse_score
from attngen.expr.traced import Traced, TracedTensor, refuse
from attngen.expr.tree import INDEX_NAMES

_NAMES = (*INDEX_NAMES, "q_pos", "score")


class Expression(str):
    """A text of the expression language that was written in Python: a mask or a score of a spec, like any text.

    Attributes:
        scalars: what it declares, to be declared in the spec as well.
        tensors: the same of tensors.
    """

    scalars: Mapping[str, str]
    tensors: Mapping[str, str]

    def __repr__(self) -> str:
        return f"Expression({str(self)!r})"


def expression(
    function: Callable[..., Any],
    *,
    scalars: Mapping[str, str] | None = None,
    tensors: Mapping[str, str] | None = None,
) -> Expression:
    """Write a Python function down as a mask, or as a score where it takes `score`.

    The function is called once, on symbols. It uses + - * / // %, comparisons, & | ~ in the place of and, or, not,
    and functions by the names of the language, of `attngen.functions` or of torch:

        expression(lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx < 128))
        expression(lambda score, h, q_idx, kv_idx, slopes: score + slopes[h] * (kv_idx - q_idx),
                   tensors={"slopes": "f32[num_heads_q]"})

    Args:
        function: its parameters are found by name, in any order: b, h, h_kv, q_idx, kv_idx, q_pos, seqlen_q,
            seqlen_k, score, and what is declared; a parameter of another name keeps its default.
        scalars: types of scalars by name, as in a spec: `{"cap": "f32 = 30.0"}`.
        tensors: formats and dimensions of tensors by name, as in a spec; the function indexes them.

    Raises:
        ExpressionError: the function does what the language cannot say.
    """
    scalars, tensors = dict(scalars or {}), dict(tensors or {})
    reading = read_declarations(scalars, tensors, {})
    if reading.faults:
        raise ExpressionError(tuple(reading.faults))
    symbols: dict[str, object] = {name: Traced(name) for name in (*_NAMES, *scalars)}
    symbols |= {name: TracedTensor(name) for name in tensors}
    arguments = _arguments(function, symbols)
    result = function(**arguments)
    if not isinstance(result, Traced):
        note = "an expression is made of the function's parameters; to see every key is `full`"
        refuse(
            f"{_title(function)} returns {result!r}, which is no expression",
            "traced-result",
            repr(result),
            note,
        )
    text = Expression(result.text)
    text.scalars, text.tensors = scalars, tensors
    parse = parse_score if "score" in arguments else parse_mask
    parse(text, reading.declarations)
    return text


def _arguments(function: Callable[..., Any], symbols: Mapping[str, object]) -> dict[str, object]:
    """The symbols that a function asks for, by the names of its parameters."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        refuse(
            f"{function!r} is no function with parameters that can be read",
            "traced-parameters",
            repr(function),
        )
    arguments = {}
    for parameter in parameters:
        if parameter.name in symbols and parameter.kind is not parameter.POSITIONAL_ONLY:
            arguments[parameter.name] = symbols[parameter.name]
        elif parameter.default is parameter.empty:
            refuse(
                f"{_title(function)} has a parameter `{parameter}`, which is no name of the language",
                "traced-parameters",
                parameter.name,
                "a value of the call is declared: tensors={...} or scalars={...}",
                tuple(get_close_matches(parameter.name, symbols, n=2)) or tuple(symbols),
            )
    return arguments


def _title(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", function))
