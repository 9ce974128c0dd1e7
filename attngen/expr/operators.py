"""Operators and literals of a syntax tree: what resolve.py reads without looking up a name."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise, takewhile
from typing import Any

from lark import Token, Tree
from lark.tree import Meta

from attngen.expr.arithmetic import compare, floor_divide, minus, modulo, negative, over, plus, times, where
from attngen.expr.logic import conjunction, disjunction, negate
from attngen.expr.ranges import LARGEST_I32, index_range
from attngen.expr.syntax import Syntax
from attngen.expr.tree import FALSE, TRUE, Expr, affine_parts, const, real, total

MAX_NODES = 10_000
LARGEST_VALUE = 2**62  # of an i32 expression: one bit below i64, so that comparisons fit as well

WORDS = {"bool": "a condition", "i32": "an integer", "f32": "a real number", "number": "numbers"}
TYPES = {"bool": ("bool",), "i32": ("i32",), "number": ("i32", "f32"), "any": ("bool", "i32", "f32")}


class Formulas(ABC):
    """Gives operators their meaning. A node with a fault reads as None, and one fault is told once."""

    @abstractmethod
    def read(self, tree: Syntax, depth: int) -> Expr | None:
        """The meaning of a syntax tree that stands `depth` deep."""

    @abstractmethod
    def fault(
        self, rule: str, message: str, at: Meta | Token, note: str = "", nearest: tuple[str, ...] = ()
    ) -> None:
        """Record a fault."""

    @abstractmethod
    def _is_shallow(self, expr: Expr, at: Meta) -> bool:
        """Whether a tree is not too deep to be gone through; a long chain is asked at each link."""

    def _read_true(self, tree: Syntax, depth: int) -> Expr:
        return TRUE

    def _read_false(self, tree: Syntax, depth: int) -> Expr:
        return FALSE

    def _read_infinity(self, tree: Syntax, depth: int) -> Expr:
        return real(float("inf"))

    def _read_integer(self, tree: Syntax, depth: int) -> Expr | None:
        # A text of ten thousand digits is out of range without being read.
        digits = str(tree.children[0]).lstrip("0") or "0"
        if int(digits[:20]) <= LARGEST_I32:
            return const(int(digits))
        shown = digits if len(digits) <= 20 else digits[:20] + "…"
        note = f"an integer is at most {LARGEST_I32}"
        self.fault("number-range", f"has the integer {shown}", tree.meta, note, (str(LARGEST_I32),))
        return None

    def _read_real(self, tree: Syntax, depth: int) -> Expr | None:
        value = real(float(str(tree.children[0])))
        if value.value != float("inf"):
            return value
        self.fault("number-range", "has a number beyond the largest f32", tree.meta, nearest=("inf",))
        return None

    def _read_group(self, tree: Syntax, depth: int) -> Expr | None:
        return self.read(child(tree, 0), depth)

    def _read_signed(self, tree: Syntax, depth: int) -> Expr | None:
        sign = tree.children[0]
        operand = self._operand(child(tree, 1), depth, "number", f"`{sign}`")
        return negative(operand) if operand is not None and sign == "-" else operand

    def _read_sum(self, tree: Syntax, depth: int) -> Expr | None:
        operands = self._operands(tree.children[::2], depth, "number", "`+` and `-`")
        if operands is None:
            return None
        signs = [1, *(-1 if sign == "-" else 1 for sign in tree.children[1::2])]
        count = sum(1 for _ in takewhile(lambda operand: operand.type == "i32", operands))
        result = total(zip(signs[:count], operands[:count], strict=True)) if count else operands[0]
        if 0 < count < len(operands) and not self._is_in_range(result, tree.meta):
            return None
        for sign, operand in list(zip(signs, operands, strict=True))[max(count, 1) :]:
            result = plus(result, operand) if sign > 0 else minus(result, operand)
            if not self._is_shallow(result, tree.meta):
                return None
        return result

    def _read_product(self, tree: Syntax, depth: int) -> Expr | None:
        operands = self._operands(tree.children[::2], depth, "number", "`*`, `/`, `//` and `%`")
        product: Expr | None = operands[0] if operands else None
        places = tree.children[1:]
        for at in range(0, len(places), 2):
            if operands is None or product is None:
                return None
            product = self._scaled(str(places[at]), product, operands[at // 2 + 1], tree, child(tree, at + 2))
            if product is not None and not self._is_shallow(product, tree.meta):
                return None
        return product

    def _scaled(self, sign: str, a: Expr, b: Expr, tree: Syntax, divisor: Syntax) -> Expr | None:
        if a.type == "i32" and not self._is_in_range(a, tree.meta):
            return None
        if sign == "*":
            return times(a, b) if self._is_small_product(a, b, tree.meta) else None
        if sign == "/":
            if b.op != "const" or b.value:
                return over(a, b)
            self.fault("divisor", "divides by 0", divisor.meta)
            return None
        for operand, place in ((a, tree), (b, divisor)):
            if operand.type != "i32":
                message = f"gives {WORDS[operand.type]} to `{sign}`, which takes integers"
                self.fault("expression-types", message, place.meta, "`/` divides numbers", ("floor(x / y)",))
                return None
        lowest, highest = index_range(b)
        if lowest <= 0 <= highest:
            cure = f"max({b}, 1)"
            is_zero = lowest == highest
            message = "divides by 0" if is_zero else f"divides by what may be 0, in `{sign}`"
            note = "" if is_zero else f"it lies between {lowest} and {highest}"
            self.fault("divisor", message, divisor.meta, note, () if is_zero or len(cure) > 40 else (cure,))
            return None
        return floor_divide(a, b) if sign == "//" else modulo(a, b)

    def _is_small_product(self, a: Expr, b: Expr, at: Meta) -> bool:
        """Whether two sums multiplied out stay a tree of legal size."""
        if (
            a.type != "i32"
            or b.type != "i32"
            or len(affine_parts(a)[0]) * len(affine_parts(b)[0]) <= MAX_NODES
        ):
            return True
        self.fault("expression-size", "multiplies two sums of too many terms", at)
        return False

    def _read_comparison(self, tree: Syntax, depth: int) -> Expr | None:
        operands = self._operands(tree.children[::2], depth, "any", "a comparison")
        if operands is None or not self._are_comparable(operands, tree):
            return None
        pairs = list(zip(tree.children[1::2], pairwise(operands), strict=True))
        for _, (left, right) in pairs:
            are_integers = left.type == right.type == "i32"
            if are_integers and not self._is_in_range(minus(left, right), tree.meta):
                return None
        return conjunction(compare(str(sign), left, right) for sign, (left, right) in pairs)

    def _are_comparable(self, operands: Sequence[Expr], tree: Syntax) -> bool:
        """Whether all are numbers, or all conditions between which only == and != stand."""
        are_conditions = [operand.type == "bool" for operand in operands]
        if not any(are_conditions):
            return True
        if not all(are_conditions):
            condition = child(tree, 2 * are_conditions.index(True))
            note = "this is a condition; `where(c, 1, 0)` makes a number of it"
            self.fault("expression-types", "compares a condition with a number", condition.meta, note)
            return False
        for sign in tree.children[1::2]:
            if sign not in ("==", "!="):
                assert isinstance(sign, Token)
                note = "conditions have no order; they are compared by == and !="
                self.fault("expression-types", f"compares conditions by `{sign}`", sign, note, ("==", "!="))
                return False
        return True

    def _read_negation(self, tree: Syntax, depth: int) -> Expr | None:
        operand = self._operand(child(tree, 0), depth, "bool", "`not`")
        return None if operand is None else negate(operand)

    def _read_requirements(self, tree: Syntax, depth: int) -> Expr | None:
        operands = self._operands(tree.children, depth, "bool", "`and`")
        return None if operands is None else conjunction(operands)

    def _read_alternatives(self, tree: Syntax, depth: int) -> Expr | None:
        operands = self._operands(tree.children, depth, "bool", "`or`")
        return None if operands is None else disjunction(operands)

    def _read_choice(self, tree: Syntax, depth: int) -> Expr | None:
        yes, condition, no = tree.children
        return self._choose((condition, yes, no), tree, depth, "`if`")

    def _choose(self, trees: Sequence[Any], tree: Syntax, depth: int, taker: str) -> Expr | None:
        condition = self._operand(trees[0], depth, "bool", taker)
        yes, no = (self.read(each, depth) for each in trees[1:])
        if condition is None or yes is None or no is None:
            return None
        if (yes.type == "bool") == (no.type == "bool"):
            return where(condition, yes, no)
        note = f"one is {WORDS[yes.type]}, the other {WORDS[no.type]}"
        self.fault("expression-types", f"gives two kinds of values to {taker}", tree.meta, note)
        return None

    def _operands(self, trees: Sequence[Any], depth: int, type: str, taker: str) -> list[Expr] | None:
        """All operands, read before any is missed, so that each tells its own faults."""
        found = []
        for tree in trees:  # no comprehension, which is one more frame at each level of a deep text
            operand = self._operand(tree, depth, type, taker)
            if operand is not None:
                found.append(operand)
        return found if len(found) == len(trees) else None

    def _operand(self, tree: Syntax, depth: int, type: str, taker: str) -> Expr | None:
        operand = self.read(tree, depth)
        if operand is None or operand.type in TYPES[type]:
            return operand
        message = f"gives {WORDS[operand.type]} to {taker}, which takes {WORDS[type]}"
        self.fault("expression-types", message, tree.meta, f"this is {WORDS[operand.type]}")
        return None

    def _is_in_range(self, expr: Expr, at: Meta) -> bool:
        if max(map(abs, index_range(expr))) < LARGEST_VALUE:
            return True
        note = "indices and lengths reach 2^30; this may reach 2^62"
        self.fault("index-range", "leaves the range of an index", at, note)
        return False


def child(tree: Syntax, index: int) -> Syntax:
    """A child that is no token."""
    found = tree.children[index]
    assert isinstance(found, Tree)  # the grammar leaves no bare token there
    return found
