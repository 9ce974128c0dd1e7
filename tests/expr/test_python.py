"""Masks and scores written in Python: the text they give, and what Python cannot say."""

import copy
import functools
import operator
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import and_masks, noop_mask, or_masks

import attngen
from attngen.errors import Diagnostic
from attngen.expr.declarations import Declarations, TensorType
from attngen.expr.parse import parse_mask, parse_score

SLOPES = {"slopes": "f32[num_heads_q]"}


def only(function: Callable[..., Any], **declared: Any) -> Diagnostic:
    with pytest.raises(attngen.ExpressionError) as caught:
        attngen.expression(function, **declared)
    (fault,) = caught.value.diagnostics
    return fault


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, "q_idx >= kv_idx"),
        (lambda kv_idx, q_pos: kv_idx <= q_pos, "kv_idx <= q_pos"),
        (lambda q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx < 128), "q_idx >= kv_idx and q_idx - kv_idx < 128"),
        (lambda q_idx, kv_idx: 3 >= q_idx - (kv_idx - 1), "q_idx - (kv_idx - 1) <= 3"),  # noqa: SIM300
        (lambda q_idx, kv_idx: (q_idx - kv_idx) - 1 == 0, "q_idx - kv_idx - 1 == 0"),
        (lambda q_idx, kv_idx: (q_idx + kv_idx) * 2 % 3 != 0, "(q_idx + kv_idx) * 2 % 3 != 0"),
        (lambda q_idx, kv_idx: q_idx // (2 * 3) == 7 - kv_idx // 2, "q_idx // 6 == 7 - kv_idx // 2"),
        (lambda q_idx, h: -q_idx + -3 < -(q_idx + h), "-q_idx + -3 < -(q_idx + h)"),
        (lambda h, b: ~(h < 1) | (b < 1) & ~((h < 2) | (b < 2)),
         "not h < 1 or b < 1 and not (h < 2 or b < 2)"),
        (lambda h, b: (h < 1) & ((b < 1) & (h < 2)), "h < 1 and (b < 1 and h < 2)"),
        (lambda q_idx, kv_idx: attngen.where(q_idx < 5, kv_idx, q_idx) < 3, "where(q_idx < 5, kv_idx, q_idx) < 3"),
        (lambda q_idx, kv_idx: abs(q_idx - kv_idx) < 9, "abs(q_idx - kv_idx) < 9"),
        (lambda q_idx, kv_idx: (q_idx - kv_idx).abs() < 9, "abs(q_idx - kv_idx) < 9"),
        (lambda kv_idx, seqlen_k: torch.minimum(kv_idx, seqlen_k) < 3, "min(kv_idx, seqlen_k) < 3"),
        (lambda h, b: torch.logical_and(h < 1, torch.logical_not(b < 1)), "h < 1 and not b < 1"),
        (lambda h, h_kv: True & (h < h_kv), "true and h < h_kv"),
        (lambda: attngen.functions.causal & attngen.functions.window(128, 0), "causal and window(128, 0)"),
        (lambda b, kv_idx, width=4: kv_idx < width, "kv_idx < 4"),
        (lambda kv_idx: np.bool_(True) & (kv_idx > np.int64(2)) & (np.array(3) > kv_idx),
         "true and kv_idx > 2 and kv_idx < 3"),
    ],
)  # fmt: skip
def test_a_mask_is_written_as_its_function_is(function: Callable[..., Any], text: str) -> None:
    """Operators, brackets where they are needed, functions of the language, of torch and of Python."""
    written = attngen.expression(function)
    assert str(written) == written == text and parse_mask(text)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda score, b, h, q_idx, kv_idx: score + 0.1 * (kv_idx - q_idx), "score + 0.1 * (kv_idx - q_idx)"),
        (lambda score: 30 * torch.tanh(score / 30), "30 * tanh(score / 30)"),
        (lambda score: attngen.functions.softcap(score, 30.0), "softcap(score, 30.0)"),
        (lambda score, q_idx, kv_idx: torch.where(q_idx == kv_idx, score, -float("inf")),
         "where(q_idx == kv_idx, score, -inf)"),
        (lambda score: score - 1e-7 + 1e20, "score - 1e-07 + 1e+20"),
        (lambda score: torch.clamp(score, -1.5, 2), "clamp(score, -1.5, 2)"),
        (lambda score: score / (1 + score.exp()), "score / (1 + exp(score))"),
        (lambda score, kv_idx: 1 / (kv_idx + 1) + score, "1 / (kv_idx + 1) + score"),
        (lambda score: score * torch.tensor(0.5).item(), "score * 0.5"),
    ],
)  # fmt: skip
def test_a_score_is_written_as_its_function_is(function: Callable[..., Any], text: str) -> None:
    """A function that takes `score` is a score; constants are written so that they are read as they were."""
    written = attngen.expression(function)
    assert written == text and parse_score(text)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda batch_idx, head_idx, q_idx, kv_idx: kv_idx > q_idx - head_idx, "kv_idx > q_idx - h"),
        (lambda b, h, q, kv: q >= kv, "q_idx >= kv_idx"),
        (lambda b, h, *places: places[0] >= places[1], "q_idx >= kv_idx"),
        (lambda *places: places[3] >= places[0], "kv_idx >= b"),
        (lambda batch, h, q_idx, kv_idx, **more: q_idx < 3 + len(more), "q_idx < 3"),
        (lambda a, b_, c, d, /: a < d, "b < kv_idx"),
        (lambda w, x, y, z, width=4: z - y < width, "kv_idx - q_idx < 4"),
        (lambda w, x, y, z, *, width=4: z - y < width, "kv_idx - q_idx < 4"),
        (noop_mask, "true"),
        (and_masks(lambda b, h, q, kv: q >= kv, noop_mask), "true and q_idx >= kv_idx and true"),
        (or_masks(lambda b, h, q, kv: q >= kv, lambda b, h, m, n: m < 3), "false or q_idx >= kv_idx or q_idx < 3"),
    ],
)  # fmt: skip
def test_four_parameters_are_a_mask_mod_whatever_their_names(function: Callable[..., Any], text: str) -> None:
    """FlexAttention passes b, h, q_idx, kv_idx by position; and_masks and or_masks of torch among others."""
    assert attngen.expression(function) == text


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda score, batch, head, token_q, token_kv: score * 0.5 + token_q, "score * 0.5 + q_idx"),
        (lambda s, b, h, m, n: s + (m - n), "score + (q_idx - kv_idx)"),
        (lambda s, b, h, *places: s + places[1], "score + kv_idx"),
        (lambda score, *places: score + places[1], "score + h"),
    ],
)
def test_five_parameters_are_a_score_mod(function: Callable[..., Any], text: str) -> None:
    """The score comes first; a known name among them tells how many there are before `*rest`."""
    assert attngen.expression(function) == text


