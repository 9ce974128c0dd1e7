"""Chains without end: each is read, or refused by name; Python's stack is never the limit."""

from collections.abc import Callable
from typing import Any

import pytest

from attngen.errors import ExpressionError
from attngen.expr import parse_mask, parse_score, to_text
from attngen.expr.tree import Expr

MASKS = {
    "//": lambda n: "kv_idx" + " // (h + 1)" * n + " == 0",
    "// by constants": lambda n: "kv_idx" + " // 2" * n + " == 0",
    "%": lambda n: "kv_idx" + " % (h + 7)" * n + " == 0",
    "% by constants": lambda n: "kv_idx" + " % 7" * n + " == 0",
    "products of integers": lambda n: "kv_idx" + " * (h % 2)" * n + " == 0",
    "sums of integers": lambda n: "kv_idx" + "".join(f" + h // {i + 2}" for i in range(n)) + " == 0",
    "sums of remainders": lambda n: "kv_idx" + "".join(f" + h % {i + 2} - h" for i in range(n)) + " == 0",
    "and": lambda n: "causal" + "".join(f" and q_idx % {i + 2} == 0" for i in range(n)),
    "or": lambda n: "causal" + "".join(f" or q_idx % {i + 2} == 0" for i in range(n)),
    "and in or": lambda n: "causal" + " or q_idx < h and b < h" * n,
    "<": lambda n: "b" + "".join(f" < q_idx + {i}" for i in range(n)),
    "< of reals": lambda n: "0.5" + " < f32(h)" * n,
    "!=": lambda n: "b" + "".join(f" != {i}" for i in range(n)),
    "not": lambda n: "not " * n + "causal",
    "brackets": lambda n: "(" * n + "causal" + ")" * n,
    "and or brackets": lambda n: "(q_idx < h or kv_idx > b and " * n + "causal" + ")" * n,
    "let": lambda n: (
        "".join(f"let x{i} = {f'x{i - 1}' if i else 'h'} in " for i in range(n)) + f"x{n - 1} < 2"
    ),
}
SCORES = {
    "+": lambda n: "score" + " + f32(q_idx)" * n,
    "-": lambda n: "score" + " - score" * n,
    "*": lambda n: "score" + " * score" * n,
    "/": lambda n: "score" + " / score" * n,
    "+ and *": lambda n: "score" + " + 2.0 * score" * n,
    "signs": lambda n: "-" * n + "score",
    "if and else": lambda n: "".join(f"score * {i}.5 if b < {i} else " for i in range(n)) + "score",
    "if in if": lambda n: "(score if causal else " * n + "score" + ")" * n,
    "if in a condition": lambda n: "score if " + "(b < h if " * n + "causal" + " else causal)" * n + " else 0.0",
    "calls": lambda n: "exp(" * n + "score" + ")" * n,
    "minima": lambda n: "score + f32(" + "min(b, " * n + "h" + ")" * n + ")",
    "let of calls": lambda n: "".join(f"let x{i} = tanh({f'x{i - 1}' if i else 'score'}) in " for i in range(n))
    + f"x{n - 1}",
    "let of functions": lambda n: "".join(f"let g{i}(a) = {f'g{i - 1}(a)' if i else 'a'} in " for i in range(n))
    + f"g{n - 1}(score)",
    "let in let": lambda n: "let x = " * n + "score" + " in x" * n,
}  # fmt: skip


def below(depth: int, act: Callable[[], Any]) -> Any:
    """What an act gives when it is called deep in a program."""
    return act() if depth == 0 else below(depth - 1, act)


def outcome(parse: Callable[[str], Expr], text: str) -> Expr | None:
    """The tree, or None where it is refused by one of the limits of size."""
    try:
        return parse(text)
    except ExpressionError as refused:
        limits = ("expression-nesting", "expression-size", "expression-length", "index-range")
        assert refused.diagnostics[0].rule in limits, refused
        return None


@pytest.mark.parametrize("length", [99, 300, 500, 1200])
@pytest.mark.parametrize(
    ("parse", "chain"),
    [
        pytest.param(parse, chain, id=f"{parse.__name__} {kind}")
        for parse, chains in ((parse_mask, MASKS), (parse_score, SCORES))
        for kind, chain in chains.items()
    ],
)
def test_a_chain_is_read_or_refused_by_name(
    parse: Callable[[str], Expr], chain: Callable[[int], str], length: int
) -> None:
    """Of any length, from a program that is itself deep in calls; what is read can be written and read again."""
    tree = below(200, lambda: outcome(parse, chain(length)))
    assert tree is None or parse(to_text(tree)) is tree


@pytest.mark.parametrize(("parse", "text"), [(parse_mask, MASKS["or"](500)), (parse_mask, MASKS["let"](300))])
def test_a_chain_that_is_no_deeper_for_being_long_is_read(parse: Callable[[str], Expr], text: str) -> None:
    """Conditions in a row and lets one after another are not nested."""
    assert outcome(parse, text) is not None
