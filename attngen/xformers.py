"""xformers.ops.memory_efficient_attention by attngen's kernels, with its classes of biases as texts.

Biases are known by the names of their classes, so that those of xformers (0.0.33) and those here, for whom it is not
installed, are taken alike; xformers is never imported. A subclass of another name is refused, since nothing tells what
it hides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from attngen.autograd import is_differentiated
from attngen.errors import ArgumentError, shown
from attngen.fit_heads import check_strided
from attngen.flash_attn.attend import attend
from attngen.flash_attn.wish import Texts
from attngen.plan import DENSE
from attngen.varlen import RAGGED

_SIZES = ("_window_size", "window_left", "window_right")
_RECENT, _RECENT_ROWS = "kv_idx > q_pos - {_window_size}", "kv_idx > q_idx - {_window_size}"
_LOCAL = "kv_idx >= q_pos - {window_left} and kv_idx <= q_pos + {window_right}"
MASKS = {
    "LowerTriangularMask": "causal_top_left",
    "LowerTriangularMaskWithTensorBias": "causal_top_left",
    "LowerTriangularFromBottomRightMask": "causal",
    "LowerTriangularFromBottomRightLocalAttentionMask": f"causal and {_RECENT}",
    "LocalAttentionFromBottomRightMask": _LOCAL,
}
"""The texts of biases of dense sequences, with sizes that they hold as attributes."""
MASKS_OF_SEQUENCES = {
    "BlockDiagonalMask": "full",
    "BlockDiagonalCausalMask": "causal_top_left",
    "BlockDiagonalCausalFromBottomRightMask": "causal",
    "BlockDiagonalCausalLocalAttentionMask": f"causal_top_left and {_RECENT_ROWS}",
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": f"causal and {_RECENT}",
    "BlockDiagonalPaddedKeysMask": "full",
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": "causal",
    "BlockDiagonalLocalAttentionPaddedKeysMask": _LOCAL,
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": f"causal and {_RECENT}",
}
"""Of biases that cut queries and keys into sequences one after another: the text within each."""
_FORMATS = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
_NAMES = {
    "q": "query",
    "k": "key",
    "v": "value",
    "softmax_scale": "scale",
    **dict.fromkeys(
        ("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "max_seqlen_q", "max_seqlen_k"), "attn_bias"
    ),
}


class LowerTriangularMask:
    """Causal, aligned to the top left."""


class LowerTriangularFromBottomRightMask:
    """Causal, aligned to the bottom right."""


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask:
    """Causal, aligned to the bottom right, of the last `_window_size` keys."""

    _window_size: int


@dataclass
class LocalAttentionFromBottomRightMask:
    """Keys from `window_left` before the place of a query to `window_right` behind it."""

    window_left: int
    window_right: int


@dataclass
class SequenceInfo:
    """How a dimension is cut into sequences.

    Attributes:
        seqstart: (sequences + 1,), i32: where each begins, and where the last one ends.
        max_seqlen: length of the longest.
    """

    seqstart: torch.Tensor
    max_seqlen: int

    @classmethod
    def from_seqlens(
        cls, seqlens: Sequence[int], *, device: torch.device | str | None = None
    ) -> "SequenceInfo":
        """Of lengths that the host knows."""
        starts = torch.tensor([0, *accumulate(seqlens)], dtype=torch.int32, device=device)
        return cls(starts, max(seqlens, default=0))


@dataclass
class BlockDiagonalMask:
    """Each sequence sees itself.

    Attributes:
        q_seqinfo: how queries are cut.
        k_seqinfo: how keys are cut.
    """

    q_seqinfo: SequenceInfo
    k_seqinfo: SequenceInfo

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int] | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> "BlockDiagonalMask":
        """Of the lengths of all sequences; keys are cut as queries where none are given."""
        of_q = SequenceInfo.from_seqlens(q_seqlen, device=device)
        of_k = of_q if kv_seqlen is None else SequenceInfo.from_seqlens(kv_seqlen, device=device)
        return cls(of_q, of_k)


class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Each sequence is causal, aligned to its top left."""


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """Each sequence is causal, aligned to its bottom right."""


