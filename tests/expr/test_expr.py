"""The expression language: four readings of one tree agree with plain Python."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import attngen
from attngen.expr import const, evaluate, extremes, key_range, name, parse_mask, to_cuda, to_text

NAMES = ("q_idx", "kv_idx", "seqlen_q", "seqlen_k", "h")
SMALL = st.integers(0, 12)
ENV = st.fixed_dictionaries({key: SMALL for key in (*NAMES, "b", "h_kv")})


@st.composite
def sums(draw: st.DrawFn) -> str:
    """A sum of names and small integers."""
    terms = draw(st.lists(st.sampled_from(NAMES) | SMALL.map(str), min_size=1, max_size=4))
    signs = draw(st.lists(st.sampled_from("+-"), min_size=len(terms) - 1, max_size=len(terms) - 1))
    return terms[0] + "".join(f" {sign} {term}" for sign, term in zip(signs, terms[1:], strict=True))


COMPARISONS = st.builds(
    lambda a, op, b: f"{a} {op} {b}", sums(), st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), sums()
)
MASKS = st.recursive(
    COMPARISONS,
    lambda inner: st.one_of(
        st.builds(lambda a, b: f"({a}) and ({b})", inner, inner),
        st.builds(lambda a, b: f"({a}) or ({b})", inner, inner),
        st.builds(lambda a: f"not ({a})", inner),
    ),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(MASKS, ENV)
def test_every_reading_agrees_with_python(text: str, env: dict[str, int]) -> None:
    """The value, the value of the canonical text, and the CUDA text, all as Python reads the original."""
    expected = bool(eval(text, {}, env))
    tree = parse_mask(text)
    assert bool(evaluate(tree, env)) == expected
    assert parse_mask(to_text(tree)) is tree
    cuda = to_cuda(tree, {key: key for key in env})
    python = re.sub(r"\b(\d+)LL\b", r"\1", cuda.replace("(long long)", ""))
    python = python.replace("&&", " and ").replace("||", " or ")
    python = re.sub(r"\btrue\b", "True", re.sub(r"\bfalse\b", "False", python))
    assert bool(eval(python, {}, env)) == expected


@settings(max_examples=200, deadline=None)
@given(MASKS, ENV)
def test_a_key_range_is_exactly_what_the_mask_shows(text: str, env: dict[str, int]) -> None:
    """Where there is a closed form, a key is visible if and only if it lies between the bounds."""
    tree = parse_mask(text)
    found = key_range(tree)
    if found is None:
        return
    for kv_idx in range(40):
        at = env | {"kv_idx": kv_idx}
        inside = all(evaluate(lo, at) <= kv_idx for lo in found.lower) and all(
            kv_idx < evaluate(hi, at) for hi in found.upper
        )
        assert inside == bool(evaluate(tree, at))


@settings(max_examples=100, deadline=None)
@given(sums(), SMALL, SMALL, ENV)
def test_extremes_are_reached_and_never_passed(
    text: str, first: int, length: int, env: dict[str, int]
) -> None:
    """The smallest and largest value over a tile's rows, by brute force."""
    form = parse_mask(f"kv_idx + kv_idx <= {text}")
    bounds = key_range(parse_mask(f"kv_idx < {text}")) if "kv_idx" not in text else None
    assert form.type == "bool"
    if bounds is None or not bounds.upper:
        return
    upper = bounds.upper[0]
    low, high = extremes(upper, "q_idx", const(first), const(first + length))
    values = [evaluate(upper, env | {"q_idx": row}) for row in range(first, first + length + 1)]
    assert (evaluate(low, env), evaluate(high, env)) == (min(values), max(values))


@pytest.mark.parametrize(
    ("mask", "table"),
    [
        ("full", ["11111", "11111", "11111"]),
        ("causal", ["11100", "11110", "11111"]),
    ],
)
def test_the_prelude_by_tables_drawn_by_hand(mask: str, table: list[str]) -> None:
    """Three queries and five keys: causal is aligned to the bottom right."""
    tree = parse_mask(mask)
    for q_idx, row in enumerate(table):
        for kv_idx, visible in enumerate(row):
            env = {"q_idx": q_idx, "kv_idx": kv_idx, "seqlen_q": 3, "seqlen_k": 5}
            assert bool(evaluate(tree, env)) == (visible == "1")


def test_causal_with_more_queries_than_keys_hides_the_first_rows() -> None:
    """Five queries and three keys: the first two see nothing."""
    env = {"seqlen_q": 5, "seqlen_k": 3}
    seen = [
        [bool(evaluate(parse_mask("causal"), env | {"q_idx": i, "kv_idx": j})) for j in range(3)]
        for i in range(5)
    ]
    assert [sum(row) for row in seen] == [0, 0, 1, 2, 3]


def test_equal_meanings_are_one_object() -> None:
    """Chains, negations and shifted constants have one canonical form."""
    causal = parse_mask("causal")
    for text in (
        "kv_idx <= q_pos",
        "kv_idx < q_pos + 1",
        "not kv_idx > q_pos",
        "q_pos >= kv_idx",
        "0 <= q_pos - kv_idx",
    ):
        assert parse_mask(text) is causal
    assert name("q_idx") is name("q_idx")


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("kv_idx <= q_indx", 11),
        ("kv_idx <=", 10),
        ("kv_idx + q_idx", 1),
        ("kv_idx <= q_idx )", 17),
        ("kv_idx = 3", 8),
    ],
)
def test_faults_stand_under_a_caret(text: str, column: int) -> None:
    """Unknown names, missing operands, a sum that is no condition, stray brackets, a single equals sign."""
    with pytest.raises(attngen.ExpressionError) as caught:
        parse_mask(text)
    location = caught.value.diagnostics[0].location
    assert location is not None and location.column == column


@pytest.mark.parametrize("text", ["kv_idx <= " + "(" * 200 + "1" + ")" * 200, "kv_idx <= 1" + " + 1" * 4000])
def test_hostile_texts_are_refused_not_hung_on(text: str) -> None:
    """Nesting and length have limits, which the error names."""
    with pytest.raises(attngen.ExpressionError, match="100|10,000|10000"):
        parse_mask(text)
