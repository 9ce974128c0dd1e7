"""What is nearly right is refused on every point of the grid: the judgement of the kernels' tests has teeth.

A mutant is the reference, rounded as a kernel's output is, with one thing wrong. `gpu/test_grid_on_gpu.py` does the
same at full length.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from attngen.check.reference import attention, attention_chunked
from attngen.expr import parse_mask
from tests.check.length_grid import (
    HEAD_DIMS,
    INPUTS,
    LONGEST_ON_CPU,
    MASKS,
    Point,
    judge,
    points,
)

LONG = 1024
SMALLEST_BLOCK = 16
"""Keys in the smallest block that a GPU's plan has; a larger one is missed more."""


@dataclass(frozen=True)
class Rounded:
    """The reference under some mask, in a kernel's dtypes."""

    mask: str

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        exact = attention if q.device.type == "cpu" else attention_chunked
        out, lse = exact(q, k, v, parse_mask(self.mask))
        return out.to(q.dtype), lse.float()


def zeros(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """A kernel that computes nothing."""
    batch, seqlen_q, heads, _ = q.shape
    return q.new_zeros(batch, seqlen_q, heads, v.shape[3]), q.new_zeros(batch, heads, seqlen_q).float()


def mutants(point: Point) -> Iterator[tuple[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]]]:
    """Every mutant whose result differs from the true one at this point, by name."""
    yield "zeros", zeros
    last = (point.shape.seqlen_k - 1) % SMALLEST_BLOCK + 1
    yield "last block of keys dropped", Rounded(f"({point.mask}) and kv_idx < seqlen_k - {last}")
    if point.mask == "full":
        yield "one key too few", Rounded("kv_idx < seqlen_k - 1")
        return
    yield "one key too few", Rounded("kv_idx <= q_pos - 1")
    if point.shape.seqlen_q > 1:  # the only row sees all keys there are
        yield "one key too many", Rounded("kv_idx <= q_pos + 1")


def assert_teeth(dims: tuple[int, int], inputs: str, mask: str, longest: int | None, device: str) -> None:
    """The rounded reference passes at every point; every mutant fails by its lse and, of few keys, by its values."""
    for point in points(dims, inputs, mask, longest):
        honest = judge(Rounded(mask), point, device, layouts=())
        assert honest.ok, honest
        for name, mutant in mutants(point):
            verdict = judge(mutant, point, device, layouts=())
            failures = set(verdict.accuracy.failures)
            shows = (
                point.shape.seqlen_k < LONG or name == "zeros"
            )  # of 4096 keys, sixteen are less than out's rounding
            assert "lse" in failures and (failures & {"max", "rmse"} or not shows), (
                f"{name} passes: {verdict}"
            )


@pytest.mark.matrix
@pytest.mark.parametrize("dims", HEAD_DIMS, ids=lambda dims: f"d{dims[0]}x{dims[1]}")
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("mask", MASKS)
def test_no_mutant_passes(mask: str, inputs: str, dims: tuple[int, int]) -> None:
    """Zeros, a dropped last block and masks off by one fail on every point that the simulator is judged on."""
    assert_teeth(dims, inputs, mask, LONGEST_ON_CPU, "cpu")


def test_a_layout_that_matters_is_refused() -> None:
    """A kernel that takes every stride for the contiguous one is right on contiguous inputs alone."""

    def blind(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dense = [x.as_strided(x.shape, torch.empty(x.shape).stride()) for x in (q, k, v)]
        return Rounded("full")(*dense)

    point = next(p for p in points((32, 32), "bf16", "full", LONGEST_ON_CPU) if p.shape.seqlen_q == 113)
    verdict = judge(blind, point)
    assert verdict.accuracy.ok and set(verdict.unlike) == {"strided", "bhsd"}
