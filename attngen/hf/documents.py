"""Packed batches: sequences one after another in a row, of which cumulative lengths say where each begins.

Lengths stay on the device: nothing here is read by the host.
"""

from typing import Any

import torch
from transformers.masking_utils import and_masks, packed_sequence_mask_function

from attngen.hf.mask_functions import MaskFunction


def within_documents(
    function: MaskFunction, starts_q: torch.Tensor, starts_k: torch.Tensor, q_length: int, kv_length: int
) -> MaskFunction:
    """A mask function that shows of what another shows the pairs of one document.

    The last query of a document stands beside its last key, as flash-attn has it. Tokens behind the last document are
    one more.

    Args:
        function: the other, of places in the row.
        starts_q: (documents + 1,), whole numbers: where each document begins among the rows of q, and behind them where
            the last one ends.
        starts_k: likewise, of k; the same object where each document has as many queries as keys.
        q_length: rows of q.
        kv_length: rows of k.
    """
    kv_documents, _ = _documents(starts_k, kv_length)
    if starts_q is starts_k and q_length == kv_length:
        within: MaskFunction = and_masks(function, packed_sequence_mask_function(kv_documents))
        return within
    q_documents, rows = _documents(starts_q, q_length)
    known = q_documents[0].clamp(max=starts_q.shape[0] - 2).long()
    beside = rows + (starts_k[1:] - starts_q[1:])[known]
    before = starts_k[:-1][known] - 1  # where a query stands that is before all keys of its document
    q_places = torch.maximum(beside, before).to(torch.int32)[None]

    def inner_mask(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        is_shown = function(batch_idx, head_idx, q_places[batch_idx, q_idx], kv_idx)
        return is_shown & (q_documents[batch_idx, q_idx] == kv_documents[batch_idx, kv_idx])

    return inner_mask


def _documents(starts: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of each row's document, (1, length), and the rows, (length,), i32."""
    rows = torch.arange(length, dtype=torch.int32, device=starts.device)
    ends = starts[1:].to(torch.int32)
    return torch.searchsorted(ends, rows, right=True, out_int32=True)[None], rows