def memory_efficient_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Attention, with the signature of xformers.

    Args:
        query: (batch, seqlen_q, heads, columns), without heads, or (batch, seqlen_q, groups, heads, columns) where the
            heads of a group share keys; f16 or bf16, on the CPU, where the simulator runs, f32 too.
        key: likewise, with seqlen_k; what a group shares is expanded, and then not copied.
        value: likewise; columns may be others.
        attn_bias: None; a tensor of f16, bf16 or f32 that is added to the scores, (batch, heads, seqlen_q, seqlen_k)
            or 1 where it is for all, without heads where query has none; or an object of one of `MASKS` and
            `MASKS_OF_SEQUENCES`. The latter are of batch 1, whose tokens are sequences one after another.
        p: 0: there is no dropout.
        scale: 1/sqrt(columns) where None.
        op: None: attngen chooses its kernels.
        output_dtype: None, or the type of query.

    Returns:
        (batch, seqlen_q, heads, columns of value), of as many dimensions as query.

    Raises:
        ArgumentError: an argument that no kernel takes, pages and gaps among keys too.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_strided(name, x)
        if x.dim() not in (3, 4, 5) or x.dim() != query.dim():
            must = "3, 4 or 5, as many as query has: (batch, seqlen, groups, heads, columns)"
            raise ArgumentError(name, f"{x.dim()} dimensions", must)
    if p:
        raise ArgumentError("p", shown(p), "0: there is no dropout")
    if op is not None:
        raise ArgumentError("op", shown(op), "None: attngen chooses its kernels")
    if output_dtype not in (None, query.dtype):
        raise ArgumentError("output_dtype", str(output_dtype), f"None or {query.dtype}, the type of query")
    q = query.unsqueeze(2) if query.dim() == 3 else query.flatten(2, -2)
    k, v = _of_keys(key), _of_keys(value)
    name = type(attn_bias).__name__
    if name in MASKS_OF_SEQUENCES:
        return _of_sequences(q, k, v, attn_bias, scale).reshape(*query.shape[:-1], value.shape[-1])
    mask, added = "full", attn_bias
    if name in MASKS:
        mask, added = _text(MASKS[name], attn_bias), getattr(attn_bias, "_bias", None)
    elif attn_bias is not None and not isinstance(attn_bias, torch.Tensor):
        must = f"None, a tensor, or one of {', '.join((*MASKS, *MASKS_OF_SEQUENCES))}"
        raise ArgumentError("attn_bias", name, must)
    texts = Texts(mask, "score", {}, {}, scale)
    if added is not None:
        heads = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        elements = _of_pairs(added, query.dim(), heads)
        tensors = {"attn_bias": f"{_FORMATS[added.dtype]}[batch, num_heads_q, seqlen_q, seqlen_k]"}
        score = "score + attn_bias[b, h, q_idx, kv_idx]"
        texts = Texts(mask, score, tensors, {"attn_bias": elements}, scale)
    out, _ = attend(q, k, v, texts, False, DENSE, names=_NAMES)
    return out.reshape(*query.shape[:-1], value.shape[-1])


def _text(template: str, bias: Any) -> str:
    """A text with the sizes that a bias holds as attributes."""
    for name in _SIZES:
        if f"{{{name}}}" in template:
            size = getattr(bias, name, None)
            if type(size) is not int or size < 0:
                raise ArgumentError(f"attn_bias.{name}", shown(size), "a number of keys")
            template = template.replace(f"{{{name}}}", str(size))
    return template


def _of_keys(x: torch.Tensor) -> torch.Tensor:
    """Key or value with one dimension of heads: that of groups, where a group's heads are one that is expanded."""
    if x.dim() == 3:
        return x.unsqueeze(2)
    if x.dim() == 5 and (x.shape[3] == 1 or x.stride(3) == 0) and not is_differentiated(x):
        return x[:, :, :, 0]
    return x.flatten(2, -2)


def _of_pairs(bias: torch.Tensor, dims: int, sizes: tuple[int, int, int, int]) -> torch.Tensor:
    """A tensor with an element for each pair, where it is 1 by a stride of 0."""
    check_strided("attn_bias", bias)
    if bias.dtype not in _FORMATS:
        raise ArgumentError("attn_bias", f"dtype {bias.dtype}", " or ".join(map(str, _FORMATS)))
    of_four = bias
    if dims == 3 and bias.dim() == 3:
        of_four = bias.unsqueeze(1)
    elif dims == 5 and bias.dim() == 5:
        of_four = bias.flatten(1, 2)
    try:
        if of_four.dim() != 4:
            raise RuntimeError
        return of_four.expand(sizes)
    except RuntimeError:
        must = f"what stands for {sizes} = (batch, heads, seqlen_q, seqlen_k)"
        raise ArgumentError("attn_bias", f"shape {tuple(bias.shape)}", must) from None


def _of_sequences(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any, scale: float | None
) -> torch.Tensor:
    """Attention of the sequences into which a bias cuts a batch of 1."""
    for name, x in (("query", q), ("key", k), ("value", v)):
        if x.shape[0] != 1:
            must = f"batch 1, whose tokens a {type(bias).__name__} cuts into sequences"
            raise ArgumentError(name, f"batch {x.shape[0]}", must)
    mask = _text(MASKS_OF_SEQUENCES[type(bias).__name__], bias)
    cut: dict[str, Any] = {"seqused_k": getattr(bias.k_seqinfo, "seqlen", None)}
    for letter, info in (("q", bias.q_seqinfo), ("k", bias.k_seqinfo)):
        cut |= {f"cu_seqlens_{letter}": info.seqstart, f"max_seqlen_{letter}": info.max_seqlen}
    texts = Texts(mask, "score", {}, {}, scale)
    out, _ = attend(q[0], k[0], v[0], texts, False, RAGGED, cut, _NAMES)
    return out
