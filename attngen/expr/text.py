"""Tree to text of the language itself, and the way a comparison is written in any language.

`parse_mask(to_text(e)) is e`, given the same scalars and tensors: the text is canonical, and the digest of a spec is
taken from it. What would make it long by being repeated, or deep, is named by a `let` before it.
"""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from attngen.expr.arithmetic import FUNCTIONS
from attngen.expr.ranges import LARGEST_I32
from attngen.expr.tree import (
    INDEX_NAMES,
    Expr,
    affine,
    affine_parts,
    const,
    free_names,
    nodes,
    round_to_f32,
    scale,
    sub,
    tensor_names,
)

_LEADS = ("kv_idx", "q_idx")  # a comparison is written about the first of these that it reads
_SYMBOLS = {"eq": "==", "ne": "!="}

# How tightly a text binds: the name of a rule of grammar.lark, outermost first.
_CHOICE, _OR, _AND, _NOT, _COMPARISON, _SUM, _PRODUCT, _FACTOR, _ATOM = range(9)

_LONG = 48  # a part that is repeated gets a name from this length on, and what is shorter is repeated
_DEEP = 40  # a part that is nested deeper gets a name; the parser reads a hundred levels


@dataclass(frozen=True)
class WrittenComparison:
    """A comparison as a person writes it: `kv_idx <= q_idx + seqlen_k - seqlen_q`."""

    left: Expr
    symbol: str
    right: Expr


def write_comparison(comparison: Expr) -> WrittenComparison:
    """One atom of a comparison of i32 on the left, with a positive coefficient, everything else on the right."""
    form = comparison.args[0]
    coefficients, _ = affine_parts(form)
    lead = _lead(list(coefficients))
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


def _lead(atoms: list[Expr]) -> Expr:
    """The atom that a comparison is about: an index, or what reads it, or else the first."""
    for lead in _LEADS:
        for atom in atoms:
            if atom.op == "name" and atom.name == lead:
                return atom
        for atom in atoms:
            if lead in free_names(atom):
                return atom
    return atoms[0]


def written_terms(form: Expr) -> list[tuple[int, Expr | None]]:
    """The terms (coefficient, atom) of an affine form in the order of writing; the constant has no atom.

    Atoms that are added come before atoms that are subtracted and the constant comes last, but it leads where
    it alone is positive: a form starts with a minus only where it must.
    """
    coefficients, constant = affine_parts(form)
    terms: list[tuple[int, Expr | None]] = [(value, atom) for atom, value in coefficients.items()]
    terms.sort(key=lambda term: term[0] < 0)
    if constant > 0 and terms and terms[0][0] < 0:
        return [(constant, None), *terms]
    return [*terms, (constant, None)] if constant or not terms else terms


@lru_cache(maxsize=64)  # every candidate for a plan asks for that of one mask
def to_text(expr: Expr) -> str:
    """The canonical text of an expression."""
    return _Writer(expr).text()


@dataclass(frozen=True)
class _Written:
    """A text, how tightly it binds, and how deep it is nested."""

    text: str
    level: int
    depth: int = 1

    def within(self, level: int) -> "_Written":
        """The text where only what binds as tightly as `level` may stand."""
        return self if self.level >= level else _Written(f"({self.text})", _ATOM, self.depth + 1)


