"""The functions of flash_attn 2, with its signatures (2.8.4).

Arguments mean what they mean there: a window is (left, right), -1 without bound, and causal takes the right side to 0;
the last query stands beside the last key. alibi_slopes are f32, (num_heads_q) or (batch, num_heads_q); softcap 0.0 is
none. Keys and values may have fewer heads than queries, a divisor of them. Heads have up to 256 columns, those of
values their own number; what is no multiple of 8, or less than 32, is padded.

`deterministic` or not, gradients are the same bits in every run. lse has a gradient too, and so have alibi_slopes where
sequences are of one length. With alibi_slopes, lse is of the scores as they are documented: that library leaves out a
number for each row where causal is set. For what no kernel takes a function raises `attngen.ArgumentError`, which is a
ValueError; dropout_p is refused unless it is 0.
"""

from typing import Any

import torch

from attngen.flash_attn.attend import (
    attend,
    check_longest,
    lengths_of,
    longest,
    refuse_unserved,
    unpacked,
)
from attngen.flash_attn.kv_cache import Cache, NewKeys, attend_cache
from attngen.flash_attn.wish import Wish, window_of
from attngen.varlen import RAGGED, lengths_between

Made = torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""out, or with return_attn_probs (out, lse, an empty tensor: probabilities are returned beside dropout alone)."""
NO_WINDOW = (-1, -1)


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Made:
    """Attention of dense sequences.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim), f16 or bf16; on the CPU, where the simulator runs, f32 too.
        k: (batch, seqlen_k, num_heads_kv, head_dim).
        v: (batch, seqlen_k, num_heads_kv, head_dim_v).
        dropout_p: 0.
        softmax_scale: 1/sqrt(head_dim) where None.
        causal: see the module, as for what follows.
        window_size: (left, right).
        softcap: a number.
        alibi_slopes: f32.
        deterministic: either.
        return_attn_probs: whether lse is returned too, (batch, num_heads_q, seqlen_q), f32.

    Raises:
        ArgumentError: an argument that no kernel takes.
    """
    refuse_unserved(dropout_p=dropout_p, deterministic=deterministic)
    wish = Wish(window_of(window_size, causal, -1), softmax_scale, 0, softcap, alibi_slopes)
    return _returned(q, attend(q, k, v, wish.texts, return_attn_probs, names=_NAMES))


def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Made:
    """Attention of dense sequences with keys and values in one tensor, (batch, seqlen_k, 2, num_heads_kv, head_dim)."""
    k, v = unpacked("kv", kv, 2, False)
    rest = (softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_func(q, k, v, dropout_p, *rest)


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Made:
    """Attention of dense sequences in one tensor, (batch, seqlen, 3, num_heads, head_dim)."""
    rest = (softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    q, k, v = unpacked("qkv", qkv, 3, False)
    return flash_attn_func(q, k, v, dropout_p, *rest)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> Made:
    """Attention of sequences of any lengths, one after another.

    Args:
        q: (tokens_q, num_heads_q, head_dim).
        k: (tokens_k, num_heads_kv, head_dim), or with block_table (pages, page, num_heads_kv, head_dim).
        v: (tokens_k, num_heads_kv, head_dim_v), likewise.
        cu_seqlens_q: (batch + 1,), i32: where each sequence of queries begins, and where the last one ends.
        cu_seqlens_k: likewise, of keys; in pages these are as many as it says, wherever they lie.
        max_seqlen_q: length of the longest sequence of queries, or more. A tensor on a device is not read: the bound is
            then the number of tokens, which changes no result.
        max_seqlen_k: likewise, of keys.
        dropout_p: 0.
        softmax_scale: as of `flash_attn_func`, like what follows.
        causal: see softmax_scale.
        window_size: see softmax_scale.
        softcap: see softmax_scale.
        alibi_slopes: see softmax_scale; without a gradient.
        deterministic: see softmax_scale.
        return_attn_probs: whether lse is returned too, (num_heads_q, tokens_q), f32.
        block_table: (batch, max_pages), i32: the pages of each sequence, any number of rows a page; without gradients.

    Raises:
        ArgumentError: an argument that no kernel takes.
    """
    refuse_unserved(dropout_p=dropout_p, deterministic=deterministic)
    wish = Wish(window_of(window_size, causal, -1), softmax_scale, 0, softcap, alibi_slopes)
    cut = {"cu_seqlens_q": cu_seqlens_q, **longest("max_seqlen_q", max_seqlen_q)}
    if block_table is None:
        cut |= {"cu_seqlens_k": cu_seqlens_k, **longest("max_seqlen_k", max_seqlen_k)}
    else:
        check_longest("max_seqlen_k", max_seqlen_k)
        cut |= {"block_table": block_table, "seqused_k": lengths_between("cu_seqlens_k", cu_seqlens_k)}
    lengths = RAGGED if block_table is None else lengths_of(cu_seqlens_q, block_table=block_table)
    return _returned(q, attend(q, k, v, wish.texts, return_attn_probs, lengths, cut, _NAMES))


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Made:
    """Attention of sequences of any lengths, keys and values in one tensor: (tokens_k, 2, num_heads_kv, head_dim)."""
    k, v = unpacked("kv", kv, 2, True)
    rest = (softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, *rest
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Made:
    """Attention of sequences of any lengths in one tensor, (tokens, 3, num_heads, head_dim)."""
    q, k, v = unpacked("qkv", qkv, 3, True)
    rest = (softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, *rest)


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention to a cache, with new keys and values written into it first; without a backward pass.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim).
        k_cache: (batch_cache, seqlen_cache, num_heads_kv, head_dim), or with block_table (pages, page, num_heads_kv,
            head_dim), any number of rows a page; k is written into it.
        v_cache: likewise, of head_dim_v columns.
        k: (batch, seqlen_new, num_heads_kv, head_dim), head_dim a multiple of 8, or None.
        v: (batch, seqlen_new, num_heads_kv, head_dim_v), or None.
        rotary_cos: (positions, rotary_dim / 2), of the type of q or f32, rotary_dim a multiple of 16: k is rotated by
            its places, and so is q, of as many rows; where no mask goes by places, all rows of q by that of the first.
        rotary_sin: likewise.
        cache_seqlens: (batch,), i32, or a number: how many keys there are before k.
        cache_batch_idx: (batch,), integers: which sequence of the cache, or row of block_table, each of q has.
        cache_leftpad: (batch,), i32: where the keys of each sequence begin; cache_seqlens counts those before too, and
            places do.
        block_table: (batch, max_pages), i32: the pages of each sequence.
        softmax_scale: as of `flash_attn_func`, like causal, window_size, softcap and alibi_slopes.
        causal: see softmax_scale.
        window_size: see softmax_scale.
        softcap: see softmax_scale.
        rotary_interleaved: whether columns 2i and 2i + 1 turn together, or i and i + rotary_dim / 2.
        alibi_slopes: see softmax_scale.
        num_splits: 0: how many queries and keys a call has says whether keys are split; 1: they are not.
        return_softmax_lse: whether lse is returned too, (batch, num_heads_q, seqlen_q), f32.

    Raises:
        ArgumentError: an argument that no kernel takes, or a tensor that requires grad.
    """
    refuse_unserved(rotary_interleaved=rotary_interleaved, num_splits=num_splits)
    wish = Wish(window_of(window_size, causal, -1), softmax_scale, 0, softcap, alibi_slopes)
    cache = Cache(k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    new = NewKeys(k, v, rotary_cos, rotary_sin, rotary_interleaved)
    return attend_cache(q, cache, new, wish.texts, return_softmax_lse, may_split=num_splits != 1)


_NAMES = {"return_lse": "return_attn_probs"}


def _returned(q: torch.Tensor, made: tuple[torch.Tensor, Any]) -> Made:
    """What the library returns, whose third result is empty without dropout."""
    out, lse = made
    return out if lse is None else (out, lse, q.new_empty(0))
