"""Text to tree: syntax by lark, then names, types and ranges, all faults of a text in one report.

The parser knows nothing of YAML: whoever has the text tells by `locate` where its characters stand.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from lark import Lark, Token, Tree, UnexpectedToken
from lark.tree import Meta

from attngen.errors import Diagnostic, ExpressionError, Location
from attngen.expr.logic import conjunction, disjunction, equal, less, less_equal, negate
from attngen.expr.mistakes import name_mistake
from attngen.expr.tree import (
    FALSE,
    INDEX_NAMES,
    LARGEST_INDEX,
    TRUE,
    Expr,
    add,
    affine_parts,
    const,
    name,
    scale,
)

Locate = Callable[[int], Location]
"""The place of a character of the text, by its offset; the length of the text stands for its end."""

MAX_LENGTH = 10_000
MAX_NESTING = 100
_LARGEST_VALUE = 2**62  # of an index expression: one bit below i64, so that comparisons fit as well

_PRELUDE = Path(__file__).with_name("prelude.attn")
_WORDS = {"bool": "a condition", "i32": "an index", "f32": "a score"}
_COMPARISONS: dict[str, Callable[[Expr, Expr], Expr]] = {
    "<": less,
    "<=": less_equal,
    ">": lambda a, b: less(b, a),
    ">=": lambda a, b: less_equal(b, a),
    "==": equal,
    "!=": lambda a, b: negate(equal(a, b)),
}


def parse_mask(text: str, locate: Locate | None = None) -> Expr:
    """The condition under which a query sees a key.

    Args:
        text: the condition, `causal` or `kv_idx <= q_idx + 3`.
        locate: where the characters of the text stand; by default in a file called `<mask>`.

    Raises:
        ExpressionError: with every fault of the text.
    """
    fragment = _Fragment("mask", text, locate)
    expr = _parse(fragment, definitions())
    if expr is not None and expr.type != "bool":
        fragment.fault("expression-types", "must be a condition", note=f"this is {_WORDS[expr.type]}")
    fragment.raise_faults()
    assert expr is not None  # a text without a tree has faults
    return expr


def parse_score(text: str, locate: Locate | None = None) -> Expr:
    """The score of a query and a key after its modification; so far there is none to ask for.

    Raises:
        ExpressionError: the text is not `score`.
    """
    fragment = _Fragment("score", text, locate)
    if text.strip() != "score":
        found = f"= {text.strip()} must be score" if text.strip() else "must be score"
        fragment.fault("score-identity", found, note="scores cannot be modified yet", nearest=("score",))
    fragment.raise_faults()
    return name("score")


@cache
def definitions() -> Mapping[str, Expr]:
    """The prelude: what each of its names stands for."""
    known: dict[str, Expr] = {}
    for line in _PRELUDE.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            word, text = line.split("=", 1)
            fragment = _Fragment(f"definition {word.strip()}", text, None)
            expr = _parse(fragment, known)
            fragment.raise_faults()
            assert expr is not None
            known[word.strip()] = expr
    return known


class _Fragment:
    """A text on its way to a tree, its faults, and the places they are drawn at."""

    def __init__(self, title: str, text: str, locate: Locate | None) -> None:
        self.title = title
        self.text = text
        self.faults: list[Diagnostic] = []
        self._locate = locate or self._locate_in_text

    def fault(
        self,
        rule: str,
        message: str,
        *,
        at: Meta | Token | None = None,
        note: str = "",
        nearest: tuple[str, ...] = (),
    ) -> None:
        """Record a fault of the stretch `at`, or of the whole text."""
        if at is None:
            end = len(self.text.rstrip())
            start = len(self.text) - len(self.text.lstrip()) if end else 0
        else:
            start, end = at.start_pos or 0, at.end_pos or 0
        self.faults.append(
            Diagnostic(
                message=f"{self.title} {message}",
                rule=rule,
                location=self._span(start, end),
                path=self.title,
                value=self.text[start:end],
                note=note,
                nearest=nearest,
            )
        )

    def raise_faults(self) -> None:
        """Report what has been recorded, in the order of the text."""
        if self.faults:
            raise ExpressionError(tuple(sorted(self.faults, key=_place)))

    def _span(self, start: int, end: int) -> Location:
        first = self._locate(min(start, len(self.text)))
        if end <= start:
            return replace(first, length=1)
        last = self._locate(end - 1)
        is_one_line = last.line == first.line
        return replace(first, length=(last.column if is_one_line else len(first.text)) - first.column + 1)

    def _locate_in_text(self, offset: int) -> Location:
        before = self.text[:offset].split("\n")
        lines = self.text.split("\n")
        return Location(f"<{self.title}>", len(before), len(before[-1]) + 1, lines[len(before) - 1])


def _place(diagnostic: Diagnostic) -> tuple[int, int]:
    location = diagnostic.location
    return (location.line, location.column) if location else (0, 0)


class _KeepMistakes:
    """Keeps the tokens that no rule takes in the lexer: lark would drop them."""

    always_accept = ("REAL", "FOREIGN", "STRAY")

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        return stream


@cache
def _parser() -> Lark:
    return Lark.open(
        str(Path(__file__).with_name("grammar.lark")),
        parser="lalr",
        lexer="basic",  # the contextual one would read `and` as a name where no operator may stand
        start="expression",
        postlex=_KeepMistakes(),
        propagate_positions=True,
    )


def _parse(fragment: _Fragment, definitions: Mapping[str, Expr]) -> Expr | None:
    """The tree of a text, or None with its faults recorded."""
    text = fragment.text
    if not text.strip():
        fragment.fault("operand", "is empty", note="an expression must stand here", nearest=("full",))
        return None
    if len(text) > MAX_LENGTH:
        fragment.fault("expression-length", f"has {len(text)} characters; at most {MAX_LENGTH} are read")
        return None
    try:
        tree = _parser().parse(text)
    except UnexpectedToken as error:
        _record_syntax(fragment, error)
        return None
    return _Reader(fragment, definitions).read(tree, 0)


def _record_syntax(fragment: _Fragment, error: UnexpectedToken) -> None:
    mistake = name_mistake(error, _parser().parse)
    token = error.token
    if token.type == "$END":
        end = len(fragment.text.rstrip())
        at = Token("$END", "", start_pos=end, end_pos=end)
        fragment.fault(mistake.rule, "ends too early", at=at, note=mistake.note, nearest=mistake.nearest)
    else:
        message = f"cannot go on with `{token}`"
        fragment.fault(mistake.rule, message, at=token, note=mistake.note, nearest=mistake.nearest)


_Node = Tree[Token]


class _Reader:
    """Gives a syntax tree its meaning. A node with a fault reads as None, and one fault is told once."""

    def __init__(self, fragment: _Fragment, definitions: Mapping[str, Expr]) -> None:
        self._fragment = fragment
        self._definitions = definitions

    def read(self, tree: _Node, depth: int) -> Expr | None:
        if depth > MAX_NESTING:
            message = f"is nested more than {MAX_NESTING} deep here"
            self._fragment.fault("expression-nesting", message, at=tree.meta)
            return None
        expr: Expr | None = getattr(self, f"_read_{tree.data}")(tree, depth + 1)
        if expr is not None and expr.type == "i32" and not _is_in_range(expr):
            note = "indices and lengths reach 2^30; this may reach 2^62"
            self._fragment.fault("index-range", "leaves the range of an index", at=tree.meta, note=note)
            return None
        return expr

    def _read_true(self, tree: _Node, depth: int) -> Expr:
        return TRUE

    def _read_false(self, tree: _Node, depth: int) -> Expr:
        return FALSE

    def _read_integer(self, tree: _Node, depth: int) -> Expr:
        # A text of ten thousand digits is out of range without being read.
        digits = str(tree.children[0]).lstrip("0") or "0"
        return const(int(digits[:20]))

    def _read_reference(self, tree: _Node, depth: int) -> Expr | None:
        word = str(tree.children[0])
        if word in self._definitions:
            return self._definitions[word]
        if word in INDEX_NAMES:
            return name(word)
        known = (*INDEX_NAMES, *self._definitions, "true", "false")
        note = "a mask is decided before there is a score" if word == "score" else "no name of the language"
        self._fragment.fault(
            "known-names",
            f"reads `{word}`",
            at=tree.meta,
            note=note,
            nearest=tuple(get_close_matches(word, known, n=2)) or known,
        )
        return None

    def _read_group(self, tree: _Node, depth: int) -> Expr | None:
        return self.read(_child(tree, 0), depth)

    def _read_signed(self, tree: _Node, depth: int) -> Expr | None:
        operand = self._operand(_child(tree, 1), depth, "i32", f"`{tree.children[0]}`")
        return None if operand is None else scale(-1 if tree.children[0] == "-" else 1, operand)

    def _read_sum(self, tree: _Node, depth: int) -> Expr | None:
        signs = ["+", *map(str, tree.children[1::2])]
        operands = self._operands(tree.children[::2], depth, "i32", "`+` and `-`")
        if operands is None:
            return None
        total = const(0)
        for sign, operand in zip(signs, operands, strict=True):
            total = add(total, scale(-1 if sign == "-" else 1, operand))
        return total

    def _read_product(self, tree: _Node, depth: int) -> Expr | None:
        operands = self._operands(tree.children, depth, "i32", "`*`")
        if operands is None:
            return None
        product, *others = operands
        for other in others:
            if product.op == "const":
                product, other = other, product
            if other.op != "const":
                note = "one side of `*` must be a number"
                self._fragment.fault("index-arithmetic", "multiplies two names", at=tree.meta, note=note)
                return None
            product = scale(int(other.value), product)
        return product

    def _read_comparison(self, tree: _Node, depth: int) -> Expr | None:
        operands = self._operands(tree.children[::2], depth, "i32", "a comparison")
        if operands is None:
            return None
        signs = map(str, tree.children[1::2])
        pairs = zip(signs, pairwise(operands), strict=True)
        return conjunction(_COMPARISONS[sign](left, right) for sign, (left, right) in pairs)

    def _read_negation(self, tree: _Node, depth: int) -> Expr | None:
        operand = self._operand(_child(tree, 0), depth, "bool", "`not`")
        return None if operand is None else negate(operand)

    def _read_requirements(self, tree: _Node, depth: int) -> Expr | None:
        operands = self._operands(tree.children, depth, "bool", "`and`")
        return None if operands is None else conjunction(operands)

    def _read_alternatives(self, tree: _Node, depth: int) -> Expr | None:
        operands = self._operands(tree.children, depth, "bool", "`or`")
        return None if operands is None else disjunction(operands)

    def _operands(self, trees: list[Any], depth: int, type: str, taker: str) -> list[Expr] | None:
        """All operands, read before any is missed, so that each tells its own faults."""
        operands = [self._operand(tree, depth, type, taker) for tree in trees]
        found = [operand for operand in operands if operand is not None]
        return found if len(found) == len(operands) else None

    def _operand(self, tree: _Node, depth: int, type: str, taker: str) -> Expr | None:
        operand = self.read(tree, depth)
        if operand is None or operand.type == type:
            return operand
        message = f"gives {_WORDS[operand.type]} to {taker}, which takes {_WORDS[type]}"
        note = f"this is {_WORDS[operand.type]}"
        self._fragment.fault("expression-types", message, at=tree.meta, note=note)
        return None


def _child(tree: _Node, index: int) -> _Node:
    child = tree.children[index]
    assert isinstance(child, Tree)  # the grammar leaves no bare token there
    return child


def _is_in_range(form: Expr) -> bool:
    coefficients, constant = affine_parts(form)
    return abs(constant) + sum(map(abs, coefficients.values())) * LARGEST_INDEX < _LARGEST_VALUE
