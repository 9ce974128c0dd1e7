"""What a call of `attngen.append` passes, checked argument by argument before anything is touched."""

from typing import Any

import torch

from attngen.bind import (
    PAGE_LAYOUTS,
    ROW_ALIGNMENT,
    check_alignment,
    check_no_derivative,
    check_overlap,
    check_plain,
    check_writable,
    python_number,
)
from attngen.errors import ArgumentError, shown
from attngen.serving.append_call import AppendCall, Rotary, Scale
from attngen.serving.append_kernel import CHUNK

NEW_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CACHE_DTYPES = (*NEW_DTYPES, torch.float8_e4m3fn)
F32 = torch.finfo(torch.float32)
ROTARY_STEP = 16
"""Columns of which rotary_dim is a multiple: both halves are whole chunks."""


def checked_call(
    *,
    k_new: Any,
    v_new: Any,
    k_cache: Any,
    v_cache: Any,
    seqused_k: Any,
    block_table: Any,
    cu_seqlens_q: Any,
    cache_batch_idx: Any,
    leftpad_k: Any,
    rotary: Any,
    rotary_interleaved: Any,
    q: Any,
    q_advances: Any,
    layout: Any,
    k_scale: Any,
    v_scale: Any,
) -> AppendCall:
    """The call of arguments that are those of `attngen.append`.

    Raises:
        ArgumentError: the first fault found.
    """
    if layout not in PAGE_LAYOUTS:
        raise ArgumentError("layout", shown(layout), " or ".join(map(repr, PAGE_LAYOUTS)))
    for name, flag in (("rotary_interleaved", rotary_interleaved), ("q_advances", q_advances)):
        if not isinstance(flag, bool):
            raise ArgumentError(name, shown(flag), "True or False")
    is_ragged = cu_seqlens_q is not None
    for name, x in (("k_new", k_new), ("v_new", v_new), *((("q", q),) if q is not None else ())):
        _check_rows(name, x, k_new, is_ragged)
    device = k_new.device
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        _check_cache(name, x, device)
    heads_first = layout == "hnd"
    k_cache, v_cache = (x.transpose(1, 2) if heads_first else x for x in (k_cache, v_cache))
    _check_shapes((k_new, v_new), q, (k_cache, v_cache), heads_first)
    if is_ragged:
        _check_integers("cu_seqlens_q", cu_seqlens_q, None, device)
        k_new, v_new, q = (x if x is None else x.unsqueeze(0) for x in (k_new, v_new, q))
        batch = len(cu_seqlens_q) - 1
    else:
        batch = k_new.shape[0]
    _check_integers("seqused_k", seqused_k, batch, device)
    for name, x in (("cache_batch_idx", cache_batch_idx), ("leftpad_k", leftpad_k)):
        if x is not None:
            _check_integers(name, x, batch, device)
    _check_table(block_table, cache_batch_idx is not None, batch, k_cache)
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    k_scale, v_scale = (_scale(name, scale, batch, k_cache) for name, scale in scales.items())
    turns = None if rotary is None else _rotary(rotary, rotary_interleaved, k_new)
    if q is not None and turns is None:
        raise ArgumentError("q", "queries without rotary", "None where nothing is rotated")
    beside = {"k_new": k_new, "v_new": v_new, "q": q, "seqused_k": seqused_k, "block_table": block_table}
    read = {name: x for name, x in beside.items() if x is not None}
    check_overlap("k_cache", k_cache, {"v_cache": v_cache, **read})
    check_overlap("v_cache", v_cache, read)
    return AppendCall(
        k_new, v_new, q, k_cache, v_cache, seqused_k, block_table, cu_seqlens_q, cache_batch_idx, leftpad_k, turns,
        q_advances, k_scale, v_scale,
    )  # fmt: skip


def _check_rows(name: str, x: Any, k_new: torch.Tensor, is_ragged: bool) -> None:
    """Refuse new rows that the kernel cannot read."""
    check_plain(name, x)
    check_no_derivative(name, x)
    if x.dtype not in NEW_DTYPES:
        raise ArgumentError(name, f"dtype {x.dtype}", " or ".join(map(str, NEW_DTYPES)))
    if x.device.type not in ("cpu", "cuda"):
        raise ArgumentError(name, f"device {x.device}", "cpu or cuda")
    if (x.dtype, x.device) != (k_new.dtype, k_new.device):
        must = f"{k_new.dtype} on {k_new.device}, as k_new has"
        raise ArgumentError(name, f"{x.dtype} on {x.device}", must)
    if x.dim() != (3 if is_ragged else 4):
        ragged, dense = "3: (tokens, heads, head_dim)", "4: (batch, seqlen_new, heads, head_dim)"
        must = f"{ragged} beside cu_seqlens_q" if is_ragged else f"{dense}, or 3 beside cu_seqlens_q"
        raise ArgumentError(name, f"{x.dim()} dimensions", must)
    _check_columns(name, x)


