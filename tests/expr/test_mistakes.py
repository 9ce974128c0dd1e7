"""Faults of a text: each has a name, a caret and a cure, and all stand in one report."""

import pytest
from lark import UnexpectedToken

from attngen.errors import Diagnostic, ExpressionError, Location
from attngen.expr import parse_mask, parse_score
from attngen.expr.mistakes import _MISTAKES, name_mistake
from attngen.expr.parse import _parser


def faults(text: str) -> tuple[Diagnostic, ...]:
    with pytest.raises(ExpressionError) as caught:
        parse_mask(text)
    return caught.value.diagnostics


@pytest.mark.parametrize("mistake", _MISTAKES, ids=lambda mistake: f"{mistake.rule}: {mistake.note}")
def test_every_example_of_a_mistake_is_that_mistake(mistake: object) -> None:
    """Each example fails to parse, and is named as itself and not as a more general mistake before it."""
    for text in mistake.examples:  # type: ignore[attr-defined]
        with pytest.raises(UnexpectedToken) as caught:
            _parser().parse(text)
        assert name_mistake(caught.value, _parser().parse) is mistake, text


@pytest.mark.parametrize(
    ("text", "column", "length", "rule", "nearest"),
    [
        ("b = h", 3, 1, "comparison-sign", "=="),
        ("(b < h) = 3", 9, 1, "comparison-sign", "=="),
        ("kv_idx =< q_idx", 8, 2, "comparison-sign", "<="),
        ("b <> 3", 3, 2, "comparison-sign", "!="),
        ("causal && b < 3", 8, 2, "logic-words", "and"),
        ("causal || b < 3", 8, 2, "logic-words", "or"),
        ("causal AND b < 3", 8, 3, "logic-words", "and"),
        ("!causal", 1, 1, "logic-words", "not"),
        ("b < 3 if h < 2", 7, 2, "logic-words", None),
        ("b % 3 == 0", 3, 1, "index-arithmetic", "+"),
        ("b // 3 == 0", 3, 2, "index-arithmetic", "+"),
        ("b * h < 3", 1, 5, "index-arithmetic", None),
        ("b < 1.5", 5, 3, "whole-numbers", None),
        ("1e-3 < b", 1, 4, "whole-numbers", None),
        ("window(128, 0)", 7, 1, "calls", None),
        ("ids[b] < 1", 4, 1, "calls", None),
        ("b < (h", 7, 1, "brackets", ")"),
        ("b < h)", 6, 1, "brackets", None),
        ("b <", 4, 1, "operand", None),
        ("b < 2 * = 2", 9, 1, "operand", None),
        ("and b < 1", 1, 3, "operand", None),
        ("  ", 1, 1, "operand", "full"),
        ("b h", 3, 1, "one-expression", None),
        ("12abc < b", 3, 3, "one-expression", None),
        ("kv_idx @ 3", 8, 1, "one-expression", None),
        ("q_idx ≤ kv_idx", 7, 1, "one-expression", None),
        ("kvidx < 3", 1, 5, "known-names", "kv_idx"),
        ("Causal", 1, 6, "known-names", "causal"),
        ("TRUE or False", 9, 5, "known-names", None),
        ("score < 1", 1, 5, "known-names", None),
        ("q_idx + 1", 1, 9, "expression-types", None),
        ("causal < 3", 1, 6, "expression-types", None),
        ("not b", 5, 1, "expression-types", None),
        ("-(b < 1) < 3", 2, 7, "expression-types", None),
        ("b < 4611686018427387904", 5, 19, "index-range", None),
        ("2147483648 * 2147483648 * b < 1", 1, 27, "index-range", None),
    ],
)
def test_a_mistake_is_named_where_it_stands(
    text: str, column: int, length: int, rule: str, nearest: str | None
) -> None:
    """The caret, the rule and the first remedy of common slips, many of them good C or good Python."""
    found = faults(text)[-1]
    assert found.location is not None and (found.location.column, found.location.length) == (column, length)
    assert found.rule == rule and (nearest is None or found.nearest[0] == nearest)


def test_all_faults_of_a_text_stand_in_one_report_in_order() -> None:
    """Three unknown names and a wrong type, told once each."""
    found = faults("kvidx < q_ixd and (3 or hh < 1)")
    assert [fault.location.column for fault in found if fault.location] == [1, 9, 20, 25]


def test_a_text_without_a_file_is_its_own_file() -> None:
    """Line and column count within the text."""
    (fault,) = faults("causal and\n  nonsense")
    assert fault.location == Location("<mask>", 2, 3, "  nonsense", 8)


def test_a_text_stands_where_its_owner_says() -> None:
    """Every caret goes through `locate`, the end of the text included."""

    def locate(offset: int) -> Location:
        return Location("f.yaml", 7, 10 + offset, " " * 40, 1)

    with pytest.raises(ExpressionError) as caught:
        parse_mask("b < ", locate)
    assert caught.value.diagnostics[0].location == Location("f.yaml", 7, 13, " " * 40, 1)
    with pytest.raises(ExpressionError) as caught:
        parse_mask("b < qidx", locate)
    assert caught.value.diagnostics[0].location == Location("f.yaml", 7, 14, " " * 40, 4)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 5000 + "true" + ")" * 4000,
        "not " * 2000 + "true",
        "b < " + "-" * 5000 + "1",
        "(" * 4000,
        "b < 1" + " and b < 1" * 1200,
        "9" * 9000 + " < b",
        "b < 1" * 1500,
    ],
    ids=lambda text: text[:8],
)
def test_hostile_texts_are_answered(text: str) -> None:
    """Deep, long and huge texts end in an error that the user can read, never in a crash."""
    assert all(len(str(fault.draw())) < 1000 for fault in faults(text))


def test_the_limits_are_as_documented() -> None:
    """A hundred brackets and ten thousand characters are read; one more is refused by its own rule."""
    assert str(parse_mask("(" * 100 + "true" + ")" * 100)) == "true"
    assert faults("(" * 101 + "true" + ")" * 101)[0].rule == "expression-nesting"
    assert str(parse_mask("true" + " " * 9996)) == "true"
    assert faults("true" + " " * 9997)[0].rule == "expression-length"


@pytest.mark.parametrize("text", ["softcap(score, 30.0)", "score + 1", "", "Score", "score\n+ 1", "&&"])
def test_a_score_is_score(text: str) -> None:
    """Anything else is refused by the rule that says so."""
    with pytest.raises(ExpressionError) as caught:
        parse_score(text)
    assert [fault.rule for fault in caught.value.diagnostics] == ["score-identity"]
    assert caught.value.diagnostics[0].nearest == ("score",)


def test_score_may_have_blanks_around_it() -> None:
    """Folded scalars end in a line break."""
    assert parse_score(" score\n").type == "f32"
