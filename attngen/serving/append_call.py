"""What `attngen.append` is asked to do, in one convention for the kernel and for torch."""

from dataclasses import dataclass

import torch

Scale = float | torch.Tensor
"""What the values of a cache stand for: of all, or f32 (batch, heads_kv), of any strides."""


@dataclass(frozen=True)
class Rotary:
    """Tables of rotary embeddings.

    Attributes:
        cos, sin: (positions, rotary_dim / 2), of one type; there is a position at least.
        is_interleaved: columns 2i and 2i + 1 turn together; else i and i + rotary_dim / 2.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    is_interleaved: bool

    @property
    def positions(self) -> int:
        """Rows of the tables."""
        return self.cos.shape[0]

    @property
    def columns(self) -> int:
        """The first columns of a row that are rotated."""
        return 2 * self.cos.shape[1]


@dataclass(frozen=True)
class AppendCall:
    """Arguments that have been checked. Tensors have the strides that were passed.

    Attributes:
        k_new: (batch, seqlen_new, heads_kv, head_dim); of ragged sequences (1, tokens, heads_kv, head_dim).
        v_new: (batch, seqlen_new, heads_kv, head_dim_v), or (1, tokens, heads_kv, head_dim_v).
        q: (batch, seqlen_new, heads_q, head_dim), or (1, tokens, heads_q, head_dim); None where it is not rotated.
        k_cache, v_cache: (pages, page, heads_kv, head_dim); without a table a page is a sequence.
        seqused_k: (batch), i32: keys of each sequence before anything is appended.
        block_table: (rows, max_pages), i32: which pages a row of it has; None where row i has page i alone.
        cu_seqlens_q: (batch + 1), i32: where ragged sequences begin and end; None for dense ones.
        cache_batch_idx: (batch), i32: which row each sequence has; None for its own number.
        leftpad_k: (batch), i32: keys at the beginning that positions do not count; None for none.
        rotary: how K and q are rotated; None where they are not.
        q_advances: whether row i of q is rotated as the i-th new key is; else all are as the first.
        k_scale, v_scale: what values are divided by before they are e4m3; 1 of other formats.
    """

    k_new: torch.Tensor
    v_new: torch.Tensor
    q: torch.Tensor | None
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    seqused_k: torch.Tensor
    block_table: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cache_batch_idx: torch.Tensor | None
    leftpad_k: torch.Tensor | None
    rotary: Rotary | None
    q_advances: bool
    k_scale: Scale
    v_scale: Scale

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.seqused_k.shape[0]

    @property
    def tokens(self) -> int:
        """New rows of all sequences."""
        return self.k_new.shape[0] * self.k_new.shape[1]

    @property
    def rows(self) -> int:
        """Rows of the table, or sequences that a cache without one has room for."""
        return (self.k_cache if self.block_table is None else self.block_table).shape[0]

    @property
    def max_pages(self) -> int:
        """Pages that a row has."""
        return 1 if self.block_table is None else self.block_table.shape[1]
