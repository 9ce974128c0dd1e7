"""The derivative of a score is torch's, and as short as a person writes it."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from attngen.errors import InternalError
from attngen.expr.arithmetic import call, compare, minus, negative, over, plus, times, where
from attngen.expr.derivative import derivative
from attngen.expr.torch_value import evaluate
from attngen.expr.tree import Expr, lookup, name, nodes, real, scalar
from tests.effort import examples

SCORE, Q, K = name("score"), name("q_idx"), name("kv_idx")
CAP = scalar("cap", "f32")
BIAS = lookup("bias", (Q, K), "f32")
ONE = real(1.0)
SOFTCAP = call("tanh", over(SCORE, CAP))


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (SCORE, ONE),
        (plus(SCORE, BIAS), ONE),
        (minus(SCORE, times(CAP, call("f32", minus(Q, K)))), ONE),
        (minus(BIAS, SCORE), real(-1.0)),
        (BIAS, real(0.0)),
        (times(SCORE, CAP), CAP),
        (over(SCORE, CAP), over(ONE, CAP)),
        (call("exp", SCORE), call("exp", SCORE)),
        (call("floor", SCORE), real(0.0)),
        (times(call("f32", call("i32", SCORE)), CAP), real(0.0)),
        (where(compare("<", SCORE, CAP), BIAS, CAP), real(0.0)),
        (where(compare("<=", Q, K), SCORE, plus(SCORE, BIAS)), ONE),
        (call("max", SCORE, real(0.0)), where(compare(">=", SCORE, real(0.0)), ONE, real(0.0))),
        (lookup("table", (call("i32", SCORE),), "f32"), real(0.0)),
    ],
)
def test_a_derivative_is_as_short_as_a_person_writes_it(score: Expr, expected: Expr) -> None:
    """What is 0 or 1 leaves no trace."""
    assert derivative(score) is expected


@pytest.mark.parametrize(
    ("score", "by", "expected"),
    [
        (plus(SCORE, BIAS), BIAS, ONE),
        (plus(SCORE, BIAS), CAP, real(0.0)),
        (times(SCORE, CAP), CAP, SCORE),
        (minus(SCORE, times(CAP, call("f32", minus(Q, K)))), CAP, negative(call("f32", minus(Q, K)))),
        (times(BIAS, BIAS), BIAS, plus(BIAS, BIAS)),
        (where(compare("<", CAP, SCORE), BIAS, SCORE), CAP, real(0.0)),
        (plus(BIAS, lookup("bias", (K, Q), "f32")), BIAS, ONE),
        (BIAS, BIAS, ONE),
    ],
)
def test_a_derivative_by_what_a_score_reads_is_short_too(score: Expr, by: Expr, expected: Expr) -> None:
    """By a lookup, which another of the same tensor is not, or by a scalar."""
    assert derivative(score, by) is expected


def test_the_derivative_of_softcap_computes_tanh_once() -> None:
    """It reads the value's own node: 1 - tanh² needs no second tanh."""
    found = derivative(times(CAP, SOFTCAP))
    assert [each for each in nodes(found) if each.op == "call"] == [SOFTCAP]


def test_only_an_f32_has_a_derivative() -> None:
    """An index is a fault of attngen's own."""
    with pytest.raises(InternalError):
        derivative(Q)


SCORES: st.SearchStrategy[Expr] = st.deferred(lambda: _scores)
CONDITIONS = st.builds(compare, st.sampled_from(["<", "<=", "==", "!="]), SCORES, SCORES)
FUNCTIONS = ["abs", "sign", "exp", "exp2", "log", "log2", "tanh", "sigmoid", "sqrt", "sin", "cos", "floor"]
_scores = st.one_of(
    st.sampled_from([SCORE, SCORE, SCORE, CAP, BIAS]),
    st.sampled_from([-2.0, 0.5, 1.0, 3.0]).map(real),
    st.builds(
        lambda operation, a, b: operation(a, b), st.sampled_from([plus, minus, times, over]), SCORES, SCORES
    ),
    st.builds(call, st.sampled_from(["min", "max"]), SCORES, SCORES),
    st.builds(lambda x: call("clamp", x, real(-1.0), real(1.0)), SCORES),
    st.builds(call, st.sampled_from(FUNCTIONS), SCORES),
    st.builds(where, CONDITIONS, SCORES, SCORES),
    st.builds(lambda x: call("f32", call("i32", x)), SCORES),
)


def slope_by_torch(expr: Expr, by: Expr, env: dict[str, Any], bias: torch.Tensor) -> torch.Tensor:
    """What autograd makes of the value, in f64."""
    x = bias.clone() if by is BIAS else torch.tensor(env[by.name], dtype=torch.float64)
    x.requires_grad_()
    value = evaluate(
        expr, env if by is BIAS else env | {by.name: x}, {"bias": x if by is BIAS else bias}, torch.float64
    )
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        return torch.zeros((), dtype=torch.float64)
    return torch.autograd.grad(value, x, materialize_grads=True)[0].squeeze()


@settings(max_examples=examples(2))
@given(
    SCORES,
    st.sampled_from([SCORE, CAP, BIAS]),
    st.sampled_from([-2.0, -1.0, -0.3, 0.0, 0.5, 1.0, 1.7, 3.0]),
    st.sampled_from([0.25, 1.0, -1.0]),
)
def test_the_derivative_is_torchs(expr: Expr, by: Expr, score: float, cap: float) -> None:
    """By the score, a scalar or a lookup, in f64, at ties and ends of clamps too.

    Wherever torch finds a finite value and a finite slope.

    The tolerance is that of constants such as ln 2, which are f32 in the tree.
    """
    env = {"score": score, "cap": cap, "q_idx": 0, "kv_idx": 0}
    bias = torch.tensor([[0.5]], dtype=torch.float64)
    values = [
        evaluate(each, env, {"bias": bias}, torch.float64) for each in nodes(expr) if each.type == "f32"
    ]
    assume(all(torch.as_tensor(value).abs() < 1e6 for value in values))
    expected = slope_by_torch(expr, by, env, bias)
    assume(bool(expected.isfinite()))
    found = torch.as_tensor(evaluate(derivative(expr, by), env, {"bias": bias}, torch.float64))
    torch.testing.assert_close(found.to(torch.float64), expected, rtol=1e-5, atol=1e-5)
