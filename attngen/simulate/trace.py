"""What a teacher writes on the board: S, running max, rescale factor, running sum and O, block after block.

Scores are scaled and maxima are in natural units, as in the textbooks, though the kernel keeps S unscaled and
the maximum in units of log2. Read off a simulated run; nothing is computed again.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from attngen.plan import Plan
from attngen.plan.steps import CopyTile, Exponentiate, OutputGemm, RowMax, StoreRows
from attngen.simulate.roles import Event
from attngen.simulate.run import simulate
from attngen.simulate.tiles import Member

T = TypeVar("T")

WIDEST = 12
"""Most rows or columns of a matrix that are printed."""


@dataclass(frozen=True)
class BlockRecord:
    """The state of a block of rows after one block of keys.

    Attributes:
        member: head and element of the batch.
        rows, keys: which rows and keys, those that exist.
        s: (rows, keys), softmax_scale * Q Kᵀ, -inf where masked.
        row_max: (rows,), largest score so far.
        alpha: (rows,), what the sums before this block are worth after it.
        row_sum: (rows,), sum of exp(score - row_max) so far.
        o: (rows, head_dim_v), the sum of exp(score - row_max) V so far, not normalised.
    """

    member: Member
    rows: range
    keys: range
    s: torch.Tensor
    row_max: torch.Tensor
    alpha: torch.Tensor
    row_sum: torch.Tensor
    o: torch.Tensor


@dataclass(frozen=True)
class FinishedRecord:
    """A block of rows at its end.

    Attributes:
        member, rows: as in `BlockRecord`.
        o: (rows, head_dim_v), normalised, before it is rounded to the output type.
        lse: (rows,), natural log-sum-exp.
    """

    member: Member
    rows: range
    o: torch.Tensor
    lse: torch.Tensor


@dataclass(frozen=True)
class Trace:
    """A run as it would be written on the board; `str` is the text.

    Attributes:
        records: in the order in which they happened.
        out, lse: what the run returned.
    """

    records: tuple[BlockRecord | FinishedRecord, ...]
    out: torch.Tensor
    lse: torch.Tensor | None

    @property
    def blocks(self) -> tuple[BlockRecord, ...]:
        """The records of blocks of keys."""
        return tuple(record for record in self.records if isinstance(record, BlockRecord))

    def __str__(self) -> str:
        return "\n".join(line for record in self.records for line in _lines(record))


def trace(
    plan: Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    layout: str = "bshd",
) -> Trace:
    """Simulate a call and record every block of keys; arguments as of `simulate`."""
    scale = abs(1 / math.sqrt(plan.head_dim_qk) if softmax_scale is None else softmax_scale)
    seqlen_q, seqlen_k = (x.shape[1 if layout == "bshd" else 2] for x in (q, k))
    records: list[BlockRecord | FinishedRecord] = []
    seen: dict[str, torch.Tensor] = {}

    def observe(event: Event) -> None:
        step, m_block = event.step, event.indices.get("m", event.tile.m_block or 0)
        rows = _existing(m_block, plan.block_m, seqlen_q)
        if isinstance(step, RowMax):
            keys = _existing(event.indices["n"], plan.block_n, seqlen_k)
            seen["s"] = event.value(step.s)[: len(rows), : len(keys)] * scale
            seen["row_max"] = event.value(step.row_max)[: len(rows)] * math.log(2)
            seen["alpha"] = event.value(step.alpha)[: len(rows)]
        elif isinstance(step, Exponentiate):
            seen["row_sum"] = event.value(step.row_sum)[: len(rows)]
        elif isinstance(step, OutputGemm):
            keys = _existing(event.indices["n"], plan.block_n, seqlen_k)
            o = event.value(step.acc)[: len(rows), : plan.head_dim_v]
            records.append(BlockRecord(event.tile.members[0], rows, keys, o=o, **seen))
        elif isinstance(step, StoreRows) and not step.dst.workspace:
            seen["lse"] = event.value(step.src)[: len(rows)]
        elif isinstance(step, CopyTile):
            o = event.value(step.src)[: len(rows), : plan.head_dim_v]
            records.append(FinishedRecord(event.tile.members[0], rows, o, seen.pop("lse")))

    out, lse = simulate(
        plan, q, k, v, softmax_scale=softmax_scale, return_lse=True, layout=layout, observer=observe
    )
    return Trace(tuple(records), out, lse)


def _existing(block: int, size: int, length: int) -> range:
    return range(block * size, min((block + 1) * size, length))


def _lines(record: BlockRecord | FinishedRecord) -> Iterator[str]:
    batch, head, _ = record.member
    whose = f"batch {batch}, head {head}, rows {_span(record.rows)}"
    if isinstance(record, BlockRecord):
        yield f"{whose}, keys {_span(record.keys)}"
        yield from _matrix("S", record.s)
        yield from _matrix("running max", record.row_max.unsqueeze(1))
        yield from _matrix("rescale factor", record.alpha.unsqueeze(1))
        yield from _matrix("running sum", record.row_sum.unsqueeze(1))
        yield from _matrix("O, not normalised", record.o)
    else:
        yield f"{whose}, done"
        yield from _matrix("O", record.o)
        yield from _matrix("lse", record.lse.unsqueeze(1))


def _span(indices: range) -> str:
    return f"{indices[0]} .. {indices[-1]}" if len(indices) > 1 else f"{indices[0]}"


def _matrix(name: str, values: torch.Tensor) -> Iterator[str]:
    """A matrix in aligned columns beside its name; a column of one number per row is written as one row."""
    if values.shape[1] == 1 and values.shape[0] > 1:
        values = values.T
    cells = [[f"{x:.5g}" for x in _cut(row)] for row in _cut(values.tolist())]
    width = max((len(cell) for row in cells for cell in row), default=0)
    more_columns = "  ..." if values.shape[1] > WIDEST else ""
    for i, row in enumerate(cells):
        yield f"  {name if i == 0 else '':<20}" + "  ".join(f"{cell:>{width}}" for cell in row) + more_columns
    if values.shape[0] > WIDEST:
        yield f"  {'':<20}..."


def _cut(values: Sequence[T]) -> Sequence[T]:
    return values[:WIDEST]
