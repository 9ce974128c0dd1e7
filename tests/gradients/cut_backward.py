"""Backward passes of sequences with lengths of their own, by one kernel for all, on the simulator or a GPU."""

import math
from typing import Any

import torch

import attngen
from attngen.spec_call import GRADIENTS

KINDS = ("ragged ragged", "padded padded", "ragged padded", "dense ragged")
Seqlens = tuple[tuple[int, int], ...]
SEQLENS: Seqlens = ((70, 130), (0, 5), (200, 70), (1, 300))
"""Queries and keys of each sequence: of several blocks, of less than one, and of none."""
HEADS, HEADS_KV = 4, 2
AHEAD, BEHIND = 5, 9
"""Tokens that no sequence has."""


def fused(kinds: str, mask: str = "causal", head_dim: int = 64, **more: Any) -> attngen.Kernel:
    """A kernel of one program for all gradients."""
    queries, keys = kinds.split()
    spec = {
        "target": "sm_90a",
        "problem": {"head_dim": head_dim, "queries": queries, "keys": keys},
        "mask": mask,
        "gradients": list("qkv"),
        **more,
    }
    kernel = attngen.compile(spec)
    assert [plan.schedule for plan in kernel.call.gradients] == ["fused_gradients"]
    return kernel


class CutBatch:
    """Inputs of a call, with NaN wherever no sequence has anything.

    Attributes:
        named: what says lengths.
        places: of queries and of keys, where each sequence stands in a tensor.
    """

    def __init__(
        self,
        kinds: str,
        head_dim: int = 64,
        seqlens: Seqlens = SEQLENS,
        device: str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self._dtype = dtype
        self._generator = torch.Generator().manual_seed(len(seqlens))
        self.named: dict[str, torch.Tensor] = {}
        self.places: list[list[Any]] = []
        shapes: list[tuple[int, ...]] = []
        for letter, kind, lengths in zip("qk", kinds.split(), zip(*seqlens, strict=True), strict=True):
            if kind == "dense":
                lengths = (max(lengths),) * len(lengths)
            starts = torch.tensor([AHEAD, *lengths]).cumsum(0).int()
            if kind == "ragged":
                self.named[f"cu_seqlens_{letter}"] = starts.to(device)
                places = [slice(int(first), int(end)) for first, end in zip(starts, starts[1:], strict=False)]
                shapes.append((int(starts[-1]) + BEHIND,))
            else:
                places = [(b, slice(0, length)) for b, length in enumerate(lengths)]
                shapes.append((len(lengths), max(lengths) + (3 if kind == "padded" else 0)))
            if kind == "padded":
                self.named[f"seqused_{letter}"] = torch.tensor(lengths, dtype=torch.int32, device=device)
            self.places.append(places)
        self.q, self.k, self.v, self.dout = (
            self._drawn((*shapes[side], HEADS_KV if side else HEADS, head_dim), self.places[side]).to(device)
            for side in (0, 1, 1, 0)
        )

    def _drawn(self, shape: tuple[int, ...], places: list[Any]) -> torch.Tensor:
        drawn = torch.randn(shape, generator=self._generator).to(self._dtype)
        poisoned = torch.full_like(drawn, math.nan)
        for at in places:
            poisoned[at] = drawn[at]
        return poisoned

    def gradients(self, kernel: attngen.Kernel) -> tuple[torch.Tensor, ...]:
        """dq, dk and dv, f32."""
        return gradients_in_f32(kernel, self.q, self.k, self.v, self.dout, **self.named)


def gradients_in_f32(
    kernel: attngen.Kernel,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    made: tuple[torch.Tensor, torch.Tensor] | None = None,
    **named: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """dq, dk and dv of a call, in memory that held NaN; `made` is out and lse, the kernel's own where None."""
    out, lse = made or kernel(q, k, v, return_lse=True, **named)
    held = [torch.full_like(x, math.nan, dtype=torch.float32) for x in (q, k, v)]
    return kernel.backward(dout, q, k, v, out, lse, grads=held, **named)


def assert_each_is_a_dense_call(
    of: CutBatch, kinds: str, mask: str, head_dim: int, deterministic: bool, **more: Any
) -> None:
    """dk and dv are a dense call's to the bit, dq too where sums have one order; 0 in rows that no sequence has.

    Out and lse are those of all: a forward pass may take other tiles for a short sequence alone.
    """
    kernel = fused(kinds, mask, head_dim, deterministic=deterministic, **more)
    out, lse = made = kernel(of.q, of.k, of.v, return_lse=True, **of.named)
    found = gradients_in_f32(kernel, of.q, of.k, of.v, of.dout, made, **of.named)
    dense = fused("dense dense", mask, head_dim, deterministic=deterministic, **more)
    of_rows = lse.transpose(-1, -2)  # rows of sequences as in all else
    for rows, keys in zip(*of.places, strict=True):
        q, k, v, dout, own_out = (
            x[at][None] for x, at in ((of.q, rows), (of.k, keys), (of.v, keys), (of.dout, rows), (out, rows))
        )
        own_lse = of_rows[rows][None].transpose(-1, -2).contiguous()
        alone = gradients_in_f32(dense, q, k, v, dout, (own_out, own_lse))
        for name, gradient, own, at in zip(GRADIENTS, found, alone, (rows, keys, keys), strict=True):
            if name == "dq" and not deterministic:
                torch.testing.assert_close(gradient[at], own[0], rtol=2.0**-18, atol=1e-5)
            else:
                assert torch.equal(gradient[at], own[0]), name
            gradient[at] = 0.0
    assert not any(gradient.any() for gradient in found)
