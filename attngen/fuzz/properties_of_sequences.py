"""The properties of calls whose sequences have lengths of their own: each sequence is a dense call of its rows.

Rows that no sequence counts hold poison in every case, in all inputs, so that these show what reads them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from attngen.check.by_sequence import CutCall, Sequence
from attngen.check.judging import Inputs
from attngen.check.paging import as_padded
from attngen.expr import GIVEN_BLOCKS, SINK
from attngen.fuzz.properties_of_gradients import first_difference
from attngen.fuzz.trial import SIMULATOR_ULPS, Complaint, Subject, Trial
from attngen.lower.choice import WARPGROUP_FIELDS
from attngen.plan import LETTERS, KernelPlan
from attngen.schedules import WARPGROUP_SCHEDULES
from attngen.spec import Spec, load


def sequences(trial: Trial) -> Complaint:
    """Out and lse of each sequence are those of a dense call of it, to the bit on a GPU (as of `batch_slice`)."""
    for call, each, dense in _dense_calls(trial):
        own = call.rows(trial.out, "queries", each), call.of_lse(trial.lse, each)
        made = dense.forward()
        if complaint := first_difference(own, made, _ulps(trial), names=("out", "lse")):
            return f"sequence {each.number}: {complaint} in a dense call"
    return None


def sequence_gradients(trial: Trial) -> Complaint:
    """dq, dk and dv of each sequence are those of a dense call of it, to the bit on a GPU (as of `batch_slice`)."""
    for call, each, dense in _dense_calls(trial):
        dq, dk, dv, *_ = trial.first_gradients  # a sink's is the sum over sequences
        own = call.inputs(dq, dk, dv, each)
        if complaint := first_difference(own, dense.backward(call), _ulps(trial)):
            return f"sequence {each.number}: {complaint} in a dense call"
    return None


def _ulps(trial: Trial) -> int:
    return SIMULATOR_ULPS if trial.device == "cpu" else 0


class _DenseCall:
    """A sequence as a dense call, the last of a batch of as many as its number asks for: `b` is then right."""

    def __init__(
        self, trial: Trial, subject: Subject, call: CutCall, inputs: Inputs, sequence: Sequence
    ) -> None:
        self._trial, self._subject, self._sequence = trial, subject, sequence
        q, k, v = call.inputs(*inputs, sequence)
        self._inputs = (self._repeated(q), self._repeated(k), self._repeated(v))
        self._passed = dict(self._declared(call))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Out and lse: (1, rows, heads, cols) and (1, heads, rows)."""
        out, lse = self._run()
        return out[-1:], lse[-1:]

    def backward(self, call: CutCall) -> tuple[torch.Tensor, ...]:
        """dq, dk and dv, (1, rows, heads, cols) each."""
        out, lse = self._run()
        trial, each = self._trial, self._sequence
        assert trial.dout is not None
        dout = self._repeated(call.rows(trial.dout, "queries", each))
        dlse = None if trial.dlse is None else self._repeated(call.of_lse(trial.dlse, each))
        scale = trial.case.softmax_scale
        with trial.state():
            made = self._subject.backward(dout, *self._inputs, out, lse, dlse, scale, **self._passed)
        return tuple(x[-1:] for x in made[:3])

    def _run(self) -> Any:
        scale = self._trial.case.softmax_scale
        with self._trial.state():
            return self._subject(*self._inputs, scale, return_lse=True, **self._passed)

    def _repeated(self, x: torch.Tensor) -> torch.Tensor:
        return x.expand(self._sequence.number + 1, *x.shape[1:])

    def _declared(self, call: CutCall) -> Iterator[tuple[str, Any]]:
        """What is declared, of the sequence's own tokens, and of the batches that there are."""
        spec, rows = self._trial.case.spec, self._sequence.rows
        by_token = {f"tokens_{letter}": rows[axis] for axis, letter in LETTERS.items()}
        batches = {"batch": slice(self._sequence.number + 1)}
        padded = {f"seqlen_{letter}" for axis, letter in LETTERS.items() if call.lengths.of(axis) == "padded"}
        for name, x in self._trial.declared.items():
            tensor = spec.declarations.tensors.get(name)
            if name == GIVEN_BLOCKS.name:
                yield name, self._blocks(x)
            elif tensor is not None:
                places: Mapping[Any, slice] = by_token | batches
                own = x[tuple(places.get(dim, slice(None)) for dim in tensor.dims)]
                # A dimension with a name of its own has an element, read or not.
                for i, dim in enumerate(tensor.dims):
                    if dim in padded and not own.shape[i]:
                        own = own.new_zeros((*own.shape[:i], 1, *own.shape[i + 1 :]))
                yield name, own
            elif name in spec.declarations.scalars or name == SINK:
                yield name, x

    def _blocks(self, kept: torch.Tensor) -> torch.Tensor:
        """The map for as many batches as there are, or for all, and the blocks of the sequence's rows and keys."""
        blocks, each = self._trial.case.spec.blocks, self._sequence
        assert blocks is not None
        sizes = {"queries": blocks.block_m, "keys": blocks.block_n}
        rows, keys = (-(-(at.stop - at.start) // sizes[axis]) for axis, at in each.rows.items())
        return kept[: 1 if len(kept) == 1 else each.number + 1, :, :rows, :keys]


def _dense_calls(trial: Trial) -> Iterator[tuple[CutCall, Sequence, _DenseCall]]:
    """Each sequence of the case's call, and the dense call that it is."""
    plan, spec = trial.subject.plan, dense_spec(trial.case.spec)
    lengths, k, v, passed = as_padded(plan.lengths, trial.k, trial.v, trial.declared)
    if plan.lengths.is_paged("keys"):  # what `auto` stands for may be another kernel for dense sequences
        spec = spec.replace(_said_of(plan))
    call, subject = CutCall.read(lengths, trial.q, k, passed), trial.make(spec)
    for each in call.sequences:
        yield call, each, _DenseCall(trial, subject, call, (trial.q, k, v), each)


def _said_of(plan: KernelPlan) -> dict[str, Any]:
    """All that a spec may say of the kernel, by path, so that nothing is left to `auto`."""
    workers: dict[str, Any] = {"warps": plan.warps}
    if plan.schedule in WARPGROUP_SCHEDULES:
        values = (plan.worker.warpgroups, plan.overlap, plan.scheduler.persistent)
        workers = dict(zip(WARPGROUP_FIELDS, values, strict=True))
    schedule = {"kind": plan.schedule, "stages": plan.stages, **workers}
    return {
        **{f"schedule.{name}": value for name, value in schedule.items()},
        "tile.block_m": plan.block_m,
        "tile.block_n": plan.block_n,
    }


def dense_spec(spec: Spec) -> Spec:
    """The spec for dense sequences; dimensions by token are lengths, and those of padded ones have names of their own.

    A padded tensor keeps the rows that no sequence counts, so that an index past a sequence's end reads what it read.
    """
    data = {key: value for key, value in spec.to_dict().items() if key != "check"}
    cut = [letter for axis, letter in LETTERS.items() if data["problem"].pop(axis, None) is not None]
    tensors = {}
    for name, text in data.get("tensors", {}).items():
        for letter in cut:
            if f"seqlen_{letter}" in text:  # nothing is sorted along a name of its own
                text = text.replace(f"seqlen_{letter}", f"padded_{letter}").removesuffix(" sorted")
            text = text.replace(f"tokens_{letter}", f"seqlen_{letter}")
        tensors[name] = text
    return load(data | ({"tensors": tensors} if tensors else {}))
