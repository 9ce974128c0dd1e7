"""Carets inside YAML scalars: every style, every folding, every escape."""

import re

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

import attngen
from attngen.errors import Location
from attngen.spec.read_yaml import read_document
from attngen.spec.source import Source

ESCAPE = re.compile(r"\\(x..|u.{4}|U.{8}|.)")
WORDS = st.sampled_from(
    ["kv_idx", "<=", "q_idx", "+", "'", '"', "\\", "# no comment", "é", "日", "n", "x41", ">", "|"]
)
TEXTS = st.lists(st.tuples(WORDS, st.sampled_from([" ", "  ", "\n", "\n\n", "\t", "\n  "])), min_size=1).map(
    lambda parts: "".join(word + blank for word, blank in parts).rstrip()
)


@given(TEXTS, st.sampled_from([None, "'", '"', "|", ">"]), st.sampled_from([12, 40, 1000]), st.booleans())
@example("a\\nb n", '"', 1000, False)
@example("it''s 'quoted'", "'", 12, False)
@example("x\x07 \x1b é n", '"', 12, False)
def test_every_character_of_every_style_is_found_in_the_file(
    text: str, style: str | None, width: int, is_ascii: bool
) -> None:
    """Whatever way YAML writes a text, the place of each character that is no blank shows that character."""
    data = {"name": "x", "mask": text, "score": "score"}
    source = Source("f", yaml.safe_dump(data, default_style=style, width=width, allow_unicode=not is_ascii))
    document = read_document(source)
    written, text = text, document.data["mask"]
    assert not document.diagnostics
    assert text == written or style == ">"  # PyYAML folds an indented line, where YAML would not
    mark = document.marks["mask"]
    assert len(mark.offsets) == len(text) + 1 and list(mark.offsets) == sorted(mark.offsets)
    for offset, char in enumerate(text):
        place = mark.locate(offset)
        if char.isspace():
            continue
        shown = place.text[place.column - 1 :]
        escape = ESCAPE.match(shown) if mark.source.text[mark.value[0]] == '"' else None
        assert (yaml.safe_load(f'"{escape.group()}"') if escape else shown[0]) == char


@pytest.mark.parametrize(
    ("written", "line", "column", "length"),
    [
        ("mask: kv_idx <= nope", 2, 17, 4),
        ("mask:   kv_idx   <=   nope   # a comment", 2, 23, 4),
        ('mask: "kv_idx <= nope"', 2, 18, 4),
        ("mask: 'kv_idx <= nope'", 2, 18, 4),
        ('mask: "kv_idx \\u003c= nope"', 2, 23, 4),
        ('mask: "kv_idx\\t<=\\n nope"', 2, 21, 4),
        ('"mask": "kv_idx <=\\\n   nope"', 3, 4, 4),
        ("mask: kv_idx <=\n   nope", 3, 4, 4),
        ("mask: 'kv_idx\n\n   <= nope'", 4, 7, 4),
        ("mask: >\n  kv_idx <=\n  nope", 4, 3, 4),
        ("mask: >-  # folded\n     kv_idx\n       <=\n     nope\n\n", 5, 6, 4),
        ("mask: |\n  kv_idx\n  <= nope", 4, 6, 4),
        ("mask: |2+\n  kv_idx <= nope\n\n", 3, 13, 4),
        ("mask:\n  kv_idx <= nope", 3, 13, 4),
        ("? mask\n: kv_idx <= nope", 3, 13, 4),
    ],
)
def test_the_caret_of_an_expression_is_right_in_every_style(
    written: str, line: int, column: int, length: int
) -> None:
    """An unknown name is underlined where it stands in the file, to its last character."""
    with pytest.raises(attngen.ExpressionError) as caught:
        attngen.load(f"problem: {{head_dim: 64}}\n{written}\n")
    (fault,) = caught.value.diagnostics
    place = fault.location
    assert place is not None and (place.line, place.column, place.length) == (line, column, length)
    assert place.text[place.column - 1 :][:4] == "nope" and fault.path == "mask"


@pytest.mark.parametrize(
    ("written", "line", "column"),
    [
        ("mask: kv_idx <=", 2, 16),
        ('mask: "kv_idx <= "', 2, 17),
        ("mask: >\n  kv_idx\n  <=", 4, 5),
        ("mask:", 2, 6),
        ("mask: ''", 2, 8),
    ],
)
def test_an_expression_that_ends_too_early_is_marked_at_its_end(written: str, line: int, column: int) -> None:
    """The caret stands after the last character that was written."""
    with pytest.raises(attngen.ExpressionError) as caught:
        attngen.load(f"problem: {{head_dim: 64}}\n{written}\n")
    place = caught.value.diagnostics[0].location
    assert place is not None and (place.line, place.column) == (line, column)


def test_lines_count_as_editors_count_them() -> None:
    """Line feeds, carriage returns and both together each end one line."""
    for line_break in ("\n", "\r\n", "\r"):
        source = Source("f", line_break.join(["a", "bc", "", "def"]))
        at = source.text.index("def")
        assert source.location(at, at + 99) == Location("f", 4, 1, "def", 3)
        assert source.location(len(source.text), len(source.text)) == Location("f", 4, 4, "def", 1)


def test_a_byte_order_mark_moves_no_caret() -> None:
    """Editors on Windows write one; it is no column."""
    with pytest.raises(attngen.SpecError) as caught:
        attngen.load("\ufeffproblem: {head_dim: 100}\n")
    assert caught.value.diagnostics[0].location == Location("<text>", 1, 21, "problem: {head_dim: 100}", 3)


def test_a_block_scalar_is_located_at_its_content() -> None:
    """The bar in the first line is not the value."""
    spec = attngen.load("problem: {head_dim: 64}\nmask: |\n  causal\nname: 'x'\n")
    mask, name = spec.locate("mask"), spec.locate("name")
    assert mask is not None and (mask.line, mask.column, mask.length) == (3, 3, 6)
    assert name is not None and (name.line, name.column, name.length) == (4, 7, 3)
