"""Megatron's core attention by attngen's kernels: what a layer's spec names in the place of `DotProductAttention`.

Of Megatron-LM core_v0.19.0. What a module holds is that class's own: its scale, its window, its softmax offset and how
it is saved. Packed sequences and an attention_bias mean what they mean to Megatron's TEDotProductAttention.
"""

from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention

from attngen.errors import ArgumentError, shown
from attngen.expr import SINK
from attngen.fit_heads import check_strided
from attngen.flash_attn.attend import attend
from attngen.flash_attn.wish import Texts
from attngen.megatron_masks import PACKED, check_no_tensors, cut_of, mask_text, with_tensors
from attngen.plan import DENSE
from attngen.varlen import RAGGED

_SERVED = {"context_parallel_size": 1, "qk_clip": False, "log_max_attention_logit": False}
_NAMES = {"q": "query", "k": "key", "v": "value", SINK: "softmax_offset"}
_NAMES |= {f"{x}_q": f"{PACKED}.{x}_q" for x in ("cu_seqlens", "max_seqlen")}
_NAMES |= {f"{x}_k": f"{PACKED}.{x}_kv" for x in ("cu_seqlens", "max_seqlen")}


class CoreAttention(DotProductAttention):  # type: ignore[misc] # Megatron need not be installed
    """Attention of the heads of a layer that this process has."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        for name, served in _SERVED.items():
            if (found := getattr(config, name)) != served:
                fault = ArgumentError(f"config.{name}", shown(found), f"{served}, of this core attention")
                raise ValueError(str(fault)) from fault  # Megatron makes an error anew, of its text alone
        about = (attention_dropout, softmax_scale, cp_comm_type, pg_collection)
        super().__init__(config, layer_number, attn_mask_type, attention_type, *about)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """(seqlen_q, batch, heads * head_dim_v), contiguous, or packed (tokens, ...); CPU tensors are simulated.

        Args:
            query: (seqlen_q, batch, heads, head_dim), or packed (tokens, heads, head_dim); f16 or bf16, on the CPU f32.
            key: (seqlen_k, batch, query groups, head_dim), or packed, like value.
            value: see key.
            attention_mask: (batch or 1, heads or 1, seqlen_q or 1, seqlen_k), bool: True hides a key.
            attn_mask_type: of AttnMaskType, what else is hidden; the module's where None.
            attention_bias: of such a shape: numbers that are added to scaled scores, with a gradient.
            packed_seq_params: where sequences begin and end, of format thd.

        Raises:
            ArgumentError: an argument that is not served, by its name.
        """
        if self.training and self.attention_dropout.p:
            raise ArgumentError("attention_dropout", self.attention_dropout.p, "0 in training: there is none")
        dims = 4 if packed_seq_params is None else 3
        for name, x in (("query", query), ("key", key), ("value", value)):
            check_strided(name, x)
            if x.dim() != dims:
                raise ArgumentError(name, f"{x.dim()} dimensions", f"{dims}; with {PACKED} 3, else 4")
        kind = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        lengths = None if dims == 3 else (query.shape[0], key.shape[0])
        mask = mask_text(kind, self.scale_mask_softmax.window_size, lengths)
        sink = {} if self.softmax_offset is None else {SINK: self.softmax_offset}
        scale = self.softmax_scale * (self.scale_mask_softmax.scale or 1)  # which the former was divided by
        if dims == 3:
            check_no_tensors(attention_mask=attention_mask, attention_bias=attention_bias)
            texts = Texts(mask, "score", {}, sink, scale)
            cut = cut_of(packed_seq_params)
            return attend(query, key, value, texts, False, RAGGED, cut, _NAMES)[0].flatten(1)
        sizes = (query.shape[1], query.shape[2], *query.shape[:1], *key.shape[:1])
        mask, score, tensors, passed = with_tensors(mask, sizes, attention_mask, attention_bias)
        texts = Texts(mask, score, tensors, passed | sink, scale)
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        out, _ = attend(q, k, v, texts, False, DENSE, names=_NAMES)
        return out.transpose(0, 1).flatten(2).contiguous()
