"""Numbers of the expression language: constructors for i32 and f32 that keep the canonical form and fold constants.

Types are the caller's to check (the parser tells the user); what is said of them here is an assertion. Where an
operation takes both i32 and f32, an i32 among f32 is converted.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from attngen.errors import InternalError
from attngen.expr.logic import (
    compare_reals,
    conjunction,
    disjunction,
    equal,
    less,
    less_equal,
    negate,
)
from attngen.expr.tree import (
    LARGEST_DIVISOR,
    Expr,
    add,
    affine,
    affine_parts,
    const,
    node,
    real,
    scale,
    sort_key,
    steps_of,
    sub,
)


@dataclass(frozen=True)
class Function:
    """A function of the language.

    Attributes:
        arity: how many arguments it takes.
        takes: "f32": numbers, as f32; "number": numbers, as i32 if all are, else as f32; "choice": a condition and two
            values of one type.
    """

    arity: int
    takes: Literal["f32", "number", "choice"]


FUNCTIONS = {
    "abs": Function(1, "number"),
    "sign": Function(1, "number"),
    "min": Function(2, "number"),
    "max": Function(2, "number"),
    "clamp": Function(3, "number"),
    "exp": Function(1, "f32"),
    "exp2": Function(1, "f32"),
    "log": Function(1, "f32"),
    "log2": Function(1, "f32"),
    "tanh": Function(1, "f32"),
    "sigmoid": Function(1, "f32"),
    "sqrt": Function(1, "f32"),
    "sin": Function(1, "f32"),
    "cos": Function(1, "f32"),
    "floor": Function(1, "f32"),
    "i32": Function(1, "number"),
    "f32": Function(1, "number"),
    "where": Function(3, "choice"),
}
"""Every function by its name. `min` and `max` of a NaN and a number are the number; `i32` drops the fraction, keeps to
the ends of i32 and makes 0 of a NaN; `sign` is -1, 0 or 1, and 0 of a NaN; `clamp(x, lo, hi)` is
`min(max(x, lo), hi)`."""


def promoted(*numbers: Expr) -> tuple[Expr, ...]:
    """The numbers as i32 if all are, else as f32."""
    if all(number.type == "i32" for number in numbers):
        return numbers
    return tuple(map(to_f32, numbers))


def to_f32(number: Expr) -> Expr:
    """The f32 nearest to an i32; an f32 stays."""
    if number.type == "f32":
        return number
    _expect(number.type == "i32", number)
    if number.op == "const":
        return real(float(number.value))
    return node("call", (number,), "f32", 0, "f32")


def to_i32(number: Expr) -> Expr:
    """The i32 next to an f32 on the side of zero, the end of the range for what lies outside, 0 for a NaN."""
    if number.type == "i32":
        return number
    _expect(number.type == "f32", number)
    if number.op == "const":
        return const(int(max(-(2.0**31), min(2.0**31 - 1, float(number.value)))))
    return node("call", (number,), "i32", 0, "i32")


def plus(a: Expr, b: Expr) -> Expr:
    """The sum a + b."""
    return _arithmetic("+", a, b, add)


def minus(a: Expr, b: Expr) -> Expr:
    """The difference a - b."""
    return _arithmetic("-", a, b, sub)


def times(a: Expr, b: Expr) -> Expr:
    """The product a · b."""
    return _arithmetic("*", a, b, _index_product)


def over(a: Expr, b: Expr) -> Expr:
    """The quotient a / b, an f32."""
    return _real_arithmetic("/", to_f32(a), to_f32(b))


def negative(a: Expr) -> Expr:
    """-a; of an f32 it turns the sign of a zero as well."""
    return scale(-1, a) if a.type == "i32" else times(real(-1.0), a)


def floor_divide(a: Expr, b: Expr) -> Expr:
    """The quotient of two i32, rounded down. A divisor of 0 is the parser's to refuse."""
    _expect(a.type == b.type == "i32", a)
    if b.op != "const":
        return node("arith", (a, b), "//", 0, "i32")
    divisor = int(b.value)
    if divisor < 0:
        a, divisor = scale(-1, a), -divisor
    whole, rest = _split(a, divisor)
    coefficients, constant = affine_parts(rest)
    if not coefficients:
        return add(whole, const(constant // divisor))
    if divisor == 1:
        return add(whole, rest)
    if len(coefficients) == 1 and not constant:
        ((atom, factor),) = coefficients.items()
        if factor == 1 and (steps := steps_of(atom)) and steps * divisor < LARGEST_DIVISOR:
            # (x // s) // d is x // (s · d)
            return add(whole, floor_divide(atom.args[0], const(steps * divisor)))
    return add(whole, node("arith", (rest, const(divisor)), "//", 0, "i32"))


def modulo(a: Expr, b: Expr) -> Expr:
    """What `a // b` leaves, which has the sign of b."""
    _expect(a.type == b.type == "i32", a)
    if b.op != "const" or b.value < 0:
        if a.op == b.op == "const":
            return const(int(a.value) % int(b.value))
        return node("arith", (a, b), "%", 0, "i32")
    divisor = int(b.value)
    _, rest = _split(a, divisor)
    coefficients, constant = affine_parts(rest)
    if not coefficients:
        return const(constant % divisor)
    return node("arith", (rest, b), "%", 0, "i32") if divisor > 1 else const(0)


def call(name: str, *args: Expr) -> Expr:
    """A function of `FUNCTIONS` by its name."""
    function = FUNCTIONS[name]
    _expect(len(args) == function.arity, *args)
    if name == "where":
        return where(*args)
    if name == "f32":
        return to_f32(*args)
    if name == "i32":
        return to_i32(*args)
    args = promoted(*args) if function.takes == "number" else tuple(map(to_f32, args))
    if name == "clamp":
        number, lo, hi = args
        return call("min", call("max", number, lo), hi)
    if name in ("min", "max") and args[0] is args[1]:
        return args[0]
    if all(arg.op == "const" for arg in args):
        folded = _folded(name, *(arg.value for arg in args))
        if args[0].type == "i32":
            return const(int(folded))
        if not math.isnan(folded):
            return real(folded)
    return node("call", args, name, 0, args[0].type)


def where(condition: Expr, yes: Expr, no: Expr) -> Expr:
    """`yes` where the condition holds, else `no`; both are values of one type, or numbers."""
    _expect(condition.type == "bool", condition)
    if yes.type != no.type:
        yes, no = promoted(yes, no)
    if yes is no:
        return yes
    if condition.op == "const":
        return yes if condition.value else no
    if yes.type == "bool":
        return disjunction([conjunction([condition, yes]), conjunction([negate(condition), no])])
    return node("where", (condition, yes, no), "", 0, yes.type)


def compare(sign: str, a: Expr, b: Expr) -> Expr:
    """The comparison `a sign b`, sign one of < <= > >= == != for two numbers, == or != for two conditions."""
    if a.type == b.type == "bool":
        return where(a, b, negate(b)) if sign == "==" else where(a, negate(b), b)
    a, b = promoted(a, b)
    if sign in (">", ">="):
        sign, a, b = sign.replace(">", "<"), b, a
    if a.type == "f32":
        return compare_reals(sign, a, b)
    if sign == "!=":
        return negate(equal(a, b))
    return {"<": less, "<=": less_equal, "==": equal}[sign](a, b)


def _arithmetic(sign: str, a: Expr, b: Expr, of_indices: Callable[[Expr, Expr], Expr]) -> Expr:
    a, b = promoted(a, b)
    return of_indices(a, b) if a.type == "i32" else _real_arithmetic(sign, a, b)


def _index_product(a: Expr, b: Expr) -> Expr:
    if a.op == "const":
        return scale(int(a.value), b)
    if b.op == "const":
        return scale(int(b.value), a)
    # Every pair of terms is a product of its own, so that equal products meet in the sum.
    more, more_constant = affine_parts(b)
    total = scale(more_constant, a)
    coefficients, constant = affine_parts(a)
    total = add(total, scale(constant, affine(more, 0)))
    for left, count in coefficients.items():
        for right, other in more.items():
            factors = _factors(left) + _factors(right)
            total = add(total, scale(count * other, _product_of_atoms(factors)))
    return total


def _factors(atom: Expr) -> tuple[Expr, ...]:
    if atom.op == "arith" and atom.name == "*":
        return _factors(atom.args[0]) + _factors(atom.args[1])
    return (atom,)


def _product_of_atoms(factors: tuple[Expr, ...]) -> Expr:
    first, *others = sorted(factors, key=sort_key)
    for other in others:
        first = node("arith", (first, other), "*", 0, "i32")
    return first


def _real_arithmetic(sign: str, a: Expr, b: Expr) -> Expr:
    if a.op == b.op == "const":
        folded = _fold_real(sign, float(a.value), float(b.value))
        if folded is not None and not math.isnan(folded):
            return real(folded)
    one = real(1.0)
    if sign in "*/" and b is one:
        return a
    if sign == "*" and a is one:
        return b
    return node("arith", (a, b), sign, 0, "f32")


def _fold_real(sign: str, a: float, b: float) -> float | None:
    """The f32 result: f64 arithmetic on two f32, rounded once more, is the f32 result itself."""
    if sign == "/":
        return None if b == 0 else a / b
    return a + b if sign == "+" else a - b if sign == "-" else a * b


def _split(a: Expr, divisor: int) -> tuple[Expr, Expr]:
    """(w, r) such that a = divisor · w + r and w takes from a what divides without remainder."""
    coefficients, constant = affine_parts(a)
    even = {atom: factor // divisor for atom, factor in coefficients.items() if factor % divisor == 0}
    rest = {atom: factor for atom, factor in coefficients.items() if factor % divisor}
    return affine(even, constant // divisor), affine(rest, constant % divisor)


def _folded(name: str, *values: float) -> float:
    """The value of a function of constants; NaN where it has none, or none that is worth knowing."""
    try:
        return float(_VALUES[name](*values))
    except (ValueError, OverflowError):
        return math.nan


_VALUES: dict[str, Callable[..., float]] = {
    "abs": abs,
    "sign": lambda x: (x > 0) - (x < 0),
    "min": min,
    "max": max,
    "exp": math.exp,
    "exp2": lambda x: 2.0**x,
    "log": math.log,
    "log2": math.log2,
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "sqrt": math.sqrt,
    "sin": math.sin,
    "cos": math.cos,
    "floor": math.floor,
}


def _expect(holds: bool, *exprs: Expr) -> None:
    if not holds:
        raise InternalError(f"no such operation on {', '.join(map(str, exprs))}")
