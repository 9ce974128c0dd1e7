"""The functions of flash_attn_interface (FlashAttention-3), with its signatures (of August 2026).

Arguments mean what they mean there: as in `version2`, and attention_chunk keys make a chunk, whose keys alone its
queries see. seqused_q and seqused_k, (batch,), i32, are how many rows of each sequence count; rows behind
them are 0. Inputs are f16 or bf16 (f32 too on the CPU): descales are refused, and so are qv, more than one of
num_splits, pack_gqa and an sm_margin, by their names. For what no kernel takes a function raises
`attngen.ArgumentError`, which is a ValueError.
"""

from typing import Any

import torch

from attngen.errors import ArgumentError, shown
from attngen.fit_heads import check_strided
from attngen.flash_attn.attend import attend, longest, refuse_unserved, unpacked
from attngen.flash_attn.kv_cache import Cache, NewKeys, attend_cache
from attngen.flash_attn.wish import Wish, window_of
from attngen.varlen import RAGGED

Made = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""out, or (out, lse)."""
NO_WINDOW = (-1, -1)
_NAMES = {"return_lse": "return_attn_probs"}


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: tuple[int, int] = NO_WINDOW,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Made:
    """Attention of dense sequences.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim).
        k: (batch, seqlen_k, num_heads_kv, head_dim).
        v: (batch, seqlen_k, num_heads_kv, head_dim_v).
        softmax_scale: 1/sqrt(head_dim) where None.
        causal: see the module, as for what follows.
        qv: None.
        q_descale: None.
        k_descale: None.
        v_descale: None.
        window_size: (left, right).
        attention_chunk: 0, or keys of a chunk.
        softcap: a number.
        num_splits: 0: the call says whether keys are split; 1: they are not.
        pack_gqa: None or False.
        deterministic: either.
        sm_margin: 0.
        return_attn_probs: whether lse is returned too, (batch, num_heads_q, seqlen_q), f32.

    Raises:
        ArgumentError: an argument that no kernel takes.
    """
    descales = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
    schedule = {"num_splits": num_splits, "pack_gqa": pack_gqa, "sm_margin": sm_margin}
    refuse_unserved(qv=qv, deterministic=deterministic, **descales, **schedule)
    wish = Wish(window_of(window_size, causal, -1), softmax_scale, attention_chunk, softcap)
    may_split = num_splits != 1
    return _returned(attend(q, k, v, wish.texts, return_attn_probs, names=_NAMES, may_split=may_split))


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: tuple[int, int] = NO_WINDOW,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Made:
    """Attention of dense sequences in one tensor.

    Args:
        qkv: (batch, seqlen, 3, num_heads, head_dim), or (batch, seqlen, num_heads, head_dim) with the heads of queries,
            keys and values one after another.
        softmax_scale: as of `flash_attn_func`, like what is not explained here.
        causal: see softmax_scale.
        q_descale: see softmax_scale.
        k_descale: see softmax_scale.
        v_descale: see softmax_scale.
        window_size: see softmax_scale.
        attention_chunk: see softmax_scale.
        softcap: see softmax_scale.
        deterministic: see softmax_scale.
        num_heads_q: of four dimensions, how many heads are of queries; the others are half of keys, half of values.
        sm_margin: see softmax_scale.
        return_attn_probs: see softmax_scale.
    """
    q, k, v = _of_heads(qkv, num_heads_q)
    return flash_attn_func(
        q,
        k,
        v,
        softmax_scale,
        causal,
        None,
        q_descale,
        k_descale,
        v_descale,
        window_size,
        attention_chunk,
        softcap,
        deterministic=deterministic,
        sm_margin=sm_margin,
        return_attn_probs=return_attn_probs,
    )


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: tuple[int, int] = NO_WINDOW,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Made:
    """Attention of sequences of any lengths, one after another.

    Args:
        q: (tokens_q, num_heads_q, head_dim).
        k: (tokens_k, num_heads_kv, head_dim).
        v: (tokens_k, num_heads_kv, head_dim_v).
        cu_seqlens_q: (batch + 1,), i32: where each sequence of queries begins, and where the last one ends.
        cu_seqlens_k: likewise, of keys.
        max_seqlen_q: length of the longest sequence of queries, or more. A tensor on a device is not read: the bound is
            then the number of tokens, which changes no result.
        max_seqlen_k: likewise, of keys.
        seqused_q: (batch,), i32, or None for all.
        seqused_k: likewise.
        softmax_scale: as of `flash_attn_func`, like what follows.
        causal: see softmax_scale.
        qv: see softmax_scale.
        q_descale: see softmax_scale.
        k_descale: see softmax_scale.
        v_descale: see softmax_scale.
        window_size: see softmax_scale.
        attention_chunk: see softmax_scale.
        softcap: see softmax_scale.
        num_splits: see softmax_scale.
        pack_gqa: see softmax_scale.
        deterministic: see softmax_scale.
        sm_margin: see softmax_scale.
        return_attn_probs: whether lse is returned too, (num_heads_q, tokens_q), f32.

    Raises:
        ArgumentError: an argument that no kernel takes.
    """
    descales = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
    schedule = {"num_splits": num_splits, "pack_gqa": pack_gqa, "sm_margin": sm_margin}
    refuse_unserved(qv=qv, deterministic=deterministic, **descales, **schedule)
    wish = Wish(window_of(window_size, causal, -1), softmax_scale, attention_chunk, softcap)
    cut = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "seqused_q": seqused_q,
        "seqused_k": seqused_k,
        **longest("max_seqlen_q", max_seqlen_q),
        **longest("max_seqlen_k", max_seqlen_k),
    }
    may_split = num_splits != 1
    made = attend(q, k, v, wish.texts, return_attn_probs, RAGGED, cut, _NAMES, may_split=may_split)
    return _returned(made)


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    qv: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: torch.Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Made:
    """Attention to a cache, with new keys and values written into it first; without a backward pass.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim), or with cu_seqlens_q (tokens_q, num_heads_q, head_dim).
        k_cache: (batch_cache, seqlen_cache, num_heads_kv, head_dim), or with page_table (pages, page, num_heads_kv,
            head_dim), any number of rows a page; k is written into it.
        v_cache: likewise, of head_dim_v columns.
        k: (batch, seqlen_new, num_heads_kv, head_dim), or with cu_seqlens_k_new (tokens_new, num_heads_kv, head_dim),
            head_dim a multiple of 8, or None.
        v: likewise, of head_dim_v columns.
        qv: None, like all that speaks of descales and schedules.
        rotary_cos: (positions, rotary_dim / 2), of the type of q or f32, rotary_dim a multiple of 16: k is rotated by
            its places, and so is q, of as many rows; where no mask goes by places, all rows of q by that of the first.
        rotary_sin: likewise.
        cache_seqlens: (batch,), i32, or a number: how many keys there are before k.
        cache_batch_idx: (batch,), integers: which sequence of the cache, or row of page_table, each of q has.
        cache_leftpad: (batch,), i32: where the keys of each sequence begin; cache_seqlens counts those before too, and
            places do.
        page_table: (batch, max_pages), i32: the pages of each sequence.
        cu_seqlens_q: (batch + 1,), i32, where queries have lengths of their own.
        cu_seqlens_k_new: (batch + 1,), i32, where k and v have lengths of their own. Beside rotary tables it is the
            very tensor that is passed as cu_seqlens_q.
        max_seqlen_q: as of `flash_attn_varlen_func`.
        rotary_seqlens: (batch,), i32: what rotations count from in the place of cache_seqlens.
        q_descale: see qv.
        k_descale: beside caches of e4m3, which f16 or bf16 queries may have: f32, (batch, num_heads_kv), (num_heads_kv)
            or one number, any strides: what they are multiplied by, and k is divided by; 1 where None.
        v_descale: likewise.
        softmax_scale: as of `flash_attn_func`, like causal, window_size, attention_chunk and softcap.
        causal: see softmax_scale.
        window_size: see softmax_scale.
        attention_chunk: see softmax_scale.
        softcap: see softmax_scale.
        rotary_interleaved: whether columns 2i and 2i + 1 turn together, or i and i + rotary_dim / 2.
        scheduler_metadata: see qv.
        num_splits: 0: how many queries and keys a call has says whether keys are split; 1: they are not.
        pack_gqa: see qv.
        sm_margin: see qv.
        return_softmax_lse: whether lse is returned too, (batch, num_heads_q, seqlen_q) or (num_heads_q, tokens_q), f32.

    Raises:
        ArgumentError: an argument that no kernel takes, or a tensor that requires grad.
    """
    refuse_unserved(
        qv=qv,
        rotary_interleaved=rotary_interleaved,
        q_descale=q_descale,
        scheduler_metadata=scheduler_metadata,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
    )
    wish = Wish(window_of(window_size, causal, -1), softmax_scale, attention_chunk, softcap)
    lengths = (cache_seqlens, cache_batch_idx, cache_leftpad)
    cache = Cache(k_cache, v_cache, *lengths, page_table, "page_table", k_descale, v_descale)
    new = NewKeys(k, v, rotary_cos, rotary_sin, rotary_interleaved, cu_seqlens_k_new, rotary_seqlens)
    of_queries = (cu_seqlens_q, max_seqlen_q if cu_seqlens_q is not None else None)  # read beside these alone
    return attend_cache(q, cache, new, wish.texts, return_softmax_lse, *of_queries, may_split=num_splits != 1)


def _of_heads(qkv: torch.Tensor, num_heads_q: int | None) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of one tensor: three of it, or heads one after another."""
    check_strided("qkv", qkv)
    if qkv.dim() == 5:
        return unpacked("qkv", qkv, 3, False)
    if qkv.dim() != 4:
        must = "(batch, seqlen, 3, heads, head_dim), or (batch, seqlen, heads, head_dim) with num_heads_q"
        raise ArgumentError("qkv", f"shape {tuple(qkv.shape)}", must)
    heads = qkv.shape[2]
    is_count = isinstance(num_heads_q, int) and 0 < num_heads_q < heads
    if not is_count or (heads - num_heads_q) % 2:  # type: ignore[operator] # it is an int
        must = f"how many of the {heads} heads are of queries; as many of the others are of keys as of values"
        raise ArgumentError("num_heads_q", shown(num_heads_q), must)
    of_keys = (heads - num_heads_q) // 2  # type: ignore[operator]
    return qkv.split([num_heads_q, of_keys, of_keys], dim=2)  # type: ignore[no-any-return,no-untyped-call]


def _returned(made: tuple[torch.Tensor, Any]) -> Made:
    out, lse = made
    return out if lse is None else (out, lse)