def test_declared_parameters_stand_beside_those_by_position() -> None:
    """A declared name is what is declared, wherever it stands."""
    written = attngen.expression(
        lambda score, batch, head, q, kv, slopes: score + slopes[head] * (kv - q), tensors=SLOPES
    )
    assert written == "score + slopes[h] * (kv_idx - q_idx)"


def pairs(parts: st.SearchStrategy[str], *signs: str) -> st.SearchStrategy[str]:
    return st.tuples(parts, st.sampled_from(signs), parts).map(lambda each: f"({' '.join(each)})")


NUMBERS = st.recursive(
    st.sampled_from(["q_idx", "kv_idx", "h", "3", "-2"]),
    lambda numbers: (
        pairs(numbers, "+", "-")
        | st.tuples(numbers, st.sampled_from(["* 3", "* -2", "// 3", "// -2", "% 3"])).map(
            "({0[0]} {0[1]})".format
        )
        | numbers.map("(-{})".format)
    ),
    max_leaves=6,
)
CONDITIONS = st.recursive(
    # Never of constants alone: Python would compare those itself.
    pairs(NUMBERS, "<", "<=", ">", ">=", "==", "!=").map(lambda pair: f"(h - {pair[1:]}"),
    lambda conditions: pairs(conditions, "&", "|") | conditions.map("(~{})".format),
    max_leaves=5,
)


@given(CONDITIONS, st.tuples(*[st.integers(0, 9)] * 3))
def test_the_text_means_what_the_function_means(condition: str, values: tuple[int, int, int]) -> None:
    """The language is Python's here, so that Python itself says whether a bracket is missing."""
    function = eval(f"lambda q_idx, kv_idx, h: (q_idx < 0) | {condition}")
    written = attngen.expression(function)
    names = dict(zip(("q_idx", "kv_idx", "h"), values, strict=True))
    assert eval(written, names.copy()) == bool(
        function(**{key: torch.tensor(value) for key, value in names.items()})
    )


