"""The expression language: every reading of one tree agrees with plain Python."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from attngen.expr import Leaves, evaluate, key_range, parse_mask, to_cuda, to_text
from tests.effort import examples
from tests.expr.strategies import ENV, MASKS, NAMES, sums


@settings(max_examples=examples(1.5))
@given(MASKS, ENV)
def test_every_reading_agrees_with_python(text: str, env: dict[str, int]) -> None:
    """The value, the value of the canonical text, and the CUDA text, all as Python reads the original."""
    expected = bool(eval(text, {}, env))
    tree = parse_mask(text)
    assert bool(evaluate(tree, env)) == expected
    assert bool(evaluate(parse_mask(to_text(tree)), env)) == expected
    python = re.sub(
        r"\b(\d+)LL\b", r"\1", to_cuda(tree, Leaves({key: key for key in env})).replace("(long long)", "")
    )
    python = re.sub(r"!(?!=)", " not ", python.replace("&&", " and ").replace("||", " or "))
    python = re.sub(r"\btrue\b", "True", re.sub(r"\bfalse\b", "False", python))
    assert bool(eval(python, {}, env)) == expected


_ROW_NAMES = tuple(name for name in NAMES if name != "kv_idx")
_BOUNDS = st.builds(
    lambda left, sign, right: f"{left} {sign} {right}",
    st.sampled_from(["kv_idx", "kv_idx + 2", "3 - kv_idx", "kv_idx - h"]),
    st.sampled_from(["<", "<=", ">", ">=", "=="]),
    sums(_ROW_NAMES),
)


@given(st.lists(_BOUNDS, min_size=1, max_size=3).map(" and ".join), ENV)
def test_a_conjunction_of_bounds_has_a_key_range_and_it_is_exact(text: str, env: dict[str, int]) -> None:
    """A key is visible if and only if it lies between the bounds, found by trying every key."""
    tree = parse_mask(text)
    found = key_range(tree)
    assert found is not None
    for kv_idx in range(80):
        at = env | {"kv_idx": kv_idx}
        inside = all(evaluate(lower, at) <= kv_idx for lower in found.lower) and all(
            kv_idx < evaluate(upper, at) for upper in found.upper
        )
        assert inside == bool(eval(text, {}, at))


@given(MASKS, ENV)
def test_where_any_mask_has_a_key_range_it_is_exact(text: str, env: dict[str, int]) -> None:
    """The same for masks of any form: either there is no closed form, or it is the mask."""
    found = key_range(parse_mask(text))
    for kv_idx in range(40) if found else ():
        at = env | {"kv_idx": kv_idx}
        inside = all(evaluate(lower, at) <= kv_idx for lower in found.lower) and all(
            kv_idx < evaluate(upper, at) for upper in found.upper
        )
        assert inside == bool(eval(text, {}, at))
