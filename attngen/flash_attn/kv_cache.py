"""Attention of a few queries to a cache of keys and values, contiguous or in pages; new ones are appended first."""

from dataclasses import dataclass
from typing import Any

import torch

from attngen.autograd import is_differentiated
from attngen.errors import ArgumentError, shown
from attngen.expr import LARGEST_LENGTH
from attngen.fit_heads import CACHE_TYPE, check_strided
from attngen.flash_attn.attend import attend, check_attention, lengths_of, longest
from attngen.flash_attn.wish import Texts
from attngen.serving import append
from attngen.varlen import lengths_between, sequences_of

_NAMES = {
    "k": "k_cache",
    "v": "v_cache",
    "seqused_k": "cache_seqlens",
    "leftpad_k": "cache_leftpad",
    "return_lse": "return_softmax_lse",
}
_NAMES_OF_APPEND = {
    "k_new": "k",
    "v_new": "v",
    "seqused_k": "cache_seqlens",
    "cu_seqlens_q": "cu_seqlens_k_new",
    "rotary[0]": "rotary_cos",
    "rotary[1]": "rotary_sin",
    "k_scale": "k_descale",
    "v_scale": "v_descale",
}


_BESIDE_E4M3 = (torch.float16, torch.bfloat16)
"""What q may be of beside caches of e4m3."""


@dataclass(frozen=True)
class Cache:
    """Keys and values that are there before a call.

    Attributes:
        k, v: (batch_cache, seqlen_cache, num_heads_kv, head_dim), or beside a table (pages, page, num_heads_kv,
            head_dim), any number of rows a page; of q's type, or e4m3.
        seqlens: (batch,), i32, or a number for all: how many keys each sequence has before anything is appended; None
            for as many as there is room for.
        batch_index: (batch,), integers: which sequence of the caches, or row of the table, each sequence of q reads;
            None for its own.
        leftpad: (batch,), i32: how many keys at the beginning of each do not count.
        table: (rows, max_pages), i32: the pages of each sequence; None where the caches are contiguous.
        table_name: what the face calls it.
        k_descale, v_descale: f32, a number, one of each head, or (batch, num_heads_kv): what e4m3 numbers are
            multiplied by, and new ones divided by; 1 where None.
    """

    k: torch.Tensor
    v: torch.Tensor
    seqlens: int | torch.Tensor | None
    batch_index: torch.Tensor | None
    leftpad: torch.Tensor | None
    table: torch.Tensor | None
    table_name: str = "block_table"
    k_descale: torch.Tensor | None = None
    v_descale: torch.Tensor | None = None

    @property
    def is_e4m3(self) -> bool:
        """Whether its numbers are e4m3."""
        return self.k.dtype is CACHE_TYPE

    @property
    def descales(self) -> dict[str, torch.Tensor]:
        """What a kernel is passed for them; nothing of 16 bits."""
        if not self.is_e4m3:
            return {}
        said = {"k_descale": self.k_descale, "v_descale": self.v_descale}
        device = self.k.device
        return {
            name: torch.ones((), dtype=torch.float32, device=device) if x is None else x
            for name, x in said.items()
        }

    @property
    def room(self) -> int:
        """How many keys a sequence has room for."""
        return self.k.shape[1] * (1 if self.table is None else self.table.shape[1])


@dataclass(frozen=True)
class NewKeys:
    """What a call appends before it attends.

    Attributes:
        k, v: (batch, seqlen_new, num_heads_kv, head_dim), or with starts (tokens_new, num_heads_kv, head_dim); both or
            neither.
        cos, sin: (positions, rotary_dim / 2), by which new keys, and q, are rotated; both or neither.
        is_interleaved: whether columns 2i and 2i + 1 turn together, or i and i + rotary_dim / 2.
        starts: (batch + 1,), i32: where the new keys of each sequence begin, and where the last ones end.
        positions: (batch,), i32: by which the first new key of each sequence is rotated; None for its place.
    """

    k: torch.Tensor | None
    v: torch.Tensor | None
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    is_interleaved: bool
    starts: torch.Tensor | None = None
    positions: torch.Tensor | None = None

    @property
    def rotary(self) -> tuple[torch.Tensor | None, torch.Tensor | None] | None:
        """The tables; None where nothing is rotated."""
        return None if self.cos is self.sin is None else (self.cos, self.sin)