def _check_columns(name: str, x: torch.Tensor) -> None:
    """Refuse rows that are no whole chunks, or do not lie so that chunks can be moved."""
    if x.shape[-1] < CHUNK or x.shape[-1] % CHUNK:
        raise ArgumentError(name, f"head_dim {x.shape[-1]}", f"a multiple of {CHUNK}, at least {CHUNK}")
    _check_contiguous(name, x, "head_dim")


def _check_contiguous(name: str, x: torch.Tensor, what: str) -> None:
    if x.stride(-1) != 1 and x.numel():
        must = f"1 (contiguous {what})"
        raise ArgumentError(
            name, f"stride {x.stride(-1)} in the last dimension", must, f"pass {name}.contiguous()"
        )
    if x.is_cuda:
        check_alignment(name, x, unit_of(x))


def unit_of(x: torch.Tensor) -> int:
    """On how many bytes rows start that chunks of a tensor are moved of."""
    return min(ROW_ALIGNMENT, CHUNK * x.element_size())


def _check_cache(name: str, x: Any, device: torch.device) -> None:
    check_plain(name, x)
    check_no_derivative(name, x)
    check_writable(name, x)
    if x.dtype not in CACHE_DTYPES:
        raise ArgumentError(name, f"dtype {x.dtype}", " or ".join(map(str, CACHE_DTYPES)))
    if x.device != device:
        raise ArgumentError(name, f"device {x.device}", f"{device}, the device of k_new")
    if x.dim() != 4:
        raise ArgumentError(name, f"{x.dim()} dimensions", "4: (pages, page, heads_kv, head_dim)")
    _check_columns(name, x)


def _check_shapes(
    new: tuple[torch.Tensor, torch.Tensor],
    q: torch.Tensor | None,
    caches: tuple[torch.Tensor, torch.Tensor],
    heads_first: bool,
) -> None:
    """Refuse tensors whose sizes do not fit each other; caches as (pages, page, heads_kv, head_dim)."""
    (k_new, v_new), (k_cache, v_cache) = new, caches
    if v_new.shape[:-1] != k_new.shape[:-1]:
        must = f"{(*k_new.shape[:-1], v_new.shape[-1])}, as k_new has but for head_dim"
        raise ArgumentError("v_new", f"shape {tuple(v_new.shape)}", must)
    if q is not None and (q.shape[:-2], q.shape[-1]) != (k_new.shape[:-2], k_new.shape[-1]):
        must = f"{(*k_new.shape[:-2], q.shape[-2], k_new.shape[-1])}, as k_new has but for heads"
        raise ArgumentError("q", f"shape {tuple(q.shape)}", must)
    order = (0, 2, 1, 3) if heads_first else (0, 1, 2, 3)
    axes = "(pages, heads_kv, page, head_dim)" if heads_first else "(pages, page, heads_kv, head_dim)"
    for name, cache, rows in (("k_cache", k_cache, k_new), ("v_cache", v_cache, v_new)):
        expected = (*k_cache.shape[:2], *rows.shape[-2:])
        if cache.shape != expected or cache.dtype != k_cache.dtype:
            got, wanted = (tuple(shape[dim] for dim in order) for shape in (cache.shape, expected))
            must = f"{k_cache.dtype} of shape {wanted} = {axes}"
            raise ArgumentError(name, f"{cache.dtype} of shape {got}", must)
    if k_cache.shape[1] < 1:
        raise ArgumentError("k_cache", "pages of 0 rows", f"a row a page at least: {axes}")


