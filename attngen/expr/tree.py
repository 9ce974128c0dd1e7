"""The typed tree of the expression language: hash-consed nodes and the affine normal form of i32 expressions.

Two expressions that mean the same by the rules below are the same object, so `is` compares meanings:

- An i32 expression is an affine form: atoms (names, lookups, and what is no sum of others, such as `q_idx // 64`) with
  integer factors, in the order of `sort_key`, then a constant.
- A comparison of i32 holds one affine form that is compared with zero, divided by the greatest common divisor of its
  coefficients (see logic.py, which also keeps conjunctions and disjunctions canonical).
- f32 arithmetic is left as it is written, since its order matters; constants are folded, rounded to f32.

Trees are made by this module, arithmetic.py and logic.py. Text is made in text.py and cuda.py.
"""

import struct
import threading
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakValueDictionary

from attngen.errors import InternalError

Type = Literal["bool", "i32", "f32"]
Op = Literal[
    "const",  # value: an integer, a truth value or an f32
    "name",  # name: an index, a length, `score`, a scalar of the spec, or what no text can name (below)
    "lookup",  # name: a tensor; args: one i32 for each of its dimensions, clamped to them when it is read
    "mul",  # i32. args: a constant other than 0 and 1, and an atom
    "add",  # i32. args: two or more of atom and mul, in the order of their atoms, then a constant unless it is 0
    "arith",  # name: `*`, `//` or `%` of two i32 that no affine form has, or `+`, `-`, `*` or `/` of two f32
    "call",  # name: a function of arithmetic.FUNCTIONS other than clamp and where; args: its arguments
    "where",  # args: a condition, the value where it holds, the value where it does not
    "le",  # args: an affine form; holds where it is at most 0
    "eq",  # args: an affine form whose first coefficient is positive; holds where it is 0
    "ne",  # the same; holds where it is not 0
    "compare",  # name: `<`, `<=`, `==` or `!=`, of two f32
    "and",  # args: two or more conditions, none of them `and`
    "or",  # args: two or more conditions, none of them `or`
    "not",  # args: a name, a lookup, a where or a `<` or `<=` of f32: what no other node can turn round
]

INDEX_NAMES = ("b", "h", "h_kv", "q_idx", "kv_idx", "seqlen_q", "seqlen_k")
"""The indices of the language: batch, query head, key/value head, row of q, row of k, and the two lengths."""

TILE_NAMES = ("q_idx.first", "q_idx.last", "kv_idx.first", "kv_idx.last", "q_idx.tile", "kv_idx.tile")
"""What trees about a tile also read: its first and last row and key that exist, and its number among the blocks of
rows and of keys. Like every name that is made up here, each holds a character that no name in a text has."""

LARGEST_INDEX = 2**30 - 1
"""No index exceeds this, and none is negative."""

LARGEST_DIVISOR = 2**31
"""Divisors are not multiplied to this or more: no literal could write them."""

LARGEST_TILE = 512
"""Most rows or keys of a tile on a GPU (a rule of the plan)."""

LARGEST_LENGTH = LARGEST_INDEX + 1 - LARGEST_TILE
"""No length exceeds this (a rule of every call): the last tile reaches past the end, and its rows are indices too."""

DECODING_RANGES = {
    **dict.fromkeys(
        ("call.batch", "call.num_heads_q", "call.group", "tile.m_max", "tile.n_max"), (1, LARGEST_INDEX)
    ),
    **dict.fromkeys(("tile.block_m", "tile.block_n"), (1, LARGEST_TILE)),
    **dict.fromkeys(("tile.index", "tile.row", "tile.section", "tile.rest"), (0, 2**31 - 1)),
    **dict.fromkeys(("tile.side", "tile.width"), (1, LARGEST_INDEX)),
    "tiles.count": (0, LARGEST_INDEX),
    **dict.fromkeys(("q_idx.start", "kv_idx.start"), (0, LARGEST_LENGTH)),
    **{"call.seqlen_q": (1, LARGEST_LENGTH), "call.seqlen_k": (0, LARGEST_LENGTH)},
    **{f"seen.{each}": (0, LARGEST_INDEX) for each in ("min", "full_begin", "full_end", "max", "last")},
    **{f"seen.{each}": (0, LARGEST_LENGTH) for each in ("first_all", "end_any", "end_all")},
    **{f"part.{each}": (0, LARGEST_INDEX) for each in ("n_begin", "n_end", "part", "parts")},
}
"""What tiles, and the blocks they see, are found by: sizes of a call and bounds, where there is a tile to decode."""


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Expr:
    """A node. Build one with the constructors below, never directly: they keep the canonical form.

    Attributes:
        op: what the node does; `Op` says what its arguments are.
        args: the nodes it is made of.
        name: what `Op` says, else empty; of an f32 `const` its bits, which tell -0.0 from 0.0.
        value: of a `const`, else 0.
        type: of the whole expression.
    """

    op: Op
    args: tuple["Expr", ...]
    name: str
    value: int | bool | float
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


