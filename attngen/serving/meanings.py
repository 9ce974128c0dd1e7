"""What the kernels of this folder mean, in torch: what CPU tensors get, and what the emitted texts are held against."""

import math
from collections.abc import Sequence

import torch

from attngen.quantize import rounded_to_e4m3
from attngen.serving.append_call import AppendCall, Rotary, Scale
from attngen.simulate.simulated_softmax import LARGEST, LN_2, LOG2_E, joined
from attngen.torch_state import torch_defaults


@torch_defaults()
def merged(
    outs: Sequence[torch.Tensor],
    lses: Sequence[torch.Tensor],
    sink: torch.Tensor | None,
    layout: str,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge parts that have been checked; arguments as of `attngen.merge_states`.

    Args:
        outs: of the parts, like lses.
        lses: see outs.
        sink: a logit of each head, or None.
        layout: of outs.
        dtype: of the result.

    Returns:
        out, dense, in f32 until it is rounded, and lse.
    """
    natural = torch.stack([lse.masked_fill(lse == math.inf, -math.inf) for lse in lses])
    largest = natural.amax(0).clamp(min=-LARGEST)
    weights = torch.exp2((natural - largest) * LOG2_E)
    total = weights.sum(0)
    by = torch.where(total == 0, 0.0, total.reciprocal())
    lse = largest + torch.log2(total) * LN_2
    if sink is not None:
        by, lse = joined(by, lse, sink.float().unsqueeze(-1))
    out = torch.zeros_like(outs[0], dtype=torch.float32, memory_format=torch.contiguous_format)
    rows = _heads_first(out, layout)
    for part, weight, of_part in zip(outs, weights, natural, strict=True):
        seen = _heads_first(part, layout).float().masked_fill((of_part == -math.inf).unsqueeze(-1), 0.0)
        rows += weight.unsqueeze(-1) * seen
    rows *= by.unsqueeze(-1)
    return out.to(dtype), lse


def _heads_first(x: torch.Tensor, layout: str) -> torch.Tensor:
    """A view with rows as lse has them: (batch, heads, seqlen, head_dim), or (heads, tokens, head_dim)."""
    return x if x.dim() == 4 and layout == "bhsd" else x.transpose(-3, -2)


@torch_defaults()
def appended(call: AppendCall) -> torch.Tensor | None:
    """Write what a call appends into its caches, and return q, rotated in f32 and rounded, if there is one.

    q has as many dimensions as it was passed with.
    """
    sequence, index = _tokens_of(call)
    has_sequence = sequence >= 0
    number = sequence.clamp(min=0)
    used = _looked_up(call.seqused_k, number).long()
    page, slot = _places(call, number, used + index)
    exists = has_sequence & (used >= 0) & (page >= 0)
    first = used - (0 if call.leftpad_k is None else _looked_up(call.leftpad_k, number).long())
    k, v = (x.flatten(0, 1).float() for x in (call.k_new, call.v_new))
    turns = call.rotary
    if turns is not None:
        k = rotated(k, turns, first + index)
    for x, cache, scale in ((k, call.k_cache, call.k_scale), (v, call.v_cache, call.v_scale)):
        _store(x[exists], cache, (page[exists], slot[exists]), scale, number[exists])
    if call.q is None or turns is None:
        return None
    q = rotated(call.q.flatten(0, 1).float(), turns, first + index if call.q_advances else first)
    return (
        q.masked_fill(~has_sequence.view(-1, 1, 1), 0.0)
        .to(call.q.dtype)
        .view(call.q.shape[call.cu_seqlens_q is not None :])
    )


def _tokens_of(call: AppendCall) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequence of each token, of several the last, -1 of none; and its number in it."""
    token = torch.arange(call.tokens, dtype=torch.int64)
    if call.cu_seqlens_q is None:
        length = max(1, call.k_new.shape[1])
        return token // length, token % length
    begin, end = (x.clamp(0, call.tokens).long() for x in (call.cu_seqlens_q[:-1], call.cu_seqlens_q[1:]))
    has = (begin <= token[:, None]) & (token[:, None] < end)
    numbers = torch.arange(-1, call.batch, dtype=torch.int64)
    sequence = torch.where(has, numbers[1:], -1)
    found = torch.cat((numbers[:1].expand(call.tokens, 1), sequence), 1).amax(1)
    return found, token - _looked_up(begin, found.clamp(min=0))


def _looked_up(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Elements of a vector; 0 of one that has none."""
    return x[at] if len(x) else torch.zeros(at.shape, dtype=x.dtype)


def _places(call: AppendCall, number: torch.Tensor, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Page and row of it, page -1 where there is none, of places of sequences."""
    pages, page_size = call.k_cache.shape[:2]
    row = number if call.cache_batch_idx is None else _looked_up(call.cache_batch_idx, number).long()
    exists = (row >= 0) & (row < call.rows) & (place >= 0) & (place < call.max_pages * page_size)
    row, place = row.where(exists, 0), place.where(exists, 0)
    page = row
    if call.block_table is not None:
        page = _looked_up(call.block_table.reshape(-1), row * call.max_pages + place // page_size).long()
    return page.where(exists & (page >= 0) & (page < pages), -1), place % page_size


def rotated(x: torch.Tensor, turns: Rotary, position: torch.Tensor) -> torch.Tensor:
    """Rows of heads with their first columns rotated, pair by pair.

    Args:
        x: (tokens, heads, head_dim), f32.
        turns: the angles, by position.
        position: (tokens), kept within those that there are.
    """
    position = position.clamp(0, turns.positions - 1)
    cos, sin = (table[position].float().unsqueeze(1) for table in (turns.cos, turns.sin))
    turned = x.clone()
    half = turns.columns // 2
    columns = torch.arange(turns.columns, dtype=torch.int64)
    first, second = columns.view(half, 2).T if turns.is_interleaved else columns.view(2, half)
    a, b = x[..., first], x[..., second]
    turned[..., first], turned[..., second] = a * cos - b * sin, b * cos + a * sin
    return turned


def _store(
    x: torch.Tensor,
    cache: torch.Tensor,
    places: tuple[torch.Tensor, torch.Tensor],
    scale: Scale,
    sequence: torch.Tensor,
) -> None:
    """Write rows of heads, f32, to places (page, row) of a cache, of e4m3 divided by the scales of their sequences."""
    if cache.dtype == torch.float8_e4m3fn:
        by = scale[sequence] if isinstance(scale, torch.Tensor) else x.new_full(x.shape[:2], scale)
        cache.view(torch.uint8)[places] = rounded_to_e4m3(x / by.unsqueeze(-1)).view(torch.uint8)
    else:
        cache[places] = x.to(cache.dtype)
