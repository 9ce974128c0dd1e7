"""Values of the language in a Python function: objects that write down what is done to them.

They know how operators are written and bracketed, and of types what torch makes of a condition among numbers; the
parser reads what they wrote. What torch calls its functions and methods is said in torch_functions.py.
"""

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, Never, cast

from attngen.errors import Diagnostic, ExpressionError, shown
from attngen.expr.literals import read_default, read_integer
from attngen.expr.syntax import MAX_LENGTH
from attngen.expr.tree import Type

# How tightly an operator binds, as in Python.
_OR, _AND, _NOT, _COMPARISON, _SUM, _PRODUCT, _SIGN, _ATOM = range(8)
_BINDS = {"+": _SUM, "-": _SUM, "*": _PRODUCT, "/": _PRODUCT, "//": _PRODUCT, "%": _PRODUCT}
_LOGIC = {"&": ("and", _AND), "|": ("or", _OR), "^": ("!=", _COMPARISON)}


def _both_ways(sign: str) -> tuple["_Operator", "_Operator"]:
    """The methods of an operator with the object on its left, and on its right."""
    return (
        lambda self, other: operate(self, sign, other),
        lambda self, other: operate(other, sign, self),
    )


class Traced:
    """A value of the language in a Python function: every operation on it gives the text of the operation.

    Attributes:
        text: of the value.
        kind: its type; of a text that the parser is to refuse any. (`x.type` is a method of torch.)
    """

    __hash__ = None  # type: ignore[assignment]  # `==` gives a condition, so that no set could hold it
    __array_ufunc__ = None  # a number of numpy leaves its operators to this class

    def __init__(self, text: str, type: Type, binds: int = _ATOM) -> None:
        if len(text) > MAX_LENGTH:
            note = f"it is longer than {MAX_LENGTH} characters; a value that is used twice is written twice"
            refuse("the expression grows too long", "expression-length", text, note)
        self.text = text
        self.kind: Type = type
        self._binds = binds

    def __repr__(self) -> str:
        return f"<traced {self.text}>"

    def within(self, binds: int) -> str:
        """The text as an operand of what binds as tightly as this."""
        return self.text if self._binds >= binds else f"({self.text})"

    __add__, __radd__ = _both_ways("+")
    __sub__, __rsub__ = _both_ways("-")
    __mul__, __rmul__ = _both_ways("*")
    __truediv__, __rtruediv__ = _both_ways("/")
    __floordiv__, __rfloordiv__ = _both_ways("//")
    __mod__, __rmod__ = _both_ways("%")
    __and__, __rand__ = _both_ways("&")
    __or__, __ror__ = _both_ways("|")
    __xor__, __rxor__ = _both_ways("^")
    __lshift__, __rlshift__ = _both_ways("<<")
    __rshift__, __rrshift__ = _both_ways(">>")
    __lt__, _ = _both_ways("<")
    __le__, _ = _both_ways("<=")
    __gt__, _ = _both_ways(">")
    __ge__, _ = _both_ways(">=")
    __eq__, _ = _both_ways("==")  # type: ignore[assignment]
    __ne__, _ = _both_ways("!=")  # type: ignore[assignment]

    def __invert__(self) -> "Traced":
        return Traced(f"not {self.within(_NOT)}", "bool", _NOT) if self.kind == "bool" else -1 - self

    def __neg__(self) -> "Traced":
        value = read_default(self.kind, self.text) if self.kind != "bool" else None
        if value is not None:
            return operand(-value)
        return Traced(f"-{self.within(_SIGN)}", self.kind, _SIGN)

    def __pos__(self) -> "Traced":
        return self

    def __abs__(self) -> "Traced":
        return cast("Traced", self.abs())

    def __getattr__(self, name: str) -> Any:
        """torch's methods and attributes: `x.abs()`, `x.clamp(lo, hi)`, `x.dtype`."""
        from attngen.expr import torch_functions

        return torch_functions.attribute(self, name)

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
        note = "look it up in a torch tensor, not in a list or an array; a loop has a fixed number of turns"
        self._refuse_number(note)

    def __float__(self) -> Never:
        self._refuse_number("functions of expressions are torch's, or those of attngen.functions")

    __int__ = __complex__ = __float__

    def _refuse_number(self, note: str) -> Never:
        message = f"Python asks for the number `{self.text}`, which only the kernel knows"
        refuse(message, "traced-value", self.text, note)

    def __iter__(self) -> Never:
        refuse(f"`{self.text}` is one value and holds no others", "traced-value", self.text)

    def _refuse_operator(self, *others: object) -> Never:
        note = "it has + - * / // %, comparisons, & | ^ ~ and the functions of attngen.functions"
        refuse(f"the language has no such operation on `{self.text}`", "traced-operators", self.text, note)

    __pow__ = __rpow__ = __matmul__ = __rmatmul__ = __divmod__ = __rdivmod__ = __round__ = _refuse_operator
    __getitem__ = __setitem__ = __contains__ = _refuse_operator

    @classmethod
    def __torch_function__(
        cls, function: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What torch calls in the place of its own function, where a Traced is among the arguments."""
        from attngen.expr import torch_functions

        return torch_functions.apply(function.__name__, *args, **(kwargs or {}))


_Operator = Callable[[Traced, object], Traced]


def operate(left: object, sign: str, right: object) -> Traced:
    """A binary operator of Python on two values, of which torch's meaning is written down."""
    a, b = operand(left), operand(right)
    if sign in _BINDS:
        return _arithmetic(a, sign, b)
    if sign in _LOGIC:
        return _joined(a, sign, b)
    if sign in ("<<", ">>"):
        return _shifted(a, sign, b)
    if not (a.kind == b.kind == "bool" and sign in ("==", "!=")):
        a, b = number(a), number(b)
    # Comparisons chain, so that a comparison of a comparison needs brackets on both sides.
    return Traced(f"{a.within(_SUM)} {sign} {b.within(_SUM)}", "bool", _COMPARISON)


def _arithmetic(a: Traced, sign: str, b: Traced) -> Traced:
    """Of conditions torch makes numbers; but the sum and the product of two are conditions again."""
    if a.kind == b.kind == "bool" and sign in "+-*":
        if sign == "-":
            note = "nor has torch; `a & ~b` holds where a alone does, `a ^ b` where one does"
            refuse(
                f"the language has no `-` of two conditions, as `{a.text}`", "traced-operators", a.text, note
            )
        return _joined(a, "|" if sign == "+" else "&", b)
    a, b = number(a), number(b)
    type: Type = "f32" if sign == "/" or "f32" in (a.kind, b.kind) else "i32"
    binds = _BINDS[sign]
    return Traced(f"{a.within(binds)} {sign} {b.within(binds + 1)}", type, binds)


def _joined(a: Traced, sign: str, b: Traced) -> Traced:
    """`&`, `|` or `^` of two conditions; of integers `&` takes the last bits."""
    if a.kind == b.kind == "bool":
        word, binds = _LOGIC[sign]
        first, second = (_SUM, _SUM) if sign == "^" else (binds, binds + 1)
        return Traced(f"{a.within(first)} {word} {b.within(second)}", "bool", binds)
    if "bool" in (a.kind, b.kind):
        message = f"`{sign}` joins a condition and a number, `{a.text}` and `{b.text}`"
        refuse(message, "traced-operators", a.text, "`x != 0` makes a condition of a number")
    for bits, mask in ((a, b), (b, a)):
        last = literal(mask)
        if sign == "&" and bits.kind == "i32" and last is not None and last & (last + 1) == 0 <= last:
            return operate(bits, "%", last + 1)
    note = "of bits it has `x & (2**n - 1)`, `x << n` and `x >> n`, with n a constant"
    message = f"the language has no bitwise `{sign}` of integers, as `{a.text} {sign} {b.text}`"
    refuse(message, "traced-operators", a.text, note)


def _shifted(a: Traced, sign: str, b: Traced) -> Traced:
    """`<<` or `>>` by a constant, which are a product and a quotient."""
    count = literal(b)
    if a.kind != "i32" or count is None or not 0 <= count <= 30:
        message = f"the language has no bitwise `{sign}` as in `{a.text} {sign} {b.text}`"
        note = "an integer is shifted, by a constant up to 30"
        refuse(message, "traced-operators", a.text, note)
    return operate(a, "*" if sign == "<<" else "//", 2**count)


def number(value: object) -> Traced:
    """A value as a number: 1 of a condition that holds, else 0."""
    traced = operand(value)
    return traced if traced.kind != "bool" else Traced(f"where({traced.text}, 1, 0)", "i32")


def condition(value: object) -> Traced:
    """A value as a condition: of a number, whether it is not 0."""
    traced = operand(value)
    constant = literal(traced)
    if constant is not None:
        return operand(constant != 0)
    return traced if traced.kind == "bool" else operate(traced, "!=", 0)


def operand(value: object) -> Traced:
    """A value in a Python function as a traced one: numbers and truth values are written out."""
    from attngen.expr.traced_tensors import TracedTensor, constant_of

    value = constant_of(value)
    if isinstance(value, Traced):
        return value
    if isinstance(value, bool):
        return Traced(str(value).lower(), "bool")
    if isinstance(value, Integral):
        return Traced(str(int(value)), "i32", _ATOM if int(value) >= 0 else _SIGN)
    if isinstance(value, Real) and not math.isnan(value):
        real = float(value)
        return Traced(repr(real), "f32", _ATOM if math.copysign(1, real) > 0 else _SIGN)
    if isinstance(value, TracedTensor):
        value.refuse_use()
    note = "a value of the call is declared: tensors={...} or scalars={...}"
    what = f"{type(value).__name__} {shown(value)}"
    refuse(f"the language has no {what}", "traced-operands", what, note)


def literal(value: Traced) -> int | None:
    """The integer that a text is; None of any other."""
    return read_integer(value.text)


def refuse(message: str, rule: str, value: str, note: str = "", nearest: tuple[str, ...] = ()) -> Never:
    """Raise the one fault that ends a trace."""
    raise ExpressionError((Diagnostic(message, rule, value=value, note=note, nearest=nearest),))