def node(op: Op, args: tuple[Expr, ...], name: str, value: int | bool | float, type: Type) -> Expr:
    """The one node with these fields. It checks nothing: for the constructors of this package only."""
    key = (op, args, name, value, type)
    with _nodes_lock:
        found = _nodes.get(key)
        if found is None:
            found = _nodes[key] = Expr(op, args, name, value, type)
    return found


def const(value: int | bool) -> Expr:
    """A constant: an i32 from an int, a condition from a bool."""
    return node("const", (), "", value, "bool" if isinstance(value, bool) else "i32")


def real(value: float) -> Expr:
    """An f32 constant: the nearest f32, which beyond the largest is infinite."""
    rounded = round_to_f32(value)
    return node("const", (), rounded.hex(), rounded, "f32")


def round_to_f32(value: float) -> float:
    """The nearest f32, ties to even; infinite beyond the largest."""
    try:
        return float(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


TRUE = const(True)
FALSE = const(False)


def name(name: str) -> Expr:
    """An index or a length by its name, what a tile is found by, or `score`.

    Raises:
        InternalError: the language has no such name; the parser has told the user long before.
    """
    if name == "score":
        return scalar(name, "f32")
    if name not in (*INDEX_NAMES, *TILE_NAMES, *DECODING_RANGES):
        raise InternalError(f"the expression language has no name {name!r}")
    return scalar(name, "i32")


def scalar(name: str, type: Type) -> Expr:
    """A scalar that the spec declares, a value of the call."""
    return node("name", (), name, 0, type)


def lookup(tensor: str, indices: tuple[Expr, ...], type: Type) -> Expr:
    """The element of a tensor; each index is clamped to its dimension when it is read."""
    return node("lookup", indices, tensor, 0, type)


def found_of(lookup: Expr) -> Expr:
    """What a lookup gave, in a tree that does not look it up again; its name is the lookup's text, which is no name."""
    return scalar(str(lookup), lookup.type)


def affine(coefficients: Mapping[Expr, int], constant: int) -> Expr:
    """The sum of coefficient times atom, plus the constant."""
    terms = [
        atom if coefficient == 1 else node("mul", (const(coefficient), atom), "", 0, "i32")
        for atom, coefficient in sorted(coefficients.items(), key=lambda term: sort_key(term[0]))
        if coefficient
    ]
    if constant or not terms:
        terms.append(const(constant))
    return terms[0] if len(terms) == 1 else node("add", tuple(terms), "", 0, "i32")


def affine_parts(expr: Expr) -> tuple[dict[Expr, int], int]:
    """Coefficients by atom, in the order of the atoms, and the constant of an i32 expression.

    Raises:
        InternalError: the expression is no i32.
    """
    if expr.type != "i32":
        raise InternalError(f"{expr} is no i32")
    coefficients: dict[Expr, int] = {}
    constant = 0
    for term in expr.args if expr.op == "add" else (expr,):
        if term.op == "const":
            constant = int(term.value)
        elif term.op == "mul":
            factor, atom = term.args
            coefficients[atom] = int(factor.value)
        else:
            coefficients[term] = 1
    return coefficients, constant


def add(a: Expr, b: Expr) -> Expr:
    """The sum a + b of two i32."""
    return total(((1, a), (1, b)))


def total(terms: Iterable[tuple[int, Expr]]) -> Expr:
    """The sum of factor times i32, at once: one by one, each sum would be sorted anew."""
    coefficients: dict[Expr, int] = {}
    constant = 0
    for factor, form in terms:
        more, more_constant = affine_parts(form)
        for atom, coefficient in more.items():
            coefficients[atom] = coefficients.get(atom, 0) + factor * coefficient
        constant += factor * more_constant
    return affine(*_without_remainders(coefficients, constant))


def _without_remainders(coefficients: dict[Expr, int], constant: int) -> tuple[dict[Expr, int], int]:
    """k · (x % c) - k · x is -k · c · (x // c), wherever the sum has both and c is positive."""
    while (
        atom := next((each for each in coefficients if _is_taken_back(each, coefficients)), None)
    ) is not None:
        factor, dividend, divisor = coefficients[atom], atom.args[0], int(atom.args[1].value)
        parts, rest = affine_parts(dividend)
        coefficients = {
            each: count for each, count in coefficients.items() if each is not atom and each not in parts
        }
        quotient = _quotient(dividend, divisor)
        coefficients[quotient] = coefficients.get(quotient, 0) - factor * divisor
        constant += factor * rest
    return coefficients, constant


def _is_taken_back(atom: Expr, coefficients: Mapping[Expr, int]) -> bool:
    """Whether an atom of a sum is some x % c, and the sum takes x away as often as it adds that."""
    factor = coefficients[atom]
    if atom.op != "arith" or atom.name != "%" or atom.args[1].op != "const" or not factor:
        return False
    parts, _ = affine_parts(atom.args[0])
    return int(atom.args[1].value) > 0 and all(
        coefficients.get(part, 0) == -factor * count for part, count in parts.items()
    )


def _quotient(dividend: Expr, divisor: int) -> Expr:
    """The canonical x // c of the x of a canonical x % c: (x // s) // c is x // (s · c)."""
    if (steps := steps_of(dividend)) and steps * divisor < LARGEST_DIVISOR:
        dividend, divisor = dividend.args[0], steps * divisor
    return node("arith", (dividend, const(divisor)), "//", 0, "i32")


def steps_of(number: Expr) -> int:
    """The c of an i32 that is some x // c, else 0."""
    is_quotient = number.op == "arith" and number.name == "//" and number.args[1].op == "const"
    return int(number.args[1].value) if is_quotient else 0


def scale(factor: int, a: Expr) -> Expr:
    """The product factor · a."""
    coefficients, constant = affine_parts(a)
    return affine(
        {atom: factor * coefficient for atom, coefficient in coefficients.items()}, factor * constant
    )


def sub(a: Expr, b: Expr) -> Expr:
    """The difference a - b."""
    return add(a, scale(-1, b))


def nodes(*exprs: Expr, known: Container[Expr] = (), below: Container[Op] | None = None) -> tuple[Expr, ...]:
    """Every node of the trees once, arguments before what they are arguments of.

    Args:
        exprs: the trees.
        known: what is left out, with all that only it holds.
        below: the ops whose arguments are followed; by default all.
    """
    found: dict[Expr, None] = {}
    pending = [(expr, False) for expr in reversed(exprs)]
    while pending:
        expr, is_open = pending.pop()
        if expr in found or expr in known:
            continue
        if is_open:
            found[expr] = None
        else:
            pending.append((expr, True))
            if below is None or expr.op in below:
                pending.extend((arg, False) for arg in reversed(expr.args))
    return tuple(found)


def with_nodes(expr: Expr, by: Mapping[Expr, Expr]) -> Expr:
    """The tree with other nodes in the place of some, each of the same type; for printing only: the form may not be
    canonical.
    """
    made: dict[Expr, Expr] = {}
    for each in nodes(expr):
        args = tuple(made[arg] for arg in each.args)
        made[each] = by.get(each) or node(each.op, args, each.name, each.value, each.type)
    return made[expr]


@lru_cache(maxsize=64)  # a simulated kernel asks at every tile
def free_names(expr: Expr) -> frozenset[str]:
    """The names an expression reads, without those of tensors."""
    return frozenset(each.name for each in nodes(expr) if each.op == "name")


@lru_cache(maxsize=64)
def tensor_names(expr: Expr) -> frozenset[str]:
    """The tensors an expression reads."""
    return frozenset(each.name for each in nodes(expr) if each.op == "lookup")


def sort_key(expr: Expr) -> tuple[Any, ...]:
    """A total order on nodes that depends on their content only, so that it is the same in every process."""
    for each in nodes(expr, known=_sort_keys):
        args = tuple(_sort_keys[arg] for arg in each.args)
        _sort_keys[each] = (each.op, each.name, each.value, each.type, args)
    return _sort_keys[expr]


_sort_keys: WeakKeyDictionary[Expr, tuple[Any, ...]] = WeakKeyDictionary()
