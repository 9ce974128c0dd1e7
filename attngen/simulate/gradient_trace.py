"""A backward pass as a teacher writes it on the board: P, dP, D and dS of pairs of blocks, and the gradients so far.

Q and K are those of a call; the gradients of P, S and O are called dP, dS and dO, and D is the sum of dO O over a row.
dS is the gradient of the products, without softmax_scale, and so are dQ and dK until they are done. Read off a
simulated run; nothing is computed again. Kernels of programs that every warp runs alike are shown.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attngen.bind import bind, check_arguments
from attngen.errors import ArgumentError
from attngen.plan import GRADIENTS_INTAKE, SCORES, Call, RegTile, Rows
from attngen.plan.steps import Gemm, HidePairs, RecoverP, ScoreGradient, StageTile
from attngen.simulate.launches import run_call
from attngen.simulate.roles import Event
from attngen.simulate.trace import existing, matrix_lines, span_text
from attngen.simulate.visits import SIMULATED_SMS, Member


@dataclass(frozen=True)
class PairRecord:
    """What stands on the board after one block of queries has met one block of keys, or when a gradient is done.

    Attributes:
        member: query head and element of the batch; of a gradient of keys that is done the first head of the group.
        rows, keys: which queries and keys, those that exist; None of the side that has been summed over.
        matrices: by their names: "P", "dP", "D" and "dS", (rows, keys) or (rows, 1), and gradients, (rows or keys,
            columns).
    """

    member: Member
    rows: range | None
    keys: range | None
    matrices: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class BackwardTrace:
    """A backward pass as it would be written on the board; `str` is the text.

    Attributes:
        records: in the order in which they happened.
        gradients: what the pass returned, by name.
    """

    records: tuple[PairRecord, ...]
    gradients: Mapping[str, torch.Tensor]

    def __str__(self) -> str:
        return "\n".join(line for record in self.records for line in _lines(record))


def trace_backward(
    call: Call,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    wanted: Sequence[str] = ("dq", "dk", "dv"),
    *,
    softmax_scale: float | None = None,
    declared: Mapping[str, Any] | None = None,
) -> BackwardTrace:
    """Simulate the backward pass of a call, and record every pair of blocks.

    Args:
        call: of a spec that asks for gradients.
        dout: (batch, seqlen_q, num_heads_q, head_dim_v), of the inputs' type, on the CPU.
        q: (batch, seqlen_q, num_heads_q, head_dim_qk).
        k: (batch, seqlen_k, num_heads_kv, head_dim_qk).
        v: (batch, seqlen_k, num_heads_kv, head_dim_v).
        out: what the forward call returned, of the shape of dout.
        lse: (batch, num_heads_q, seqlen_q), f32, like out.
        wanted: names of the gradients to make.
        softmax_scale: of the forward call.
        declared: the scalars and tensors of the spec, by name.

    Raises:
        ArgumentError: what the kernels cannot take, or kernels for warpgroups.
    """
    if any(len(plan.roles) > 1 for plan in call.gradients):
        must = "one whose warps run alike: target: simulator, or schedule.kind: fa2"
        raise ArgumentError("call", "a backward pass for warpgroups", must)
    named = {**(declared or {}), "dout": dout, "out": out, "lse": lse}
    given = check_arguments(call.manifest, q, k, v, softmax_scale, {}, "bshd", named, GRADIENTS_INTAKE)
    board = _Board(q.shape[1], k.shape[1])
    bound = bind(call.manifest, given, tuple(wanted), SIMULATED_SMS, softmax_scale)
    made = run_call(call, bound, observer=board.observe)
    return BackwardTrace(tuple(board.records), made)


class _Board:
    """Writes down what the Steps of a run leave in the registers."""

    def __init__(self, seqlen_q: int, seqlen_k: int) -> None:
        self._lengths = {"queries": seqlen_q, "keys": seqlen_k}
        self.records: list[PairRecord] = []
        self._pair: dict[str, torch.Tensor] = {}
        self._pair_of: tuple[range, range] | None = None

    def observe(self, event: Event) -> None:
        """Take note of a Step that has just been done."""
        step = event.step
        if isinstance(step, RecoverP):
            self._pair_of = self._spans(event, step)
            name = "P" if step.slope is None else "P times slope"
            self._pair = {name: self._of_pair(event, step.s)}
        elif isinstance(step, HidePairs):
            self._pair = {name: self._of_pair(event, step.s) for name in self._pair}
        elif isinstance(step, ScoreGradient):
            assert self._pair_of is not None
            assert isinstance(step.delta, Rows)
            rows, _ = self._pair_of
            delta = event.role.device.read(step.delta, event.tile, rows.start, (len(rows),))[0]
            self._pair |= {
                "dP": self._of_pair(event, step.dp),
                "D": delta.unsqueeze(1),
                "dS": self._of_pair(event, step.ds),
            }
        elif isinstance(step, Gemm) and set(step.acc.axes) != set(SCORES):
            assert self._pair_of is not None
            rows, keys = self._pair_of
            own = rows if step.acc.axes[0] == "queries" else keys
            self._pair[f"{_gradient(step.acc)} so far"] = _own_values(event, step.acc, own)
            self._write(event, rows, keys, self._pair)
            self._pair = {}
        elif isinstance(step, StageTile):
            own = self._own_side(event, step.src)
            of_queries, done = step.src.axes[0] == "queries", _own_values(event, step.src, own)
            self._write(
                event, own if of_queries else None, None if of_queries else own, {_gradient(step.src): done}
            )

    def _write(
        self, event: Event, rows: range | None, keys: range | None, matrices: Mapping[str, torch.Tensor]
    ) -> None:
        last = self.records[-1] if self.records else None
        member = event.tile.members[0]
        if last is not None and (last.member, last.rows, last.keys) == (member, rows, keys):  # dV, then dK
            self.records[-1] = PairRecord(member, rows, keys, {**last.matrices, **matrices})
        else:
            self.records.append(PairRecord(member, rows, keys, dict(matrices)))

    def _spans(self, event: Event, step: RecoverP) -> tuple[range, range]:
        """The queries and the keys of a pair of blocks, those that exist."""
        extents = dict(zip(step.s.axes, (step.s.rows, step.s.cols), strict=True))
        first = {
            "queries": event.role.index(step.rows) * extents["queries"],
            "keys": event.role.index(step.block) * extents["keys"],
        }
        rows, keys = (
            existing(first[side], extents[side], self._lengths[side]) for side in ("queries", "keys")
        )
        return rows, keys

    def _of_pair(self, event: Event, tile: RegTile) -> torch.Tensor:
        """The values of a tile of pairs as queries x keys, those that exist."""
        assert self._pair_of is not None
        rows, keys = self._pair_of
        values = event.value(tile)
        values = values if tile.axes[0] == "queries" else values.T
        return values[: len(rows), : len(keys)]

    def _own_side(self, event: Event, tile: RegTile) -> range:
        """The queries or the keys whose gradient a block of threads owns."""
        side = tile.axes[0]
        block = event.tile.m_block if side == "queries" else event.tile.n_block
        return existing((block or 0) * tile.rows, tile.rows, self._lengths[side])


def _own_values(event: Event, acc: RegTile, own: range) -> torch.Tensor:
    """The rows of an accumulator that exist, without padded columns."""
    return event.value(acc)[: len(own), : acc.valid_cols]


def _gradient(acc: RegTile) -> str:
    """An accumulator's name on the board: dQ of acc_dq."""
    name = acc.name.removeprefix("acc_")
    return name[:-1] + name[-1].upper()


def _lines(record: PairRecord) -> Iterator[str]:
    batch, head, *_ = record.member
    sides = {"rows": record.rows, "keys": record.keys}
    spans = ", ".join(f"{name} {span_text(each)}" for name, each in sides.items() if each is not None)
    is_done = record.rows is None or record.keys is None
    yield f"batch {batch}, head {head}, {spans}{', done' if is_done else ''}"
    for name, values in record.matrices.items():
        yield from matrix_lines(name, values)