def test_declared_tensors_and_scalars_are_handed_over_by_name() -> None:
    """Indexed, used as numbers, and given to definitions of the prelude; in any order of the parameters."""
    declared = Declarations(tensors={"slopes": TensorType("slopes", "f32", ("num_heads_q",))})
    slope = attngen.expression(lambda slopes, score, h, kv_idx: score + slopes[h] * kv_idx, tensors=SLOPES)
    assert slope == "score + slopes[h] * kv_idx" and parse_score(slope, declared)
    alibi = attngen.expression(lambda score, slopes: score + attngen.functions.alibi(slopes), tensors=SLOPES)
    assert alibi == "score + alibi(slopes)" and alibi.tensors == SLOPES and alibi.scalars == {}
    table = attngen.expression(
        lambda b, q_pos, kv_idx, ids, width: (ids[b, q_pos] == ids[b, kv_idx]) & (q_pos - kv_idx < width),
        tensors={"ids": "i32[batch, seqlen_k]"},
        scalars={"width": "i32 = 128"},
    )
    assert table == "ids[b, q_pos] == ids[b, kv_idx] and q_pos - kv_idx < width"


def test_an_expression_is_a_text_wherever_a_text_is_read() -> None:
    """In a dict, in `replace`, as a key, copied and pickled; faults beside it are drawn in the dict's YAML."""
    causal = attngen.expression(lambda q_idx, kv_idx: q_idx >= kv_idx)
    biased = attngen.expression(lambda score, h, slopes: score + slopes[h], tensors=SLOPES)
    spec = attngen.load(
        {"problem": {"head_dim": 64}, "tensors": biased.tensors, "mask": causal, "score": biased}
    )
    assert (
        spec.mask == causal
        and spec.replace({"mask": causal}) == spec
        and attngen.load(spec.to_yaml()) == spec
    )
    assert hash(causal) == hash("q_idx >= kv_idx") and repr(causal) == "Expression('q_idx >= kv_idx')"
    for twin in (pickle.loads(pickle.dumps(biased)), copy.copy(biased)):
        assert twin == biased and twin.tensors == SLOPES
    with pytest.raises(attngen.SpecError) as caught:
        attngen.load({"problem": {"head_dim": 65}, "mask": causal})
    assert str(caught.value.diagnostics[0].location) == "<dict>:2:13"


def test_the_function_may_be_any_that_has_parameters() -> None:
    """A partial, a method, an object that is called."""

    class Band:
        width = 8

        def __call__(self, q_idx: Any, kv_idx: Any) -> Any:
            return q_idx - kv_idx < self.width

    def within(width: int, q_idx: Any, kv_idx: Any) -> Any:
        return q_idx - kv_idx < width

    for function in (
        Band(),
        Band().__call__,
        functools.partial(within, 8),
        functools.partial(within, width=8),
    ):
        assert attngen.expression(function) == "q_idx - kv_idx < 8"


