"""Tree to text of the language itself, and the way a comparison is written in any language.

`parse_mask(to_text(e)) is e`: the text is canonical, and the digest of a spec is taken from it.
"""

from dataclasses import dataclass

from attngen.expr.tree import Expr, affine, affine_parts, const, scale, sub

_LEADS = ("kv_idx", "q_idx")  # a comparison is written about the first of these that it reads
_SYMBOLS = {"eq": "==", "ne": "!="}


@dataclass(frozen=True)
class WrittenComparison:
    """A comparison as a person writes it: `kv_idx <= q_idx + seqlen_k - seqlen_q`."""

    left: Expr
    symbol: str
    right: Expr


def write_comparison(comparison: Expr) -> WrittenComparison:
    """One name on the left with a positive coefficient, everything else on the right."""
    form = comparison.args[0]
    coefficients, _ = affine_parts(form)
    lead = next((name for name in _LEADS if name in coefficients), next(iter(coefficients)))
    left = affine({lead: coefficients[lead]}, 0)
    right = sub(left, form)
    is_flipped = coefficients[lead] < 0
    if is_flipped:
        left, right = scale(-1, left), scale(-1, right)
    if comparison.op != "le":
        return WrittenComparison(left, _SYMBOLS[comparison.op], right)
    # One less to subtract reads better with a strict sign: `kv_idx < q_idx`, not `kv_idx <= q_idx - 1`.
    spare = 1 if is_flipped else -1
    if affine_parts(right)[1] == spare:
        return WrittenComparison(left, ">" if is_flipped else "<", sub(right, const(spare)))
    return WrittenComparison(left, ">=" if is_flipped else "<=", right)


def written_terms(form: Expr) -> list[tuple[int, str]]:
    """The terms (coefficient, name) of an affine form in the order of writing; the constant has no name.

    Names that are added come before names that are subtracted and the constant comes last, but it leads where
    it alone is positive: a form starts with a minus only where it must.
    """
    coefficients, constant = affine_parts(form)
    terms = sorted(((value, name) for name, value in coefficients.items()), key=lambda term: term[0] < 0)
    if constant > 0 and terms and terms[0][0] < 0:
        return [(constant, ""), *terms]
    return [*terms, (constant, "")] if constant or not terms else terms


def to_text(expr: Expr) -> str:
    """The canonical text of an expression."""
    if expr.op == "const" and expr.type == "bool":
        return "true" if expr.value else "false"
    if expr.op in ("le", "eq", "ne"):
        written = write_comparison(expr)
        return f"{to_text(written.left)} {written.symbol} {to_text(written.right)}"
    if expr.op == "or":
        return " or ".join(map(to_text, expr.args))
    if expr.op == "and":
        return " and ".join(f"({to_text(arg)})" if arg.op == "or" else to_text(arg) for arg in expr.args)
    return expr.name if expr.type == "f32" else _sum_text(expr)


def _sum_text(form: Expr) -> str:
    text = ""
    for coefficient, name in written_terms(form):
        size = abs(coefficient)
        term = str(size) if not name else name if size == 1 else f"{size} * {name}"
        sign = "-" if coefficient < 0 else "+"
        text = f"{text} {sign} {term}" if text else f"-{term}" if coefficient < 0 else term
    return text
