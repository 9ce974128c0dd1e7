"""Names for syntax errors, learnt from examples of mistakes.

The parser stops in some state at some token; a mistake is named by the first example that stops in the same state at
the same token, or else at the same kind of token, and so the general mistakes stand first. What a mistake means is
said here; where it is drawn is syntax.py's business.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from lark import Token, Tree, UnexpectedToken


@dataclass(frozen=True)
class Mistake:
    """A syntax error with a name.

    Attributes:
        rule: name of the rule it breaks.
        note: what to write instead, and why.
        examples: texts with this mistake.
        nearest: what may stand there.
    """

    rule: str
    note: str
    examples: tuple[str, ...]
    nearest: tuple[str, ...] = ()


# Every place where the parser may stand: after an operand, and where an operand must come.
_OPERANDS = ("b", "1", "0.5", "true", "false", "inf", "(b)", "f(b)", "t[b]")
_OPENINGS = (
    "", "(", "not ", "b and ", "b or ", "b < ", "b + ", "-", "2 * ", "b if ", "b if b else ", "f(b, ", "t[", "t[b, ",
    "let x = ", "let f(x) = ", "let x = b in ", "let f(x) = b in ",
)  # fmt: skip
_PLACES = (*_OPENINGS, "f(")  # in `f(` an operand must come as well, and `)` is a mistake of its own
# Every way to leave something open, up to the operand in it.
_BRACKETS = ("(b", "(1", "((b)", "(b < b", "(not b", "(b and b")
_CALLS = ("f(b", "f(1 + b")
_LOOKUPS = ("t[b", "t[1 + b")
_LISTS = ("f(b, 1", "t[b, 1", "f(b, 1 + b")
_LETS = ("let x = b", "let f(x) = b", "let x = 1 + b", "let f(x) = b < 1")
_CHOICES = ("b if b", "b if 1", "b if b < 1")


def _after(openings: tuple[str, ...], *tokens: str) -> tuple[str, ...]:
    return tuple(f"{opening} {token}".rstrip() for token in tokens for opening in openings)


_AFTER_SIGNS = "an operator is missing before this"
_NEEDS_OPERAND = "a name, a number or ( must come here"

_MISTAKES = (
    Mistake("one-expression", _AFTER_SIGNS, _after(_OPERANDS, "h", "1", "0.5", "true", "false", "inf", "not", "let")),
    Mistake("one-expression", _AFTER_SIGNS, _after(("1", "0.5", "true", "(b)", "f(b)", "t[b]"), "(", "[")),
    Mistake("one-expression", "the expression is complete before this", _after(_OPERANDS, "@")),
    Mistake("operand", _NEEDS_OPERAND, _after(_OPENINGS, "and", "<", "*", ")", "]", ",", "if", "else", "in", "=", "[")),
    Mistake("operand", _NEEDS_OPERAND, _after(_PLACES, "or", "/", "@", "//")),
    Mistake("operand", _NEEDS_OPERAND, (*_after(_OPENINGS, "")[1:], "b +")),
    Mistake("operand", "a call has an argument in its brackets; what has none stands alone", ("f()", "f(", "f(,")),
    Mistake("operand", "put this let in brackets", _after(("b +", "not", "b and", "-", "b <", "b *", "b if"), "let")),
    Mistake("brackets", "an open ( must be closed here", _after(_BRACKETS, "", "]", ",", "in"), (")",)),
    Mistake("brackets", "the ( of this call must be closed here", _after(_CALLS, "", "]", "in"), (")",)),
    Mistake("brackets", "an open [ must be closed here", _after(_LOOKUPS, "", ")", "in"), ("]",)),
    Mistake("brackets", "the bracket after the name must be closed here", _after(_LISTS, "", "in"), (")", "]")),
    Mistake("brackets", "no ( is open here", ("b )", "1 )", "(b) )", "b < b )", "b if b else b )")),
    Mistake("brackets", "no [ is open here", ("b ]", "1 ]", "(b) ]", "b < b ]", "b if b else b ]")),
    Mistake("brackets", "a comma stands between arguments and between indices only", ("b , b", "1 , b")),
    Mistake("let", "`let x = ...` goes on with `in` and what x is for", _after(_LETS, "", ")", "]", ","), ("in",)),
    Mistake("let", "no let is open here", ("b in", "1 in", "b < b in", "b if b else b in")),
    Mistake("let", "let names something: `let x = ... in ...`", ("let", "let =", "let 1", "let (", "let @")),
    Mistake("let", "this word has a meaning of its own", _after(("let",), "in", "if", "not", "true", "inf", "and")),
    Mistake("let", "an = must come after the name", _after(("let x",), "", "b", "1", "in", "<", "==", "@")),
    Mistake("let", "an = must come after the )", _after(("let f(x)",), "", "b", "1", "in", "<", "==", "@")),
    Mistake("let", "parameters are names", _after(("let f(", "let f(x,"), "", ")", "1", "true", "@")),
    Mistake("let", "a comma or ) must come after a parameter", _after(("let f(x",), "", "y", "1", "=", "+", "@")),
    Mistake("choice", "`a if c` needs an `else` value", _after(_CHOICES, "", ")", "]", ",", "in", "if"), ("else",)),
    Mistake("choice", "no if is open here", ("b else", "1 else", "b < b else", "b if b else b else")),
    Mistake("choice", "a choice is `a if condition else b`", _after(_OPERANDS, "?"), ("if",)),
    Mistake("comparison-sign", "`=` alone compares nothing", _after(_OPERANDS, "="), ("==",)),
    Mistake("comparison-sign", "the equals sign comes second", _after(_OPERANDS, "=<"), ("<=",)),
    Mistake("comparison-sign", "the equals sign comes second", _after(_OPERANDS, "=>"), (">=",)),
    Mistake("comparison-sign", "the sign for `is not`", _after(_OPERANDS, "<>"), ("!=",)),
    Mistake("logic-words", "conditions are joined by words", _after(_OPERANDS, "&&", "&", "AND"), ("and",)),
    Mistake("logic-words", "conditions are joined by words", _after(_OPERANDS, "||", "|", "OR"), ("or",)),
    Mistake("logic-words", "a condition is turned round by a word", _after(_PLACES, "!", "~", "NOT"), ("not",)),
    Mistake("powers", "there is no power; multiply", _after(_OPERANDS, "**"), ("x * x",)),
    Mistake("powers", "multiply for a power; exclusive or is `!=`", _after(_OPERANDS, "^"), ("x * x", "!=")),
    Mistake("numbers", "a point has digits on both sides", (*_after(_PLACES, "."), "1 .", "0.5 ."), ("0.5",)),
    Mistake("numbers", "a name has no parts", _after(("b", "true", "false", "inf", "(b)", "f(b)", "t[b]"), ".")),
    Mistake("quotes", "names and numbers stand without quotes", _after(_PLACES + _OPERANDS, "'", '"')),
)  # fmt: skip


def name_mistake(error: UnexpectedToken, parse: Callable[[str], Tree[Token]]) -> Mistake:
    """The mistake whose example fails as `error` did: at the same token, else at one of its type, else at any."""
    known = _failures(parse)
    return next((known[key] for key in _keys(error) if key in known), _MISTAKES[0])


@cache
def _failures(parse: Callable[[str], Tree[Token]]) -> dict[tuple[object, ...], Mistake]:
    """The first mistake to fail in each way; every example is parsed once."""
    known: dict[tuple[object, ...], Mistake] = {}
    for mistake in _MISTAKES:
        for example in mistake.examples:
            try:
                parse(example)
            except UnexpectedToken as error:
                for key in _keys(error):
                    known.setdefault(key, mistake)
    return known


def _keys(error: UnexpectedToken) -> tuple[tuple[object, ...], ...]:
    """How the parser fails, most precise first: at its position (without lark's depth of the stack), at a token."""
    position, token = error.state.position, error.token
    return (position, token.type, str(token)), (position, token.type), (position,)
