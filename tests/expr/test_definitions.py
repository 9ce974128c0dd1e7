"""Definitions, tensors and scalars: what a body sees, what a call means, and where its faults are told."""

import pytest

from attngen.errors import Diagnostic, ExpressionError, Location
from attngen.expr import (
    Declarations,
    Definition,
    Locate,
    Scalar,
    TensorType,
    check_definitions,
    parse_mask,
    parse_score,
    to_text,
)

SCALARS = {"width": Scalar("width", "i32"), "cap": Scalar("cap", "f32"), "flag": Scalar("flag", "bool")}
TENSORS = {
    "ids": TensorType("ids", "i32", ("batch", "seqlen_k")),
    "slopes": TensorType("slopes", "f32", ("num_heads_q",)),
    "seen": TensorType("seen", "bool", ("batch", "rows")),
    "level": TensorType("level", "u8", ("seqlen_q",)),
}


def declare(**texts: str) -> Declarations:
    """Declarations with definitions: `f__x__y="x + y"` is f(x, y)."""
    heads = {head: head.split("__") for head in texts}
    definitions = {
        name: Definition(name, tuple(parameters), texts[head]) for head, (name, *parameters) in heads.items()
    }
    return Declarations(SCALARS, TENSORS, definitions)


def faults(text: str, declarations: Declarations) -> tuple[Diagnostic, ...]:
    with pytest.raises(ExpressionError) as caught:
        parse_mask(text, declarations)
    return caught.value.diagnostics


@pytest.mark.parametrize(
    ("definitions", "text", "same"),
    [
        ({"near": "q_pos - 3 <= kv_idx"}, "near and causal", "window(3, 0)"),
        ({"near__n": "q_pos - n <= kv_idx"}, "near(3) and causal", "window(3, 0)"),
        ({"f__x": "x + width"}, "f(f(b)) < 3", "b + 2 * width < 3"),
        ({"f__x": "g(x) + 1", "g__x": "2 * x"}, "f(b) < 3", "2 * b < 2"),
        ({"own__t": "t[b, q_pos] == t[b, kv_idx]"}, "own(ids)", "document(ids)"),
        ({"own__t": "two(t, q_pos) == t[b, kv_idx]", "two__t__i": "t[b, i]"}, "own(ids)", "document(ids)"),
        ({"own": "document(ids)"}, "own", "document(ids)"),
        ({"f__q": "let two = 2 in two * q"}, "let two = b in f(two) < 3", "2 * b < 3"),
        ({"window__n": "kv_idx < n"}, "window(3)", "sinks(3)"),
        ({"causal_top_left": "full"}, "causal_top_left", "full"),
        ({"sinks__n": "full"}, "prefix(3)", "kv_idx < 3 or causal"),
        ({}, "let f(x) = x + h in let h2 = f(b) in h2 < 3", "b + h < 3"),
        ({}, "let x = b in let x = x + 1 in x < 3", "b < 2"),
        ({}, "let x = b in let f(y) = x + y in let x = h in f(x) < 3", "b + h < 3"),
        ({}, "let f(causal) = causal < 3 in f(b)", "b < 3"),
        ({}, "document(ids) and (let ids = b in ids < 3)", "b < 3 and document(ids)"),
        (
            {},
            "flag and not seen[b, kv_idx] and level[q_idx] < 3",
            "level[q_idx] < 3 and not seen[b, kv_idx] and flag",
        ),
        ({}, "clamp(b, 1, 3) < h if flag else full", "where(flag, min(max(b, 1), 3) < h, true)"),
        ({}, "b + 0.5 < cap", "f32(b) + 0.5 < cap"),
        ({}, "b < h + 0.5 < h_kv", "b < h + 0.5 and h + 0.5 < h_kv"),
    ],
)
def test_what_a_text_stands_for(definitions: dict[str, str], text: str, same: str) -> None:
    """Scopes are lexical, arguments are values or tensors, and the prelude keeps to its own definitions."""
    assert parse_mask(text, declare(**definitions)) is parse_mask(same, declare())


