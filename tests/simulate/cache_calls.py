"""Calls on caches in e4m3, drawn: NaN behind every sequence, and in pages and descales that nobody needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attngen.check.caches import CACHE_TYPE, drawn_descales
from attngen.check.cuts import Cut, CutKind
from attngen.check.inputs import Shape, random_inputs
from attngen.dtypes import dtype, torch_dtype
from attngen.spec import Spec

HEADS, HEADS_KV, PAGE = 4, 2, 16


@dataclass(frozen=True)
class CacheCall:
    """What a call takes.

    Attributes:
        tensors: q, k and v.
        passed: what it says by name.
    """

    spec: Spec
    shape: Shape
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    passed: dict[str, Any]

    @classmethod
    def drawn(
        cls, spec: Spec, seqlens_k: Sequence[int], seqlens_q: Sequence[int], seed: int = 0, page: int = PAGE
    ) -> "CacheCall":
        """A call of sequences of these lengths; of dense queries or keys the first length is that of all."""
        of_q = _cut(spec.problem.queries, seqlens_q, 0)
        of_k = _cut(spec.problem.keys, seqlens_k, page)
        lengths = [cut.size if cut else each[0] for cut, each in ((of_q, seqlens_q), (of_k, seqlens_k))]
        shape = Shape(len(seqlens_q), HEADS, HEADS_KV, lengths[0], lengths[1], of_q, of_k)
        dims, number = spec.problem.head_dim, torch_dtype(dtype(spec.precision.inputs))
        tensors = random_inputs(shape, dims.qk, dims.v, number, seed=seed, cache=CACHE_TYPE)
        return cls(spec, shape, tensors, shape.arguments() | drawn_descales(spec, shape, seed=seed))


def _cut(kind: Any, lengths: Sequence[int], page: int) -> Cut | None:
    """Of a sequence one row more is there than counts."""
    if kind == "dense":
        return None
    cut_kind: CutKind = kind
    unused = (1,) * len(lengths) if kind == "ragged" else ()
    return Cut(cut_kind, tuple(lengths), unused=unused, tail=1, page=page if kind == "paged" else 0)
