"""Canonical text: it means the very tree it was made of, and a person would write it so."""

import pytest
from hypothesis import given

from attngen.expr import parse_mask, parse_score, to_text
from attngen.fuzz.draw_expressions import DECLARATIONS, masks, scores


@given(masks(DECLARATIONS))
def test_the_text_of_a_mask_is_a_fixed_point(text: str) -> None:
    """Parsing the text of a tree gives that very tree."""
    tree = parse_mask(text, DECLARATIONS)
    assert parse_mask(to_text(tree), DECLARATIONS) is tree


@given(scores(DECLARATIONS))
def test_the_text_of_a_score_is_a_fixed_point(text: str) -> None:
    """Every operator and function of f32 among them."""
    tree = parse_score(text, DECLARATIONS)
    assert parse_score(to_text(tree), DECLARATIONS) is tree


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("softcap(score, 30)", "30.0 * tanh(score / 30.0)"),
        ("score + alibi(slopes)", "score + slopes[h] * f32(kv_idx + seqlen_q - q_idx - seqlen_k)"),
        ("score if causal else -inf", "score if kv_idx <= q_idx + seqlen_k - seqlen_q else -inf"),
        ("-(score * 2)", "-(score * 2.0)"),
        ("-score * 2", "-score * 2.0"),
        ("score - (b - 0.1)", "score - (f32(b) - 0.1)"),
        ("score / (b / 3) / 4", "score / (f32(b) / 3.0) / 4.0"),
        ("score + -1e-3", "score + -0.001"),
        ("score * 1e30 + 16777217", "score * 1e+30 + 16777216.0"),
        ("0.0 * -0.0 + score", "-0.0 + score"),
        ("min(score, inf)", "min(score, inf)"),
        ("i32(score) % 3 * (b + 1)", "f32(i32(score) % 3 + b * (i32(score) % 3))"),
        ("(score if flag else 0) + 1", "(score if flag else 0.0) + 1.0"),
        ("score if flag else 1 if b < 3 else 2", "score if flag else f32(1 if b <= 2 else 2)"),
    ],
)
def test_scores_as_a_person_would_write_them(text: str, written: str) -> None:
    """Constants as they round, brackets where the order of f32 needs them and nowhere else."""
    tree = parse_score(text, DECLARATIONS)
    assert to_text(tree) == written and parse_score(written, DECLARATIONS) is tree


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("chunked(64)", "kv_idx // 64 == (q_idx + seqlen_k - seqlen_q) // 64"),
        ("q_idx // 2 - 3 * (kv_idx // 4) >= 0", "3 * (kv_idx // 4) <= q_idx // 2"),
        ("-(b // 2) - h % 3 < q_idx % 4", "q_idx % 4 > -(h % 3) - b // 2"),
        ("b * (h // 2) < 3 and not flag", "b * (h // 2) <= 2 and not flag"),
        ("b * 2 % 5 == 1", "2 * b % 5 == 1"),
        ("kv_idx < 2147483647 * 3", "kv_idx <= 2 * 2147483647 + 2147483646"),
        ("kv_idx * (2147483647 + 1) < 3 * b", "(2147483647 + 1) * kv_idx < 3 * b"),
        ("(b if flag else h) < ids[b, kv_idx]", "ids[b, kv_idx] > (b if flag else h)"),
        ("not b < h + 0.5", "not f32(b) < f32(h) + 0.5"),
        ("(b < 3 or h < 3) and flag", "flag and (b <= 2 or h <= 2)"),
    ],
)
def test_masks_as_a_person_would_write_them(text: str, written: str) -> None:
    """About the key where it reads the key."""
    tree = parse_mask(text, DECLARATIONS)
    assert parse_mask(written, DECLARATIONS) is tree
    assert to_text(tree) == written


def test_what_is_long_and_repeated_has_a_name() -> None:
    """A name that the text does not use otherwise; what is short is repeated."""
    long = "(b if ids[b, kv_idx] < ids[b, q_idx] + 12 else h) // 3"
    tree = parse_mask(f"let y = {long} in y * y < 3 or y > 8", DECLARATIONS)
    written = to_text(tree)
    assert written.startswith("let x1 = ") and written.count("ids[b, kv_idx]") == 1
    assert parse_mask(written, DECLARATIONS) is tree
    assert "let" not in to_text(parse_mask("b % 3 < h or b % 3 > kv_idx"))


def test_what_is_deep_has_a_name() -> None:
    """A hundred levels are written in less than a hundred brackets."""
    text = "b" + "".join(f" if h < {at} else ({at} + q_idx // (1 + b" for at in range(1, 17)) + "))" * 16
    tree = parse_mask(f"({text}) < 3".replace("(1 + b", "max(1, b"), DECLARATIONS)
    assert parse_mask(to_text(tree), DECLARATIONS) is tree
