"""The functions of flash_attn.cute (FlashAttention-4), with its signatures (of August 2026).

Arguments mean what they mean there: a side of a window without bound is None, and a number below 0 leaves keys out;
causal takes the right side to 0; the last query stands beside the last key. learnable_sink is f32, bf16 or f16,
(num_heads_q). Every call returns (out, lse), with lse None where return_lse is False and nothing requires grad; lse has
a gradient. Inputs are f16 or bf16 (f32 too on the CPU). Functions in the DSL of that library mean nothing to attngen,
which has a language of its own: `attngen.attention` takes functions of torch, as `attngen.expression` reads them. For
what no kernel takes a function raises `attngen.ArgumentError`, which is a ValueError.
"""

from collections.abc import Callable
from typing import Any

import torch

from attngen.autograd import is_differentiated
from attngen.errors import ArgumentError, shown
from attngen.fit_heads import check_strided
from attngen.flash_attn.attend import attend, check_longest, lengths_of, longest, refuse_unserved
from attngen.flash_attn.wish import Wish, window_of
from attngen.varlen import lengths_between

Window = tuple[int | None, int | None]
NO_WINDOW: Window = (None, None)
Made = tuple[torch.Tensor, torch.Tensor | None]
_NAMES = {"sink": "learnable_sink", "blocks": "block_sparse_tensors", "block_table": "page_table"}


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qv: torch.Tensor | None = None,
    gather_kv_indices: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = NO_WINDOW,
    learnable_sink: torch.Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable[..., Any] | None = None,
    score_mod_bwd: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    aux_tensors: list[Any] | None = None,
    aux_scalars: tuple[Any, ...] | None = None,
    block_sparse_tensors: Any = None,
    block_sparse_tensors_bwd: Any = None,
    return_lse: bool = False,
) -> Made:
    """Attention of dense sequences.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim).
        k: (batch, seqlen_k, num_heads_kv, head_dim).
        v: (batch, seqlen_k, num_heads_kv, head_dim_v).
        qv: None.
        gather_kv_indices: None.
        softmax_scale: 1/sqrt(head_dim) where None.
        causal: see the module, as for what follows.
        window_size: (left, right).
        learnable_sink: a logit for each head.
        softcap: a number, 0.0 for none.
        num_splits: 0: the call says whether keys are split; 1: they are not.
        pack_gqa: None or False.
        deterministic: either.
        score_mod: None, like the other functions and what they read.
        score_mod_bwd: see score_mod.
        mask_mod: see score_mod.
        aux_tensors: see score_mod.
        aux_scalars: see score_mod.
        block_sparse_tensors: which blocks are kept: an object with mask_block_cnt, mask_block_idx, perhaps
            full_block_cnt and full_block_idx, and block_size, (rows, keys). Causal and window hide inside all of them.
        block_sparse_tensors_bwd: None: the backward pass turns the blocks of the call round itself.
        return_lse: whether lse, (batch, num_heads_q, seqlen_q), f32, is wanted in any case.

    Raises:
        ArgumentError: an argument that no kernel takes.
    """
    functions = {"score_mod": score_mod, "score_mod_bwd": score_mod_bwd, "mask_mod": mask_mod}
    read = {"aux_tensors": aux_tensors, "aux_scalars": aux_scalars}
    schedule = {"num_splits": num_splits, "pack_gqa": pack_gqa, "deterministic": deterministic}
    refuse_unserved(qv=qv, gather_kv_indices=gather_kv_indices, **functions, **read, **schedule)
    refuse_unserved(block_sparse_tensors_bwd=block_sparse_tensors_bwd)
    wish = Wish(window_of(window_size, causal, None), softmax_scale, 0, softcap, None, learnable_sink)
    wants_lse = return_lse or is_differentiated(q, k, v, learnable_sink)
    blocks = _blocks(block_sparse_tensors)
    may_split = num_splits != 1
    return attend(q, k, v, wish.texts, wants_lse, names=_NAMES, blocks=blocks, may_split=may_split)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qv: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    gather_kv_indices: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = NO_WINDOW,
    learnable_sink: torch.Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable[..., Any] | None = None,
    score_mod_bwd: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    block_sparse_tensors: Any = None,
    aux_tensors: list[Any] | None = None,
    aux_scalars: tuple[Any, ...] | None = None,
    return_lse: bool = False,
    scheduler_metadata: Any = None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
) -> Made:
    """Attention of sequences with lengths of their own: queries and keys each one after another, padded, or dense.

    Args:
        q: with cu_seqlens_q (tokens_q, num_heads_q, head_dim), without (batch, seqlen_q, num_heads_q, head_dim).
        k: likewise, by cu_seqlens_k.
        v: likewise.
        qv: as of `flash_attn_func`, like what is not explained here.
        cu_seqlens_q: (batch + 1,), i32: where each sequence of queries begins, and where the last one ends.
        cu_seqlens_k: likewise, of keys.
        max_seqlen_q: length of the longest sequence of queries, or more. A tensor on a device is not read: the bound is
            then the number of tokens, which changes no result.
        max_seqlen_k: likewise, of keys.
        min_seqlen_k: None.
        seqused_q: (batch,), i32: how many rows of each sequence count; rows behind them are 0.
        seqused_k: likewise, of keys.
        gather_kv_indices: see qv.
        page_table: (batch, max_pages), i32: the pages of each sequence, without gradients; k and v are then (pages,
            page, num_heads_kv, head_dim), any number of rows a page. Lengths of keys are seqused_k, or those of
            cu_seqlens_k, else all that a row has room for.
        softmax_scale: see qv.
        causal: see qv.
        window_size: see qv.
        learnable_sink: see qv.
        softcap: see qv.
        num_splits: 0: the call says whether keys are split; 1: they are not.
        pack_gqa: see qv.
        deterministic: see qv.
        score_mod: see qv.
        score_mod_bwd: see qv.
        mask_mod: see qv.
        block_sparse_tensors: None: its blocks count over all sequences, attngen's from where each begins.
        aux_tensors: see qv.
        aux_scalars: see qv.
        return_lse: whether lse, (num_heads_q, tokens_q) or (batch, num_heads_q, seqlen_q), f32, is wanted in any case.
        scheduler_metadata: None.
        seqlen_k_per_split: None.
        disable_scheduler_metadata: either.

    Raises:
        ArgumentError: an argument that no kernel takes.
    """
    functions = {"score_mod": score_mod, "score_mod_bwd": score_mod_bwd, "mask_mod": mask_mod}
    read = {"aux_tensors": aux_tensors, "aux_scalars": aux_scalars}
    schedule = {"num_splits": num_splits, "pack_gqa": pack_gqa, "deterministic": deterministic}
    refuse_unserved(qv=qv, gather_kv_indices=gather_kv_indices, **functions, **read, **schedule)
    refuse_unserved(
        min_seqlen_k=min_seqlen_k,
        scheduler_metadata=scheduler_metadata,
        seqlen_k_per_split=seqlen_k_per_split,
        disable_scheduler_metadata=disable_scheduler_metadata,
    )
    if block_sparse_tensors is not None:
        must = "None where sequences have lengths of their own"
        hint = "attngen.compile({..., 'blocks': ...}) takes a map that counts from where each sequence begins"
        raise ArgumentError("block_sparse_tensors", type(block_sparse_tensors).__name__, must, hint)
    wish = Wish(window_of(window_size, causal, None), softmax_scale, 0, softcap, None, learnable_sink)
    wants_lse = return_lse or is_differentiated(q, k, v, learnable_sink)
    if page_table is not None:
        if seqused_k is None:
            starts = cu_seqlens_k
            seqused_k = _room(page_table, k) if starts is None else lengths_between("cu_seqlens_k", starts)
        cu_seqlens_k = None
    said = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "seqused_q": seqused_q,
        "seqused_k": seqused_k,
        "block_table": page_table,
    }
    cut = {name: x for name, x in said.items() if x is not None}
    for name, starts, bound in (("q", cu_seqlens_q, max_seqlen_q), ("k", cu_seqlens_k, max_seqlen_k)):
        if starts is None:
            check_longest(f"max_seqlen_{name}", bound)
        else:
            cut |= longest(f"max_seqlen_{name}", bound)
    may_split = num_splits != 1
    return attend(q, k, v, wish.texts, wants_lse, lengths_of(**said), cut, _NAMES, may_split=may_split)


