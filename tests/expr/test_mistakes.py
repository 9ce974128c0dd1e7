"""Faults of a text: each has a name, a caret and a cure, and all stand in one report."""

import time

import pytest
from lark import UnexpectedToken

from attngen.errors import Diagnostic, ExpressionError, Location
from attngen.expr import ignores_score, parse_mask, parse_score, to_text
from attngen.expr.mistakes import _MISTAKES, name_mistake
from attngen.expr.syntax import parser
from attngen.expr.tree import nodes


def faults(text: str) -> tuple[Diagnostic, ...]:
    with pytest.raises(ExpressionError) as caught:
        parse_mask(text)
    return caught.value.diagnostics


@pytest.mark.parametrize("mistake", _MISTAKES, ids=lambda mistake: f"{mistake.rule}: {mistake.note}")
def test_every_example_of_a_mistake_is_that_mistake(mistake: object) -> None:
    """Each example fails to parse, and is named as itself and not as a more general mistake before it."""
    for text in mistake.examples:  # type: ignore[attr-defined]
        with pytest.raises(UnexpectedToken) as caught:
            parser().parse(text)
        assert name_mistake(caught.value, parser().parse) is mistake, text


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
        ("b ? h : 3", 3, 1, "choice", "if"),
        ("b < 3 if h < 2", 15, 1, "choice", "else"),
        ("(b < 3 if h < 2) or full", 16, 1, "choice", "else"),
        ("b < 3 if h < 2 if true", 16, 2, "choice", "else"),
        ("b < 3 else full", 7, 4, "choice", None),
        ("let x = 3 x < b", 11, 1, "one-expression", None),
        ("let x = 3", 10, 1, "let", "in"),
        ("(let x = 3) < b", 11, 1, "let", "in"),
        ("let f(x = 3 in b < 3", 9, 1, "let", None),
        ("let f() = 3 in b < 3", 7, 1, "let", None),
        ("let x in b < 3", 7, 2, "let", None),
        ("let 3 = b in b < 3", 5, 1, "let", None),
        ("let if = b in b < 3", 5, 2, "let", None),
        ("b in h", 3, 2, "let", None),
        ("1 + let x = 3 in x", 5, 3, "operand", None),
        ("b ** 2 < 3", 3, 2, "powers", "x * x"),
        ("b ^ 2 < 3", 3, 1, "powers", "x * x"),
        ("b.c < 3", 2, 1, "numbers", None),
        (".5 < b", 1, 1, "numbers", "0.5"),
        ("5. < b", 2, 1, "numbers", "0.5"),
        ("b < 'h'", 5, 1, "quotes", None),
        ("full() and b < 3", 6, 1, "operand", None),
        ("window(1, )", 11, 1, "operand", None),
        ("window(, 1)", 8, 1, "operand", None),
        ("window(1, 2", 12, 1, "brackets", ")"),
        ("abs(b < 3", 10, 1, "brackets", ")"),
        ("ids[b < 3", 10, 1, "brackets", "]"),
        ("b < 3]", 6, 1, "brackets", None),
        ("b, h < 3", 2, 1, "brackets", None),
        ("3(b) < 2", 2, 1, "one-expression", None),
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
        ("windw(3, 4)", 1, 5, "known-names", "window"),
        ("document(idz)", 10, 3, "known-names", None),
        ("q_idx + 1", 1, 9, "expression-types", None),
        ("causal < 3", 1, 6, "expression-types", None),
        ("not b", 5, 1, "expression-types", None),
        ("-(b < 1) < 3", 2, 7, "expression-types", None),
        ("causal + causal < 3", 10, 6, "expression-types", None),
        ("causal < full", 8, 1, "expression-types", "=="),
        ("causal == 3", 1, 6, "expression-types", None),
        ("q_idx == b != (h < 1)", 15, 7, "expression-types", None),
        ("tanh(causal) < 3", 6, 6, "expression-types", None),
        ("b < 3 if h else full", 10, 1, "expression-types", None),
        ("(b if h < 1 else full) and full", 2, 20, "expression-types", None),
        ("where(b, 1, 2) < 3", 7, 1, "expression-types", None),
        ("where(b < 1, 1, full) < 3", 1, 21, "expression-types", None),
        ("1.5 // 2 == b", 1, 8, "expression-types", None),
        ("b % 2.0 == 0", 5, 3, "expression-types", None),
        ("b % 0 == 0", 5, 1, "divisor", None),
        ("b // (h - h) == 0", 6, 7, "divisor", None),
        ("b // h == 0", 6, 1, "divisor", "max(h, 1)"),
        ("b % (h - 3) == 0", 5, 7, "divisor", "max(h - 3, 1)"),
        ("b / 0 < 1", 5, 1, "divisor", None),
        ("b / 0.0 < 1", 5, 3, "divisor", None),
        ("b / (1.0 - 1) < 1", 5, 9, "divisor", None),
        ("abs(b, h) < 1", 1, 9, "call-arguments", None),
        ("window(1)", 1, 9, "call-arguments", None),
        ("min(b) < 1", 1, 6, "call-arguments", None),
        ("causal(3)", 1, 9, "calls", "causal"),
        ("b(3) < 1", 1, 4, "calls", "b"),
        ("b[3] < 1", 1, 4, "tensor-index", None),
        ("abs[3] < 1", 1, 6, "tensor-index", None),
        ("abs < 1", 1, 3, "function-value", None),
        ("window and full", 1, 6, "function-value", "window(left, right)"),
        ("document(window)", 10, 6, "function-value", "window(left, right)"),
        ("let b = 3 in full", 5, 1, "reserved-names", "b_"),
        ("let score = 3 in full", 5, 5, "reserved-names", None),
        ("let abs(x) = 3 in full", 5, 3, "reserved-names", None),
        ("let f(q_idx) = 3 in full", 7, 5, "reserved-names", None),
        ("let f(x, x) = 3 in full", 7, 4, "definition-heads", None),
        ("b < 2147483648", 5, 10, "number-range", "2147483647"),
        ("b < 1e39", 5, 4, "number-range", "inf"),
        ("2147483647 * 2147483647 * 2 < b", 1, 27, "index-range", None),
        ("b * h * h_kv < 3", 1, 12, "index-range", None),
        ("(kv_idx + kv_idx) * 2147483647 <= -q_idx * 2147483647", 1, 53, "index-range", None),
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
        parse_mask("b < ", locate=locate)
    assert caught.value.diagnostics[0].location == Location("f.yaml", 7, 13, " " * 40, 1)
    with pytest.raises(ExpressionError) as caught:
        parse_mask("b < qidx", locate=locate)
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


