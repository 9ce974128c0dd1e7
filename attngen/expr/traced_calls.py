"""Functions and definitions of the language in a Python function, by name: `attngen.functions`, `attngen.where`."""

from difflib import get_close_matches
from functools import partial
from typing import Any

from attngen.expr.arithmetic import FUNCTIONS
from attngen.expr.scope import prelude
from attngen.expr.traced import Traced, number, operand
from attngen.expr.traced_tensors import TracedTensor, traced_tensor
from attngen.expr.tree import Type

_NUMBERS_OF_PRELUDE: dict[str, Type] = {
    "q_pos": "i32",
    **dict.fromkeys(("alibi", "relative_bias", "softcap", "temperature"), "f32"),
}
"""The types of the prelude's definitions that are no conditions."""


def call(name: str, *arguments: object) -> Traced:
    """A function of the language, or of its prelude, by name."""
    if name not in FUNCTIONS:
        return _call_definition(name, *arguments)
    values = [operand(each) for each in arguments]
    takes = FUNCTIONS[name].takes
    if takes != "choice":
        values = [number(each) for each in values]
    elif {each.kind for each in values[1:]} > {"bool"}:
        values[1:] = [number(each) for each in values[1:]]
    types = {each.kind for each in values[takes == "choice" :]}
    type: Type = "bool" if types == {"bool"} else "f32" if takes == "f32" or "f32" in types else "i32"
    type = {"i32": "i32", "f32": "f32"}.get(name, type)  # type: ignore[assignment]
    return Traced(f"{name}({', '.join(each.text for each in values)})", type)


def _call_definition(name: str, *arguments: object, **named: object) -> Traced:
    """A definition of the prelude, whose parameters may be tensors; arguments may be given by name."""
    parameters = prelude()[name].parameters
    given = dict(zip(parameters, arguments, strict=False)) | named
    if len(given) < len(arguments) + len(named) or not given.keys() <= set(parameters):
        raise TypeError(f"{name} takes {', '.join(parameters)}")
    texts = [_argument(given[each]) for each in parameters if each in given]
    return Traced(f"{name}({', '.join(texts)})", _NUMBERS_OF_PRELUDE.get(name, "bool"))


def _argument(value: object) -> str:
    """The text of an argument: of a tensor its name."""
    value = value if isinstance(value, TracedTensor) else traced_tensor(value)
    return value.text if isinstance(value, TracedTensor) and value.is_whole else operand(value).text


def where(condition: object, yes: object, no: object) -> Traced:
    """`yes` where the condition holds, else `no`; for functions that `attngen.expression` reads."""
    return call("where", condition, yes, no)


class Functions:
    """The functions and the definitions of the language by name, for functions that `attngen.expression` reads.

    `functions.softcap(score, 30.0)`, `functions.causal & functions.window(128, 0)`.
    """

    def __dir__(self) -> list[str]:
        return [*FUNCTIONS, *prelude()]

    def __getattr__(self, name: str) -> Any:
        if name in FUNCTIONS:
            return partial(call, name)
        if name in prelude():
            type = _NUMBERS_OF_PRELUDE.get(name, "bool")
            return partial(_call_definition, name) if prelude()[name].parameters else Traced(name, type)
        near = get_close_matches(name, dir(self), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise AttributeError(f"the language has no function {name!r}{hint}", name=name, obj=self)


functions = Functions()
