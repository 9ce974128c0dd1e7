"""The error rule for models: how far from f32 a result in bf16 may be, each of its parts by itself.

No further than twice eager attention in bf16, and a rounding of one part in 128 besides, as the tests have it.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from figures import BLOCK, Tensors

OF_EAGER, ROUNDING = 2.0, 2.0**-7


def by_blocks(rows: torch.Tensor) -> Tensors:
    """A result (1, rows, ...) by blocks of rows."""
    return rows[0].split(BLOCK)


class Judgement(NamedTuple):
    """How far a result is from what is exact.

    Attributes:
        error: the largest of a part, over that part's norm.
        of_allowed: the largest of a part, over what it may be.
    """

    error: float
    of_allowed: float

    @property
    def is_right(self) -> bool:
        """Whether no part is further away than it may be; one that is no number is."""
        return self.of_allowed <= 1

    @classmethod
    def worst(cls, found: Iterable["Judgement"]) -> "Judgement":
        """The largest of each number; infinite where one is none."""
        columns = zip(*found, strict=True)
        return cls(*(max(math.inf if math.isnan(x) else x for x in column) for column in columns))


class Exact:
    """What a result should be, by eager attention in f32.

    Args:
        exact: parts of it.
        eager: the same parts by eager attention in bf16.
    """

    def __init__(self, exact: Sequence[torch.Tensor], eager: Sequence[torch.Tensor]) -> None:
        self._exact = exact
        self._allowed = OF_EAGER * self._errors(eager) + ROUNDING

    def _errors(self, made: Sequence[torch.Tensor]) -> torch.Tensor:
        """The norm of what each part differs by, over that part's norm."""
        pairs = zip(made, self._exact, strict=True)
        return torch.stack([(x.float() - y).norm() / y.norm() for x, y in pairs])

    def judged(self, made: Sequence[torch.Tensor]) -> Judgement:
        """How far a result is from this one, part by part."""
        errors = self._errors(made)
        return Judgement(float(errors.max()), float((errors / self._allowed).max()))