def _room(page_table: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """How many keys each row of a table has room for, (rows,)."""
    check_strided("page_table", page_table)
    if page_table.dim() != 2 or k.dim() != 4:
        name, x, must = ("page_table", page_table, 2) if page_table.dim() != 2 else ("k", k, 4)
        raise ArgumentError(name, f"{x.dim()} dimensions", str(must))
    rows, most = page_table.shape
    return page_table.new_full((rows,), most * k.shape[1], dtype=torch.int32)


def _blocks(tensors: Any) -> tuple[tuple[int, int], Any] | None:
    """Sizes of blocks, and which are kept, of what is called block-sparse tensors."""
    if tensors is None:
        return None
    sizes = getattr(tensors, "block_size", None)
    if not isinstance(sizes, tuple) or len(sizes) != 2 or not all(isinstance(size, int) for size in sizes):
        must = "(rows, keys) of a block in its block_size"
        raise ArgumentError("block_sparse_tensors", f"block_size {shown(sizes)}", must)
    for name in ("cu_total_m_blocks", "cu_block_idx_offsets"):
        if getattr(tensors, name, None) is not None:
            must = "None where sequences are of one length"
            raise ArgumentError(f"block_sparse_tensors.{name}", type(getattr(tensors, name)).__name__, must)
    return sizes, tensors
