"""Attention of sequences of any lengths, one after another, as torch.nn.attention.varlen has it."""

from operator import index
from typing import Any, Protocol

import torch

from attngen.api import kernel_of_call
from attngen.bind import bound_of_lengths, check_plain
from attngen.errors import ArgumentError, shown
from attngen.expr import LARGEST_LENGTH
from attngen.plan import Lengths
from attngen.torch_state import is_traced, is_transformed

RAGGED = Lengths("ragged", "ragged")
NO_END = -1
"""What torch calls a side of a window that has no end."""

_OWN_NAMES = {
    "q": "query",
    "k": "key",
    "v": "value",
    "softmax_scale": "scale",
    **{f"cu_seqlens_{axis}": f"cu_seq_{axis}" for axis in "qk"},
    **{f"max_seqlen_{axis}": f"max_{axis}" for axis in "qk"},
}
"""What this function calls the arguments of a kernel."""


class AuxRequest(Protocol):
    """What `torch.nn.attention.varlen.AuxRequest` says: which results are wanted beside out."""

    lse: bool


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: AuxRequest | None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (NO_END, NO_END),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of each sequence with itself, by a kernel that is compiled once and remembered.

    Arguments are those of torch's function of this name. Where an input requires grad there is a backward pass, with
    seqused_k too. CPU tensors run on the simulator, f32 too.

    Args:
        query: (tokens_q, num_heads_q, head_dim), f16 or bf16, last dimension contiguous, rows on 16 bytes.
        key: (tokens_k, num_heads_kv, head_dim), or with block_table (pages, page, num_heads_kv, head_dim), any number
            of rows a page.
        value: (tokens_k, num_heads_kv, head_dim_v), likewise.
        cu_seq_q: (sequences + 1,), i32: where each sequence of queries begins, and behind them where the last one ends.
        cu_seq_k: likewise, of keys. With block_table it says how long they are where seqused_k is None, else nothing.
        max_q: length of the longest sequence of queries, or more; it chooses kernels, and changes no result.
        max_k: likewise, of keys.
        return_aux: whether lse is wanted too: of torch's `AuxRequest`, or anything with that field.
        scale: 1/sqrt(head_dim) where None.
        window_size: keys before and behind the place of a query that it sees, -1 for all: (-1, 0) is causal. The last
            query of a sequence has the place of its last key.
        enable_gqa: whether num_heads_q may be a multiple of num_heads_kv.
        seqused_k: (sequences,), i32: how many keys of each sequence count.
        block_table: (sequences, max_pages), i32: the pages of each; without a backward pass.
        num_splits: None or 1. With 1 results do not depend on other sequences; with None keys in pages are split where
            queries are few. Others never are.

    Returns:
        out, (tokens_q, num_heads_q, head_dim_v), or (out, lse) with lse (num_heads_q, tokens_q), f32, as torch returns
        it. Tokens behind the last sequence have out 0, lse -inf and gradients 0.

    Raises:
        ArgumentError: an argument that no kernel takes.
    """
    if num_splits is not None and (type(num_splits) is not int or num_splits != 1):
        must = "None or 1: a call says by its sizes whether keys are split"
        raise ArgumentError("num_splits", shown(num_splits), must)
    if cu_seq_k is None and (block_table is None or seqused_k is None):
        must = "a tensor" if block_table is None else "a tensor, or seqused_k beside block_table"
        raise ArgumentError("cu_seq_k", "None", must, "pass cu_seq_q where lengths are alike")
    dims = 3 if block_table is None else 4
    form = "(tokens, heads, head_dim)" if block_table is None else "(pages, page, heads, head_dim)"
    for name, x, count, of in (
        ("query", query, 3, "(tokens, heads, head_dim)"),
        ("key", key, dims, form),
        ("value", value, dims, form),
    ):
        if not (is_traced(x) or is_transformed(x)):
            check_plain(name, x)
        if x.dim() != count:
            raise ArgumentError(name, f"{x.dim()} dimensions", f"{count}: {of}")
    if not enable_gqa and query.shape[1] != key.shape[-2]:
        got = f"{key.shape[-2]} heads beside {query.shape[1]} of query"
        raise ArgumentError("key", got, "as many, without enable_gqa", "pass enable_gqa=True")
    passed: dict[str, Any] = {"cu_seqlens_q": cu_seq_q, "max_seqlen_q": max_q}
    if block_table is None:
        passed |= {"cu_seqlens_k": cu_seq_k, "max_seqlen_k": max_k, "seqused_k": seqused_k}
    else:
        bound_of_lengths("max_k", max_k)
        used = lengths_between("cu_seq_k", cu_seq_k) if seqused_k is None else seqused_k
        passed |= {"block_table": block_table, "seqused_k": used}
    if return_aux is not None and not isinstance(getattr(return_aux, "lse", None), bool):
        raise ArgumentError("return_aux", shown(return_aux), "None or AuxRequest(lse=True)")
    wants_lse = return_aux is not None and return_aux.lse
    mask = _mask(window_size)
    try:
        lengths = RAGGED if block_table is None else Lengths("ragged", "paged")
        may_split = num_splits is None
        kernel = kernel_of_call(query, key, value, mask, passed=passed, lengths=lengths, may_split=may_split)
        return kernel(query, key, value, scale, wants_lse, **passed)
    except ArgumentError as error:
        raise error.renamed(_OWN_NAMES) from error


def sequences_of(name: str, starts: Any) -> int:
    """How many sequences there are of which `starts`, (batch + 1,), i32, says where each begins.

    Raises:
        ArgumentError: starts are no such tensor.
    """
    if (
        not isinstance(starts, torch.Tensor)
        or starts.dim() != 1
        or starts.dtype != torch.int32
        or not len(starts)
    ):
        is_tensor = isinstance(starts, torch.Tensor)
        got = f"{starts.dtype} of shape {tuple(starts.shape)}" if is_tensor else type(starts).__name__
        raise ArgumentError(name, got, "a tensor of i32: (batch + 1,)")
    return len(starts) - 1


def lengths_between(name: str, starts: Any, tokens: int | None = None) -> torch.Tensor:
    """How long these sequences are, (batch,), within so many tokens; errors as of `sequences_of`."""
    sequences_of(name, starts)
    within: torch.Tensor = starts if tokens is None else starts.clamp(0, tokens)
    return within.diff()


def _mask(window_size: tuple[int, int]) -> str:
    """The mask of a window, as a spec writes it."""
    try:
        left, right = map(index, window_size)
        if not NO_END <= min(left, right) <= max(left, right) <= LARGEST_LENGTH:
            raise ValueError
    except (TypeError, ValueError):
        must = f"(left, right), each -1 or the number of keys that are seen, at most {LARGEST_LENGTH:,}"
        raise ArgumentError("window_size", shown(window_size), must, "(-1, 0) is causal") from None
    if (left, right) == (NO_END, 0):
        return "causal"
    sides = [f"kv_idx >= q_pos - {left}"] * (left != NO_END) + [f"kv_idx <= q_pos + {right}"] * (
        right != NO_END
    )
    return " and ".join(sides) or "full"
