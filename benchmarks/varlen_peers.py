"""Attention of sequences one after another by others: FlashAttention-3 as vLLM builds it, and torch's FlashAttention-2.

FlashAttention-3 is the library that the environment names as FA3 (`vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so` of vLLM's
wheel). Who is not present says so in a line and takes no part.
"""

import inspect
import os
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from attngen.check import timing


@dataclass(frozen=True)
class Packed:
    """Sequences one after another, of queries and keys alike.

    Attributes:
        q: (tokens, heads, head_dim), like k and v.
        k: see q.
        v: see q.
        starts: where each sequence begins, and behind them where the last one ends; so many tokens there are.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    starts: tuple[int, ...]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [stop - start for start, stop in zip(self.starts, self.starts[1:], strict=False)]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    def on_device(self, numbers: list[int] | tuple[int, ...]) -> torch.Tensor:
        """Numbers as i32 beside q."""
        return torch.tensor(numbers, dtype=torch.int32, device=self.q.device)


@cache
def load_fa3() -> Any:
    """The operations of FlashAttention-3.

    Raises:
        ImportError: the environment names no library of it.
    """
    if "FA3" not in os.environ:
        raise ImportError("the environment's FA3 names no library")
    torch.ops.load_library(os.environ["FA3"])
    return torch.ops._vllm_fa3_C


def fa3_run(packed: Packed, *, causal: bool, splits: int, is_prepared: bool) -> timing.Run:
    """FlashAttention-3, which returns a list whose first tensor is out, (tokens, heads, head_dim).

    Args:
        packed: its sequences.
        causal: whether a row sees no key behind it.
        splits: parts into which keys are cut; 0 leaves them to it.
        is_prepared: whether its scheduler's metadata is made before, or by each call.
    """
    fa3, q, k, v = load_fa3(), packed.q, packed.k, packed.v
    (_, heads, dim), starts, longest = q.shape, packed.on_device(packed.starts), packed.longest
    sides = (causal, -1, -1)
    metadata = None
    if is_prepared:
        lengths = packed.on_device(packed.lengths)
        sizes = (len(packed.lengths), longest, longest, heads, k.shape[1], dim, dim, q.dtype)
        metadata = fa3.get_scheduler_metadata(
            *sizes, lengths, starts, *[None] * 5, 0, *sides, False, splits, None, 0
        )
    call = (q, k, v, *[None] * 4, starts, starts, *[None] * 3, longest, longest, *[None] * 9)
    return partial(fa3.fwd, *call, dim**-0.5, *sides, 0.0, True, metadata, splits, None, 0, None, 1, 0, None)


def torch_run(packed: Packed, *, causal: bool) -> timing.Run:
    """torch's own function, FlashAttention-2, which returns out, (tokens, heads, head_dim).

    Raises:
        ImportError: this torch has none.
    """
    from torch.nn.attention.varlen import varlen_attn

    taken = inspect.signature(varlen_attn).parameters
    side = {"window_size": (-1, 0 if causal else -1)} if "window_size" in taken else {"is_causal": causal}
    starts, longest = packed.on_device(packed.starts), packed.longest
    return partial(varlen_attn, packed.q, packed.k, packed.v, starts, starts, longest, longest, **side)