@pytest.mark.parametrize(
    ("function", "rule", "said"),
    [
        (lambda q_idx, kv_idx: 0 < q_idx < kv_idx, "traced-truth", "(a < b) & (b < c)"),
        (lambda q_idx, kv_idx: q_idx < 3 and kv_idx < 3, "traced-truth", "&"),
        (lambda q_idx, kv_idx: not q_idx < 3, "traced-truth", "~"),
        (lambda q_idx, kv_idx: kv_idx < (3 if q_idx < 2 else 4), "traced-truth", "attngen.where(c, x, y)"),
        (lambda q_idx, kv_idx: max(q_idx, kv_idx) < 3, "traced-truth", "attngen.where"),
        (lambda q_idx: q_idx in (1, 2), "traced-truth", "q_idx == 1"),
        (lambda q_idx, kv_idx: [1, 2][q_idx] < 3, "traced-value", "a torch tensor"),
        (lambda q_idx, kv_idx: torch.arange(9) < q_idx, "traced-operands", "without an index"),
        (lambda q_idx, kv_idx: int(q_idx) < 3, "traced-value", "only the kernel knows"),
        (lambda q_idx, kv_idx: all(q_idx), "traced-value", "holds no others"),
        (lambda q_idx, kv_idx: q_idx**2 < kv_idx, "traced-operators", "no such operation on `q_idx`"),
        (lambda q_idx, kv_idx: q_idx ^ kv_idx, "traced-operators", "bitwise `^`"),
        (lambda q_idx, kv_idx: (q_idx & 5) == 1, "traced-operators", "2**n - 1"),
        (lambda q_idx, kv_idx: q_idx << kv_idx, "traced-operators", "by a constant"),
        (lambda q_idx, kv_idx: (q_idx < 1) & kv_idx, "traced-operators", "`x != 0`"),
        (lambda q_idx, kv_idx: (q_idx < 1) - (kv_idx < 1), "traced-operators", "`a ^ b`"),
        (lambda q_idx, kv_idx: q_idx.item() < 3, "traced-function", "`q_idx` has no 'item'"),
        (lambda q_idx, kv_idx: np.abs(q_idx - kv_idx) < 3, "traced-function", "torch's functions"),
        (lambda q_idx, kv_idx: np.where(q_idx < 3, q_idx, kv_idx) < 3, "traced-function", "torch's functions"),
        (lambda q_idx, kv_idx: np.arange(9)[q_idx] < 3, "traced-function", "cannot be read"),
        (lambda q_idx, kv_idx: [].pop() < kv_idx, "traced-function", "pop from empty list"),
        (lambda score: score.add_(1), "traced-operators", "x = x.add(y)"),
        (lambda score: torch.zeros(()).add_(score), "traced-operators", "writes to a tensor"),
        (lambda score: torch.nn.functional.gelu(score), "traced-operators", "no torch.gelu"),
        (lambda score: score.add(1, alpha=2), "traced-operators", "torch.add with these arguments"),
        (lambda score: torch.clamp(score, lo=1), "traced-function", "clamp() received an invalid"),
        (lambda score: score.to(torch.bfloat16), "traced-operators", "convert to torch.bfloat16"),
        (lambda score: score + score.new_ones((3,)), "traced-operators", "shape (3,)"),
        (lambda score: torch.nn.Parameter(torch.tensor(1.0)) * score, "traced-tensors", ".detach()"),
        (lambda q_idx, kv_idx: torch.erf(q_idx) < 1, "traced-operators", "torch.erf"),
        (lambda q_idx, kv_idx: q_idx < "3", "traced-operands", "no str '3'"),
        (lambda q_idx, kv_idx: q_idx < None, "traced-operands", "no NoneType None"),
        (lambda score: score + float("nan"), "traced-operands", "no float nan"),
        (lambda q_idx: True, "traced-result", "returns True"),
        (lambda q_idx: None, "traced-result", "returns None"),
        (lambda score: 0.5, "traced-result", "returns 0.5"),
        (lambda q_index, kv_idx: q_index < 3, "traced-parameters", "q_index"),
        (lambda q_idx, *names: names[0] < 3, "traced-parameters", "*names"),
        (lambda q_idx, kv_idx, b, x: q_idx < x, "traced-parameters", "`x`"),
        (lambda b, h, q_idx, kv_idx, doc: doc < 3, "traced-parameters", "`doc`"),
        (lambda a, b, c: a < b, "traced-parameters", "score before them"),
        (lambda slopes: slopes < 3, "traced-parameters", "tensors={...}"),
        (max, "traced-parameters", "no function"),
        (5, "traced-parameters", "no function"),
    ],
)  # fmt: skip
def test_what_python_cannot_say_is_told_with_the_cure(function: Any, rule: str, said: str) -> None:
    """Truth values, numbers, foreign operators and operands, wrong results and wrong parameters."""
    fault = only(function)
    assert fault.rule == rule and said in fault.draw()


def test_a_parameter_that_is_misspelt_names_its_neighbour() -> None:
    """The nearest of the language's names and of the declared ones."""
    assert only(lambda q_index, kv_idx: q_index < kv_idx).nearest[0] == "q_idx"
    assert only(lambda slope, score: score, tensors=SLOPES).nearest[0] == "slopes"


def test_a_tensor_without_an_index_and_what_it_is_not() -> None:
    """Arithmetic on the tensor itself, and a loop over it."""
    assert only(lambda score, slopes: score + slopes, tensors=SLOPES).rule == "traced-operands"
    assert only(lambda score, slopes: score + sum(slopes), tensors=SLOPES).rule == "traced-value"


