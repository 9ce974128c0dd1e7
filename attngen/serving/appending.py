"""`append`: new keys and values go behind those that a cache has, rotated where positions are to be in them."""

from collections.abc import Mapping
from typing import Any

import torch

from attngen.bind import ROW_ALIGNMENT
from attngen.capture import not_captured
from attngen.dtypes import DTYPES, DType, torch_dtype
from attngen.errors import ArgumentError
from attngen.serving.append_call import AppendCall
from attngen.serving.append_checks import checked_call, unit_of
from attngen.serving.append_kernel import CHUNK, MADE, TENSORS, AppendRows
from attngen.serving.known_calls import KnownCalls, signature_of
from attngen.serving.lone_kernel import LARGEST_GRID, arch_on, launcher_of
from attngen.serving.meanings import appended

_FORMATS: dict[torch.dtype, DType] = {
    torch_dtype(DTYPES[name]): DTYPES[name] for name in ("f16", "bf16", "f32", "e4m3")
}
_CALLS = KnownCalls()
_CACHES = ("k_cache", "v_cache")
_UNITS = dict.fromkeys(("k_new", "v_new", "q", "cos", "sin"), ROW_ALIGNMENT)
CONVERTS_E4M3 = (8, 9)
"""The least compute capability with conversions to e4m3. Source: PTX ISA, "cvt"."""