@pytest.mark.parametrize(
    ("definitions", "text", "rule", "place"),
    [
        ({}, "ids < 3", "tensor-value", "<mask>:1:1"),
        ({}, "let t = ids in t[b, 1] < 3", "tensor-value", "<mask>:1:9"),
        ({}, "window(ids, 3)", "tensor-value", "<definition window>:1:9"),
        ({}, "ids[b] < 3", "tensor-index", "<mask>:1:1"),
        ({}, "ids[b, 1, 2] < 3", "tensor-index", "<mask>:1:1"),
        ({}, "ids[b, 1.5] < 3", "expression-types", "<mask>:1:8"),
        ({}, "ids[b, causal] < 3", "expression-types", "<mask>:1:8"),
        ({}, "idz[b, 1] < 3", "known-names", "<mask>:1:1"),
        ({}, "ids(b, 1) < 3", "calls", "<mask>:1:1"),
        ({}, "width[b] < 3", "tensor-index", "<mask>:1:1"),
        ({}, "document(b)", "tensor-index", "<definition document>:1:1"),
        ({}, "document(slopes)", "tensor-index", "<definition document>:1:1"),
        ({}, "chunked(width)", "divisor", "<definition chunked>:1:10"),
        ({}, "width(3) < 3", "calls", "<mask>:1:1"),
        ({}, "let f(x) = y in f(3) < 3", "known-names", "<mask>:1:12"),
        ({"f__x": "x + q_ixd"}, "f(3) < 3", "known-names", "<definition f>:1:5"),
        ({"f__x": "x +"}, "f(3) < 3", "operand", "<definition f>:1:4"),
        ({"f__x": "not x"}, "f(3)", "expression-types", "<definition f>:1:5"),
        ({"f": "f < 3"}, "f", "recursion", "<definition f>:1:1"),
        ({"f__x": "g(x)", "g__x": "f(x + 1)"}, "f(3) < 3", "recursion", "<definition g>:1:1"),
        ({"f__x": "x + score"}, "f(3) < 3", "known-names", "<definition f>:1:5"),
    ],
)
def test_a_fault_is_told_where_it_stands(
    definitions: dict[str, str], text: str, rule: str, place: str
) -> None:
    """At the call where the call is wrong, in the body where the body is."""
    fault = faults(text, declare(**definitions))[0]
    assert (fault.rule, str(fault.location)) == (rule, place)
    assert place.startswith("<mask>") or rule == "operand" or "called as `" in fault.note or text == "f"


def test_a_fault_of_a_body_names_the_call_and_is_told_once() -> None:
    """Two calls of one faulty body are one fault, by the first call."""
    (fault,) = faults("f(3) < 3 or\n f(4) < 3", declare(f__x="x + q_ixd"))
    assert fault.note == "nothing has this name; called as `f(3)` at <mask>:1:1"
    assert "q_idx" in fault.nearest
    (fault,) = faults("f(3) < 3 or\n f(causal) < 3", declare(f__x="x + 1"))
    assert fault.note == "this is a condition; called as `f(causal)` at <mask>:2:2"


def test_a_body_stands_where_its_owner_says() -> None:
    """Places in bodies go through `locate_of`, and those of the text through `locate`."""

    def locate_of(name: str) -> Locate | None:
        return lambda offset: Location(f"{name}.yaml", 3, 10 + offset, " " * 40)

    with pytest.raises(ExpressionError) as caught:
        parse_mask("f(3) < q_ixd", declare(f__x="x + q_ixd"), locate_of=locate_of)
    assert [str(fault.location) for fault in caught.value.diagnostics] == ["<mask>:1:8", "f.yaml:3:14"]
    (fault,) = check_definitions(declare(f__x="x +", g="q_ixd"), locate_of)
    assert (fault.rule, str(fault.location)) == ("operand", "f.yaml:3:13")


def test_the_syntax_of_a_definition_that_nobody_calls_is_checked() -> None:
    """What its arguments decide is left to the calls."""
    assert check_definitions(declare(f__x="not x", g="1 + + 1")) == ()
    assert [fault.rule for fault in check_definitions(declare(f="b &&", g="", h2="(b"))] == [
        "logic-words", "operand", "brackets",
    ]  # fmt: skip


def test_no_definition_captures_the_score() -> None:
    """Not even a `let` with parameters; a value that was made of it may be used."""
    for text in ("f(1)", "let g(x) = x + score in g(1)"):
        with pytest.raises(ExpressionError, match="pass it as an argument"):
            parse_score(text, declare(f__x="x + score"))
    expr = parse_score("let s = 2 * score in let g(x) = x + s in g(1)", declare())
    assert to_text(expr) == "1.0 + 2.0 * score"


def test_a_definition_is_read_once_for_equal_arguments() -> None:
    """Also where the arguments are written otherwise; a hundred definitions in a chain are no recursion."""
    chain = {f"f{at}__x": f"f{at + 1}(x) + f{at + 1}(1 + x - 1)" for at in range(20)}
    declarations = declare(**chain, f20__x="x")
    assert parse_mask("f0(b) == 0", declarations) is parse_mask("b == 0")
