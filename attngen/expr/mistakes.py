"""Names for syntax errors, learnt from examples of mistakes.

The parser stops in some state at some token; lark's `match_examples` finds the example that stops in the same
state at the same token, or else at the same kind of token, and so the general mistakes stand first. What a
mistake means is said here; where it is drawn is parse.py's business.
"""

from collections.abc import Callable
from dataclasses import dataclass

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
_OPERANDS = ("b", "1", "true", "(b)", "b < b", "b < 1", "b + b", "not b", "(b", "(1", "((b)", "(true")
_OPENINGS = ("", "(", "not ", "b and ", "b or ", "b < ", "b + ", "-", "2 * ")


def _after_operand(*tokens: str) -> tuple[str, ...]:
    return tuple(f"{operand} {token}" for token in tokens for operand in _OPERANDS)


def _for_operand(*tokens: str) -> tuple[str, ...]:
    return tuple(f"{opening}{token}" for token in tokens for opening in _OPENINGS)


_MISTAKES = (
    Mistake("one-expression", "an operator is missing before this", _after_operand("h", "1", "true", "not")),
    Mistake("one-expression", "the expression is complete before this", _after_operand("@")),
    Mistake(
        "operand",
        "a name, a number or ( must come here",
        _for_operand("and", "or", "<", "*", ")", "@", "//"),
    ),
    Mistake(
        "operand",
        "a name, a number or ( must come here",
        ("(", "not", "b and", "b or", "b <", "b +", "-", "2 *"),
    ),
    Mistake("brackets", "an open ( must be closed here", ("(b", "(1", "(true", "((b)"), (")",)),
    Mistake("brackets", "no ( is open here", ("b )", "1 )", "true )", "(b) )", "b < b )", "not b )")),
    Mistake("comparison-sign", "`=` alone compares nothing", _after_operand("="), ("==",)),
    Mistake("comparison-sign", "the equals sign comes second", _after_operand("=<"), ("<=",)),
    Mistake("comparison-sign", "the equals sign comes second", _after_operand("=>"), (">=",)),
    Mistake("comparison-sign", "the sign for `is not`", _after_operand("<>"), ("!=",)),
    Mistake("logic-words", "conditions are joined by words", _after_operand("&&", "&", "AND"), ("and",)),
    Mistake("logic-words", "conditions are joined by words", _after_operand("||", "|", "OR"), ("or",)),
    Mistake("logic-words", "a condition is turned round by a word", _for_operand("!", "~"), ("not",)),
    Mistake(
        "index-arithmetic",
        "an index is a sum of names and numbers, each at most multiplied by a number",
        _after_operand("/", "//", "%", "**", "^"),
        ("+", "-", "*"),
    ),
    Mistake("whole-numbers", "indices are whole numbers", _for_operand("1.5") + _after_operand("1.5")),
    Mistake("calls", "the language has no definitions with arguments", _after_operand("(")),
    Mistake("calls", "the language has no tensors", _after_operand("[")),
    Mistake("logic-words", "there is no choice; join conditions by words", _after_operand("if", "?")),
)


def name_mistake(error: UnexpectedToken, parse: Callable[[str], Tree[Token]]) -> Mistake:
    """The mistake whose example fails as `error` did."""

    def parse_example(text: str) -> Tree[Token]:
        try:
            return parse(text)
        except UnexpectedToken as mistake:
            raise _at_position(mistake) from None

    examples = {index: mistake.examples for index, mistake in enumerate(_MISTAKES)}
    found = _at_position(error).match_examples(parse_example, examples, token_type_match_fallback=True)
    return _MISTAKES[0 if found is None else found]


def _at_position(error: UnexpectedToken) -> UnexpectedToken:
    """The error with the parser's position as its state: lark would also compare how deep its stack is."""
    error.state = error.state.position
    return error
