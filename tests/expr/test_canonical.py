"""The tree: what means the same is the same object, and what does not is not."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attngen.expr import (
    FALSE,
    TRUE,
    Expr,
    add,
    affine,
    const,
    evaluate,
    name,
    parse_mask,
    scale,
    sub,
    to_text,
)
from tests.expr.strategies import MASKS


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("kv_idx <= q_idx + seqlen_k - seqlen_q", "causal"),
        ("not (kv_idx > q_pos)", "causal"),
        ("seqlen_q + kv_idx - q_idx <= seqlen_k", "causal"),
        ("2 * kv_idx <= 2 * q_pos + 1", "causal"),
        ("causal and full", "causal"),
        ("causal and causal", "causal"),
        ("causal or kv_idx < q_pos", "causal"),
        ("causal and kv_idx <= q_pos + 5", "causal"),
        ("b < 3 and b < 5", "b <= 2"),
        ("b < 3 or b < 5", "b < 5"),
        ("b <= h and b >= h", "b == h"),
        ("b < h or b > h", "b != h"),
        ("3 <= b and b != 3", "b > 3"),
        ("b > 1 and b < 3", "b == 2"),
        ("0 < b < 5 < h", "b > 0 and 5 > b and h >= 6"),
        ("not (b < 3 and h < 4)", "b >= 3 or h >= 4"),
        ("2 * b == 4 * h", "b == 2 * h"),
        ("-b == -h", "h == b"),
        ("b < 3 and (h < 2 or h > 4)", "(h > 4 or h < 2) and 3 > b"),
        ("3 * (b - 2 * h) <= 7", "b - 2 * h < 3"),
        ("q_idx - q_idx % 4 <= kv_idx", "4 * (q_idx // 4) <= kv_idx"),
        ("(q_idx // 3) % 4 < q_idx // 3", "q_idx // 12 > 0"),
        ("q_idx % 3 - q_idx + 3 * (q_idx // 3 % 4) < 0", "q_idx // 12 > 0"),
        ("b < b % -4", "b % -4 > b"),
        ("causal == full", "causal"),
        ("causal != full", "kv_idx > q_pos"),
        ("(b < 3) == (h < 4)", "(h < 4) == (b < 3)"),
        ("(b < 3) == (h < 4)", "(b >= 3) == (h >= 4)"),
        ("(b < 3) != (h < 4)", "(b < 3) == (h >= 4)"),
        ("(b < 3) == (h < 4)", "h < 4 if b < 3 else h >= 4"),
        ("(b < 3) == (h < 4) == (b < 3)", "(b < 3) == (h < 4)"),
    ],
)
def test_equal_meanings_are_one_node(text: str, same: str) -> None:
    """Order, sign, scale, shifted constants, intersections and De Morgan's law leave no trace."""
    assert parse_mask(text) is parse_mask(same)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("b < b + 1", TRUE),
        ("2 * b == 2 * h + 1", FALSE),
        ("b < 3 and b > 5", FALSE),
        ("b < 5 or b > 3", TRUE),
        ("b == 3 and b != 3", FALSE),
        ("b == 3 and b == 4", FALSE),
        ("1 <= b <= 2 and b != 1 and b != 2", FALSE),
        ("(b < 1 or h < 1) and not (b < 1 or h < 1)", FALSE),
        ("(b < 1 or h < 1) or not (b < 1 or h < 1)", TRUE),
        ("not true or false", FALSE),
        ("causal == causal", TRUE),
        ("causal != causal", FALSE),
        ("0 < 1 < 2", TRUE),
    ],
)
def test_what_is_always_or_never_true_is_a_constant(text: str, value: Expr) -> None:
    """A mask that says nothing is `full`, and one that contradicts itself is `false`."""
    assert parse_mask(text) is value


@given(MASKS)
def test_the_canonical_text_is_a_fixed_point(text: str) -> None:
    """Parsing the text of a tree gives that very tree, and so the same text again."""
    tree = parse_mask(text)
    assert parse_mask(to_text(tree)) is tree


@given(MASKS)
def test_one_node_never_stands_for_two_meanings(text: str) -> None:
    """A negated mask is another node, true exactly where the first is false."""
    tree, negated = parse_mask(text), parse_mask(f"not ({text})")
    assert tree is not negated
    for q_idx, kv_idx, h in product(range(3), repeat=3):
        env = {"q_idx": q_idx, "kv_idx": kv_idx, "h": h, "seqlen_q": 2, "seqlen_k": 3}
        assert bool(evaluate(tree, env)) != bool(evaluate(negated, env))


def test_a_copy_is_the_same_object() -> None:
    """Pickling, copying and another thread never make a second node of one meaning."""
    tree = parse_mask("causal and h < 3 or b == 1")
    assert (
        pickle.loads(pickle.dumps(tree)) is tree and copy.deepcopy(tree) is tree and copy.copy(tree) is tree
    )
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: parse_mask("b == 1 or h <= 2 and kv_idx <= q_pos"), range(64)))
    assert all(other is tree for other in found)


def test_truth_and_one_are_two_constants() -> None:
    """Python takes True for 1; the tree must not."""
    assert const(True) is not const(1) and const(True) is TRUE and const(1).type == "i32"


@given(st.integers(-9, 9), st.integers(-9, 9), st.integers(-9, 9))
def test_affine_arithmetic_is_arithmetic(a: int, b: int, factor: int) -> None:
    """Sums, differences and multiples of forms have the values of the sums, differences and multiples."""
    first, second = affine({name("b"): a, name("q_idx"): 1}, b), affine({name("b"): b, name("h"): a}, a)
    env = {"b": 5, "h": 7, "q_idx": 11}
    left, right = evaluate(first, env), evaluate(second, env)
    assert evaluate(add(first, second), env) == left + right
    assert evaluate(sub(first, second), env) == left - right
    assert evaluate(scale(factor, first), env) == factor * left
    assert sub(add(first, second), second) is first


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("causal", "kv_idx <= q_idx + seqlen_k - seqlen_q"),
        ("q_pos >= kv_idx + 1", "kv_idx < q_idx + seqlen_k - seqlen_q"),
        ("q_idx - kv_idx < 128", "kv_idx >= q_idx - 127"),
        ("seqlen_q - q_idx > 5 - seqlen_k", "q_idx <= seqlen_k + seqlen_q - 6"),
        ("-kv_idx <= -3", "kv_idx >= 3"),
        ("3 * kv_idx - 2 * q_idx != h", "3 * kv_idx != h + 2 * q_idx"),
        ("kv_idx + q_idx <= 5", "kv_idx <= 5 - q_idx"),
        ("full", "true"),
    ],
)
def test_the_canonical_text_is_what_a_person_would_write(text: str, written: str) -> None:
    """kv_idx on the left without a sign, strict where that saves a one, minus signs last."""
    assert to_text(parse_mask(text)) == written == str(parse_mask(text))


def test_names_are_names() -> None:
    """A name is found by its name, whoever asks."""
    assert name("q_idx") is parse_mask("q_idx < 0").args[0].args[0]
