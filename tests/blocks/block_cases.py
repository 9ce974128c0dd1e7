"""Calls with given blocks: a spec, sizes, and a map that is drawn, all kept, none kept, or without some rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

import attngen
from attngen.check.judging import judge, judge_gradients

SCHEDULES = ("serial", "fa2", "warp_specialized", "pingpong")
DIM = 16


class Tensors(NamedTuple):
    """What a call takes, and the gradient of its output."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor


@dataclass(frozen=True)
class BlockCase:
    """A spec with given blocks, and the sizes of a call.

    Attributes:
        blocks: rows and keys of a block of the map.
        tile: rows and keys of a tile; None leaves it open.
        heads: of Q and of K and V.
        shared: the map has one batch, or one head, for all.
        more: other keys of the spec.
    """

    schedule: str = "fa2"
    mask: str = "causal"
    blocks: tuple[int, int] = (32, 32)
    tile: tuple[int, int] | None = (32, 32)
    lengths: tuple[int, int] = (107, 139)
    heads: tuple[int, int] = (4, 2)
    batch: int = 2
    shared: tuple[bool, bool] = (False, False)
    target: str = "simulator"
    dim: int = DIM
    more: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.schedule} {self.mask} {self.blocks} in {self.tile} {self.lengths} {self.heads}"

    @property
    def spec(self) -> dict[str, Any]:
        """The spec, with gradients."""
        tile = (
            {} if self.tile is None else {"tile": dict(zip(("block_m", "block_n"), self.tile, strict=True))}
        )
        return {
            "target": self.target,
            "problem": {"head_dim": self.dim},
            "mask": self.mask,
            "blocks": dict(zip(("block_m", "block_n"), self.blocks, strict=True)),
            "schedule": {"kind": self.schedule},
            "gradients": ["q", "k", "v"],
            **tile,
            **self.more,
        }

    @property
    def kernel(self) -> attngen.Kernel:
        """Its kernel."""
        return attngen.compile(self.spec)

    @property
    def without_blocks(self) -> attngen.Kernel:
        """The kernel of the same spec, but for its blocks."""
        return attngen.compile({key: value for key, value in self.spec.items() if key != "blocks"})

    def inputs(self, device: str = "cpu") -> Tensors:
        """Q, K, V and dO, N(0, 1)."""
        generator = torch.Generator().manual_seed(11)
        (rows, keys), (heads, heads_kv) = self.lengths, self.heads
        shapes = ((rows, heads), (keys, heads_kv), (keys, heads_kv), (rows, heads))
        return Tensors(
            *(
                torch.randn(self.batch, *shape, self.dim, generator=generator).to(device, torch.bfloat16)
                for shape in shapes
            )
        )

    @property
    def map_shape(self) -> tuple[int, int, int, int]:
        """Of the map."""
        batch, heads = (
            1 if is_shared else size
            for is_shared, size in zip(self.shared, (self.batch, self.heads[0]), strict=True)
        )
        rows, keys = (-(-length // block) for length, block in zip(self.lengths, self.blocks, strict=True))
        return batch, heads, rows, keys

    def drawn(self, share: float = 0.5, seed: int = 3) -> torch.Tensor:
        """A map of which that share is kept; where it has several rows, the second has nothing in every other head."""
        kept = torch.rand(self.map_shape, generator=torch.Generator().manual_seed(seed)) < share
        if kept.shape[2] > 1:
            kept[:, ::2, 1] = False
        return kept


def lists_of(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts and indices of the kept blocks of a map; what lies behind the count is no block at all."""
    counts = kept.sum(-1).to(torch.int32)
    indices = torch.argsort(kept.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
    is_listed = torch.arange(kept.shape[-1], device=kept.device) < counts[..., None]
    return counts, indices.where(is_listed, 2**30)


def run(kernel: attngen.Kernel, inputs: Tensors, **declared: Any) -> tuple[torch.Tensor, ...]:
    """Out, lse, dq, dk and dv."""
    q, k, v, dout = inputs
    out, lse = kernel(q, k, v, return_lse=True, **declared)
    return out, lse, *kernel.backward(dout, q, k, v, out, lse, **declared)


def complaints(kernel: attngen.Kernel, inputs: Tensors, **declared: Any) -> list[str]:
    """What is beyond the bounds of output and gradients, by the fp64 reference on the spec's own mask."""
    q, k, v, dout = inputs
    out, lse, *gradients = run(kernel, inputs, **declared)
    accuracy = judge(kernel.spec, kernel.plan, out, lse, q, k, v, declared=declared)
    of_gradients = judge_gradients(kernel.spec, gradients, (q, k, v), dout, out, lse, declared=declared)
    return [*accuracy.failures, *of_gradients.failures]


def are_equal(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    """Whether all are the same bits."""
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
