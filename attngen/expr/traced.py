"""Values of the language in a Python function: objects that write down what is done to them.

They know how operators are written and bracketed, and nothing of types: the parser reads what they wrote.
"""

import math
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from numbers import Integral, Real
from typing import Any, Never

from attngen.errors import Diagnostic, ExpressionError
from attngen.expr.arithmetic import FUNCTIONS
from attngen.expr.scope import prelude
from attngen.expr.syntax import MAX_LENGTH

# How tightly an operator binds, as in Python.
_OR, _AND, _NOT, _COMPARISON, _SUM, _PRODUCT, _SIGN, _ATOM = range(8)

_TORCH_NAMES = {"minimum": "min", "maximum": "max", "clip": "clamp", "absolute": "abs"}
"""torch's names of functions, where they are not the language's."""


_Operator = Callable[["Traced", object], "Traced"]


def _both_ways(sign: str, binds: int) -> tuple[_Operator, _Operator]:
    """The methods of an operator with the object on its left, and on its right."""
    return (
        lambda self, other: _infix(self, sign, other, binds),
        lambda self, other: _infix(other, sign, self, binds),
    )


class Traced:
    """A value of the language in a Python function: every operation on it gives the text of the operation."""

    __hash__ = None  # type: ignore[assignment]  # `==` gives a condition, so that no set could hold it
    __array_ufunc__ = None  # a number of numpy leaves its operators to this class

    def __init__(self, text: str, binds: int = _ATOM) -> None:
        if len(text) > MAX_LENGTH:
            note = f"it is longer than {MAX_LENGTH} characters; a value that is used twice is written twice"
            refuse("the expression grows too long", "expression-length", text, note)
        self.text = text
        self._binds = binds

    def __repr__(self) -> str:
        return f"<traced {self.text}>"

    def within(self, binds: int) -> str:
        """The text as an operand of what binds as tightly as this."""
        return self.text if self._binds >= binds else f"({self.text})"

    __add__, __radd__ = _both_ways("+", _SUM)
    __sub__, __rsub__ = _both_ways("-", _SUM)
    __mul__, __rmul__ = _both_ways("*", _PRODUCT)
    __truediv__, __rtruediv__ = _both_ways("/", _PRODUCT)
    __floordiv__, __rfloordiv__ = _both_ways("//", _PRODUCT)
    __mod__, __rmod__ = _both_ways("%", _PRODUCT)
    __and__, __rand__ = _both_ways("and", _AND)
    __or__, __ror__ = _both_ways("or", _OR)

    def __lt__(self, other: object) -> "Traced":
        return _compared(self, "<", other)

    def __le__(self, other: object) -> "Traced":
        return _compared(self, "<=", other)

    def __gt__(self, other: object) -> "Traced":
        return _compared(self, ">", other)

    def __ge__(self, other: object) -> "Traced":
        return _compared(self, ">=", other)

    def __eq__(self, other: object) -> "Traced":  # type: ignore[override]
        return _compared(self, "==", other)

    def __ne__(self, other: object) -> "Traced":  # type: ignore[override]
        return _compared(self, "!=", other)

    def __invert__(self) -> "Traced":
        return Traced(f"not {self.within(_NOT)}", _NOT)

    def __neg__(self) -> "Traced":
        return Traced(f"-{self.within(_SIGN)}", _SIGN)

    def __pos__(self) -> "Traced":
        return self

    def __abs__(self) -> "Traced":
        return call("abs", self)

    def __getattr__(self, name: str) -> Callable[..., "Traced"]:
        """torch's methods: `x.abs()`, `x.clamp(lo, hi)`."""
        if name in FUNCTIONS and name != "where":
            return lambda *arguments: call(name, self, *arguments)
        raise AttributeError(f"an expression has no attribute {name!r}", name=name, obj=self)

    def __bool__(self) -> Never:
        note = (
            "write & | ~ for and, or, not; (a < b) & (b < c) for a < b < c; "
            "attngen.where(c, x, y) for x if c else y"
        )
        refuse(
            f"Python asks whether `{self.text}` is true, which only the kernel knows",
            "traced-truth",
            self.text,
            note,
        )

    def __index__(self) -> Never:
        note = "to look up a value of the call, declare it: tensors={...}; a loop has a fixed number of turns"
        refuse(
            f"Python asks for the number `{self.text}`, which only the kernel knows",
            "traced-value",
            self.text,
            note,
        )

    def __float__(self) -> Never:
        note = "functions of expressions are torch's, or those of attngen.functions"
        refuse(
            f"Python asks for the number `{self.text}`, which only the kernel knows",
            "traced-value",
            self.text,
            note,
        )

    __int__ = __complex__ = __float__

    def __iter__(self) -> Never:
        refuse(f"`{self.text}` is one value and holds no others", "traced-value", self.text)

    def _refuse_operator(self, *others: object) -> Never:
        note = "it has + - * / // %, comparisons, & | ~ and the functions of attngen.functions"
        refuse(f"the language has no such operation on `{self.text}`", "traced-operators", self.text, note)

    __pow__ = __rpow__ = __matmul__ = __rmatmul__ = __xor__ = __rxor__ = _refuse_operator
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __divmod__ = __rdivmod__ = __round__ = (
        _refuse_operator
    )
    __getitem__ = __contains__ = _refuse_operator

    @classmethod
    def __torch_function__(
        cls, function: Any, types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> "Traced":
        """What torch calls in the place of its own function, where a Traced is among the arguments."""
        name = function.__name__
        name = _TORCH_NAMES.get(name, name)
        if name in _TORCH_OPERATORS and not kwargs:
            return _TORCH_OPERATORS[name](*args)
        if name not in FUNCTIONS or kwargs:
            known = tuple(get_close_matches(name, FUNCTIONS, n=2)) or tuple(FUNCTIONS)
            note = "a tensor that the function looks into is declared: tensors={...}"
            refuse(
                f"the language has no torch.{name} with these arguments",
                "traced-operators",
                name,
                note,
                known,
            )
        return call(name, *args)


class TracedTensor:
    """A declared tensor in a Python function: indexed, or handed to a function that takes a tensor."""

    def __init__(self, name: str) -> None:
        self.text = name

    def __repr__(self) -> str:
        return f"<traced tensor {self.text}>"

    def __getitem__(self, indices: object) -> Traced:
        listed = indices if isinstance(indices, tuple) else (indices,)
        return Traced(f"{self.text}[{', '.join(_operand(index).text for index in listed)}]")

    def __iter__(self) -> Never:
        refuse(f"the tensor `{self.text}` is known to the kernel only", "traced-value", self.text)


def call(name: str, *arguments: object) -> Traced:
    """A function of the language, or of its prelude, by name."""
    texts = [each.text if isinstance(each, TracedTensor) else _operand(each).text for each in arguments]
    return Traced(f"{name}({', '.join(texts)})")


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
            return partial(call, name) if prelude()[name].parameters else Traced(name)
        near = get_close_matches(name, dir(self), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise AttributeError(f"the language has no function {name!r}{hint}", name=name, obj=self)


functions = Functions()

_TORCH_OPERATORS: dict[str, Callable[..., Traced]] = {
    "logical_and": lambda a, b: _infix(a, "and", b, _AND),
    "logical_or": lambda a, b: _infix(a, "or", b, _OR),
    "logical_not": lambda a: ~_operand(a),
}


def _infix(left: object, sign: str, right: object, binds: int) -> Traced:
    """An operation that groups from the left."""
    return Traced(f"{_operand(left).within(binds)} {sign} {_operand(right).within(binds + 1)}", binds)


def _compared(left: Traced, sign: str, right: object) -> Traced:
    # Comparisons chain, so that a comparison of a comparison needs brackets on both sides.
    return Traced(f"{left.within(_SUM)} {sign} {_operand(right).within(_SUM)}", _COMPARISON)


def _operand(value: object) -> Traced:
    """A value in a Python function as a traced one: numbers and truth values are written out."""
    if isinstance(value, Traced):
        return value
    if isinstance(value, bool):
        return Traced(str(value).lower())
    if isinstance(value, Integral):
        return Traced(str(int(value)), _ATOM if int(value) >= 0 else _SIGN)
    if isinstance(value, Real) and not math.isnan(value):
        return Traced(repr(float(value)), _ATOM if math.copysign(1, value) > 0 else _SIGN)
    if isinstance(value, TracedTensor):
        refuse(
            f"the tensor `{value.text}` is used without an index",
            "traced-operands",
            value.text,
            "write [...]",
        )
    note = "a value of the call is declared: tensors={...} or scalars={...}"
    shown = f"{type(value).__name__} {value!r}"
    refuse(f"the language has no {shown[:80]}", "traced-operands", shown, note)


def refuse(message: str, rule: str, value: str, note: str = "", nearest: tuple[str, ...] = ()) -> Never:
    """Raise the one fault that ends a trace."""
    raise ExpressionError((Diagnostic(message, rule, value=value, note=note, nearest=nearest),))
