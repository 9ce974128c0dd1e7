"""Python functions to texts of the language: FlexAttention's mask_mod and score_mod, as they are.

`expression` calls the function once, on objects that write down what is done to them. It gives a text, and the
parser says what is wrong with it: types, ranges and names are no business of this module.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from attngen.errors import ArgumentError, AttngenError, Diagnostic, ExpressionError, shown
from attngen.expr.declare import read_declarations
from attngen.expr.parse import parse_mask, parse_score
from attngen.expr.traced import Traced, operand, refuse
from attngen.expr.traced_tensors import TracedTensor, capturing, constant_of, declaration_of
from attngen.expr.tree import INDEX_NAMES

if TYPE_CHECKING:
    import torch

_NAMES = (*INDEX_NAMES, "q_pos", "score")
_MASK_PLACES = ("b", "h", "q_idx", "kv_idx")
_SCORE_PLACES = ("score", *_MASK_PLACES)
"""What FlexAttention passes, by position."""


class Expression(str):
    """A text of the expression language that was written in Python: a mask or a score of a spec, like any text.

    Attributes:
        scalars: what it declares, to be declared in the spec as well.
        tensors: the same of tensors.
        bound: tensors that the function holds, by their names among `tensors`; `attention` and kernels of `compile`
            pass them where a call does not.
        text: the text alone, which torch.compile takes for a constant.
    """

    text: str

    scalars: Mapping[str, str] = {}
    tensors: Mapping[str, str] = {}
    bound: Mapping[str, "torch.Tensor"] = {}

    def __new__(cls, text: str) -> "Expression":
        """An expression without declarations."""
        made = super().__new__(cls, text)
        made.text = str(text)
        return made

    def __repr__(self) -> str:
        return f"Expression({str(self)!r})"


def expression(
    function: Callable[..., Any],
    *,
    scalars: Mapping[str, str] | None = None,
    tensors: Mapping[str, str] | None = None,
) -> Expression:
    """Write a Python function down as a mask, or as a score where it takes `score`.

    The function is called once, on symbols. It uses + - * / // %, comparisons, & | ^ ~ for and, or, exclusive or, not,
    and functions by the names of the language, of `attngen.functions` or of torch:

        expression(lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx < 128))
        expression(lambda score, h, q_idx, kv_idx, slopes: score + slopes[h] * (kv_idx - q_idx),
                   tensors={"slopes": "f32[num_heads_q]"})

    Tensors that it holds, in its closure, a global or an attribute, are declared by names made of the variables', and
    bound to the expression. Numbers, tensors without dimensions too, are written out.

    Args:
        function: its parameters are found by name, in any order, where all have names of the language (b, h, h_kv,
            q_idx, kv_idx, q_pos, seqlen_q, seqlen_k, score) or of what is declared. Otherwise four of them are a
            mask_mod's (b, h, q_idx, kv_idx) and five a score_mod's (score first), by position. A parameter of another
            name keeps its default.
        scalars: types of scalars by name, as in a spec: `{"cap": "f32 = 30.0"}`.
        tensors: formats and dimensions of tensors by name, as in a spec; the function indexes them.

    Raises:
        ArgumentError: scalars or tensors are no texts by name.
        ExpressionError: the function does what the language cannot say.
    """
    scalars, tensors = _texts("scalars", scalars), _texts("tensors", tensors)
    reading = read_declarations(scalars, tensors, {})
    if reading.faults:
        raise ExpressionError(tuple(reading.faults))
    declared = reading.declarations
    symbols: dict[str, object] = {name: Traced(name, "f32" if name == "score" else "i32") for name in _NAMES}
    symbols |= {name: Traced(name, scalar.type) for name, scalar in declared.scalars.items()}
    symbols |= {name: TracedTensor(tensor) for name, tensor in declared.tensors.items()}
    arguments, named = _arguments(function, symbols, (*scalars, *tensors))
    is_score = any(each is symbols["score"] for each in (*arguments, *named.values()))
    sizes = (size for tensor in declared.tensors.values() for size in tensor.dims if isinstance(size, str))
    with capturing("score" if is_score else "mask", (*symbols, *sizes)) as captured:
        result = _result(function, arguments, named)
    text = Expression(result.text)
    text.scalars, text.tensors, text.bound = scalars, tensors | captured.declared, captured.bound
    parse = parse_score if is_score else parse_mask
    reading = read_declarations(scalars, text.tensors, {})
    if reading.faults:
        raise ExpressionError(tuple(reading.faults))
    parse(text, reading.declarations)
    return text


_FORMS = {"scalars": "{'cap': 'f32 = 30.0'}", "tensors": "{'doc': 'i32[batch, seqlen_k]'}"}
"""Declarations of each kind, as an example."""


def _by_name(kind: str, given: Mapping[str, str] | None) -> Mapping[str, str]:
    """Declarations of a kind, `scalars` or `tensors`, as they are given."""
    if given is None or isinstance(given, Mapping):
        return given or {}
    what = f"{type(given).__name__} {shown(given)}"
    raise ArgumentError(kind, what, "texts of declarations by name", f"write {kind}={_FORMS[kind]}")


def _texts(kind: str, given: Mapping[str, str] | None) -> dict[str, str]:
    """Declarations of a kind, each a text by a name."""
    for name, text in _by_name(kind, given).items():
        what = f"{shown(name)}: {type(text).__name__} {shown(text)}"
        if not isinstance(name, str):
            raise ArgumentError(kind, what, "a name before each text", f"write {kind}={_FORMS[kind]}")
        if not isinstance(text, str):
            written = declaration_of(text)
            place = "tensors" if "[" in written else "scalars"
            cure = f"write {place}={{{name!r}: {written!r}}}; a call passes the value, {name}=..."
            raise ArgumentError(kind, what, "a text for each name", cure)
    return dict(given or {})


def _arguments(
    function: Callable[..., Any], symbols: Mapping[str, object], declared: Sequence[str]
) -> tuple[list[object], dict[str, object]]:
    """What a function is called with: the symbols that its parameters ask for, by name or as FlexAttention does."""
    try:  # a module of torch is called as its forward
        parameters = inspect.signature(getattr(function, "forward", function)).parameters.values()
    except (TypeError, ValueError):
        refuse(
            f"{_title(function)} is no function with parameters that can be read",
            "traced-parameters",
            shown(function),
        )
    required = [each for each in parameters if each.default is each.empty and each.kind != each.VAR_KEYWORD]
    names = {each.name: each.name for each in parameters if each.name in symbols}
    rest: tuple[str, ...] = ()
    if any(each.name not in symbols or each.kind == each.VAR_POSITIONAL for each in required):
        places, rest = _places(function, [each for each in required if each.name not in declared], symbols)
        names |= places
    arguments: list[object] = []
    named: dict[str, object] = {}
    for each in parameters:
        value = symbols[names[each.name]] if each.name in names else each.default
        if each.kind == each.VAR_POSITIONAL:
            arguments += [symbols[name] for name in rest]
        elif each.kind == each.KEYWORD_ONLY and each.name in names:
            named[each.name] = value
        elif each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD):
            arguments.append(value)
    return arguments, named


def _places(
    function: Callable[..., Any], required: Sequence[inspect.Parameter], symbols: Mapping[str, object]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The names that FlexAttention's positions give to parameters, and those left for `*rest`.

    No parameter may have the name of another position: its function is no function of FlexAttention.
    """
    single = [each for each in required if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    has_rest = any(each.kind == each.VAR_POSITIONAL for each in required)
    for places in (_MASK_PLACES, _SCORE_PLACES):
        fits = len(single) <= len(places) if has_rest else len(single) == len(required) == len(places)
        given = dict(zip((each.name for each in single), places, strict=False))
        if fits and all(name == place for name, place in given.items() if name in symbols):
            return given, places[len(single) :]
    unknown = next(each for each in required if each.name not in symbols)
    refuse(
        f"{_title(function)} has a parameter `{unknown}`, which is no name of the language",
        "traced-parameters",
        unknown.name,
        "a value of the call is declared: tensors={...} or scalars={...}; by position go b, h, q_idx, kv_idx, and "
        "score before them",
        tuple(get_close_matches(unknown.name, symbols, n=2)) or tuple(symbols),
    )


def _result(function: Callable[..., Any], arguments: list[object], named: dict[str, object]) -> Traced:
    """What the function returns of symbols."""
    try:
        result = function(*arguments, **named)
        result = operand(result) if constant_of(result) is not result else result
    except AttngenError:
        raise
    except Exception as error:  # whatever a stranger's function raises is that function's fault
        note = "it is called on symbols: torch's functions and attngen.functions take them, numpy's and math's do not"
        message = f"{_title(function)} cannot be read: {str(error) or 'it raises'} ({type(error).__name__})"
        raise ExpressionError(
            (Diagnostic(message, "traced-function", value=type(error).__name__, note=note),)
        ) from error
    if isinstance(result, Traced):
        return result
    note = "an expression is made of the function's parameters; to see every key is `full`"
    refuse(
        f"{_title(function)} returns {shown(result)}, which is no expression",
        "traced-result",
        shown(result),
        note,
    )


def _title(function: object) -> str:
    return str(getattr(function, "__name__", "") or shown(function))


def joined(kind: str, given: Mapping[str, str] | None, *texts: object) -> dict[str, str]:
    """The declarations of a kind, `scalars` or `tensors`, that are given and that expressions bring.

    Raises:
        ArgumentError: two of one name that are not the same; or what is given is no mapping.
    """
    found: dict[str, str] = {}
    for brought in (
        _by_name(kind, given),
        *(getattr(text, kind) for text in texts if isinstance(text, Expression)),
    ):
        for name, declared in brought.items():
            if found.setdefault(name, declared) != declared:
                raise ArgumentError(kind, f"{name}: {declared}", f"{name}: {found[name]}, as declared before")
    return found


def bound_by(*texts: object) -> dict[str, "torch.Tensor"]:
    """The tensors that expressions bring, by name."""
    return {name: x for text in texts if isinstance(text, Expression) for name, x in text.bound.items()}


def check_text(argument: str, value: object) -> None:
    """Refuse what is no text of the language, with what to pass in its place.

    Raises:
        ArgumentError: the value is no text.
    """
    if isinstance(value, str):
        return
    default = {"mask": "full", "score": "score"}[argument]
    must = "a text of the language, or an attngen.Expression"
    # A nested tensor refuses to say its shape.
    shape = None if getattr(value, "is_nested", False) is True else getattr(value, "shape", None)
    if value is None:
        raise ArgumentError(argument, "None", must, f"leave it out, or write {default!r}")
    if callable(getattr(value, "mask_mod", None)):
        raise ArgumentError(
            argument, type(value).__name__, must, "attngen.expression(x.mask_mod) reads its function"
        )
    if isinstance(shape, tuple) and hasattr(value, "dtype"):
        raise ArgumentError(
            argument, f"{type(value).__name__} of shape {tuple(shape)}", must, _declaring(argument, shape)
        )
    cure = "attngen.expression(f) makes one of a function f" if callable(value) else None
    raise ArgumentError(argument, f"{type(value).__name__} {shown(value)}", must, cure)


def _declaring(argument: str, shape: tuple[int, ...]) -> str:
    """How a tensor over pairs is declared and read."""
    dims = {"batch": "b", "num_heads_q": "h", "seqlen_q": "q_idx", "seqlen_k": "kv_idx"}
    axes = [
        ("1", "0") if size == 1 else axis
        for size, axis in zip(shape[::-1], [*dims.items()][::-1], strict=False)
    ][::-1]
    sizes, indices = (", ".join(words) for words in zip(*axes, strict=True)) if axes else ("batch", "b")
    if argument == "mask":
        return f"declare it: mask='x[{indices}]', tensors={{'x': 'bool[{sizes}]'}}, x=..."
    return f"declare it: score='score + x[{indices}]', tensors={{'x': 'f32[{sizes}]'}}, x=..."
