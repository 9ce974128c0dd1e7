"""Formulas: numbers of a call, as trees over its run-time sizes. They are plain data, so a manifest can hold them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from attngen.expr import PAGE_SIZES

Formula = int | str | dict[str, Any]
"""An integer, the name of a run-time value, or {"op": one of FORMULA_OPS, "args": [...]}."""

FORMULA_OPS: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "ceil_div": lambda a, b: -(-a // b),
    "max": max,
    "min": min,
    "common_power": lambda a, b: (a | b) & -(a | b),
}

RUNTIME_SIZES = (
    "batch", "seqlen_q", "seqlen_k", "num_heads_q", "num_heads_kv", "group", "num_sms", "tokens_q", "tokens_k",
    *PAGE_SIZES,
)  # fmt: skip
"""Run-time values that a formula may name; group = num_heads_q // num_heads_kv, num_sms of the GPU at hand; tokens are
the rows of all sequences, and of ragged ones seqlen is a bound that the caller gives, or the tokens. Where keys are
paged, a cache has so many pages of page_size rows, a table so many rows of max_pages entries, and seqlen_k is what so
many pages hold."""


@dataclass(frozen=True)
class Guard:
    """A condition on the sizes of a call: one of them is at most a number."""

    size: str
    at_most: int

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether a call of these sizes meets it."""
        return self.size in sizes and sizes[self.size] <= self.at_most


def evaluate_formula(formula: Formula, values: Mapping[str, int]) -> int:
    """The value of a formula; operators take two or more arguments, from the left."""
    if isinstance(formula, int):
        return formula
    if isinstance(formula, str):
        return values[formula]
    first, *rest = (evaluate_formula(argument, values) for argument in formula["args"])
    for argument in rest:
        first = FORMULA_OPS[formula["op"]](first, argument)
    return first


def sizes_in(formula: Formula) -> frozenset[str]:
    """The run-time values that a formula names."""
    if isinstance(formula, dict):
        return frozenset().union(*map(sizes_in, formula["args"]))
    return frozenset((formula,) if isinstance(formula, str) else ())


def formula_text(formula: Formula) -> str:
    """A formula as people read it: ceil_div(seqlen_k, 128)."""
    if isinstance(formula, dict):
        return f"{formula['op']}({', '.join(map(formula_text, formula['args']))})"
    return str(formula)


def product(*factors: Formula) -> Formula:
    """The formula that multiplies its arguments."""
    return {"op": "mul", "args": list(factors)}


def total(*terms: Formula) -> Formula:
    """The formula that adds its arguments."""
    return {"op": "add", "args": list(terms)}


def minimum(*values: Formula) -> Formula:
    """The formula of the smallest of its arguments."""
    return {"op": "min", "args": list(values)}


def maximum(*values: Formula) -> Formula:
    """The formula of the largest of its arguments."""
    return {"op": "max", "args": list(values)}


def common_power(a: Formula, b: Formula) -> Formula:
    """The formula of the largest power of two that divides both."""
    return {"op": "common_power", "args": [a, b]}


def ceil_div(a: Formula, b: Formula) -> Formula:
    """The formula that divides and rounds up."""
    return {"op": "ceil_div", "args": [a, b]}