class _Writer:
    def __init__(self, expr: Expr) -> None:
        self._expr = expr
        self._taken = {*free_names(expr), *tensor_names(expr), *INDEX_NAMES, *FUNCTIONS}
        self._written: dict[Expr, _Written] = {}
        self._lets: list[str] = []

    def text(self) -> str:
        """The text of the tree, after a `let` for each part that has a name."""
        everything = nodes(self._expr)
        uses = Counter(part for each in everything for part in _parts(each))
        for each in everything:
            written = self._write(each)
            is_repeated = uses[each] > 1 and len(written.text) > _LONG
            if each is not self._expr and (is_repeated or written.depth > _DEEP):
                written = self._name(written)
            self._written[each] = written
        return "".join(self._lets) + self._written[self._expr].text

    def _name(self, written: _Written) -> _Written:
        number = len(self._lets) + 1
        while f"x{number}" in self._taken:
            number += 1
        self._taken.add(f"x{number}")
        self._lets.append(f"let x{number} = {written.text} in ")
        return _Written(f"x{number}", _ATOM)

    def _write(self, expr: Expr) -> _Written:
        if expr.op == "const":
            return _constant(expr)
        if expr.op == "name":
            return _Written(expr.name, _ATOM)
        if expr.op in ("add", "mul"):
            return self._sum(expr)
        if expr.op == "lookup":
            return self._joined(expr.args, _CHOICE, ", ", _ATOM, f"{expr.name}[", "]")
        if expr.op == "call":
            return self._joined(expr.args, _CHOICE, ", ", _ATOM, f"{expr.name}(", ")")
        if expr.op == "and":
            return self._joined(expr.args, _NOT, " and ", _AND)
        if expr.op == "or":
            return self._joined(expr.args, _AND, " or ", _OR)
        if expr.op == "not":
            return self._joined(expr.args, _COMPARISON, "", _NOT, "not ")
        if expr.op == "compare":
            return self._joined(expr.args, _SUM, f" {expr.name} ", _COMPARISON)
        if expr.op == "where":
            condition, yes, no = expr.args
            parts = (self._at(yes, _OR), self._at(condition, _OR), self._at(no, _CHOICE))
            yes_text, condition_text, no_text = (part.text for part in parts)
            text = f"{yes_text} if {condition_text} else {no_text}"
            return _Written(text, _CHOICE, _depth(parts))
        if expr.op == "arith":
            return self._arithmetic(expr)
        written = write_comparison(expr)
        sides = self._sum(written.left).within(_SUM), self._sum(written.right).within(_SUM)
        return _Written(f" {written.symbol} ".join(side.text for side in sides), _COMPARISON, _depth(sides))

    def _arithmetic(self, expr: Expr) -> _Written:
        a, b = expr.args
        if expr.type == "i32" and expr.name == "*":
            factors = sorted(_factors(expr), key=lambda factor: self._written[factor].level < _ATOM)
            return self._joined(tuple(factors), _FACTOR, " * ", _PRODUCT)
        if expr.name == "*" and a.op == "const" and a.value == -1:
            operand = self._at(b, _FACTOR)
            return _Written(f"-{operand.text}", _FACTOR, operand.depth + 1)
        level = _SUM if expr.name in "+-" else _PRODUCT
        sides = self._at(a, level), self._at(b, level + 1)
        # A chain of one level is one node of the syntax, so that its left side is no deeper than it is itself.
        depth = max(sides[0].depth + (sides[0].level != level), sides[1].depth + 1)
        return _Written(f" {expr.name} ".join(side.text for side in sides), level, depth)

    def _sum(self, form: Expr) -> _Written:
        if form.op == "const":
            return _constant(form)
        if form in self._written:
            return self._written[form]
        text, depth, terms = "", 1, written_terms(form)
        for coefficient, atom in terms:
            is_first = not text
            term = self._term(abs(coefficient), atom, _FACTOR if is_first and coefficient < 0 else _PRODUCT)
            sign = "-" if coefficient < 0 else "+"
            text = f"{sign if sign == '-' else ''}{term.text}" if is_first else f"{text} {sign} {term.text}"
            depth = max(depth, term.depth + 2)
        if len(terms) > 1:
            return _Written(text, _SUM, depth)
        return _Written(text, _PRODUCT if " " in text else _FACTOR, depth)

    def _term(self, size: int, atom: Expr | None, level: int) -> _Written:
        """A multiple without its sign; where a minus stands before it, the minus takes only the first factor."""
        if atom is None:
            return _integer(size).within(level)
        if size == 1:
            return self._at(atom, level)
        is_product = atom.op == "arith" and atom.name == "*"
        factors = _integer(size).within(_FACTOR), self._at(atom, _PRODUCT if is_product else _FACTOR)
        return _Written(" * ".join(factor.text for factor in factors), _PRODUCT, _depth(factors))

    def _joined(
        self, args: tuple[Expr, ...], inner: int, sign: str, level: int, before: str = "", after: str = ""
    ) -> _Written:
        parts = [self._at(arg, inner) for arg in args]
        return _Written(before + sign.join(part.text for part in parts) + after, level, _depth(parts))

    def _at(self, expr: Expr, level: int) -> _Written:
        return self._written[expr].within(level)


def _depth(parts: "list[_Written] | tuple[_Written, ...]") -> int:
    return 1 + max(part.depth for part in parts)


def _parts(expr: Expr) -> tuple[Expr, ...]:
    """The nodes whose texts the text of a node repeats."""
    if expr.op in ("add", "mul"):
        return tuple(affine_parts(expr)[0])
    if expr.op in ("le", "eq", "ne"):
        return tuple(affine_parts(expr.args[0])[0])
    return _factors(expr) if expr.op == "arith" and expr.type == "i32" and expr.name == "*" else expr.args


def _factors(expr: Expr) -> tuple[Expr, ...]:
    """The factors of a product of i32 atoms, which is nested to the left."""
    if expr.op != "arith" or expr.name != "*":
        return (expr,)
    return (*_factors(expr.args[0]), expr.args[1])


def _constant(expr: Expr) -> _Written:
    if expr.type == "bool":
        return _Written("true" if expr.value else "false", _ATOM)
    if expr.type == "f32":
        text = _real_text(float(expr.value))
        return _Written(text, _FACTOR if text.startswith("-") else _ATOM)
    if expr.value >= 0:
        return _integer(int(expr.value))
    return _Written(f"-{_integer(-int(expr.value)).within(_FACTOR).text}", _FACTOR)


def _integer(size: int) -> _Written:
    """An integer from 0 on; what no literal can be is a sum."""
    if size <= LARGEST_I32:
        return _Written(str(size), _ATOM)
    quotient, rest = divmod(size, LARGEST_I32)
    multiple = f"{quotient} * {LARGEST_I32}" if quotient > 1 else str(LARGEST_I32)
    return _Written(f"{multiple} + {rest}", _SUM, 3)


def _real_text(value: float) -> str:
    """The shortest literal that rounds to this f32."""
    if value in (float("inf"), float("-inf")):
        return "inf" if value > 0 else "-inf"
    roundings = (float(f"{value:.{digits}g}") for digits in range(1, 18))
    return repr(next(rounding for rounding in roundings if round_to_f32(rounding) == value))
