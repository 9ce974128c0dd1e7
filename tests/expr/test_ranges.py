"""Static ranges hold every value, and are exact where nothing is read twice."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attngen.errors import InternalError
from attngen.expr.arithmetic import call, compare, floor_divide, minus, modulo, plus, times, where
from attngen.expr.logic import less_equal
from attngen.expr.ranges import LARGEST_I32, SMALLEST_I32, index_range
from attngen.expr.tree import (
    LARGEST_INDEX,
    LARGEST_LENGTH,
    TILE_NAMES,
    Expr,
    const,
    lookup,
    name,
    real,
    scalar,
)
from tests.effort import examples

Q, K = name("q_idx"), name("kv_idx")
LENGTH = name("seqlen_k")


@pytest.mark.parametrize("index", ["q_idx", "kv_idx", "b", "h", "h_kv", *TILE_NAMES])
def test_an_index_is_never_negative(index: str) -> None:
    """Every index and every bound of a tile is from 0 to the largest index."""
    assert index_range(name(index)) == (0, LARGEST_INDEX)


def test_what_a_call_brings_may_be_any_i32() -> None:
    """A scalar, an element and a converted f32 keep the whole range; a length keeps its own."""
    everything = (SMALLEST_I32, LARGEST_I32)
    assert index_range(scalar("n", "i32")) == everything
    assert index_range(lookup("ids", (name("b"), Q), "i32")) == everything
    assert index_range(call("i32", scalar("x", "f32"))) == everything
    assert index_range(LENGTH) == (0, LARGEST_LENGTH)


M = LARGEST_INDEX


@pytest.mark.parametrize(
    ("expr", "expected"),
    [
        (plus(minus(Q, K), const(5)), (5 - M, 5 + M)),
        (times(const(-3), Q), (-3 * M, 0)),
        (times(Q, minus(K, const(1))), (-M, M * M)),
        (times(times(Q, Q), K), (0, M**3)),
        (floor_divide(minus(Q, const(1)), const(64)), (-1, (M - 1) // 64)),
        (floor_divide(Q, const(-7)), (-M // 7, 0)),
        (floor_divide(minus(Q, K), call("max", K, const(2))), (-M // 2, M // 2)),
        (floor_divide(minus(Q, const(8)), scalar("n", "i32")), (8 - M, M - 8)),
        (modulo(Q, const(64)), (0, 63)),
        (modulo(Q, const(-64)), (-63, 0)),
        (modulo(modulo(Q, const(8)), const(64)), (0, 7)),
        (modulo(plus(modulo(Q, const(8)), const(70)), const(64)), (6, 13)),
        (modulo(Q, minus(const(-1), modulo(K, const(5)))), (-4, 0)),
        (modulo(Q, scalar("n", "i32")), (SMALLEST_I32 + 1, LARGEST_I32 - 1)),
        (call("min", Q, const(9)), (0, 9)),
        (call("max", minus(Q, K), const(9)), (9, M)),
        (call("abs", minus(Q, const(9))), (0, M - 9)),
        (call("abs", minus(const(-9), Q)), (9, M + 9)),
        (call("sign", minus(const(-9), Q)), (-1, -1)),
        (call("sign", Q), (0, 1)),
        (where(less_equal(Q, K), Q, const(-4)), (-4, M)),
        (where(compare("<", scalar("x", "f32"), real(0.5)), const(2), const(7)), (2, 7)),
    ],
)  # fmt: skip
def test_a_range_is_exact_where_nothing_is_read_twice(expr: Expr, expected: tuple[int, int]) -> None:
    """Each operation's range as a person works it out."""
    assert index_range(expr) == expected


def test_only_integers_have_a_range() -> None:
    """A condition or an f32 is a fault of attngen's own."""
    with pytest.raises(InternalError):
        index_range(less_equal(Q, K))
    with pytest.raises(InternalError):
        index_range(name("score"))


def test_a_deep_tree_has_a_range() -> None:
    """Depth is no limit: thousands of nested nodes do not exhaust Python's stack."""
    deep = Q
    for step in range(5000):
        deep = call("max", deep, plus(K, const(step)))
    assert index_range(deep) == (4999, M + 4999)


_SMALL = st.tuples(st.integers(-9, 9), st.integers(0, 9)).map(lambda ends: (ends[0], ends[0] + ends[1]))


@settings(max_examples=examples(1.5))
@given(_SMALL, _SMALL)
def test_division_has_the_range_of_all_its_values(
    dividend: tuple[int, int], divisor: tuple[int, int]
) -> None:
    """`//` of every pair in two small ranges meets both ends, and `%` stays within."""
    a = call("min", call("max", scalar("m", "i32"), const(dividend[0])), const(dividend[1]))
    b = call("min", call("max", scalar("n", "i32"), const(divisor[0])), const(divisor[1]))
    b = const(divisor[0]) if divisor[0] == divisor[1] else b
    divisors = [d for d in range(divisor[0], divisor[1] + 1) if d]
    if not divisors:
        return
    pairs = [(x, d) for x in range(dividend[0], dividend[1] + 1) for d in divisors]
    quotients = [x // d for x, d in pairs]
    assert index_range(floor_divide(a, b)) == (min(quotients), max(quotients))
    lo, hi = index_range(modulo(a, b))
    assert all(lo <= x % d <= hi for x, d in pairs)
