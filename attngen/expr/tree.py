"""The typed tree of the expression language: hash-consed nodes and the affine normal form of indices.

Two expressions that mean the same by the rules below are the same object, so `is` compares meanings:

- An index expression is an affine form: names in alphabetical order with integer factors, then a constant.
- A comparison holds one affine form that is compared with zero, divided by the greatest common divisor of its
  coefficients (see logic.py, which also keeps conjunctions and disjunctions canonical).

Text is made in text.py and cuda.py; this module neither parses nor prints.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakValueDictionary

from attngen.errors import InternalError

Type = Literal["bool", "i32", "f32"]
Op = Literal[
    "const",  # value: an integer, or a truth value
    "name",  # name: an index, a length, or `score`
    "mul",  # args: a constant other than 0 and 1, and a name
    "add",  # args: two or more of name and mul, in the order of their names, then a constant unless it is 0
    "le",  # args: an affine form; holds where it is at most 0
    "eq",  # args: an affine form whose first coefficient is positive; holds where it is 0
    "ne",  # the same; holds where it is not 0
    "and",  # args: two or more conditions, none of them `and`
    "or",  # args: two or more conditions, none of them `or`
]

INDEX_NAMES = ("b", "h", "h_kv", "q_idx", "kv_idx", "seqlen_q", "seqlen_k")
"""The names of the language: batch, query head, key/value head, row of q, row of k, and the two lengths."""

TILE_NAMES = ("q_first", "q_last")
"""What bounds over a tile also read: its first and last row. No text can name them."""

LARGEST_INDEX = 2**30 - 1
"""No index exceeds this, and none is negative."""

LARGEST_TILE = 512
"""Most rows or keys of a tile on a GPU (a rule of the plan)."""

LARGEST_LENGTH = LARGEST_INDEX + 1 - LARGEST_TILE
"""No length exceeds this (a rule of every call): the last tile reaches past the end, and its rows are indices too."""


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Expr:
    """A node. Build one with the constructors below, never directly: they keep the canonical form.

    Attributes:
        op: what the node does; `Op` says what its arguments are.
        args: the nodes it is made of.
        name: of a `name`, else empty.
        value: of a `const`, else 0.
        type: of the whole expression.
    """

    op: Op
    args: tuple["Expr", ...]
    name: str
    value: int | bool
    type: Type

    def __str__(self) -> str:
        from attngen.expr.text import to_text

        return to_text(self)

    def __repr__(self) -> str:
        return f"Expr({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return node, (self.op, self.args, self.name, self.value, self.type)  # a copy is the same object again


_nodes: WeakValueDictionary[tuple[object, ...], Expr] = WeakValueDictionary()
_nodes_lock = threading.Lock()


def node(op: Op, args: tuple[Expr, ...], name: str, value: int | bool, type: Type) -> Expr:
    """The one node with these fields. It checks nothing: for the constructors of this package only."""
    key = (op, args, name, value, type)
    with _nodes_lock:
        found = _nodes.get(key)
        if found is None:
            found = _nodes[key] = Expr(op, args, name, value, type)
    return found


def const(value: int | bool) -> Expr:
    """A constant: an index from an int, a condition from a bool."""
    return node("const", (), "", value, "bool" if isinstance(value, bool) else "i32")


TRUE = const(True)
FALSE = const(False)


def name(name: str) -> Expr:
    """An index or a length by its name, or `score`.

    Raises:
        InternalError: the language has no such name; the parser has told the user long before.
    """
    if name == "score":
        return node("name", (), name, 0, "f32")
    if name not in INDEX_NAMES + TILE_NAMES:
        raise InternalError(f"the expression language has no name {name!r}")
    return node("name", (), name, 0, "i32")


def affine(coefficients: Mapping[str, int], constant: int) -> Expr:
    """The sum of coefficient times name, plus the constant."""
    terms = [
        name(key) if coefficient == 1 else node("mul", (const(coefficient), name(key)), "", 0, "i32")
        for key, coefficient in sorted(coefficients.items())
        if coefficient
    ]
    if constant or not terms:
        terms.append(const(constant))
    return terms[0] if len(terms) == 1 else node("add", tuple(terms), "", 0, "i32")


def affine_parts(expr: Expr) -> tuple[dict[str, int], int]:
    """Coefficients by name, in the order of the names, and the constant of an index expression.

    Raises:
        InternalError: the expression is not an index.
    """
    if expr.type != "i32":
        raise InternalError(f"{expr} is no index expression")
    coefficients: dict[str, int] = {}
    constant = 0
    for term in expr.args if expr.op == "add" else (expr,):
        if term.op == "const":
            constant = int(term.value)
        elif term.op == "name":
            coefficients[term.name] = 1
        else:
            factor, index = term.args
            coefficients[index.name] = int(factor.value)
    return coefficients, constant


def add(a: Expr, b: Expr) -> Expr:
    """The sum a + b."""
    coefficients, constant = affine_parts(a)
    more, more_constant = affine_parts(b)
    for key, coefficient in more.items():
        coefficients[key] = coefficients.get(key, 0) + coefficient
    return affine(coefficients, constant + more_constant)


def scale(factor: int, a: Expr) -> Expr:
    """The product factor · a."""
    coefficients, constant = affine_parts(a)
    return affine({key: factor * coefficient for key, coefficient in coefficients.items()}, factor * constant)


def sub(a: Expr, b: Expr) -> Expr:
    """The difference a - b."""
    return add(a, scale(-1, b))


def substitute(form: Expr, index: str, by: Expr) -> Expr:
    """The affine form with the affine form `by` in the place of the name `index`."""
    coefficients, constant = affine_parts(form)
    factor = coefficients.pop(index, 0)
    return add(affine(coefficients, constant), scale(factor, by))


def free_names(expr: Expr) -> frozenset[str]:
    """The names an expression reads."""
    if expr.op == "name":
        return frozenset((expr.name,))
    return frozenset().union(*map(free_names, expr.args))


def sort_key(expr: Expr) -> tuple[Any, ...]:
    """A total order on nodes that depends on their content only, so that it is the same in every process."""
    return (expr.op, expr.name, int(expr.value), tuple(map(sort_key, expr.args)))