@pytest.mark.parametrize(
    ("function", "declared", "rule"),
    [
        (lambda q_idx, kv_idx: (q_idx < 3) + kv_idx, {}, "expression-types"),
        (lambda q_idx, kv_idx: q_idx * 0.5 // 2 < kv_idx, {}, "expression-types"),
        (lambda q_idx, kv_idx: q_idx - kv_idx, {}, "expression-types"),
        (lambda score, q_idx: score < q_idx, {}, "expression-types"),
        (lambda score, slopes, h: score + slopes[h, h], {"tensors": SLOPES}, "tensor-index"),
        (lambda score, slopes, h: score * slopes[h], {"tensors": {"slopes": "f33[batch]"}}, "tensor-types"),
        (lambda score, h: score * h, {"scalars": {"h": "f32"}}, "reserved-names"),
    ],
)  # fmt: skip
def test_what_the_language_refuses_is_told_in_the_text(
    function: Callable[..., Any], declared: dict[str, Any], rule: str
) -> None:
    """Types, the number of indices, and declarations, by the rules that a spec is held to."""
    assert only(function, **declared).rule == rule


def test_an_expression_that_doubles_is_stopped() -> None:
    """Not after minutes."""

    def doubling(score: Any) -> Any:
        for _ in range(60):
            score = score * score
        return score

    assert only(doubling).rule == "expression-length"


def test_a_function_that_is_no_function_of_the_language() -> None:
    """An attribute error that knows the nearest."""
    with pytest.raises(AttributeError, match="softcap"):
        attngen.functions.softcapp  # noqa: B018
    assert {"softcap", "where", "tanh", "causal"} <= set(dir(attngen.functions))


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"scalars": {"w": 5}}, "got 'w': int 5, expected a text for each name\n  hint: write scalars={'w': 'i32"),
        ({"scalars": {"w": 0.5}}, "write scalars={'w': 'f32 = 0.5'}"),
        ({"scalars": {"w": True}}, "write scalars={'w': 'bool = true'}"),
        ({"scalars": {"w": None}}, "got 'w': NoneType None"),
        ({"tensors": {"t": torch.zeros(2, 12, dtype=torch.int32)}}, "write tensors={'t': 'i32[2, 12]'}"),
        ({"tensors": {"t": torch.zeros(3, dtype=torch.bfloat16)}}, "write tensors={'t': 'bf16[3]'}"),
        ({"tensors": {"t": np.zeros((2, 3))}}, "write tensors={'t': 'f32[2, 3]'}"),
        ({"tensors": {"t": [0.5, 1.0]}}, "write tensors={'t': 'f32[batch]'}"),
        ({"tensors": {"t": torch.tensor(3)}}, "write scalars={'t': 'i32 = 3'}"),
        ({"scalars": {"w": torch.zeros(3)}}, "write tensors={'w': 'f32[3]'}"),
        ({"scalars": {5: "i32"}}, "got 5: str 'i32', expected a name before each text"),
        ({"scalars": ["w"]}, "got list ['w'], expected texts of declarations by name"),
        ({"scalars": "w"}, "got str 'w', expected texts of declarations by name"),
        ({"tensors": 3}, "write tensors={'doc': 'i32[batch, seqlen_k]'}"),
    ],
)  # fmt: skip
def test_what_is_no_declaration_is_refused_with_one_that_is(declared: dict[str, Any], message: str) -> None:
    """The key, the value, and the text to write."""
    with pytest.raises(attngen.ArgumentError) as caught:
        attngen.expression(lambda q_idx: q_idx > 3, **declared)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", ["scalars", "tensors"])
@pytest.mark.parametrize("given", ["w", ["w"], 3])
def test_declarations_of_a_call_are_texts_by_name(kind: str, given: Any) -> None:
    """As those of an expression."""
    q = torch.zeros(1, 4, 1, 32, dtype=torch.bfloat16)
    with pytest.raises(attngen.ArgumentError, match="expected texts of declarations by name"):
        attngen.attention(q, q, q, "causal", **{kind: given})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_no_text() -> None:
    """Of a strided one torch does not tell the shape."""
    nested = torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.strided)
    for spec in ({"mask": nested}, {"score": nested}):
        with pytest.raises(attngen.ArgumentError, match="expected a text of the language"):
            attngen.load({"problem": {"head_dim": 64}, **spec})


@pytest.mark.parametrize("number", [5, -5, 0, 0.5, -0.0, float("inf"), 2**31 - 1])
def test_the_sign_of_a_number_is_part_of_it(number: float) -> None:
    """However often it is turned."""

    def function(score: Any, q_idx: Any) -> Any:
        like = q_idx if isinstance(number, int) else score
        return score + operator.neg(operator.neg(like.new_tensor(number)))

    assert attngen.expression(function) == f"score + {number!r}"


def test_a_number_of_two_signs_is_a_constant() -> None:
    """To a shift and to an index."""
    table = torch.arange(9)

    def function(q_idx: Any) -> Any:
        five, two = (operator.neg(operator.neg(q_idx.new_tensor(number))) for number in (5, 2))
        return table[five] + (q_idx << two) > 3

    assert attngen.expression(function) == "mask_table[5] + q_idx * 4 > 3"


def test_the_name_of_a_declared_dimension_is_taken() -> None:
    """A tensor that is held is called otherwise."""
    x = torch.arange(9)
    text = attngen.expression(lambda kv_idx, t: x[kv_idx] > t[kv_idx], tensors={"t": "i32[mask_x]"})
    assert text == "mask_x_2[kv_idx] > t[kv_idx]"
    assert text.tensors == {"t": "i32[mask_x]", "mask_x_2": "i32[mask_x_2_size0]"}