def _check_integers(name: str, x: Any, length: int | None, device: torch.device) -> None:
    """Refuse what is no i32 for each sequence; `length` is None for one more than there are sequences."""
    check_plain(name, x)
    expected = (length,) if length is not None else (max(1, len(x)) if x.dim() else 1,)
    if (x.dtype, tuple(x.shape), x.device) != (torch.int32, expected, device):
        size = "(batch + 1,)" if length is None else f"({length},) = (batch,)"
        must = f"{torch.int32} of shape {size} on {device}"
        raise ArgumentError(name, f"{x.dtype} of shape {tuple(x.shape)} on {x.device}", must)
    if not x.is_contiguous():
        raise ArgumentError(name, f"stride {x.stride(0)}", "1 (contiguous)", f"pass {name}.contiguous()")


def _check_table(table: Any, has_index: bool, batch: int, k_cache: torch.Tensor) -> None:
    """Refuse a table that is none, and one, or a cache without one, of another number of sequences."""
    if table is not None:
        check_plain("block_table", table)
        if table.dtype != torch.int32 or table.dim() != 2 or table.device != k_cache.device:
            must = f"{torch.int32} of 2 dimensions, (batch, max_pages), on {k_cache.device}"
            got = f"{table.dtype} of {table.dim()} dimensions on {table.device}"
            raise ArgumentError("block_table", got, must)
    name, x = ("k_cache", k_cache) if table is None else ("block_table", table)
    if not has_index and x.shape[0] != batch:
        what = "sequences" if table is None else "rows"
        cure = "pass a block_table, or cache_batch_idx" if table is None else "pass cache_batch_idx"
        raise ArgumentError(name, f"{x.shape[0]} {what}", f"{batch}, one for each sequence", cure)


def _rotary(tables: Any, is_interleaved: bool, k_new: torch.Tensor) -> Rotary:
    """The tables of cosines and sines of a call."""
    if not isinstance(tables, tuple | list) or len(tables) != 2:
        raise ArgumentError("rotary", f"a {type(tables).__name__}", "two tensors: cosines and sines")
    cos, sin = tables
    for name, x in (("rotary[0]", cos), ("rotary[1]", sin)):
        check_plain(name, x)
        check_no_derivative(name, x)
        dtypes = dict.fromkeys((k_new.dtype, torch.float32))
        if x.dtype not in dtypes or x.device != k_new.device or x.dim() != 2:
            must = f"{' or '.join(map(str, dtypes))} of 2 dimensions, (positions, rotary_dim / 2), on {k_new.device}"
            raise ArgumentError(name, f"{x.dtype} of {x.dim()} dimensions on {x.device}", must)
        columns = 2 * x.shape[1]
        if not 0 < columns <= k_new.shape[-1] or columns % ROTARY_STEP:
            must = f"a multiple of {ROTARY_STEP} up to {k_new.shape[-1]}, the head_dim of k_new"
            raise ArgumentError(name, f"rotary_dim {columns}", must)
        if x.shape[0] < 1:
            raise ArgumentError(name, "0 positions", "one at least")
        _check_contiguous(name, x, "columns")
    if (sin.shape, sin.dtype) != (cos.shape, cos.dtype):
        must = f"{cos.dtype} of shape {tuple(cos.shape)}, as cosines are"
        raise ArgumentError("rotary[1]", f"{sin.dtype} of shape {tuple(sin.shape)}", must)
    return Rotary(cos, sin, is_interleaved)


def _scale(name: str, scale: Any, batch: int, k_cache: torch.Tensor) -> Scale:
    """What values are divided by: a number, or a view of f32 (batch, heads_kv)."""
    if scale is None:
        return 1.0
    if k_cache.dtype != torch.float8_e4m3fn:
        raise ArgumentError(name, "a scale", f"None: a cache of {k_cache.dtype} has none")
    heads = k_cache.shape[2]
    if not isinstance(scale, torch.Tensor):
        number = python_number(name, scale)
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not F32.tiny <= number <= F32.max:
            raise ArgumentError(name, shown(scale), "a number above 0 that f32 has, or a tensor of f32")
        return float(number)
    check_plain(name, scale)
    check_no_derivative(name, scale)
    shapes = ((), (1,), (heads,), (batch, heads))
    if scale.dtype != torch.float32 or tuple(scale.shape) not in shapes or scale.device != k_cache.device:
        known = f"{', '.join(map(str, shapes[:-1]))} or {shapes[-1]}"
        must = f"{torch.float32} of shape {known} on {k_cache.device}"
        raise ArgumentError(name, f"{scale.dtype} of shape {tuple(scale.shape)} on {scale.device}", must)
    return scale.expand(batch, heads)
