"""CUDA text, torch values and key ranges at the edges: 64 bits, broadcasting, what has no closed form."""

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from attngen.errors import InternalError
from attngen.expr import (
    LARGEST_INDEX,
    LARGEST_LENGTH,
    Declarations,
    IndexRange,
    Leaves,
    TensorType,
    affine,
    const,
    evaluate,
    extremes,
    free_names,
    key_range,
    name,
    parse_mask,
    to_cuda,
)
from tests.expr.strategies import MASKS, NAMES

LARGEST = {key: LARGEST_LENGTH if key.startswith("seqlen") else LARGEST_INDEX for key in NAMES}
PLAIN = {key: key for key in (*NAMES, "b", "h_kv")}


@dataclass(frozen=True)
class CInteger:
    """An integer of C: a result has the width of its wider operand, and one that does not fit is a fault."""

    value: int
    bits: int

    def __post_init__(self) -> None:
        assert -(2 ** (self.bits - 1)) <= self.value < 2 ** (self.bits - 1), "overflow"

    def __neg__(self) -> "CInteger":
        return CInteger(-self.value, self.bits)

    def __add__(self, other: "CInteger") -> "CInteger":
        return CInteger(self.value + other.value, max(self.bits, other.bits))

    def __sub__(self, other: "CInteger") -> "CInteger":
        return CInteger(self.value - other.value, max(self.bits, other.bits))

    def __mul__(self, other: "CInteger") -> "CInteger":
        return CInteger(self.value * other.value, max(self.bits, other.bits))

    def __lt__(self, other: "CInteger") -> bool:
        return self.value < other.value

    def __le__(self, other: "CInteger") -> bool:
        return self.value <= other.value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CInteger) and self.value == other.value

    __hash__ = None  # type: ignore[assignment]


def run_c(text: str, env: dict[str, int]) -> bool:
    """The value of a C condition, with the widths that C gives its parts."""
    python = re.sub(r"\b(\d+)(LL)?\b", lambda m: f"number({m[1]}, {64 if m[2] else 32})", text)
    python = re.sub(r"\(long long\)(number\([^)]*\)|\w+)", r"wide(\1)", python)
    python = (
        python.replace("&&", " and ").replace("||", " or ").replace("true", "True").replace("false", "False")
    )
    scope: dict[str, Any] = {key: CInteger(value, 32) for key, value in env.items()}
    scope |= {"number": CInteger, "wide": lambda operand: CInteger(operand.value, 64)}
    return bool(eval(python, {"__builtins__": {}}, scope))


@given(MASKS, st.fixed_dictionaries({key: st.sampled_from([0, 1, 7, LARGEST[key]]) for key in NAMES}))
@example("q_idx + seqlen_k + h < kv_idx", LARGEST)
@example("3 * 1000000000 < q_idx", LARGEST)
@example("5 * q_idx - 5 * kv_idx < 3", LARGEST)
def test_cuda_text_overflows_nowhere(text: str, env: dict[str, int]) -> None:
    """With the widths C gives its parts, no partial sum overflows at the largest indices, and the value is right."""
    assert run_c(to_cuda(parse_mask(text), Leaves(PLAIN)), env) == bool(evaluate(parse_mask(text), env))


@pytest.mark.parametrize(
    ("text", "cuda"),
    [
        ("causal", "kv_idx <= q_idx + p.seqlen_k - p.seqlen_q"),
        ("full", "true"),
        ("b < 1 and h < 2 or kv_idx == 0", "h <= 1 && b <= 0 || kv_idx == 0"),
        ("(b < 1 or h < 2) and kv_idx != 0", "kv_idx != 0 && (h <= 1 || b <= 0)"),
        ("2 * kv_idx <= q_idx", "2 * kv_idx <= q_idx"),
        ("3 * kv_idx <= q_idx", "3LL * kv_idx <= q_idx"),
        ("kv_idx <= q_idx + b + h", "kv_idx <= (long long)b + h + q_idx"),
        ("kv_idx <= 2 * b + h", "kv_idx <= 2LL * b + h"),
        ("kv_idx <= 3 - q_idx - b - h", "kv_idx <= 3LL - b - h - q_idx"),
        ("kv_idx <= 3 - q_idx", "kv_idx <= 3 - q_idx"),
        ("kv_idx < 3 * 1000000000", "kv_idx <= 2999999999LL"),
        ("kv_idx < q_idx + 3 * 1000000000", "kv_idx <= (long long)q_idx + 2999999999LL"),
    ],
)
def test_cuda_text_is_what_an_expert_would_write(text: str, cuda: str) -> None:
    """No bracket that C does not need, and 64 bits only where 32 may not do."""
    names = PLAIN | {"seqlen_q": "p.seqlen_q", "seqlen_k": "p.seqlen_k"}
    assert to_cuda(parse_mask(text), Leaves(names)) == cuda


