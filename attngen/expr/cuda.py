"""Tree to CUDA text, with no parentheses that C does not need.

i32 arithmetic is exact: 32 bits where every partial sum, as written, fits for all values, and 64 bits otherwise. What
is asked to be exact in f32 (a mask, an index) is written by functions that neither contract nor approximate; a score
may be contracted and approximated. Nodes that are used more than once become constants of their own.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from attngen.errors import InternalError
from attngen.expr.arithmetic import times
from attngen.expr.logic import agreement, negate
from attngen.expr.ranges import index_range
from attngen.expr.text import write_comparison, written_terms
from attngen.expr.tree import (
    Expr,
    add,
    affine_parts,
    const,
    free_names,
    name,
    nodes,
    real,
    scale,
    sub,
    tensor_names,
)
from attngen.expr.weights import LARGEST_INLINE, weight

_PRIMARY = re.compile(r"\w+([.]\w+|->\w+|\[\w+\]|\([\w, ]*\))*")  # a C operand that binds before any operator
_INT_MAX = 2**31 - 1
_KEY, _FIRST_KEY = name("kv_idx"), name("kv_idx.first")


@dataclass(frozen=True)
class Leaves:
    """How the leaves of a tree are written.

    Attributes:
        names: an operand for each name, `{"seqlen_q": "params.seqlen_q"}`; of indices an int.
        readers: a function for each tensor, by the tensor's name: it reads the element at the indices that it takes.
        sizes: an int for each dimension of a tensor, likewise.
        extents: how many values an index takes, by its name; it needs no clamp in a dimension of that very text.
        exact: f32 arithmetic as the language defines it, rather than fast.
        key_step: the part of kv_idx that the compiler knows, with `names["kv_idx"]` the rest; a conversion to f32 is
            then done once a thread and not once a key. Empty: there is no such part.
        score_scale: what `names["score"]` is still to be multiplied by; a constant that a score is multiplied by joins
            it. Empty: the score is scaled.
        branchless: conditions are joined bit by bit: hundreds of branches in a row take NVRTC time that grows by their
            square.
        narrow: every number is computed in 32 bits, which hold it for a reason that ranges do not tell.
    """

    names: Mapping[str, str]
    readers: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    extents: Mapping[str, str] = field(default_factory=dict)
    exact: bool = True
    key_step: str = ""
    score_scale: str = ""
    branchless: bool = False
    narrow: bool = False


class Body(NamedTuple):
    """Expressions as C++: definitions of constants, then an expression for each.

    Attributes:
        is_outlined: whether they weigh too much to be written out at every call of their function.
    """

    lines: tuple[str, ...]
    results: tuple[str, ...]
    is_outlined: bool = False


def to_cuda(expr: Expr, leaves: Leaves) -> str:
    """An expression as one C++ expression.

    Raises:
        InternalError: a name or a tensor has no text.
    """
    return _Writer(leaves).text(expr)


def places_of(lookup: Expr, leaves: Leaves) -> tuple[str, ...]:
    """The indices of a lookup, each kept within its dimension, as C++ expressions.

    Raises:
        InternalError: a name or a tensor has no text.
    """
    return _Writer(leaves).places(lookup)


def cuda_body(exprs: Sequence[Expr], leaves: Leaves) -> Body:
    """Expressions as C++ text, in which what is shared stands once.

    Raises:
        InternalError: a name or a tensor has no text.
    """
    is_outlined = weight(*exprs) > LARGEST_INLINE
    writer = _Writer(replace(leaves, branchless=is_outlined))
    uses = Counter(arg for each in nodes(*exprs) for arg in each.args) + Counter(exprs)
    lines: list[str] = []
    for each in nodes(*exprs):
        if uses[each] > 1 and each.op not in ("const", "name", "mul"):
            text = writer.text(each)
            if not _PRIMARY.fullmatch(text):
                known = writer.define(each, f"t{len(lines)}")
                lines.append(f"const {c_type(each)} {known} = {text};")
    return Body(tuple(lines), tuple(map(writer.text, exprs)), is_outlined)


def c_type(expr: Expr) -> str:
    """The C++ type that holds every value of an expression."""
    if expr.type != "i32":
        return {"bool": "bool", "f32": "float"}[expr.type]
    lowest, highest = index_range(expr)
    return "int" if lowest >= -_INT_MAX - 1 and highest <= _INT_MAX else "i64"


def f32_literal(value: float) -> str:
    """An f32 in C++."""
    if value in (float("inf"), float("-inf")):
        return "infinity()" if value > 0 else "-infinity()"
    text = repr(value)
    return f"{text if '.' in text or 'e' in text else text + '.0'}f"


# How tightly C binds what stands at the top of a text.
_TERNARY, _OR, _AND, _BITS, _EQUALITY, _RELATION, _SUM, _PRODUCT, _UNARY, _OPERAND = range(10)


class _Writer:
    """Writes nodes; what has a constant of its own is written by that constant's name."""

    def __init__(self, leaves: Leaves) -> None:
        self._leaves = leaves
        self._known: dict[Expr, str] = {}

    def define(self, expr: Expr, constant: str) -> str:
        """Have an expression written by a name from now on."""
        self._known[expr] = constant
        return constant

    def text(self, expr: Expr, binds: int = _TERNARY) -> str:
        """The text of an expression, in parentheses where it binds less tightly than `binds`."""
        if expr in self._known:
            return self._known[expr]
        text, own = self._write(expr)
        return f"({text})" if own < binds else text

    def _write(self, expr: Expr) -> tuple[str, int]:
        if expr.op in ("le", "eq", "ne"):
            written = write_comparison(expr)
            own = _RELATION if expr.op == "le" else _EQUALITY
            return f"{self.text(written.left, _SUM)} {written.symbol} {self.text(written.right, _SUM)}", own
        if expr.op in ("and", "or"):
            return self._logic(expr)
        if expr.op == "const" and expr.type != "i32":
            return ("true" if expr.value else "false", _OPERAND) if expr.type == "bool" else self._real(expr)
        if expr.type == "i32" and expr.op in ("const", "mul", "add", "name"):
            return self._sum(expr)
        if expr.op == "not":
            return f"!{self.text(expr.args[0], _UNARY)}", _UNARY
        if expr.name == "score" and self._leaves.score_scale:
            return f"{self._name('score')} * {self._leaves.score_scale}", _PRODUCT
        if expr.op == "name":
            return self._name(expr.name), _OPERAND
        if expr.op == "lookup":
            return self._lookup(expr), _OPERAND
        if expr.op == "compare":
            own = _RELATION if expr.name[0] == "<" else _EQUALITY
            a, b = (self.text(arg, own + 1) for arg in expr.args)
            return f"{a} {expr.name} {b}", own
        if expr.op == "where":
            return self._where(expr), _TERNARY
        if expr.op == "arith":
            return self._index_arithmetic(expr) if expr.type == "i32" else self._real_arithmetic(expr)
        return self._call(expr)

    def _name(self, word: str) -> str:
        if word not in self._leaves.names:
            raise InternalError(f"{word} has no CUDA text")
        operand = self._leaves.names[word]
        if word == "kv_idx" and self._leaves.key_step:
            return f"({operand} + {self._leaves.key_step})"
        return operand if _PRIMARY.fullmatch(operand) else f"({operand})"

    def _real(self, expr: Expr) -> tuple[str, int]:
        text = f32_literal(float(expr.value))
        return text, _UNARY if text.startswith("-") else _OPERAND

    def places(self, lookup: Expr) -> tuple[str, ...]:
        """The indices of a lookup, clamped."""
        sizes = self._leaves.sizes.get(lookup.name)
        if sizes is None:
            raise InternalError(f"{lookup.name} has no CUDA text")
        return tuple(self._clamped(index, size) for index, size in zip(lookup.args, sizes, strict=True))

    def _lookup(self, expr: Expr) -> str:
        places = self.places(expr)
        return f"{self._leaves.readers[expr.name]}(params, {', '.join(places)})"

    def _clamped(self, index: Expr, size: str) -> str:
        is_inside = index.op == "name" and self._leaves.extents.get(index.name) == size
        return self.text(index) if is_inside else f"clamp_index({self.text(index)}, {size})"

    def _logic(self, expr: Expr) -> tuple[str, int]:
        """Operands with lookups are joined bit by bit: what they load is wanted anyway, and a branch each is not."""
        if self._leaves.branchless or tensor_names(expr):
            for equality, condition in (("==", expr), ("!=", negate(expr))):
                if sides := agreement(condition):
                    a, b = (self.text(side, _SUM) for side in sides)
                    return f"{a} {equality} {b}", _EQUALITY
            sign, own = (" & ", _BITS) if expr.op == "and" else (" | ", _BITS)
            return sign.join(self.text(arg, _UNARY) for arg in expr.args), own
        sign, own = (" && ", _AND) if expr.op == "and" else (" || ", _OR)
        return sign.join(self.text(arg, _AND) for arg in expr.args), own

    def _where(self, expr: Expr) -> str:
        condition, *values = expr.args
        yes, no = (self._as_type(value, c_type(expr), _OR) for value in values)
        return f"{self.text(condition, _OR)} ? {yes} : {no}"

    def _as_type(self, expr: Expr, type: str, binds: int = _TERNARY) -> str:
        """The text of an i32, whose value fits, as int or i64; of another type as it is."""
        if expr.type != "i32" or self._type_of_text(expr) == type:
            return self.text(expr, binds)
        return f"({type}){self.text(expr, _UNARY)}"

    def _type_of_text(self, number: Expr) -> str:
        """The type that C++ gives to the text of an i32: wider than the values may be, or narrower than their range."""
        if number in self._known or number.op == "where":
            return c_type(number)
        if number.op in ("name", "lookup") or number.name == "i32":
            return "int"
        if number.op in ("arith", "call"):
            return self._operation_type(number)
        terms = written_terms(number)
        is_wide = any(atom and self._type_of_text(atom) == "i64" for _, atom in terms)
        return "i64" if is_wide or not self._is_summed_in_int(terms) else "int"

    def _operation_type(self, operation: Expr) -> str:
        return "int" if self._leaves.narrow else _operation_type(operation)

    def _is_summed_in_int(self, terms: Sequence[tuple[int, Expr | None]]) -> bool:
        return self._leaves.narrow or _sums_fit_int(terms)

    # ---- i32 ----------------------------------------------------------------------------------------------------
    def _sum(self, form: Expr) -> tuple[str, int]:
        terms = written_terms(form)
        cast = "" if self._is_summed_in_int(terms) else "(long long)"
        text = ""
        for coefficient, atom in terms:
            term = self._term(abs(coefficient), atom, cast if not text else "")
            sign = "-" if coefficient < 0 else "+"
            text = f"{text} {sign} {term}" if text else f"-{term}" if coefficient < 0 else term
        if len(terms) > 1:
            return text, _SUM
        (coefficient, atom), *_ = terms
        if atom is None:
            return text, _UNARY if coefficient < 0 else _OPERAND
        return text, _PRODUCT if abs(coefficient) != 1 else _UNARY if coefficient < 0 or cast else _OPERAND

    def _term(self, size: int, atom: Expr | None, cast: str) -> str:
        if atom is None:
            return f"{size}LL" if size > _INT_MAX or cast else str(size)
        operand = (
            self.text(atom, _UNARY) if atom in self._known or atom.op != "name" else self._name(atom.name)
        )
        if size == 1:
            return f"{cast}{operand}"
        # A product is computed before it is added, so each that may pass 32 bits is widened by its own factor.
        widens = cast or not self._is_summed_in_int([(size, atom)])
        return f"{size}{'LL' if widens else ''} * {operand}"

    def _index_arithmetic(self, expr: Expr) -> tuple[str, int]:
        a, b = expr.args
        wide = self._operation_type(expr)
        if expr.name == "*":
            return f"{self._as_type(a, wide, _PRODUCT)} * {self._as_type(b, wide, _UNARY)}", _PRODUCT
        floors_as_c = index_range(a)[0] >= 0 and index_range(b)[0] > 0
        if floors_as_c:
            sign = expr.name[0]
            return f"{self._as_type(a, wide, _PRODUCT)} {sign} {self._as_type(b, wide, _UNARY)}", _PRODUCT
        function = "floor_divide" if expr.name == "//" else "floor_modulo"
        return f"{function}({self._as_type(a, wide)}, {self._as_type(b, wide)})", _OPERAND

    # ---- f32 ----------------------------------------------------------------------------------------------------
    def _real_arithmetic(self, expr: Expr) -> tuple[str, int]:
        a, b = expr.args
        if self._leaves.exact:
            return f"{_EXACT_ARITHMETIC[expr.name]}({self.text(a)}, {self.text(b)})", _OPERAND
        if expr.name == "/":
            if b.op == "const" and b.value:
                return self._real_arithmetic(times(a, real(1 / float(b.value))))
            return f"__fdividef({self.text(a)}, {self.text(b)})", _OPERAND
        if expr.name == "*" and (split := self._split_product(a, b)):
            return split, _OPERAND
        if expr.name == "*" and (scaled := self._scaled_score(a, b)):
            return scaled, _PRODUCT
        own = _PRODUCT if expr.name == "*" else _SUM
        return f"{self.text(a, own)} {expr.name} {self.text(b, own + 1)}", own

    def _call(self, expr: Expr) -> tuple[str, int]:
        if expr.name == "f32":
            return self._to_real(expr.args[0])
        if expr.args[0].type == "i32":
            args = ", ".join(self._as_type(arg, self._operation_type(expr)) for arg in expr.args)
            return f"{_INDEX_FUNCTIONS[expr.name]}({args})", _OPERAND
        function = (_EXACT_FUNCTIONS if self._leaves.exact else _FAST_FUNCTIONS)[expr.name]
        return f"{function}({', '.join(map(self.text, expr.args))})", _OPERAND

    def _to_real(self, number: Expr) -> tuple[str, int]:
        if split := self._split(number):
            return " + ".join(split), _SUM
        return f"(float){self.text(number, _UNARY)}", _UNARY

    def _split(self, number: Expr) -> tuple[str, str] | None:
        """An i32 as f32 in two parts, of which the compiler knows the second; their sum is rounded once more."""
        factor = affine_parts(number)[0].get(_KEY, 0)
        rest = sub(number, scale(factor, _KEY))
        if not self._leaves.key_step or not factor or "kv_idx" in free_names(rest):
            return None
        first = self.text(add(rest, scale(factor, _FIRST_KEY)), _UNARY)
        step = (
            f"{self.text(const(factor))} * {self._leaves.key_step}" if factor != 1 else self._leaves.key_step
        )
        return f"(float){first}", f"(float)({step})"

    def _split_product(self, a: Expr, b: Expr) -> str:
        """x · (first + step) as one fma a key, whose last operand a thread computes once; empty if nothing is split."""
        for number, factor in ((a, b), (b, a)):
            is_conversion = number.op == "call" and number.name == "f32" and number not in self._known
            if is_conversion and (split := self._split(number.args[0])):
                first, step = split
                return f"__fmaf_rn({self.text(factor)}, {step}, {self.text(factor, _PRODUCT)} * {first})"
        return ""

    def _scaled_score(self, a: Expr, b: Expr) -> str:
        """The raw score times its scale and a constant; empty where it is nothing of the kind."""
        scale = self._leaves.score_scale
        for score, factor in ((a, b), (b, a)):
            if scale and score.name == "score" and factor.op == "const":
                return f"{self._name('score')} * ({scale} * {self.text(factor, _UNARY)})"
        return ""


