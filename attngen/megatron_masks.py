"""What Megatron says of masks and packed sequences, as texts and lengths of attngen; nothing here reads a device."""

from typing import Any

import torch

from attngen.errors import ArgumentError, shown
from attngen.fit_heads import check_strided
from attngen.flash_attn.attend import longest
from attngen.flash_attn.wish import window_of
from attngen.pair_tensors import declared_by_pair

CAUSAL = "causal_top_left"
MASKS = {
    "no_mask": "full",
    "padding": "full",
    "arbitrary": "full",
    "causal": CAUSAL,
    "padding_causal": CAUSAL,
    "causal_bottom_right": "causal",
}
"""By the names of AttnMaskType: what each hides beside a mask tensor."""
PACKED = "packed_seq_params"


def mask_text(kind: Any, window: tuple[int, int] | None, lengths: tuple[int, int] | None) -> str:
    """Which keys a query sees, but for a mask tensor.

    Args:
        kind: of AttnMaskType.
        window: keys before and behind the place of a query that it sees, -1 for all, or None.
        lengths: of queries and keys, where all sequences have the same.

    Raises:
        ArgumentError: there is no such type or window, or the type is causal and lengths are neither equal nor those of
            one query, which sees all keys.
    """
    name = getattr(kind, "name", None)
    if name not in MASKS:
        raise ArgumentError("attn_mask_type", shown(kind), f"one of AttnMaskType: {', '.join(MASKS)}")
    found, place = MASKS[name], "q_pos"
    if found == CAUSAL and lengths is not None:
        queries, keys = lengths
        if queries not in (1, keys):
            got = f"{name} of {queries} queries and {keys} keys"
            cure = "causal_bottom_right puts the last query beside the last key"
            raise ArgumentError("attn_mask_type", got, "as many queries as keys, or one", cure)
        found = "causal"
    elif found == CAUSAL:
        place = "q_idx"
    left, right = window_of((-1, -1) if window is None else window, causal=False, unbounded=-1)
    sides = [found] if found != "full" else []
    sides += [f"kv_idx >= {place} - {left}"] if left is not None else []
    sides += [f"kv_idx <= {place} + {right}"] if right is not None else []
    return " and ".join(sides) or "full"


def with_tensors(
    mask: str,
    sizes: tuple[int, int, int, int],
    attention_mask: torch.Tensor | None,
    attention_bias: torch.Tensor | None,
) -> tuple[str, str, dict[str, str], dict[str, torch.Tensor]]:
    """Mask and score with what tensors say of each pair, how these are declared, and they themselves.

    Args:
        mask: what is hidden beside.
        sizes: batch, query heads, queries and keys.
        attention_mask: (batch or 1, heads or 1, queries or 1, keys or 1), bool, True where a key is hidden; or None.
        attention_bias: of such a shape: numbers that are added to scores; or None.

    Raises:
        ArgumentError: a tensor of another shape or type.
    """
    score, declared, passed = "score", {}, {}
    for name, x in (("attention_mask", attention_mask), ("attention_bias", attention_bias)):
        if x is None:
            continue
        check_strided(name, x)
        if (x.dtype == torch.bool) != (name == "attention_mask"):
            must = "torch.bool, True where a key is hidden" if name == "attention_mask" else "numbers"
            raise ArgumentError(name, f"dtype {x.dtype}", must)
        declared[name], element = declared_by_pair(name, x, sizes)
        if (
            x.shape[-1] > sizes[3]
        ):  # which models of Hugging Face pass, and Megatron's own attention would not take
            raise ArgumentError(name, f"shape {tuple(x.shape)}", f"{sizes[3]} keys, or 1")
        passed[name] = x
        if name == "attention_bias":
            score = f"score + {element}"
        else:
            mask = f"not {element}" if mask == "full" else f"{mask} and not {element}"
    return mask, score, declared, passed


def check_no_tensors(**tensors: torch.Tensor | None) -> None:
    """Refuse tensors by pair beside packed sequences.

    Raises:
        ArgumentError: there is one.
    """
    for name, x in tensors.items():
        if x is not None:
            must = f"None beside {PACKED}, which say which tokens belong together"
            raise ArgumentError(name, type(x).__name__, must)


def cut_of(packed: Any) -> dict[str, Any]:
    """What a kernel of ragged sequences is passed for PackedSeqParams of format thd.

    Sequences begin in memory where `cu_seqlens_q_padded` says, if it does, and have the lengths of `cu_seqlens_q`; rows
    between them are 0. What else is held there speaks to other modules than attention.

    Raises:
        ArgumentError: another format, or sequences that several processes share.
    """
    if packed.qkv_format != "thd":
        raise ArgumentError(
            f"{PACKED}.qkv_format", shown(packed.qkv_format), "'thd': tokens, heads, head_dim"
        )
    if packed.cp_group is not None or packed.local_cp_size not in (None, 1):
        got = f"{packed.local_cp_size} processes" if packed.cp_group is None else "a group"
        raise ArgumentError(f"{PACKED}.cp_group", got, "none: there is no context parallelism here")
    cut: dict[str, Any] = {}
    for ours, theirs in (("q", "q"), ("k", "kv")):
        starts = getattr(packed, f"cu_seqlens_{theirs}")
        padded = getattr(packed, f"cu_seqlens_{theirs}_padded")
        if not isinstance(starts, torch.Tensor):
            raise ArgumentError(
                f"{PACKED}.cu_seqlens_{theirs}", type(starts).__name__, "a torch tensor of i32"
            )
        cut[f"cu_seqlens_{ours}"] = starts if padded is None else padded
        if padded is not None and padded is not starts:
            cut[f"seqused_{ours}"] = starts.diff()
        cut |= longest(f"max_seqlen_{ours}", getattr(packed, f"max_seqlen_{theirs}"))
    return cut
