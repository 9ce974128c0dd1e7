"""What a spec says of a query and a key, taken apart for the places where a kernel works it out."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from attngen.expr import (
    INDEX_NAMES,
    Expr,
    IndexRange,
    free_names,
    key_range,
    magnitude,
    mask_of_pairs,
    name,
    nodes,
    shown_keys,
    tensor_names,
    with_nodes,
)
from attngen.expr.arithmetic import negative, over, plus, times
from attngen.expr.tree import real
from attngen.plan.steps import TANH, ByTanh

SCORE = name("score")


@dataclass(frozen=True)
class Pairs:
    """What a spec says of a query and a key.

    Attributes:
        mask: whether the query sees the key; within a tile, what is asked of its pairs.
        visible: the keys that a row sees, where they have a closed form.
        interval: those that the mask leaves to a row of a tile that is visited, where they have one.
        score: out of `score`, the scaled product and what is `added` to it; times `score_factor` in natural units.
        score_factor: positive; a factor that the exponentials take for nothing.
        added: what the accumulators of the score GEMM start from, in the units of the scaled product.
        shown: what the mask asks of a key whatever the query; None where that is nothing.
    """

    mask: Expr
    visible: IndexRange | None
    interval: IndexRange | None
    score: Expr
    score_factor: float = 1.0
    added: Expr | None = None
    shown: Expr | None = None

    @classmethod
    def of(cls, mask: Expr, score: Expr, sorted_tensors: Collection[str] = ()) -> "Pairs":
        """What a mask and a score say; a constant factor is taken off the score, unless it might overflow or vanish."""
        visible, shown = key_range(mask, sorted_tensors), shown_keys(mask)
        if score.op == "arith" and score.name == "*":
            a, b = score.args
            for factor, rest in ((a, b), (b, a)):
                if factor.op == "const" and 2.0**-64 <= float(factor.value) <= 2.0**64:
                    return cls(mask, visible, visible, rest, float(factor.value), shown=shown)
        return cls(mask, visible, visible, score, shown=shown)

    def within(self, block_m: int, block_n: int) -> "Pairs":
        """What is asked of the pairs of a tile of so many rows and keys: not what is the same for all of them."""
        mask = mask_of_pairs(self.mask, block_m, block_n)
        return self if mask is self.mask else replace(self, mask=mask, interval=key_range(mask))

    def seeded(self) -> "Pairs":
        """Take out of the score what is added to the product, wherever that enters.

        A term that is looked up for each key stays, and what is added after it: behind the GEMM it has longer to come.
        So does one that may be huge, for all that the text says.
        """
        total, added = SCORE, None
        while (parent := _only_use(total, self.score)) and (term := _term_beside(total, parent)) is not None:
            added = term if added is None else plus(added, term)
            total = parent
        return replace(self, score=with_nodes(self.score, {total: SCORE}), added=added)

    @property
    def hides_beside_end(self) -> bool:
        """Whether a tile may visit keys that no query may see beside those behind the last that one may.

        In closed form what is asked of keys is often that they lie before an end, which ends the first block visited.
        """
        if self.shown is None:
            return False
        before_end = None if self.visible is None else key_range(self.shown)
        return before_end is None or bool(before_end.lower)

    @property
    def by_tanh(self) -> ByTanh | None:
        """What of `score` its one tanh takes, and the score out of the value of that, as `ModifyScores` wants them.

        None where there is no such tanh, it takes anything but a multiple, or `score` enters elsewhere too.
        """
        found = [each for each in nodes(self.score) if each.name == "tanh"]
        if len(found) != 1 or (multiple := _multiple_of_score(found[0].args[0])) is None:
            return None
        rest = with_nodes(self.score, {found[0]: TANH})
        return None if "score" in free_names(rest) else ByTanh(multiple, rest)

    @property
    def magnitude(self) -> float:
        """What no score is larger than, in natural units; infinite where that is not known."""
        return self.score_factor * magnitude(self.score)

    @property
    def modifies_scores(self) -> bool:
        """Whether the score is anything but the scaled product, or the sum that the score GEMM leaves."""
        return self.score is not SCORE or (self.score_factor != 1 and self.added is None)


def loads_by_key(expr: Expr) -> list[Expr]:
    """The lookups of an expression that differ from key to key."""
    return [each for each in nodes(expr) if each.op == "lookup" and "kv_idx" in free_names(each)]


def _only_use(part: Expr, whole: Expr) -> Expr | None:
    """The node of a tree that alone has `part` among its operands, if there is one."""
    users = [each for each in nodes(whole) if part in each.args]
    return users[0] if len(users) == 1 else None


def _term_beside(total: Expr, parent: Expr) -> Expr | None:
    """What a sum adds to `total`; None where it is no such sum."""
    if parent.op != "arith" or parent.name not in "+-":
        return None
    a, b = parent.args
    term = b if a is total else a
    if "score" in free_names(term) or loads_by_key(term) or (b is total and parent.name == "-"):
        return None
    if _may_be_huge(term):
        return None
    return term if parent.name == "+" else negative(term)


LARGEST_SEED = 2.0**14
"""Of larger numbers the tensor core drops too much while it adds up (`lower.features.COLUMNS_SEEDED`), and over a small
softmax_scale they might overflow."""


def _may_be_huge(term: Expr) -> bool:
    """Whether a term has a large number, or a scalar or an element that may stand for padding.

    An element that is multiplied by a number made of indices, as a slope by a distance, is trusted to stand for none.
    """
    found = nodes(term)
    slopes = {
        slope
        for each in found
        if each.op == "arith" and each.name == "*"
        for slope, other in (each.args, each.args[::-1])
        if _is_of_indices(other)
    }
    return any(
        (each.op == "const" and LARGEST_SEED < abs(float(each.value)) < math.inf)
        or (each.op == "name" and each.name not in INDEX_NAMES)
        or (each.op == "lookup" and each not in slopes)
        for each in found
    )


_ARITHMETIC = ("const", "name", "add", "mul", "arith")


def _is_of_indices(expr: Expr) -> bool:
    """Whether an expression is arithmetic on indices and numbers, of one size for all that is near a query."""
    return (
        "kv_idx" in free_names(expr)
        and free_names(expr) <= set(INDEX_NAMES)
        and all(each.op in _ARITHMETIC or each.name in ("f32", "abs") for each in nodes(expr))
    )


def _multiple_of_score(expr: Expr) -> Expr | None:
    """How many times `score` an expression is, where that is the same for all pairs and looks nothing up."""
    if expr is SCORE:
        return real(1.0)
    if expr.op != "arith" or expr.name not in "*/":
        return None
    a, b = expr.args
    for part, other in ((a, b), (b, a)) if expr.name == "*" else ((a, b),):
        depends = free_names(other) & {"score", "q_idx", "kv_idx"} or tensor_names(other)
        if not depends and (multiple := _multiple_of_score(part)) is not None:
            return times(multiple, other) if expr.name == "*" else over(multiple, other)
    return None
