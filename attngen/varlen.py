"""Attention of sequences of any lengths, one after another, as torch.nn.attention.varlen has it."""

from operator import index
from typing import Any, Protocol

import torch

from attngen.api import kernel_of_call
from attngen.bind import check_plain
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
        key: (tokens_k, num_heads_kv, head_dim).
        value: (tokens_k, num_heads_kv, head_dim_v).
        cu_seq_q: (sequences + 1,), i32: where each sequence of queries begins, and behind them where the last one ends.
        cu_seq_k: likewise, of keys.
        max_q: length of the longest sequence of queries, or more; it chooses kernels, and changes no result.
        max_k: likewise, of keys.
        return_aux: whether lse is wanted too: of torch's `AuxRequest`, or anything with that field.
        scale: 1/sqrt(head_dim) where None.
        window_size: keys before and behind the place of a query that it sees, -1 for all: (-1, 0) is causal. The last
            query of a sequence has the place of its last key.
        enable_gqa: whether num_heads_q may be a multiple of num_heads_kv.
        seqused_k: (sequences,), i32: how many keys of each sequence count.
        block_table: None: keys and values by pages are not served yet.
        num_splits: None or 1: keys are never split, so that results do not depend on other sequences.

    Returns:
        out, (tokens_q, num_heads_q, head_dim_v), or (out, lse) with lse (num_heads_q, tokens_q), f32, as torch returns
        it. Tokens behind the last sequence have out 0, lse -inf and gradients 0.

    Raises:
        ArgumentError: an argument that no kernel takes, or that is not served yet.
    """
    if block_table is not None:
        must = "None: keys and values by pages come with paged caches"
        raise ArgumentError(
            "block_table", type(block_table).__name__, must, "pass ragged keys, with cu_seq_k"
        )
    if num_splits not in (None, 1):
        must = "None or 1: keys are not split here, so that results do not depend on other sequences"
        raise ArgumentError("num_splits", shown(num_splits), must)
    if cu_seq_k is None:
        must = "a tensor: without it keys come by pages, which are not served yet"
        raise ArgumentError("cu_seq_k", "None", must, "pass cu_seq_q where lengths are alike")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not (is_traced(x) or is_transformed(x)):
            check_plain(name, x)
        if x.dim() != 3:
            raise ArgumentError(name, f"{x.dim()} dimensions", "3: (tokens, heads, head_dim)")
    if not enable_gqa and query.shape[1] != key.shape[1]:
        got = f"{key.shape[1]} heads beside {query.shape[1]} of query"
        raise ArgumentError("key", got, "as many, without enable_gqa", "pass enable_gqa=True")
    passed: dict[str, Any] = {
        "cu_seqlens_q": cu_seq_q,
        "cu_seqlens_k": cu_seq_k,
        "max_seqlen_q": max_q,
        "max_seqlen_k": max_k,
        "seqused_k": seqused_k,
    }
    if return_aux is not None and not isinstance(getattr(return_aux, "lse", None), bool):
        raise ArgumentError("return_aux", shown(return_aux), "None or AuxRequest(lse=True)")
    wants_lse = return_aux is not None and return_aux.lse
    mask = _mask(window_size)
    try:
        kernel = kernel_of_call(query, key, value, mask, passed=passed, lengths=RAGGED)
        return kernel(query, key, value, scale, wants_lse, **passed)
    except ArgumentError as error:
        raise error.renamed(_OWN_NAMES) from error


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
