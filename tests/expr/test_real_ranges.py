"""Static ranges of f32: every value lies in them, and where a score is bounded they say so."""

import math

import pytest
import torch
from hypothesis import given

from attngen.expr import evaluate, magnitude, parse_score, real_range
from attngen.fuzz.draw_expressions import scores
from attngen.scaling import needs_no_maximum
from tests.expr.strategies import ENV

ANY = (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("score", ANY),
        ("softcap(score, 30.0)", (-30.0, 30.0)),
        ("softcap(score, 2.0) - 5.0", (-7.0, -3.0)),
        ("-sigmoid(score) * 4.0", (-4.0, 0.0)),
        ("clamp(score, -3.0, 8.0)", (-3.0, 8.0)),
        ("max(score, 0.0)", (0.0, math.inf)),
        ("min(abs(score), 9.0) / -3.0", (-3.0, 0.0)),
        ("sin(score) if q_idx < kv_idx else 2.5", (-1.0, 2.5)),
        ("abs(clamp(score, 2.0, 3.0) - 8.0)", (5.0, 6.0)),
        ("f32(kv_idx % 8) + tanh(score)", (-1.0, 8.0)),
        ("exp(score) * 0.0", ANY),
        ("1.0 / sigmoid(score)", ANY),
        ("1.0 / (sigmoid(score) + 1.0)", (0.5, 1.0)),
        ("sqrt(score)", (0.0, math.inf)),
        ("log(abs(tanh(score)))", ANY),
        ("score if q_idx < kv_idx else 0.0", ANY),
        ("-inf if q_idx < kv_idx else tanh(score)", (-math.inf, 1.0)),
        ("min(sin(log(score)), 100.0)", (-1.0, 100.0)),
        ("max(tanh(score), -5.0)", (-5.0, 1.0)),
        ("min(max(cos(score), 2.0), 3.0)", (2.0, 2.0)),
    ],
)
def test_a_range_is_what_a_person_works_out(score: str, expected: tuple[float, float]) -> None:
    """Bounds of functions and of constants, through arithmetic and choices."""
    found = parse_score(score)
    assert real_range(found)[:2] == pytest.approx(expected, rel=1e-6)
    assert magnitude(found) == pytest.approx(max(map(abs, expected)), rel=1e-6)


@given(scores(), ENV)
def test_every_value_lies_in_its_range(score: str, env: dict[str, int]) -> None:
    """Of random scores, but for NaN and roundings."""
    expr = parse_score(score)
    lo, hi, _ = real_range(expr)
    products = torch.tensor([-math.inf, -300.0, -2.5, -0.0, 1e-3, 0.7, 40.0, math.inf])
    value = torch.as_tensor(evaluate(expr, {**env, "score": products}), dtype=torch.float64)
    slack = 1e-5 * (1.0 + max((abs(end) for end in (lo, hi) if math.isfinite(end)), default=0.0))
    assert bool(((value >= lo - slack) & (value <= hi + slack) | value.isnan()).all()), (score, value, lo, hi)


@pytest.mark.parametrize(
    ("magnitude", "dtype", "expected"),
    [
        (55.4, torch.bfloat16, True),
        (55.5, torch.bfloat16, False),
        (6.9, torch.float16, True),
        (7.0, torch.float16, False),
        (math.inf, torch.float32, False),
    ],
)
def test_exponents_stay_clear_of_the_ends_of_a_format(
    magnitude: float, dtype: torch.dtype, expected: bool
) -> None:
    """P is a normal number with all its bits, at either end."""
    info = torch.finfo(dtype)
    assert needs_no_maximum(magnitude, info.max) == expected
    assert not expected or math.exp(-magnitude) > 8 * info.tiny and math.exp(magnitude) < info.max / 8
