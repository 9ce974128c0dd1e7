"""What torch makes of a Python function is what its text means: operators, methods, types, tensors that it holds."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attngen
from attngen.expr import evaluate, parse_mask, parse_score
from attngen.expr.declare import read_declarations
from attngen.expr.scope import prelude
from attngen.expr.traced_calls import functions

BATCH, HEADS, QUERIES, KEYS = 2, 3, 7, 9
B, H, Q, K = torch.meshgrid(*map(torch.arange, (BATCH, HEADS, QUERIES, KEYS)), indexing="ij")
SCORE = torch.linspace(-3, 3, B.numel()).reshape(B.shape)
IDS = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 5, 5], [3, 3, 3, -4, -4, -4, 9, 9, 9]])
FLAGS = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0, 1], dtype=torch.bool)
SMALL = torch.tensor([[1, 2, 3], [5, 0, 7]], dtype=torch.int16)
SLOPES = torch.tensor([0.5, -0.25, 0.125], dtype=torch.float64)


def meaning(written: attngen.Expression, **scores: torch.Tensor) -> torch.Tensor:
    """The value of a text for every pair."""
    parse = parse_score if scores else parse_mask
    expr = parse(written, read_declarations(written.scalars, written.tensors, {}).declarations)
    env = {"b": B, "h": H, "q_idx": Q, "kv_idx": K, "seqlen_q": QUERIES, "seqlen_k": KEYS, **scores}
    return torch.as_tensor(evaluate(expr, env, written.bound)).expand(B.shape)


def pairs(parts: st.SearchStrategy[str], *signs: str) -> st.SearchStrategy[str]:
    return st.tuples(parts, st.sampled_from(signs), parts).map(lambda each: f"({' '.join(each)})")


def made(parts: st.SearchStrategy[str], *forms: str) -> st.SearchStrategy[str]:
    return st.tuples(st.sampled_from(forms), parts, parts).map(lambda each: each[0].format(*each[1:]))


LEAVES = st.sampled_from(
    ["q", "kv", "h", "b", "(h * 0 + 3)", "SMALL[b, h]", "IDS[b, kv]", "IDS[b, q]", "IDS[-1, kv]"]
)


@functools.cache
def integers(depth: int) -> st.SearchStrategy[str]:
    if not depth:
        return LEAVES
    parts = integers(depth - 1)
    return (
        LEAVES
        | pairs(parts, "+", "-")
        | made(parts, "({} * 3)", "({} // -2)", "({} % 5)", "({} >> 1)", "({} << 2)", "({} & 3)", "(-{})", "(~{})",
               "torch.abs({})", "{}.clamp(min=1)", "{}.clamp(-2, 6)", "torch.minimum({}, {} + q)", "{}.long()",
               "({} * 0.3).int()", "torch.where({} < 2, {}, q - 1)", "torch.clamp({}, max=np.int64(4))",
               "({} + torch.tensor(2))", "(torch.tensor(2) - q + {})", "{}.new_full((), 4)", "torch.zeros_like({})")
        | made(conditions(depth - 1), "({} + 0)", "({} * 2)", "{}.int()", "sum([{}, {}])")
    )  # fmt: skip


@functools.cache
def conditions(depth: int) -> st.SearchStrategy[str]:
    leaves = st.sampled_from(["FLAGS[kv]", "(q == kv)", "(h < 2)", "q.new_ones((), dtype=torch.bool)"])
    if not depth:
        return leaves
    parts = conditions(depth - 1)
    return (
        pairs(integers(depth - 1), "<", "<=", ">", ">=", "==", "!=")
        | pairs(parts, "&", "|", "^", "==", "!=", "<", ">=", "+", "*")
        | made(parts, "(~{})", "torch.logical_xor({}, {})", "{}.logical_or({})", "({} & True)", "({} == 1)",
               "torch.where({}, {}, q < 3)", "(torch.tensor(True) ^ {})", "{}.to(q.device)", "({} != False)",
               "torch.maximum({}, {})", "torch.min({}, {})")
        | made(integers(depth - 1), "(q + {}).bool()", "torch.logical_not(q + {})", "(q + {}).to(torch.bool)")
    )  # fmt: skip


@functools.cache
def reals(depth: int) -> st.SearchStrategy[str]:
    leaves = st.sampled_from(["score", "SLOPES[h]", "0.5", "(score + 1)", "score.new_zeros(())"])
    if not depth:
        return leaves
    parts = reals(depth - 1)
    return (
        leaves
        | made(parts, "({} + score)", "(score * {})", "(0.25 * score - {})", "torch.tanh(score + {})",
               "(score + {}).clamp(max=2)", "torch.relu(score * {})", "(score + {}).masked_fill(q < kv, -5.0)",
               "(score - {}).where(q != kv, -1)", "(score + {}).square()", "({} + score).to(score.dtype)")
        | made(conditions(depth - 1), "({} * score)", "(score - {} * 0.5)", "torch.where({}, score, 0.0)", "{}.float()")
        | made(integers(depth - 1), "(score + 0.5 * {})", "({} / 4)", "(q + {}).float()", "torch.where(q < 2, {}, 0.5)")
    )  # fmt: skip


@given(conditions(3))
def test_a_mask_means_what_torch_computes(body: str) -> None:
    """Random functions of FlexAttention, called on tensors and read as a text."""
    function = eval(f"lambda b, h, q, kv: (q < 0) | {body}")
    assert torch.equal(meaning(attngen.expression(function)), function(B, H, Q, K))


@given(reals(3))
def test_a_score_means_what_torch_computes(body: str) -> None:
    """Up to the rounding of a sum that torch makes in f64, as of a table in f64."""
    function = eval(f"lambda score, b, h, q, kv: score * 0.5 + {body}")
    found = meaning(attngen.expression(function), score=SCORE)
    assert torch.allclose(found, function(SCORE, B, H, Q, K).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda b, h, q, kv: torch.div(q, 3, rounding_mode="floor") == kv.floor_divide(3),
        lambda b, h, q, kv: torch.remainder(q, 3).eq(kv.remainder(np.int32(3))),
        lambda b, h, q, kv: (q.ge(kv)).logical_and(torch.gt(q, 1)) | q.lt(2).bitwise_and(kv.ne(3)),
        lambda b, h, q, kv: q.sub(kv).neg().add(1).mul(2).maximum(kv) <= kv.detach().clone(),
        lambda b, h, q, kv: np.float32(2.5) < q * np.float64(0.75),
        lambda b, h, q, kv: (q < 3) < (kv < 3),
        lambda b, h, q, kv: (q < 3) * 2 + (kv < 3) == 2 * torch.ones((), dtype=torch.int64),
        lambda b, h, q, kv: torch.ones((), dtype=torch.bool),
        lambda b, h, q, kv: q.new_zeros(size=(), dtype=torch.bool, device=q.device) | (kv < q),
        lambda b, h, q, kv: torch.reciprocal(q + 1).sqrt() < torch.rsqrt(kv + 2),
    ],
)
def test_functions_of_torch_and_numbers_of_numpy(function: Callable[..., Any]) -> None:
    """What the random functions do not draw, against what torch computes."""
    want = torch.as_tensor(function(B, H, Q, K)).expand(B.shape)
    assert torch.equal(meaning(attngen.expression(function)), want)


def test_the_types_of_the_prelude_are_known() -> None:
    """A definition that is called is a condition or a number here as it is to the parser."""
    given = {"table": IDS.float(), "ids": IDS, "slopes": SLOPES, "x": 3.0, "bidirectional": False}
    for name, definition in prelude().items():

        def function(
            score: Any, name: str = name, parameters: tuple[str, ...] = definition.parameters
        ) -> Any:
            called = getattr(functions, name)
            called = called(*(given.get(each, 3) for each in parameters)) if parameters else called
            assert called.kind in ("bool", "i32", "f32")
            return score + (called.float() if called.kind == "bool" else called)

        assert attngen.expression(function).startswith("score + ")
    with pytest.raises(attngen.ExpressionError, match="takes left, right"):
        attngen.expression(lambda q_idx: functions.window(1, r=0))
    assert attngen.expression(lambda q_idx: functions.window(right=0, left=1)) == "window(1, 0)"


@pytest.mark.parametrize(
    ("convert", "text"),
    [
        (lambda x, flags: x.to(FLAGS), "score != 0"),
        (lambda x, flags: x.to(other=FLAGS), "score != 0"),
        (lambda x, flags: x.type_as(FLAGS), "score != 0"),
        (lambda x, flags: x.to(flags), "score != 0"),
        (lambda x, flags: x.type_as(flags), "score != 0"),
        (lambda x, flags: x.to("cpu", torch.bool, True), "score != 0"),
        (lambda x, flags: x.to(torch.bool, copy=True), "score != 0"),
        (lambda x, flags: x.to("cuda") != 0, "score != 0"),
        (lambda x, flags: x.to(torch.device("cpu:0")) != 0, "score != 0"),
        (lambda x, flags: x.to(IDS) != 0, "i32(score) != 0"),
        (lambda x, flags: x.type(torch.int64) != 0, "i32(score) != 0"),
    ],
)
def test_a_value_is_converted_to_the_format_of_a_tensor(convert: Callable[..., Any], text: str) -> None:
    """Of one that is held and of one that is declared; a device changes no value."""
    function = lambda score, flags: torch.where(convert(score, flags), score, 0.0)  # noqa: E731
    written = attngen.expression(function, tensors={"flags": "bool[seqlen_k]"})
    assert written == f"where({text}, score, 0.0)"


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.to(int),
        lambda x: x.to("int32"),
        lambda x: x.to(3),
        lambda x: x.to(),
        lambda x: x.to(torch.int32, to=3),
        lambda x: x.to("cpu", 3),
        lambda x: x.type_as(3),
        lambda x: x.type(),
        lambda x: x.to(SLOPES),
    ],
)
def test_what_is_no_format_is_no_conversion(convert: Callable[..., Any]) -> None:
    """Nothing is passed over: the value would keep its type."""
    with pytest.raises(attngen.ExpressionError) as caught:
        attngen.expression(lambda score: convert(score))
    assert [each.rule for each in caught.value.diagnostics] == ["traced-operators"]