@not_captured
def append(
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    rotary_interleaved: bool = True,
    q: torch.Tensor | None = None,
    q_advances: bool = True,
    layout: str = "nhd",
    k_scale: float | torch.Tensor | None = None,
    v_scale: float | torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Write new keys and values behind those that a cache has, in one launch, and rotate K and q first if asked to.

    New row i of a sequence goes to place seqused_k + i of it, which counts what is stored before anything is appended.
    Place p lies in row p % page of page block_table[sequence, p // page]. No number on the device is read by the host,
    and none that is wrong writes elsewhere: a place beyond the table or the cache, a page that there is none of, and
    all of a sequence of less than 0 keys are left out. Nothing else of the caches is touched. Where two sequences
    name one place, which of them is found there is not said. It can be captured. There is no backward pass.

    Args:
        k_new: (batch, seqlen_new, heads_kv, head_dim), or with cu_seqlens_q (tokens, heads_kv, head_dim): f16, bf16 or
            f32, head_dim a multiple of 8, last dimension contiguous, rows on 16 bytes.
        v_new: likewise, of the same type; its head_dim may be another.
        k_cache: (pages, page, heads_kv, head_dim), or without a block_table (batch, max_len, heads_kv, head_dim): f16,
            bf16, f32 or e4m3, last dimension contiguous, rows on 16 bytes, or on 8 where they are e4m3; all other
            strides are any, so that layers, or K and V, may lie in one tensor. Values are rounded once.
        v_cache: likewise, of the same type.
        seqused_k: (batch), i32: how many keys each sequence has, before; like all integers here it is contiguous.
        block_table: (batch, max_pages), i32, of any strides: the pages of each sequence.
        cu_seqlens_q: (batch + 1), i32: where each sequence of new rows begins, and where the last one ends. Rows that
            no sequence has are not appended, and come back as 0 in q; one that ends before it begins has none.
        cache_batch_idx: (batch), i32: which row of the block_table, or sequence of the cache, each has; those that
            there are none of are left out. Their number may then be any.
        leftpad_k: (batch), i32: how many keys at the beginning of each sequence do not count. It moves no place;
            rotations then begin at the first key that counts. FlashAttention rotates by place, as without it.
        rotary: cosines and sines, (positions, rotary_dim / 2) each, of the type of k_new or f32, last dimension
            contiguous, rows on 16 bytes; rotary_dim is a multiple of 16, at most head_dim. Row i of a sequence is
            rotated by position seqused_k + i, the last one where there are no more.
        rotary_interleaved: whether columns 2i and 2i + 1 turn together, or i and i + rotary_dim / 2.
        q: queries of the new rows, to be rotated: (batch, seqlen_new, heads_q, head_dim), or (tokens, heads_q,
            head_dim), of the type of k_new.
        q_advances: whether row i of q is rotated by position seqused_k + i, as causal and local masks want it; else all
            rows of a sequence by seqused_k, as FlashAttention does without such a mask.
        layout: of the caches; "hnd" exchanges page and heads_kv.
        k_scale: what values are divided by before they become e4m3, which ends at 448: a number, or f32 of shape (),
            (1,), (heads_kv,) or (batch, heads_kv), of any strides; 1 where None. Only for caches of e4m3.
        v_scale: likewise.

    Returns:
        q, rotated, dense; None where there is none.

    Raises:
        ArgumentError: an argument that the kernel cannot take; nothing was touched.
        ToolchainError: this machine cannot compile or run the kernel.
    """
    passed = {
        "k_new": k_new,
        "v_new": v_new,
        "q": q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "seqused_k": seqused_k,
        "block_table": block_table,
        "cu_seqlens_q": cu_seqlens_q,
        "cache_batch_idx": cache_batch_idx,
        "leftpad_k": leftpad_k,
        "k_scale": k_scale,
        "v_scale": v_scale,
    }
    flags = {"rotary_interleaved": rotary_interleaved, "q_advances": q_advances, "layout": layout}
    tables = tuple(rotary) if isinstance(rotary, tuple | list) else (rotary,)
    key = signature_of((*passed.values(), *flags.values(), *tables))
    tensors = _tensors_of({**passed, **dict(zip(("cos", "sin"), tables, strict=False))})
    ready = _CALLS.find(key, tensors.values())
    if ready is None:
        call = checked_call(**passed, rotary=rotary, **flags)
        if not call.k_new.is_cuda:
            return appended(call)
        if not call.tokens:
            return None if q is None else torch.empty_like(q)
        ready = launcher_of(kernel_for(call)).prepare(k_new.device, *launch_of(call))
        _CALLS.learn(key, ready, tensors, _UNITS | dict.fromkeys(_CACHES, unit_of(k_cache)), _CACHES)
    turned = None if q is None else torch.empty_like(q, memory_format=torch.contiguous_format)
    ready.start([*tensors.values(), *(() if turned is None else (turned,))])
    return turned


def _tensors_of(given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What is passed of what a kernel takes, in its order."""
    return {name: given[name] for name in TENSORS if isinstance(given.get(name), torch.Tensor)}


def kernel_for(call: AppendCall) -> AppendRows:
    """The kernel that takes a call.

    Raises:
        ArgumentError: the device has no conversion to the format of the caches.
        ToolchainError: no kernel runs on it.
    """
    new, rotary, arch = _FORMATS[call.k_new.dtype], call.rotary, arch_on(call.k_new.device)
    if (
        call.k_cache.dtype == torch.float8_e4m3fn
        and (arch.compute_capability or CONVERTS_E4M3) < CONVERTS_E4M3
    ):
        must = "f16, bf16 or f32: conversions to e4m3 need compute capability 8.9"
        raise ArgumentError("k_cache", f"{call.k_cache.dtype} on a GPU of {arch.name}", must)
    return AppendRows(
        arch,
        new,
        _FORMATS[call.k_cache.dtype],
        "none" if rotary is None else "interleaved" if rotary.is_interleaved else "halves",
        new if rotary is None else _FORMATS[rotary.cos.dtype],
    )


def launch_of(call: AppendCall) -> tuple[list[str], dict[str, int | float], int]:
    """What a launch is told: the names of its tensors, the last of which is memory for q, numbers, and blocks.

    Args:
        call: of which there are tokens.

    Raises:
        ArgumentError: there are more tokens than a launch has blocks.
    """
    if call.tokens > LARGEST_GRID:
        must = f"at most {LARGEST_GRID}"
        raise ArgumentError("k_new", f"{call.tokens} rows", must, "append some at a time")
    rotary = call.rotary
    turns = {} if rotary is None else {"cos": rotary.cos, "sin": rotary.sin}
    tensors = _tensors_of({**vars(call), **turns})
    numbers: dict[str, int | float] = {
        f"{name}.stride_{axis}": step
        for name, x in tensors.items()
        for axis, step in zip(TENSORS[name], x.stride(), strict=False)
    }
    for name in ("k_scale", "v_scale"):
        if name not in tensors:
            numbers[f"{name}_of_all"] = getattr(call, name)
    pages, page_size, heads_kv, columns = call.k_cache.shape
    numbers |= {
        "batch": call.batch,
        "tokens": call.tokens,
        "seqlen_new": call.k_new.shape[1],
        "num_heads_kv": heads_kv,
        "num_heads_q": 0 if call.q is None else call.q.shape[2],
        "k_chunks": columns // CHUNK,
        "v_chunks": call.v_cache.shape[3] // CHUNK,
        "rotary_chunks": 0 if rotary is None else rotary.columns // CHUNK,
        "positions": 0 if rotary is None else rotary.positions,
        "page_size": page_size,
        "pages": pages,
        "max_pages": call.max_pages,
        "rows": call.rows,
        "q_advances": int(call.q_advances),
    }
    names = [*tensors, *(() if call.q is None else (MADE,))]
    return names, numbers, call.tokens
