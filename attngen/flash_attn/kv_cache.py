"""Attention of a few queries to a contiguous cache of keys and values, to which new ones are appended first."""

from typing import Any

import torch

from attngen.autograd import is_differentiated
from attngen.errors import ArgumentError, shown
from attngen.expr import LARGEST_LENGTH
from attngen.fit_heads import check_strided
from attngen.flash_attn.attend import attend, lengths_of, longest
from attngen.flash_attn.wish import Texts

_NAMES = {
    "k": "k_cache",
    "v": "v_cache",
    "seqused_k": "cache_seqlens",
    "leftpad_k": "cache_leftpad",
    "return_lse": "return_softmax_lse",
}


def attend_cache(
    q: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    appended: tuple[torch.Tensor | None, torch.Tensor | None],
    cache_seqlens: int | torch.Tensor | None,
    cache_batch_idx: torch.Tensor | None,
    cache_leftpad: torch.Tensor | None,
    texts: Texts,
    wants_lse: bool,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: Any = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Write what is appended into the caches, and attend to what they then hold.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim), or with cu_seqlens_q (tokens_q, num_heads_q, head_dim).
        caches: of keys and of values, (batch_cache, seqlen_cache, num_heads_kv, head_dim).
        appended: keys and values, (batch, seqlen_new, num_heads_kv, head_dim), that go where cache_seqlens says; both
            or neither.
        cache_seqlens: (batch,), i32, or a number for all: how many keys each sequence has before anything is appended;
            None for as many as there is room for.
        cache_batch_idx: (batch,), integers: which sequence of the caches each sequence of q reads; None for its own.
            The sequences are copied together first, which costs as much as reading them.
        cache_leftpad: (batch,), i32: how many keys at the beginning of each do not count.
        texts: mask and score, and what they read.
        wants_lse: whether lse is returned.
        cu_seqlens_q: as of `attend`, like max_seqlen_q.
        max_seqlen_q: see cu_seqlens_q.

    Returns:
        out, or (out, lse). No number on the device is read by the host: a place behind the end of a cache is its last.

    Raises:
        ArgumentError: an argument that no kernel takes, or that requires grad: there is no backward pass.
    """
    (k_cache, v_cache), (k, v) = caches, appended
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    for name, x in tensors.items():
        if name not in ("k", "v") or x is not None:
            check_strided(name, x)  # type: ignore[arg-type]
        if is_differentiated(x):
            must = "one that does not: a call with a cache has no backward pass"
            raise ArgumentError(name, "a tensor that requires grad", must, "call under torch.no_grad()")
    dims = 4 if cu_seqlens_q is None else 3
    for name, x, count in (("q", q, dims), ("k_cache", k_cache, 4), ("v_cache", v_cache, 4)):
        if x.dim() != count:
            must = "3: (tokens, heads, head_dim)" if count == 3 else "4: (batch, seqlen, heads, head_dim)"
            raise ArgumentError(name, f"{x.dim()} dimensions", must)
        if (x.dtype, x.device) != (q.dtype, q.device):
            raise ArgumentError(name, f"{x.dtype} on {x.device}", f"{q.dtype} on {q.device}, as q has")
    if (k is None) != (v is None):
        name = "v" if v is None else "k"
        raise ArgumentError(name, "None", "a tensor: keys and values are appended together")
    batch = q.shape[0] if cu_seqlens_q is None else _sequences(cu_seqlens_q)
    used = _used(cache_seqlens, batch, k_cache)
    _check_numbers("cache_seqlens", used, batch, k_cache, (torch.int32,))
    _check_numbers("cache_batch_idx", cache_batch_idx, batch, k_cache, (torch.int32, torch.int64))
    _check_numbers("cache_leftpad", cache_leftpad, batch, k_cache, (torch.int32,))
    if k is not None and v is not None:
        if used is None:
            raise ArgumentError("cache_seqlens", "None", "where keys and values are appended")
        used = _append(caches, (k, v), used, cache_batch_idx)
    if cache_batch_idx is not None:
        k_cache, v_cache = (x.index_select(0, cache_batch_idx) for x in caches)
    if used is None and cache_leftpad is not None:
        used = _used(k_cache.shape[1], batch, k_cache)
    cut = {"seqused_k": used, "leftpad_k": cache_leftpad, "cu_seqlens_q": cu_seqlens_q}
    given = {name: x for name, x in cut.items() if x is not None} | longest("max_seqlen_q", max_seqlen_q)
    lengths = lengths_of(cu_seqlens_q, None, None, used)
    out, lse = attend(q, k_cache, v_cache, texts, wants_lse, lengths, given, _NAMES)
    return out if lse is None else (out, lse)


def _sequences(starts: Any) -> int:
    """How many sequences of queries there are."""
    if not isinstance(starts, torch.Tensor) or starts.dim() != 1:
        got = f"{starts.dim()} dimensions" if isinstance(starts, torch.Tensor) else type(starts).__name__
        raise ArgumentError("cu_seqlens_q", got, "a tensor of i32: (batch + 1,)")
    return starts.shape[0] - 1


def _used(said: Any, batch: int, cache: torch.Tensor) -> torch.Tensor | None:
    """How many keys each sequence has, on the device of the cache; None where nothing says so."""
    if said is None or isinstance(said, torch.Tensor):
        return said
    if isinstance(said, bool) or not isinstance(said, int) or not 0 <= said <= LARGEST_LENGTH:
        raise ArgumentError("cache_seqlens", shown(said), "a number of keys, or a tensor of i32: (batch,)")
    return torch.full((batch,), said, dtype=torch.int32, device=cache.device)


def _check_numbers(
    name: str, x: Any, batch: int, cache: torch.Tensor, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Refuse what is no number for each sequence, before a cache is written to."""
    if x is None:
        return
    must = f"{' or '.join(map(str, dtypes))} of shape ({batch},) on {cache.device}"
    if not isinstance(x, torch.Tensor):
        raise ArgumentError(name, type(x).__name__, must)
    check_strided(name, x)
    if x.dtype not in dtypes or tuple(x.shape) != (batch,) or x.device != cache.device:
        raise ArgumentError(name, f"{x.dtype} of shape {tuple(x.shape)} on {x.device}", must)


def _append(
    caches: tuple[torch.Tensor, torch.Tensor],
    appended: tuple[torch.Tensor, torch.Tensor],
    used: torch.Tensor,
    batch_index: torch.Tensor | None,
) -> torch.Tensor:
    """Write keys and values behind those that the caches hold, and return how many these are then."""
    batch, new = used.shape[0], appended[0].shape[1] if appended[0].dim() == 4 else 0
    for name, x, cache in zip(("k", "v"), appended, caches, strict=True):
        expected = (batch, new, *cache.shape[2:])
        if tuple(x.shape) != expected:
            must = f"{expected} = (batch, seqlen_new, heads, head_dim)"
            raise ArgumentError(name, f"shape {tuple(x.shape)}", must)
        if x.dtype != cache.dtype or x.device != cache.device:
            must = f"{cache.dtype} on {cache.device}, as the cache has"
            raise ArgumentError(name, f"{x.dtype} on {x.device}", must)
    steps = torch.arange(new, dtype=torch.int64, device=used.device)
    places = (used[:, None] + steps).clamp(0, caches[0].shape[1] - 1)
    sequences = (
        torch.arange(batch, dtype=torch.int64, device=used.device) if batch_index is None else batch_index
    )
    for cache, x in zip(caches, appended, strict=True):
        cache.index_put_((sequences[:, None].long(), places), x)
    return used + new
