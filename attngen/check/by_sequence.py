"""The oracles on calls whose sequences have lengths of their own: each sequence by itself, as a dense call.

What a call says of lengths is read here as the arguments are documented, and kept within the tensors; nothing of it is
shared with the simulator or the kernels. Inside a sequence mask and score mean what they mean in a dense call of its
rows; `b` is its number, and tensors by token are read from where it begins. Rows that no sequence counts are 0, their
lse -inf, or the sink.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attngen.check.gradients import Gradients
from attngen.check.paging import as_padded
from attngen.errors import ArgumentError
from attngen.expr import SINK
from attngen.plan import LETTERS, Axis, Lengths
from attngen.torch_state import torch_defaults

_INDICES: Mapping[str, Axis] = {"q_idx": "queries", "kv_idx": "keys"}


@dataclass(frozen=True)
class Sequence:
    """One sequence of a call.

    Attributes:
        number: which.
        rows: of its tensor, or of its batch there, those that count, by axis.
    """

    number: int
    rows: Mapping[Axis, slice]


@dataclass(frozen=True)
class CutCall:
    """A call as so many dense calls; tensors are as it takes them, those of four dimensions (batch, seqlen, ...).

    Attributes:
        lengths: how queries and keys are cut.
        sequences: in order.
    """

    lengths: Lengths
    sequences: tuple[Sequence, ...]

    @classmethod
    def read(cls, lengths: Lengths, q: Tensor, k: Tensor, passed: Mapping[str, Any]) -> "CutCall":
        """The sequences that a call tells of.

        Args:
            lengths: of the plan.
            q: as the call takes it, like k; only shapes are looked at.
            k: see q.
            passed: what the call passes by name; values are read.

        Raises:
            ArgumentError: sequences that overlap, of which no result is the right one.
        """
        by_axis: dict[Axis, Tensor] = {"queries": q, "keys": k}
        spans = (
            _spans(lengths, axis, x.shape[0] if lengths.is_by_token(axis) else x.shape[1], x.shape[0], passed)
            for axis, x in by_axis.items()
        )
        return cls(
            lengths,
            tuple(
                Sequence(number, {"queries": queries, "keys": keys})
                for number, (queries, keys) in enumerate(zip(*spans, strict=True))
            ),
        )

    def rows(self, x: Tensor, axis: Axis, sequence: Sequence) -> Tensor:
        """The rows of heads that a sequence counts, a view (1, rows, heads, cols)."""
        here = sequence.rows[axis]
        return x[here][None] if self.lengths.is_by_token(axis) else x[sequence.number, here][None]

    def of_lse(self, lse: Tensor, sequence: Sequence) -> Tensor:
        """The numbers of a sequence's rows out of (heads, tokens) or (batch, heads, seqlen_q): (1, heads, rows)."""
        heads = lse if self.lengths.is_by_token("queries") else lse[sequence.number]
        return heads[None, :, sequence.rows["queries"]]

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, sequence: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        """What the dense call of a sequence takes."""
        return (
            self.rows(q, "queries", sequence),
            self.rows(k, "keys", sequence),
            self.rows(v, "keys", sequence),
        )

    def outside(self, x: Tensor, axis: Axis) -> Tensor:
        """The rows of heads that no sequence counts: (rows, heads, cols)."""
        is_outside = torch.ones(x.shape[: x.dim() - 2], dtype=torch.bool, device=x.device)
        for each in self.sequences:
            at = () if self.lengths.is_by_token(axis) else (each.number,)
            is_outside[(*at, each.rows[axis])] = False
        return x[is_outside]

    def declared(self, passed: Mapping[str, Any], sequence: Sequence) -> dict[str, Any]:
        """What the oracles take for what a call passes by name."""
        of_lengths = {each.name for each in self.lengths.arguments} | set(self.lengths.bounds)
        starts = {f"{own}.start": sequence.rows[axis].start for own, axis in _INDICES.items()}
        others = {name: x for name, x in passed.items() if name not in of_lengths}
        return {**others, "b": sequence.number, **starts}


