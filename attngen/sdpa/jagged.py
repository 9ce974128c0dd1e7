"""scaled_dot_product_attention of nested tensors of the jagged layout: ragged sequences, without padding or copies."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nested._internal.nested_tensor import NestedTensor, nested_view_from_values_offsets_lengths

from attngen.api import kernel_of_call
from attngen.capture import CapturedKernel
from attngen.errors import ArgumentError, RefusedError, SpecError, ToolchainError
from attngen.fit_heads import fit_heads
from attngen.kernel import Kernel
from attngen.sdpa.question import reason_of
from attngen.varlen import RAGGED

RAGGED_DIM = 2
"""Of (batch, heads, seqlen, columns)."""


@dataclass(frozen=True)
class JaggedCall:
    """What attngen is asked.

    Attributes:
        query: the nested tensor, whose lengths out has.
        rows: (tokens, heads, columns) of query, key and value, of columns that kernels read.
        scale: of the scores, None for that of the columns.
        columns: of value.
        cut: what says lengths, as a kernel is passed it.
        kernel: that takes the call.
    """

    query: Any
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    scale: float | None
    columns: int
    cut: dict[str, Any]
    kernel: Kernel | CapturedKernel

    def attend(self) -> torch.Tensor:
        """Out, (batch, heads, seqlen, head_dim_v), nested as query is.

        Raises:
            RefusedError: no kernel takes the call; nothing was touched.
        """
        try:
            out = self.kernel(*self.rows, self.scale, **self.cut)
        except ArgumentError as error:
            raise RefusedError([reason_of(error)]) from error
        except ToolchainError as error:
            raise RefusedError([str(error).splitlines()[0]]) from error
        assert isinstance(out, torch.Tensor)
        query, rows = self.query, out[..., : self.columns]
        longest = {"min_seqlen": query._maybe_min_seqlen, "max_seqlen": query._maybe_max_seqlen}
        made = nested_view_from_values_offsets_lengths(rows, query.offsets(), query.lengths(), **longest)  # type: ignore[no-untyped-call]
        whole: torch.Tensor = made.transpose(1, 2)
        return whole


def translated_jagged(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> JaggedCall:
    """Say a call of nested tensors in attngen's terms: attention of each sequence with itself.

    Raises:
        RefusedError: no kernel takes the call; all reasons that can be told at once.
    """
    inputs = {"query": query, "key": key, "value": value}
    reasons = [
        f"{name}: no nested tensor of (batch, heads, seqlen, columns) whose seqlen is ragged"
        for name, x in inputs.items()
        if not _is_ragged(x)
    ]
    if dropout_p:
        reasons.append(
            "dropout_p: there is no dropout; torch applies it wherever it is not 0, in evaluation too"
        )
    if attn_mask is not None:
        reasons.append("attn_mask: a mask tensor beside nested tensors")
    if not reasons and query.shape[1] != key.shape[1] and not enable_gqa:
        reasons.append("query, key, value: heads that differ, without enable_gqa")
    if reasons:
        raise RefusedError(reasons)
    cut = {**_lengths("q", query), **_lengths("k", key)}
    try:
        q, k, v = (x.transpose(1, 2).values() for x in inputs.values())
        rows, scale = fit_heads(q, k, v, scale)
        kernel = kernel_of_call(*rows, "causal_top_left" if is_causal else "full", passed=cut, lengths=RAGGED)
    except ArgumentError as error:
        raise RefusedError([reason_of(error)]) from error
    except (SpecError, ToolchainError) as error:
        raise RefusedError([str(error).splitlines()[0]]) from error
    return JaggedCall(query, rows, scale, value.shape[-1], cut, kernel)


def _is_ragged(x: torch.Tensor) -> bool:
    return isinstance(x, NestedTensor) and x.dim() == 4 and x._ragged_idx == RAGGED_DIM


def _lengths(letter: str, x: Any) -> dict[str, Any]:
    """What a kernel is passed of the lengths of a nested tensor; none of it is read by the host."""
    found = {f"cu_seqlens_{letter}": x.offsets().to(torch.int32)}
    if x.lengths() is not None:
        found[f"seqused_{letter}"] = x.lengths().to(torch.int32)
    if x._maybe_max_seqlen is not None:
        found[f"max_seqlen_{letter}"] = x._maybe_max_seqlen
    return found
