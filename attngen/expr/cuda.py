"""Tree to CUDA text, with no parentheses that C does not need.

Arithmetic is exact: 32 bits where every partial sum, as written, fits for all indices up to `LARGEST_INDEX`,
and 64 bits otherwise.
"""

import re
from collections.abc import Mapping

from attngen.errors import InternalError
from attngen.expr.text import write_comparison, written_terms
from attngen.expr.tree import LARGEST_INDEX, Expr

_PRIMARY = re.compile(r"\w+([.]\w+|->\w+|\[\w+\]|\([\w, ]*\))*")  # a C operand that binds before any operator
_INT_MAX = 2**31 - 1


def to_cuda(expr: Expr, names: Mapping[str, str]) -> str:
    """An expression as C++ text.

    Args:
        expr: a mask, or an index expression.
        names: the int that holds each name the expression reads: `{"seqlen_q": "p.seqlen_q"}`.

    Raises:
        InternalError: a name has no text, or the expression is a score.
    """
    if expr.op == "const" and expr.type == "bool":
        return "true" if expr.value else "false"
    if expr.op in ("le", "eq", "ne"):
        written = write_comparison(expr)
        return f"{_sum(written.left, names)} {written.symbol} {_sum(written.right, names)}"
    if expr.op == "or":
        return " || ".join(to_cuda(arg, names) for arg in expr.args)
    if expr.op == "and":
        parts = ((arg.op, to_cuda(arg, names)) for arg in expr.args)
        return " && ".join(f"({text})" if op == "or" else text for op, text in parts)
    return _sum(expr, names)


def _sum(form: Expr, names: Mapping[str, str]) -> str:
    terms = written_terms(form)
    cast = "" if _fits_int(terms) else "(long long)"
    text = ""
    for coefficient, name in terms:
        term = _term(abs(coefficient), name, names, cast if not text else "")
        sign = "-" if coefficient < 0 else "+"
        text = f"{text} {sign} {term}" if text else f"-{term}" if coefficient < 0 else term
    return text


def _term(size: int, name: str, names: Mapping[str, str], cast: str) -> str:
    if not name:
        return f"{size}LL" if size > _INT_MAX or cast else str(size)
    if name not in names:
        raise InternalError(f"{name} has no CUDA text")
    operand = names[name] if _PRIMARY.fullmatch(names[name]) else f"({names[name]})"
    if size == 1:
        return f"{cast}{operand}"
    # A product is computed before it is added, so each that may pass 32 bits is widened by its own factor.
    return f"{size}{'LL' if cast or size * LARGEST_INDEX > _INT_MAX else ''} * {operand}"


def _fits_int(terms: list[tuple[int, str]]) -> bool:
    """Whether every partial sum, from the left, stays within 32 bits for all values of the names."""
    lowest = highest = 0
    for coefficient, name in terms:
        reach = coefficient * (LARGEST_INDEX if name else 1)
        lowest += reach if not name else min(reach, 0)
        highest += reach if not name else max(reach, 0)
        if lowest < -_INT_MAX or highest > _INT_MAX or abs(reach) > _INT_MAX:
            return False
    return True