def _spans(lengths: Lengths, axis: Axis, rows: int, batch: int, passed: Mapping[str, Any]) -> Iterator[slice]:
    """The rows that each sequence counts."""
    letter, kind = LETTERS[axis], lengths.of(axis)
    begins, ends = [0] * batch, [rows] * batch
    if kind == "ragged":
        cumulative = [min(max(0, each), rows) for each in passed[f"cu_seqlens_{letter}"].tolist()]
        begins, ends = cumulative[:-1], cumulative[1:]
        for place, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            if end < begin:
                must = f"at least {begin}, where that sequence begins"
                raise ArgumentError(f"cu_seqlens_{letter}[{place + 1}]", str(end), must)
    used, skipped = passed.get(f"seqused_{letter}"), passed.get(f"leftpad_{letter}")
    for place, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        room = end - begin
        stop = begin + (room if used is None else min(max(0, int(used[place])), room))
        first = begin if skipped is None else begin + max(0, int(skipped[place]))
        yield slice(min(first, stop), stop)


@torch_defaults()
def attention_by_sequence(
    oracle: Callable[..., tuple[Tensor, Tensor]],
    lengths: Lengths,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *about: Any,
    passed: Mapping[str, Any],
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Compute out and lse of a call sequence by sequence.

    Args:
        oracle: `attention`, `attention_chunked` or `standard_attention` of `attngen.check.reference`.
        lengths: how queries and keys are cut.
        q: (batch, seqlen_q, num_heads_q, head_dim_qk), or (tokens_q, num_heads_q, head_dim_qk) where they are ragged.
        k: likewise.
        v: likewise.
        *about: mask and softmax_scale, as the oracle takes them.
        passed: what the call passes by name: lengths, and what is declared.
        **options: of the oracle.

    Returns:
        out: in the shape of q, with the columns of v; fp64, whatever the oracle gives.
        lse: (batch, num_heads_q, seqlen_q), or (num_heads_q, tokens_q), likewise.
    """
    lengths, k, v, passed = as_padded(lengths, k, v, passed)
    call = CutCall.read(lengths, q, k, passed)
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=torch.float64)
    lse = out.new_full(out.shape[:-1], -torch.inf)
    lse = (lse if passed.get(SINK) is None else passed[SINK].to(lse).expand_as(lse).clone()).transpose(-1, -2)
    for each in call.sequences:
        declared = call.declared(passed, each)
        found = oracle(*call.inputs(q, k, v, each), *about, declared=declared, **options)
        call.rows(out, "queries", each).copy_(found[0])
        call.of_lse(lse, each).copy_(found[1])
    return out, lse


@torch_defaults()
def gradients_by_sequence(
    oracle: Callable[..., Gradients],
    lengths: Lengths,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    *about: Any,
    passed: Mapping[str, Any],
    dlse: Tensor | None = None,
    **options: Any,
) -> Gradients:
    """Compute dq, dk and dv of a call sequence by sequence, fp64, in the shapes of q, k and v.

    The oracle is `attention_gradients` or `standard_gradients` of `attngen.check.gradients`; dout and dlse are
    gradients of out and lse, in their shapes, and all else is as of `attention_by_sequence`.
    """
    call = CutCall.read(lengths, q, k, passed)
    made = Gradients(*(torch.zeros(x.shape, dtype=torch.float64, device=x.device) for x in (q, k, v)))
    for each in call.sequences:
        found = oracle(
            *call.inputs(q, k, v, each),
            call.rows(dout, "queries", each),
            *about,
            dlse=None if dlse is None else call.of_lse(dlse, each),
            declared=call.declared(passed, each),
            **options,
        )
        for into, x in zip(call.inputs(*made, each), found, strict=True):
            into.copy_(x)
    return made
