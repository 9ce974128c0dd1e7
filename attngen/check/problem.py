"""The arguments of a call as the oracles read them: views of one layout, and what mask and score say of their pairs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from attngen.expr import SINK, Expr, derivative, evaluate

Layout = Literal["bshd", "bhsd"]

LARGEST_SINK = torch.finfo(torch.float32).max
"""What a sink of +inf counts as, and no smaller one is: beside it all keys vanish."""


@dataclass(frozen=True)
class Problem:
    """The arguments of one call, brought to (batch, heads, seqlen, head_dim) as views."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Expr | None
    softmax_scale: float
    layout: Layout
    seqlen_q: int
    rows: Tensor  # (rows,), int64: the q_idx of every row of q above
    score: Expr | None
    declared: Mapping[str, Any]

    @staticmethod
    def read(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Expr | None,
        softmax_scale: float | None,
        layout: Layout,
        rows: Sequence[int] | None,
        score: Expr | None,
        declared: Mapping[str, Any] | None,
    ) -> "Problem":
        """The arguments of `attention_chunked`."""
        q, k, v = (x.detach() if layout == "bhsd" else x.detach().transpose(1, 2) for x in (q, k, v))
        seqlen_q = q.shape[2]
        if rows is None:
            index = torch.arange(seqlen_q, device=q.device)
        else:
            index = torch.tensor(list(rows), dtype=torch.int64, device=q.device)
            q = q[:, :, index]
        scale = scale_of(q, softmax_scale)
        return Problem(q, k, v, mask, scale, layout, seqlen_q, index, score, declared or {})

    @property
    def seqlen_k(self) -> int:
        """Keys of a sequence."""
        return self.k.shape[2]

    @property
    def sink(self) -> Tensor | None:
        """(num_heads_q), fp64, at most `LARGEST_SINK`; None where there is none."""
        sink = self.declared.get(SINK)
        return None if sink is None else sink.detach().double().clamp(max=LARGEST_SINK)

    def with_sink(self, lse: Tensor, h: int) -> tuple[Tensor, Tensor | float]:
        """What the logarithm of a sum over keys, fp64, becomes with the sink of a head, and what share keys keep."""
        if self.sink is None:
            return lse, 1.0
        whole = torch.logaddexp(lse, self.sink[h])
        return whole, (lse - whole.masked_fill(whole.isneginf(), 0.0)).exp()

    def sink_weight(self, lse: Tensor, h: int, number: torch.dtype) -> Tensor:
        """P of a head's sink in rows of some lse, from two numbers in a format; 0 where lse is infinite."""
        assert self.sink is not None
        is_infinite = lse.isinf() | (lse == LARGEST_SINK)
        sink, total = ((x.to(number) * math.log2(math.e)).double() for x in (self.sink[h], lse))
        return (sink - total.masked_fill(is_infinite, 0.0)).exp2().masked_fill_(is_infinite, 0.0)

    @property
    def group(self) -> int:
        """Heads of q that read one of k."""
        return self.q.shape[1] // max(1, self.k.shape[1])

    def every_index(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """b, h, q_idx and kv_idx, which broadcast to the whole score matrix."""
        batch, heads, _, _ = self.q.shape
        b, h, kv_idx = (torch.arange(size, device=self.q.device) for size in (batch, heads, self.seqlen_k))
        return b.view(-1, 1, 1, 1), h.view(1, -1, 1, 1), self.rows.view(1, 1, -1, 1), kv_idx.view(1, 1, 1, -1)

    def sees(self, b: int | Tensor, h: int | Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """True where the query sees the key, in a shape that broadcasts to the scores."""
        if self.mask is None:
            return torch.ones((), dtype=torch.bool, device=q_idx.device)
        found = evaluate(self.mask, self._names(b, h, q_idx, kv_idx), self._tensors)
        return torch.as_tensor(found, dtype=torch.bool, device=q_idx.device)

    def modified(self, scores: Tensor, *places: Any) -> Tensor:
        """What becomes of scaled products, in their own precision."""
        return scores if self.score is None else self.values(self.score, scores, *places)

    def slopes(self, scores: Tensor, *places: Any) -> Tensor:
        """The derivative of `modified` by each scaled product, in their own precision."""
        if self.score is None:
            return torch.ones_like(scores)
        return self.values(derivative(self.score), scores, *places)

    def values(self, expr: Expr, scores: Tensor, *places: Any) -> Tensor:
        """What an expression is for each pair, of scaled products in their own precision."""
        names = self._names(*places) | {"score": scores}
        found = torch.as_tensor(evaluate(expr, names, self._tensors, scores.dtype))
        return found.to(scores).expand_as(scores)

    def _names(self, b: int | Tensor, h: int | Tensor, q_idx: Tensor, kv_idx: Tensor) -> dict[str, Any]:
        return {
            "b": b,
            "h": h,
            "h_kv": h // max(1, self.group),
            "q_idx": q_idx,
            "kv_idx": kv_idx,
            "seqlen_q": self.seqlen_q,
            "seqlen_k": self.seqlen_k,
            **self.declared,
        }

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.declared.items() if isinstance(value, Tensor)}

    def query_chunks(self, chunk: int) -> Iterator[tuple[int, int, slice]]:
        """Batch, head of q and up to `chunk` of its rows, in order."""
        for b in range(self.q.shape[0]):
            for h in range(self.q.shape[1]):
                for start in range(0, self.q.shape[2], chunk):
                    yield b, h, slice(start, start + chunk)

    def empty_outputs(self, out_dtype: torch.dtype, lse_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Outputs whose storage has the caller's layout, seen as (batch, heads, seqlen, head_dim)."""
        batch, heads, rows, _ = self.q.shape
        head_dim_v = self.v.shape[-1]
        if self.layout == "bhsd":
            out = self.q.new_empty(batch, heads, rows, head_dim_v, dtype=out_dtype)
        else:
            out = self.q.new_empty(batch, rows, heads, head_dim_v, dtype=out_dtype).transpose(1, 2)
        return out, self.q.new_empty(batch, heads, rows, dtype=lse_dtype)

    def finish(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Make rows that met +inf or NaN wholly NaN and give out the caller's layout; a sink of +inf leaves 0."""
        spoilt = lse.isnan() | lse.isposinf()
        out.masked_fill_(spoilt[..., None], math.nan)
        lse.masked_fill_(spoilt, math.nan)
        if self.sink is not None:
            lse.masked_fill_(lse == LARGEST_SINK, math.inf)
        return (out if self.layout == "bhsd" else out.transpose(1, 2)), lse


def scale_of(q: Tensor, softmax_scale: float | None) -> float:
    """What a call multiplies products by: 1/sqrt(head_dim_qk) where it does not say."""
    return 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else float(softmax_scale)
