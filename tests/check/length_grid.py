"""The problems that every kernel must be right on, and the one judgement of them that simulator and GPU tests share.

`test_mutants.py` holds that the judgement refuses, on every point, what is nearly right.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, Protocol

import torch

from attngen.check.accuracy import Accuracy, compare
from attngen.check.inputs import MemoryLayout, Shape, arrange, random_inputs
from attngen.expr import parse_mask
from attngen.simulate import one_thread

LENGTHS = (
    (1, 1),
    (64, 128),
    (113, 203),
    (239, 1),
    (799, 3),
    (128, 217),
    (1023, 1024),
    (1024, 1023),
    (4096, 4096),
)
LONGEST_ON_CPU = 217
"""There each length is capped at this: the tests shall finish, and every case of a block's edge is still met.

Left out there: rows that see more than a few blocks of the tiles a GPU has, and batches. Small tiles make up for it,
see `simulate/test_simulator_values.py`.
"""
HEAD_DIMS = ((32, 32), (40, 40), (64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128))
HEADS = ((4, 4), (8, 2), (4, 1))
"""Of Q and of K and V: one each (MHA), 4:1 (GQA), one for all (MQA)."""
MASKS = ("full", "causal")
INPUTS = {"f16": torch.float16, "bf16": torch.bfloat16}
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
OTHER_LAYOUTS: tuple[MemoryLayout, ...] = ("strided", "bhsd", "offset")


class Attend(Protocol):
    """A kernel, or what passes for one."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        softmax_scale: float | None,
        return_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True)
class Point:
    """One problem: a spec's worth of constants, a shape, and random values."""

    shape: Shape
    dims: tuple[int, int]
    inputs: str
    mask: str
    softmax_scale: float | None = None
    seed: int = 0

    def spec(self, kind: str) -> dict[str, Any]:
        """The spec of a kernel for it, as `attngen.compile` takes it."""
        return {
            "problem": {"head_dim": {"qk": self.dims[0], "v": self.dims[1]}},
            "mask": self.mask,
            "precision": {"inputs": self.inputs},
            "schedule": {"kind": kind},
        }

    def draw(self, device: str) -> Tensors:
        """q, k and v, contiguous: the same values on every device and under every mask."""
        return _draw(self.shape, self.dims, INPUTS[self.inputs], device, self.seed)


@lru_cache(maxsize=32)
def _draw(shape: Shape, dims: tuple[int, int], dtype: torch.dtype, device: str, seed: int) -> Tensors:
    """Kept for as many points as one head dim and dtype has: drawing takes longer than a kernel."""
    return random_inputs(shape, *dims, dtype, device, seed)


@dataclass(frozen=True)
class Verdict:
    """How an output stands to the reference, and which memory layouts gave other bits than the contiguous one."""

    point: Point
    accuracy: Accuracy
    unlike: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return self.accuracy.ok and not self.unlike

    def __str__(self) -> str:
        unlike = f"; other bits on inputs that are {', '.join(self.unlike)}" if self.unlike else ""
        return f"{self.point}: {self.accuracy}{unlike}"


@one_thread()
def judge(
    attend: Attend, point: Point, device: str = "cpu", layouts: Sequence[MemoryLayout] = OTHER_LAYOUTS
) -> Verdict:
    """Hold out and lse against the fp64 reference on contiguous inputs, and the other layouts against these bits."""
    mask = parse_mask(point.mask)
    q, k, v = point.draw(device)
    out, lse = attend(q, k, v, softmax_scale=point.softmax_scale, return_lse=True)
    accuracy = compare(out, lse, q, k, v, mask, point.softmax_scale)
    unlike = []
    for layout in layouts:
        again = attend(*arrange(q, k, v, layout), softmax_scale=point.softmax_scale, return_lse=True)
        if not (torch.equal(again[0], out) and torch.equal(again[1], lse)):
            unlike.append(layout)
    return Verdict(point, accuracy, tuple(unlike))


def complaints(attend: Attend, points: Iterable[Point], device: str = "cpu") -> str:
    """A line for every point that is judged wrong."""
    verdicts = [judge(attend, point, device) for point in points]
    return "\n".join(str(verdict) for verdict in verdicts if not verdict.ok)


def points(dims: tuple[int, int], inputs: str, mask: str, longest: int | None = None) -> Iterator[Point]:
    """Every length of the grid, each at most `longest`, with every kind of heads."""
    capped = [tuple(min(n, longest or n) for n in lengths) for lengths in LENGTHS]
    for seed, (lengths, heads) in enumerate(product(dict.fromkeys(capped), HEADS)):
        batch = 1 if longest or max(lengths) > 2000 else 3
        yield Point(Shape(batch, *heads, *lengths), dims, inputs, mask, seed=seed)