def test_the_mask_and_the_score_of_a_text_that_is_neither() -> None:
    """A mask is a condition and a score is a number, which an integer becomes."""
    with pytest.raises(ExpressionError, match="score must be a number"):
        parse_score("causal")
    with pytest.raises(ExpressionError, match="mask must be a condition"):
        parse_mask("b + 0.5")
    assert parse_score("b").type == "f32" and ignores_score(parse_score("b"))
    assert parse_score(" score\n").type == "f32" and not ignores_score(parse_score("score + 1"))


def doublings(first: str, step: str, last: str, times: int = 20) -> str:
    """A `let` for each doubling of what x is."""
    lets = (f"let x{at + 1} = {step.replace('x', f'x{at}')} in " for at in range(times))
    return f"let x0 = {first} in {''.join(lets)}{last.replace('x', f'x{times}')}"


def calls(first: str, step: str, last: str, times: int = 20) -> str:
    """A function for each doubling of the calls of f."""
    lets = (f"let f{at + 1}(x) = {step.replace('f', f'f{at}')} in " for at in range(times))
    return f"let f0(x) = {first} in {''.join(lets)}{last.replace('f', f'f{times}')}"


@pytest.mark.parametrize(
    "text",
    [
        doublings("b", "x + x", "x < 3"),
        doublings("b + 0.5", "x * x", "x < 3"),
        doublings("b < 3", "(x if h < 3 else not x)", "x"),
        doublings("b", "(x if h < x else x + 1)", "x < 3"),
        calls("x + 1", "f(x) + f(x)", "f(b) < 3"),
        calls("x + 1", "f(x) + f(x + 1)", "f(b) < 3"),
        calls("sin(x)", "f(x) * f(x)", "f(b) < 0.5"),
        calls("x < 3", "(f(x) or not f(x + 1))", "f(b)"),
    ],
)
def test_twenty_doublings_stay_small(text: str) -> None:
    """A million copies of one part are one part, in the tree, in the time and in the text."""
    start = time.process_time()
    expr = parse_mask(text)
    assert len(nodes(expr)) < 1000 and len(to_text(expr)) < 5000 and parse_mask(to_text(expr)) is expr
    assert time.process_time() - start < 5  # 0.4 s at most here


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (calls("x // 7", "f(2 * x) + f(2 * x + 1)", "f(b) < 3", 16), "expression-size"),
        (doublings("b % 2 + h % 2 + q_idx % 2 + kv_idx % 3", "x * x", "x < 3", 5), "expression-size"),
        ("b < " + " + ".join(f"b%{divisor}" for divisor in range(2, 1200)), "expression-size"),
        (doublings("b + 0.5", "sin(x)", "x < 3", 101), "expression-nesting"),
        ("b < 0.5" + " + b" * 101, "expression-nesting"),
    ],
)
def test_what_grows_is_stopped(text: str, rule: str) -> None:
    """Trees that no kernel could hold, and texts that could not be read again, end in an error and soon."""
    start = time.process_time()
    assert rule in {fault.rule for fault in faults(text)}
    assert time.process_time() - start < 10  # 1.5 s at most here
