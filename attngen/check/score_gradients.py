"""Gradients of what a score reads besides the product, written out: sums over the pairs that read an element.

So is that of a learned sink, the sum over the rows of its head.

With dT = P (dP - D) as in `gradients`, the gradient of an element is the sum of dT times the derivative of the score by
it over all pairs whose clamped indices find it. This module shares no code with the simulator or the kernels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attngen.check.problem import Problem
from attngen.expr import SINK, Expr, derivative, name, nodes

SUM = 2.0**-22
"""Of the magnitudes that are added up, what an f32 sum and the exponentials in it may lose: four roundings of each."""


class ScoreGradients:
    """The gradients of some of a call's declared tensors and scalars, as they grow.

    Attributes:
        sums: by name, in the shape of what is declared.
        squares, magnitudes: of what an error of dP or D by |dO| |V| moves each sum by, squared or not, and added up.
        is_read: which elements a pair of a weight other than 0 reads.
    """

    def __init__(self, problem: Problem, names: Sequence[str], number: torch.dtype) -> None:
        self._problem = problem
        values = {each: torch.as_tensor(problem.declared[each]) for each in names}
        score = name("score") if problem.score is None else problem.score
        self._reads: list[tuple[Expr, Expr]] = [
            (each, derivative(score, each))
            for each in nodes(score)
            if each.op in ("lookup", "name") and each.name in names
        ]
        device = problem.q.device
        self.sums, self.squares, self.magnitudes = (
            {each: torch.zeros(x.shape, dtype=number, device=device) for each, x in values.items()}
            for _ in range(3)
        )
        self.is_read = {
            each: torch.zeros(x.shape, dtype=torch.bool, device=device) for each, x in values.items()
        }

    def add(self, dt: Tensor, p: Tensor, size: Tensor, scaled: Tensor, places: tuple[Any, ...]) -> None:
        """Take in some rows of a head.

        Args:
            dt: (rows, seqlen_k), P (dP - D).
            p: like dt; pairs of weight 0 contribute nothing.
            size: like dt, |dO| |V|.
            scaled: like dt, the scaled products.
            places: b, h, q_idx and kv_idx of the pairs.
        """
        for read, derived in self._reads:
            slope = self._problem.values(derived, scaled, *places)
            at = self._elements(read, places, dt)
            moved = (p * slope * size).masked_fill(p == 0, 0.0)
            for into, what in (
                (self.sums, (dt * slope).masked_fill(p == 0, 0.0)),
                (self.squares, moved.square()),
                (self.magnitudes, moved.abs()),
            ):
                into[read.name].view(-1).index_add_(0, at, what.reshape(-1).to(into[read.name].dtype))
            self.is_read[read.name].view(-1)[at[(p != 0).reshape(-1)]] = True

    def add_sink(self, h: int, p: Tensor, times: Tensor, size: Tensor) -> None:
        """Take in some rows of head h: p, the weight of the sink in each, and what its gradient is times that."""
        if SINK not in self.sums:
            return
        for into, what in (
            (self.sums, (p * times).masked_fill(p == 0, 0.0)),
            (self.squares, (p * size).square()),
            (self.magnitudes, p * size.maximum(times.abs())),
        ):
            into[SINK][h] += what.sum().to(into[SINK].dtype)
        self.is_read[SINK][h] |= (p != 0).any()

    def _elements(self, read: Expr, places: tuple[Any, ...], like: Tensor) -> Tensor:
        """The number of the element that each pair reads: (pairs,)."""
        at = torch.zeros_like(like, dtype=torch.int64)
        for index, size in zip(read.args, self.sums[read.name].shape, strict=True):
            found = self._problem.values(index, torch.zeros_like(like, dtype=torch.float64), *places)
            at = at * size + found.to(torch.int64).clamp(0, size - 1)
        return at.reshape(-1)
