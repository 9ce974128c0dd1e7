"""What a teacher writes on the board: S, running max, rescale factor, running sum and O, block after block.

Scores are scaled and maxima are in natural units, as in the textbooks, though the kernel keeps S unscaled and
the maximum in units of log2. Read off a simulated run; nothing is computed again.
"""

import math
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from attngen.plan import KernelPlan, PartRows, RegVec
from attngen.plan.steps import (
    Exponentiate,
    Gemm,
    IssueGemm,
    RowMax,
    StageTile,
    StoreRegisters,
)
from attngen.simulate.launches import simulate
from attngen.simulate.roles import Event, RoleRun
from attngen.simulate.visits import Member

T = TypeVar("T")

WIDEST = 12
"""Most rows or columns of a matrix that are printed."""


@dataclass(frozen=True)
class BlockRecord:
    """The state of a block of rows after one block of keys.

    Attributes:
        member: head and element of the batch.
        rows, keys: which rows and keys, those that exist.
        s: (rows, keys), the scores, -inf where masked.
        row_max: (rows,), largest score so far; 0 where scores are bounded and no maximum is taken.
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
    plan: KernelPlan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    layout: str = "bshd",
    declared: Mapping[str, Any] | None = None,
) -> Trace:
    """Simulate a call and record every block of keys; arguments as of `simulate`."""
    scale = abs(1 / math.sqrt(plan.head_dim_qk) if softmax_scale is None else softmax_scale)
    board = _Board(plan, scale)
    out, lse = simulate(
        plan,
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        return_lse=True,
        layout=layout,
        observer=board.observe,
        declared=declared,
    )
    return Trace(tuple(board.records), out, lse)


class _Board:
    """Writes down what the Steps of a run leave in the registers.

    A schedule may compute O of a block after S of the next one; so what was seen of a block waits for its O. Blocks
    outside a loop over keys are the last one of their rows.
    """

    def __init__(self, plan: KernelPlan, scale: float) -> None:
        self.records: list[BlockRecord | FinishedRecord] = []
        self._plan, self._scale = plan, scale
        self._seen: dict[RoleRun, deque[dict[str, Any]]] = defaultdict(deque)
        self._lse: dict[RoleRun, torch.Tensor] = {}

    def observe(self, event: Event) -> None:
        """Take note of a Step that has just been done."""
        step, plan, seen = event.step, self._plan, self._seen[event.role]
        own = event.role.own_rows(plan.block_m)
        first_row = event.indices.get("m", event.tile.m_block or 0) * plan.block_m + own.start
        rows = existing(first_row, len(own), event.tile.seqlen_q)
        if not rows:
            return
        last = event.tile.bounds.n_max - 1 if event.tile.bounds else 0
        keys = existing(event.indices.get("n", last) * plan.block_n, plan.block_n, event.tile.seqlen_k)
        if isinstance(step, RowMax):
            seen.append(
                {
                    "keys": keys,
                    "s": event.value(step.s)[: len(rows), : len(keys)] * self._unit(step, event.role),
                    "row_max": self._natural_maximum(event, step)[: len(rows)],
                    "alpha": event.value(step.alpha)[: len(rows)],
                }
            )
        elif isinstance(step, Exponentiate):
            if step.row_max is None:  # P is then exp(score) itself
                s = event.value(step.s)[: len(rows), : len(keys)].log()
                of_rows = torch.ones(len(rows), dtype=torch.float32)
                seen.append({"keys": keys, "s": s, "row_max": 0 * of_rows, "alpha": of_rows})
            seen[-1]["row_sum"] = event.value(step.row_sum)[: len(rows)]
        elif isinstance(step, Gemm | IssueGemm) and "v_columns" in step.acc.axes:
            o = event.value(step.acc)[: len(rows), : plan.head_dim_v]
            self.records.append(BlockRecord(event.tile.members[0], rows, o=o, **seen.popleft()))
        elif isinstance(step, StoreRegisters) and (isinstance(step.dst, PartRows) or step.dst.workspace):
            return
        elif isinstance(step, StoreRegisters) and isinstance(step.src, RegVec):
            self._lse[event.role] = event.value(step.src)[: len(rows)]
        elif isinstance(step, StageTile | StoreRegisters):
            o = event.value(step.src)[: len(rows), : plan.head_dim_v]
            self.records.append(FinishedRecord(event.tile.members[0], rows, o, self._lse[event.role]))

    def _natural_maximum(self, event: Event, step: RowMax) -> torch.Tensor:
        """The largest score of each row; -inf where it has seen no key."""
        found: torch.Tensor = event.value(step.row_max)
        unit = math.log(2) if step.scale is not None else self._unit(step, event.role)
        return (found * unit).masked_fill(found == torch.finfo(found.dtype).min, -math.inf)

    def _unit(self, step: RowMax, role: RoleRun) -> float:
        """What makes a score natural."""
        if step.scale is not None:
            return self._scale
        return math.log(2) * (1.0 if step.is_scaled else role.call.scale["softmax_scale_log2"])


def existing(first: int, size: int, length: int) -> range:
    """Of so many rows or keys those that a sequence has."""
    return range(first, min(first + size, length))


def _lines(record: BlockRecord | FinishedRecord) -> Iterator[str]:
    batch, head, *_ = record.member
    whose = f"batch {batch}, head {head}, rows {span_text(record.rows)}"
    if isinstance(record, BlockRecord):
        yield f"{whose}, keys {span_text(record.keys)}"
        yield from matrix_lines("S", record.s)
        yield from matrix_lines("running max", record.row_max.unsqueeze(1))
        yield from matrix_lines("rescale factor", record.alpha.unsqueeze(1))
        yield from matrix_lines("running sum", record.row_sum.unsqueeze(1))
        yield from matrix_lines("O, not normalised", record.o)
    else:
        yield f"{whose}, done"
        yield from matrix_lines("O", record.o)
        yield from matrix_lines("lse", record.lse.unsqueeze(1))


def span_text(indices: range) -> str:
    """The first and the last of some rows or keys."""
    return f"{indices[0]} .. {indices[-1]}" if len(indices) > 1 else f"{indices[0]}"


def matrix_lines(name: str, values: torch.Tensor) -> Iterator[str]:
    """A matrix in aligned columns beside its name; a column of one number per row is written as one row."""
    if values.shape[1] == 1 and values.shape[0] > 1:
        values = values.T
    cells = [[f"{x + 0.0:.5g}" for x in _cut(row)] for row in _cut(values.tolist())]
    width = max((len(cell) for row in cells for cell in row), default=0)
    more_columns = "  ..." if values.shape[1] > WIDEST else ""
    for i, row in enumerate(cells):
        yield f"  {name if i == 0 else '':<20}" + "  ".join(f"{cell:>{width}}" for cell in row) + more_columns
    if values.shape[0] > WIDEST:
        yield f"  {'':<20}..."


def _cut(values: Sequence[T]) -> Sequence[T]:
    return values[:WIDEST]
