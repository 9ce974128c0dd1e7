"""Batches of sequences of any lengths, and what a dense kernel makes of each sequence alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

import attngen
from attngen.kernel import Kernel

HEADS, HEADS_KV, DIM = 4, 2, 16


@cache
def compiled(
    schedule: str, queries: str, keys: str, mask: str, gradients: bool = False, tokens: bool = True
) -> Kernel:
    """A kernel for the simulator of tiles of 8 by 8; `tokens` says in which dimension declared tensors have keys."""
    tensors = {"seg": "i32[tokens_k]" if tokens else "i32[batch, seqlen_k]", "limit": "i32[batch]"}
    return attngen.compile(
        {
            "target": "simulator",
            "problem": {"head_dim": DIM, "queries": queries, "keys": keys},
            "mask": mask,
            "tensors": {name: text for name, text in tensors.items() if f"{name}[" in mask},
            "tile": {"block_m": 8, "block_n": 8},
            "schedule": {"kind": schedule},
            "gradients": ["q", "k", "v"] if gradients else [],
        }
    )


@dataclass(frozen=True)
class Batch:
    """Inputs of a call, and where in them the sequences lie.

    Attributes:
        queries, keys: the rows that each sequence uses: of a ragged tensor its own, of a padded one those of a batch.
        lengths: what the call says of them.
    """

    kinds: tuple[str, str]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    queries: tuple[slice, ...]
    keys: tuple[slice, ...]
    lengths: dict[str, torch.Tensor]

    def sequences(self) -> Iterator[tuple[int, Any, Any]]:
        """The number of each sequence, and the places of its queries and keys in a tensor of rows of heads."""
        for b, (rows, keys) in enumerate(zip(self.queries, self.keys, strict=True)):
            yield (
                b,
                *(
                    rows if kind == "ragged" else (b, rows)
                    for kind, rows in zip(self.kinds, (rows, keys), strict=True)
                ),
            )


def batch(
    queries: str,
    keys: str,
    seqlens_q: tuple[int, ...],
    seqlens_k: tuple[int, ...],
    unused: int = 0,
    leftpad: int = 0,
    tail: int = 0,
    poison: float | None = None,
) -> Batch:
    """Random inputs.

    Args:
        queries: how they are cut, like keys.
        keys: see queries.
        seqlens_q: rows that each sequence uses.
        seqlens_k: keys likewise.
        unused: rows and keys behind those that a sequence uses.
        leftpad: keys ahead of them.
        tail: rows and keys behind the last sequence, of ragged ones.
        poison: what stands wherever nothing is used.
    """
    make = torch.Generator().manual_seed(len(seqlens_q))
    lengths: dict[str, torch.Tensor] = {}
    tensors, places = [], []
    for letter, kind, used, heads, ahead in (
        ("q", queries, seqlens_q, (HEADS,), 0),
        ("k", keys, seqlens_k, (HEADS_KV, HEADS_KV), leftpad),
    ):
        stored = [ahead + length + unused for length in used]
        starts = torch.tensor([0, *stored]).cumsum(0).to(torch.int32)
        if kind == "ragged":
            lengths[f"cu_seqlens_{letter}"] = starts
            shape: tuple[int, ...] = (int(starts[-1]) + tail,)
            own = [
                slice(int(start) + ahead, int(start) + ahead + n)
                for start, n in zip(starts[:-1], used, strict=True)
            ]
        else:
            shape = (len(used), max(stored, default=0))
            own = [slice(ahead, ahead + n) for n in used]
        if unused or kind == "padded":
            lengths[f"seqused_{letter}"] = torch.tensor([ahead + n for n in used], dtype=torch.int32)
        if ahead:
            lengths["leftpad_k"] = torch.full((len(used),), ahead, dtype=torch.int32)
        places.append(tuple(own))
        for count in heads:
            x = torch.randn(*shape, count, DIM, generator=make).to(torch.bfloat16)
            if poison is not None:
                kept = torch.full_like(x, poison)
                for b, rows in enumerate(own):
                    at = rows if kind == "ragged" else (b, rows)
                    kept[at] = x[at]
                x = kept
            tensors.append(x)
    return Batch((queries, keys), *tensors, *places, lengths)