def attend_cache(
    q: torch.Tensor,
    cache: Cache,
    new: NewKeys,
    texts: Texts,
    wants_lse: bool,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: Any = None,
    may_split: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Write what is appended into the caches, and attend to what they then hold.

    Row i of q is rotated as the i-th new key where the mask goes by places, else all rows as the first:
    FlashAttention's rule.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim), or with cu_seqlens_q (tokens_q, num_heads_q, head_dim).
        cache: what there is.
        new: what is appended.
        texts: mask and score, and what they read.
        wants_lse: whether lse is returned.
        cu_seqlens_q: as of `attend`, like max_seqlen_q.
        max_seqlen_q: see cu_seqlens_q.
        may_split: see cu_seqlens_q.

    Returns:
        out, or (out, lse). No number on the device is read by the host: what would go behind the end of a cache is left
        out.

    Raises:
        ArgumentError: an argument that no kernel takes, or that requires grad: there is no backward pass.
    """
    _check_tensors(q, cache, new, cu_seqlens_q)
    for name, x in texts.passed.items():
        _check_no_gradient(name, x)
    batch = q.shape[0] if cu_seqlens_q is None else sequences_of("cu_seqlens_q", cu_seqlens_q)
    used = _used(cache.seqlens, batch, q.device)
    of_batch = {"cache_seqlens": used, "cache_leftpad": cache.leftpad, "rotary_seqlens": new.positions}
    for name, x in of_batch.items():
        _check_numbers(name, x, batch, q.device, (torch.int32,))
    _check_numbers("cache_batch_idx", cache.batch_index, batch, q.device, (torch.int32, torch.int64))
    rows = None if cache.batch_index is None else cache.batch_index.int().contiguous()
    if new.k is not None and used is None:
        raise ArgumentError("cache_seqlens", "None", "where keys and values are appended")
    if new.k is not None and new.starts is None and new.k.shape[0] != batch:
        raise ArgumentError("k", f"{new.k.shape[0]} sequences", f"{batch}, as q has")
    table = cache.table
    if table is None and rows is not None:  # a sequence is a page, so that none is copied
        table = torch.arange(cache.k.shape[0], dtype=torch.int32, device=q.device).unsqueeze(1)
    if used is None and (table is not None or cache.leftpad is not None):
        used = _used(cache.room, batch, q.device)
    said = {
        "seqused_k": used,
        "leftpad_k": cache.leftpad,
        "cu_seqlens_q": cu_seqlens_q,
        "block_table": table,
        "cache_batch_idx": rows,
    }
    cut = {name: x for name, x in said.items() if x is not None} | longest("max_seqlen_q", max_seqlen_q)
    cut |= cache.descales
    lengths = lengths_of(cu_seqlens_q, None, None, used, table)
    names = _NAMES | {"block_table": cache.table_name}
    if new.k is not None and used is not None:
        # Before a cache is written to.
        check_attention(q, cache.k, cache.v, texts, wants_lse, lengths, cut, names, may_split)
        added = new.k.shape[1] if new.starts is None else _between(new.starts, batch, new.k.shape[0])
        turned = _append(q, cache, new, used, rows, texts.mask != "full")
        q = q if turned is None else turned
        cut["seqused_k"] = torch.where(used < 0, used, used + added)  # where nothing has been written
    out, lse = attend(q, cache.k, cache.v, texts, wants_lse, lengths, cut, names, may_split=may_split)
    return out if lse is None else (out, lse)


def _check_no_gradient(name: str, x: Any) -> None:
    """Refuse a tensor that requires grad."""
    if is_differentiated(x):
        must = "one that does not: a call with a cache has no backward pass"
        raise ArgumentError(name, "a tensor that requires grad", must, "call under torch.no_grad()")


def _check_tensors(q: torch.Tensor, cache: Cache, new: NewKeys, cu_seqlens_q: torch.Tensor | None) -> None:
    """Refuse tensors that do not go together, before a cache is written to."""
    caches = {"k_cache": cache.k, "v_cache": cache.v}
    added = {name: x for name, x in (("k", new.k), ("v", new.v)) if x is not None}
    if len(added) == 1:
        name = "v" if "k" in added else "k"
        raise ArgumentError(name, "None", "a tensor: keys and values are appended together")
    dims = 4 if cu_seqlens_q is None else 3
    dims_of_new = 4 if new.starts is None else 3
    dims_of = {"q": dims} | dict.fromkeys(caches, 4) | dict.fromkeys(added, dims_of_new)
    for name, x in {"q": q, **caches, **added}.items():
        check_strided(name, x)
        _check_no_gradient(name, x)
        if x.dim() != dims_of[name]:
            first = "pages, page" if name in caches and cache.table is not None else "batch, seqlen"
            must = "3: (tokens, heads, head_dim)" if dims_of[name] == 3 else f"4: ({first}, heads, head_dim)"
            raise ArgumentError(name, f"{x.dim()} dimensions", must)
        dtypes = (q.dtype, CACHE_TYPE) if name in caches and q.dtype in _BESIDE_E4M3 else (q.dtype,)
        if x.dtype not in dtypes or x.device != q.device:
            raise ArgumentError(name, f"{x.dtype} on {x.device}", f"{q.dtype} on {q.device}, as q has")
    if cache.k.dtype != cache.v.dtype:
        raise ArgumentError("v_cache", f"dtype {cache.v.dtype}", f"{cache.k.dtype}, as k_cache has")
    for name, descale in (("k_descale", cache.k_descale), ("v_descale", cache.v_descale)):
        if descale is not None and not cache.is_e4m3:
            raise ArgumentError(name, type(descale).__name__, f"None beside caches of {cache.k.dtype}")
    for (name, x), of in zip(added.items(), caches.values(), strict=False):
        if x.shape[-2:] != of.shape[-2:]:
            got, must = (
                f"{heads} heads of {columns} columns" for heads, columns in (x.shape[-2:], of.shape[-2:])
            )
            raise ArgumentError(name, got, f"{must}, as {name}_cache has")
    if cache.table is not None:
        check_strided(cache.table_name, cache.table)
        if cache.table.dim() != 2:
            raise ArgumentError(cache.table_name, f"{cache.table.dim()} dimensions", "2: (batch, max_pages)")
    of_new = {"cu_seqlens_k_new": new.starts, "rotary_cos": new.cos, "rotary_sin": new.sin}
    for name, given in of_new.items():
        if given is not None and not added:
            must = "None where no keys are appended"
            raise ArgumentError(name, type(given).__name__, must, "pass k and v")
    if new.rotary is None and new.positions is not None:
        got = type(new.positions).__name__
        raise ArgumentError("rotary_seqlens", got, "None where nothing is rotated")
    if new.rotary is not None and new.starts is not cu_seqlens_q:
        must = (
            "the tensor that is passed as cu_seqlens_q, or None beside none: q is rotated with the new keys"
        )
        raise ArgumentError("cu_seqlens_k_new", "None" if new.starts is None else "another tensor", must)


def _between(starts: Any, batch: int, tokens: int) -> torch.Tensor:
    """How many new keys each sequence has of so many, (batch,): none where it ends before it begins."""
    added = lengths_between("cu_seqlens_k_new", starts, tokens)
    if len(added) != batch:
        raise ArgumentError("cu_seqlens_k_new", f"{len(added)} sequences", f"{batch}, as q has")
    return added.clamp(min=0)


def _used(said: Any, batch: int, device: torch.device) -> torch.Tensor | None:
    """How many keys each sequence has, on a device; None where nothing says so."""
    if said is None or isinstance(said, torch.Tensor):
        return said
    if isinstance(said, bool) or not isinstance(said, int) or not 0 <= said <= LARGEST_LENGTH:
        raise ArgumentError("cache_seqlens", shown(said), "a number of keys, or a tensor of i32: (batch,)")
    return torch.full((batch,), said, dtype=torch.int32, device=device)


def _check_numbers(
    name: str, x: Any, batch: int, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Refuse what is no number for each sequence, before a cache is written to."""
    if x is None:
        return
    must = f"{' or '.join(map(str, dtypes))} of shape ({batch},) on {device}"
    if not isinstance(x, torch.Tensor):
        raise ArgumentError(name, type(x).__name__, must)
    check_strided(name, x)
    if x.dtype not in dtypes or tuple(x.shape) != (batch,) or x.device != device:
        raise ArgumentError(name, f"{x.dtype} of shape {tuple(x.shape)} on {x.device}", must)


def _append(
    q: torch.Tensor,
    cache: Cache,
    new: NewKeys,
    used: torch.Tensor,
    rows: torch.Tensor | None,
    advances: bool,
) -> torch.Tensor | None:
    """Write new keys and values behind those that the caches hold, and return q, rotated, if it is.

    Positions count from the beginning of a sequence, whatever of it does not count; `append` counts them from behind
    so many keys as `leftpad_k` says, which here is how far places are ahead of positions.
    """
    scales = {"k_scale": cache.k_descale, "v_scale": cache.v_descale}
    said: dict[str, Any] = {name: x for name, x in scales.items() if x is not None}
    try:
        return append(
            new.k,  # type: ignore[arg-type]
            new.v,  # type: ignore[arg-type]
            cache.k,
            cache.v,
            seqused_k=used,
            block_table=cache.table,
            cu_seqlens_q=new.starts,
            cache_batch_idx=rows,
            leftpad_k=None if new.positions is None else used - new.positions,
            rotary=new.rotary,  # type: ignore[arg-type]
            **said,
            rotary_interleaved=new.is_interleaved,
            q=None if new.rotary is None else q,
            q_advances=advances,
        )
    except ArgumentError as error:
        raise error.renamed(_NAMES_OF_APPEND | {"block_table": cache.table_name}) from error