@pytest.mark.parametrize(
    ("text", "cuda"),
    [
        ("im[q_idx] == im[kv_idx]", "{k} == {q}"),
        ("im[q_idx] != im[kv_idx]", "{k} == !{q}"),
        ("not im[q_idx] == im[kv_idx]", "{k} != {q}"),
        ("im[q_idx] == (kv_idx > 2)", "(kv_idx >= 3) == {q}"),
        ("(im[q_idx] != im[kv_idx]) and kv_idx < 2", "(kv_idx <= 1) & ({k} == !{q})"),
        ("im[q_idx] and kv_idx < 2 or not im[q_idx]", "((kv_idx <= 1) & {q}) | !{q}"),
    ],
)  # fmt: skip
def test_conditions_on_elements_are_compared_as_such(text: str, cuda: str) -> None:
    """What says that both hold or neither is one comparison, since both elements are loaded anyway."""
    declared = Declarations(tensors={"im": TensorType("im", "bool", ("seqlen_k",))})
    leaves = Leaves(PLAIN, {"im": "read_im"}, {"im": ("p.size",)})
    read = {
        side: f"read_im(params, clamp_index({name}, p.size))"
        for side, name in (("q", "q_idx"), ("k", "kv_idx"))
    }
    assert to_cuda(parse_mask(text, declared), leaves) == cuda.format(**read)


@pytest.mark.parametrize(
    ("operand", "written"),
    [
        ("row0 + 8", "(row0 + 8)"),
        ("p.len", "p.len"),
        ("rows[i]", "rows[i]"),
        ("f(x, y)", "f(x, y)"),
        ("-x", "(-x)"),
    ],
)
def test_an_operand_that_is_a_sum_is_put_in_brackets(operand: str, written: str) -> None:
    """A name may stand for any int expression, and the result binds as the tree does."""
    assert (
        to_cuda(parse_mask("kv_idx < 5 - q_idx"), Leaves({"kv_idx": "k", "q_idx": operand}))
        == f"k <= 4 - {written}"
    )


def test_a_name_without_a_value_is_our_fault() -> None:
    """Neither reading invents one."""
    with pytest.raises(InternalError, match="q_idx"):
        to_cuda(parse_mask("q_idx < 3"), Leaves({}))
    with pytest.raises(InternalError, match="q_idx"):
        evaluate(parse_mask("q_idx < 3"), {"kv_idx": 1})


def test_tensors_broadcast_and_are_computed_in_64_bits() -> None:
    """32-bit indices whose sum passes 31 bits are compared right, in the broadcast shape."""
    q_idx = torch.tensor([0, LARGEST_INDEX], dtype=torch.int32)[:, None]
    kv_idx = torch.tensor([0, 1, LARGEST_INDEX], dtype=torch.int32)[None, :]
    seen = evaluate(
        parse_mask("4 * q_idx + kv_idx <= 3 * seqlen_k"), {"q_idx": q_idx, "kv_idx": kv_idx, "seqlen_k": 1}
    )
    assert isinstance(seen, torch.Tensor) and seen.dtype == torch.bool
    assert seen.tolist() == [[True, True, False], [False, False, False]]


def test_without_tensors_a_value_is_plain_python() -> None:
    """`full` reads nothing, so its value has no shape."""
    assert evaluate(parse_mask("full"), {"q_idx": torch.arange(3)}) is True
    assert evaluate(parse_mask("b < 3"), {"b": 2}) is True
    assert evaluate(affine({name("b"): 2}, 1), {"b": 2}) == 5


@pytest.mark.parametrize(
    "text",
    [
        "b < 3",  # a condition on the row alone
        "causal and b < 3",
        "2 * kv_idx < q_idx",  # the bound is no affine form
        "kv_idx != 3",
        "kv_idx < 3 or kv_idx > 5",
        "causal and (kv_idx < 3 or h < 2)",
    ],
)
def test_other_masks_have_no_key_range(text: str) -> None:
    """What is not one range of keys for every row is None, not a wrong range."""
    assert key_range(parse_mask(text)) is None


def test_ranges_of_the_simplest_masks() -> None:
    """full has no bounds, false ends before the first key, an equation bounds on both sides."""
    assert key_range(parse_mask("full")) == IndexRange((), ())
    assert key_range(parse_mask("false")) == IndexRange((), (const(0),))
    assert key_range(parse_mask("kv_idx == q_idx")) == IndexRange(
        (name("q_idx"),), (affine({name("q_idx"): 1}, 1),)
    )
    assert key_range(parse_mask("q_idx - 128 < kv_idx <= q_idx")) == IndexRange(
        (affine({name("q_idx"): 1}, -127),), (affine({name("q_idx"): 1}, 1),)
    )


@given(
    st.dictionaries(st.sampled_from(NAMES), st.integers(-4, 4)),
    st.integers(-20, 20),
    st.sampled_from(NAMES),
    st.integers(0, 9),
    st.integers(0, 9),
)
def test_extremes_agree_with_brute_force(
    coefficients: dict[str, int], constant: int, over: str, first: int, length: int
) -> None:
    """The smallest and the largest value over a range, whatever the sign of the factor."""
    form = affine({name(key): factor for key, factor in coefficients.items()}, constant)
    env = {key: place for place, key in enumerate(NAMES)}
    low, high = extremes(form, over, affine({name("b"): 1}, first), affine({name("b"): 1}, first + length))
    values = [evaluate(form, env | {over: 2 + at}) for at in range(first, first + length + 1)]
    assert (evaluate(low, env | {"b": 2}), evaluate(high, env | {"b": 2})) == (min(values), max(values))
    assert over not in free_names(low) | free_names(high)