_EXACT_ARITHMETIC = {"+": "__fadd_rn", "-": "__fsub_rn", "*": "__fmul_rn", "/": "__fdiv_rn"}
_INDEX_FUNCTIONS = {"abs": "abs", "min": "min", "max": "max", "sign": "sign"}
_EXACT_FUNCTIONS = {
    "i32": "__float2int_rz",
    "abs": "fabsf",
    "sign": "sign",
    "min": "fminf",
    "max": "fmaxf",
    "floor": "floorf",
    "sqrt": "__fsqrt_rn",
    "exp": "expf",
    "exp2": "exp2f",
    "log": "logf",
    "log2": "log2f",
    "tanh": "tanhf",
    "sigmoid": "sigmoid",
    "sin": "sinf",
    "cos": "cosf",
}
_FAST_FUNCTIONS = _EXACT_FUNCTIONS | {
    "sqrt": "sqrt_approx",
    "exp": "exp_approx",
    "exp2": "exp2_approx",
    "log": "log_approx",
    "log2": "log2_approx",
    "tanh": "tanh_approx",
    "sigmoid": "sigmoid_approx",
}


def _operation_type(operation: Expr) -> str:
    """The type in which an operation on i32 is computed: it holds the result and every operand."""
    numbers = (operation, *operation.args)
    if operation.name == "%" and index_range(operation.args[1])[0] < 0:
        numbers = (*numbers, scale(-1, operation.args[0]))  # the quotient by -1 is computed too
    return "i64" if "i64" in map(c_type, numbers) else "int"


def _fits_int(lowest: int, highest: int) -> bool:
    """Whether an int holds these numbers and their negatives."""
    return lowest >= -_INT_MAX and highest <= _INT_MAX


def _sums_fit_int(terms: Sequence[tuple[int, Expr | None]]) -> bool:
    """Whether every partial sum, from the left, stays within 32 bits for all values of the atoms."""
    lowest = highest = 0
    if len(terms) == 1 and terms[0][0] == 1 and terms[0][1]:
        return True  # nothing is computed
    for coefficient, atom in terms:
        ends = [coefficient * end for end in (index_range(atom) if atom else (1, 1))]
        lowest, highest = lowest + min(ends), highest + max(ends)
        if not _fits_int(lowest, highest) or not _fits_int(min(ends), max(ends)):
            return False
    return True
