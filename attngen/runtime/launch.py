"""Launching a call from its manifest on torch tensors: the path of every call, so it does little twice.

What depends only on shapes, strides, types and device is worked out once per signature (`runtime/prepared.py`); each
call patches the pointers, which are checked every time. Nothing is copied, padded or synchronised.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from attngen.bind import (
    ROW_ALIGNMENT,
    Given,
    TileTables,
    bind,
    check_alignment,
    check_arguments,
    check_no_tangent,
    check_overlap,
    check_plain,
    check_rows_of_heads,
    passed_as,
    scalar_of,
    softmax_scale_of,
)
from attngen.errors import ArgumentError
from attngen.plan import Manifest
from attngen.runtime.bound_launches import BoundLaunches
from attngen.runtime.counters import COUNTERS
from attngen.runtime.driver import Module, launch
from attngen.runtime.kept_memory import KeptMemory
from attngen.runtime.loaded import LoadedKernels
from attngen.runtime.prepared import Prepared, prepare_signature, remember, sms_of
from attngen.torch_state import is_altered, torch_defaults

_NOTHING: Mapping[str, Any] = {}
OUT, OUT_AND_LSE = ("out",), ("out", "lse")
_Ready = tuple[Prepared, tuple[int, ...], list[torch.Tensor], tuple[torch.Tensor | None, ...], int]
"""A signature, addresses, the wanted values, memory of kept, scratch and zeroed ones, and the device."""


class Launcher:
    """Runs the compiled kernels of a call on CUDA tensors.

    Args:
        manifest: what to launch and with what.
        cubin_of: the machine code of a module, by its name; asked for when it is first needed.
        load: makes a module of a cubin; tests pass a recorder.
        start: launches; tests pass a recorder.
    """

    def __init__(
        self,
        manifest: Manifest,
        cubin_of: Callable[[str], bytes],
        load: Callable[[bytes], Any] = Module,
        start: Callable[..., None] = launch,
    ) -> None:
        self.manifest = manifest
        self._kernels = LoadedKernels(manifest.arch, manifest.kernels, cubin_of, load, start)
        self._prepared: dict[tuple[Any, ...], Prepared] = {}
        self._kept_memory = KeptMemory()
        self._tensors = tuple(dict.fromkeys(value.passed_as for value in manifest.declared))
        self._optional = frozenset(value.argument for value in manifest.declared if value.optional)
        beside = dict.fromkeys(name for intake in manifest.intakes for name in intake.beside)
        self._beside = tuple(manifest.value_of[name].passed_as for name in beside)
        self._scalars = {scalar.name: scalar.type for scalar in manifest.scalars}

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        softmax_scale: float | None = None,
        return_lse: bool = False,
        out: torch.Tensor | None = None,
        layout: str = "bshd",
        declared: Mapping[str, Any] = _NOTHING,
        tables: TileTables | None = None,
        intake: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Out, and lse if it is asked for; see `attngen.Kernel.__call__` for the arguments."""
        wanted = OUT_AND_LSE if return_lse else OUT
        into = () if out is None else (out,)
        made = self.make(wanted, q, k, v, softmax_scale, into, layout, declared, tables, intake)
        return made[0], (made[1] if return_lse else None)

    def make(self, *call: Any, **more: Any) -> list[torch.Tensor]:
        """Launch on torch's current stream of q's device what the wanted values need; arguments as of `ready`."""
        prepared, addresses, made, _, device = self.ready(*call, **more)
        stream = torch._C._cuda_getCurrentRawStream(device)
        if prepared.counters:
            addresses = (*addresses, COUNTERS.address(device, stream, prepared.counters))
        self._kernels.launch(prepared.structs, addresses, device, stream)
        return made

    def bind(self, *call: Any) -> tuple[list[torch.Tensor], BoundLaunches]:
        """Memory of the wanted values, and what launches a call that writes there; arguments as of `ready`."""
        prepared, addresses, made, memory, device = partial(self.ready, keeps=False)(*call)
        cleared = [made[number] for number in prepared.zeroed]
        cleared += [x for x in memory[-1:] if x is not None]
        structs = tuple(each.with_addresses(addresses) for each in prepared.structs)
        held = (call, made, memory)
        return made, BoundLaunches(self._kernels, structs, prepared.counters, cleared, device, held)

    def ready(
        self,
        wanted: tuple[str, ...],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        softmax_scale: float | None = None,
        into: tuple[torch.Tensor, ...] = (),
        layout: str = "bshd",
        declared: Mapping[str, Any] = _NOTHING,
        tables: TileTables | None = None,
        intake: str | None = None,
        accumulates: bool = False,
        keeps: bool = True,
    ) -> _Ready:
        """What a call launches, and the addresses of all its memory, but for counters.

        Args:
            wanted: names of values of the manifest. Where they are not what the call ends with, nothing is looked at
                but q, k and v.
            q: see `attngen.Kernel.__call__`, as for all that follow.
            k: likewise.
            v: likewise.
            softmax_scale: likewise.
            into: memory for the first of the wanted values.
            layout: likewise.
            declared: what is passed by name.
            tables: likewise.
            intake: as of `check_arguments`.
            accumulates: the wanted values are added to what `into` holds.
            keeps: whether the next call may find memory of this one; torch's graphs have it that none of theirs stays.
        """
        declared = self._without_nothing(declared)
        if is_altered():
            self._check(wanted, q, k, v, softmax_scale, into, layout, declared, intake)
            with torch_defaults():
                return self.ready(
                    wanted, q, k, v, softmax_scale, into, layout, declared, tables, intake, accumulates, keeps
                )
        try:
            if softmax_scale is not None and softmax_scale.__class__ is not float:
                softmax_scale = softmax_scale_of(softmax_scale)
            device = q.get_device()  # -1 off the GPU; costs half of what q.device does in a key
            is_recorded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
            if is_recorded:
                self._check(wanted, q, k, v, softmax_scale, into, layout, declared, intake)
            key: tuple[Any, ...] = (
                q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
                device, k.get_device(), v.get_device(), layout, softmax_scale,
                q.__class__ is k.__class__ is v.__class__ is torch.Tensor or (q.__class__, k.__class__, v.__class__),
                wanted, tables is None, intake, accumulates, tuple(map(_signature, into)) if into else None,
            )  # fmt: skip
            tensors: list[torch.Tensor] = []
            if declared:
                names = self._names(declared)
                tensors = [declared[name] for name in names]
                key += (
                    *declared,
                    *map(_signature, tensors),
                    *[(x or repr(x), x.__class__) for x in map(declared.get, self._scalars)],  # 0.0, -0.0 and False
                )  # fmt: skip
            prepared = self._prepared.get(key)
            q_pointer, k_pointer, v_pointer = q.data_ptr(), k.data_ptr(), v.data_ptr()
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
            # nothing, no tensor, no strides, a list, an array
            self._check(wanted, q, k, v, softmax_scale, into, layout, declared, intake)
            raise
        if prepared is None:
            if numbers := self._numbers(declared):
                declared = {**declared, **numbers}
                return self.ready(
                    wanted, q, k, v, softmax_scale, into, layout, declared, tables, intake, accumulates, keeps
                )
            given = self._check(wanted, q, k, v, softmax_scale, into, layout, declared, intake)
            is_given_tables = tables is not None
            prepared = self._prepare(
                wanted, given, q, softmax_scale, into, layout, is_given_tables, accumulates
            )
            remember(self._prepared, key, prepared)
        if (q_pointer | k_pointer | v_pointer) % ROW_ALIGNMENT or not (q_pointer and k_pointer and v_pointer):
            # of the empty some lie at 0
            check_rows_of_heads(self.manifest, q, k, v, softmax_scale, {}, layout, intake)
        pointers = [x.data_ptr() for x in tensors]
        if 0 in pointers:
            for name, x in zip(self._names(declared), tensors, strict=True):
                check_plain(name, x)
            # Where there are tokens and no sequence, a lookup by sequence reads something of which nothing comes.
            pointers = [pointer or q_pointer for pointer in pointers]
        for i in prepared.rows:
            if pointers[i] % ROW_ALIGNMENT:
                check_alignment(self._names(declared)[i], tensors[i])
        if into:
            names = ("q", "k", "v", *(self._names(declared) if declared else ()))
            passed = dict(zip(names, (q, k, v, *tensors), strict=True))
            begins = (q_pointer, k_pointer, v_pointer, *pointers, *[x.data_ptr() for x in into])
            self._check_memory(wanted, into, passed, prepared, begins)
        made = [*into]
        for shape, dtype in prepared.outputs[len(into) :] if into else prepared.outputs:
            # Not to spell the shape takes a third less.
            made.append(torch.empty_like(q) if shape is None else q.new_empty(shape, dtype=dtype))
        for number in prepared.zeroed:
            made[number].zero_()
        stream = torch._C._cuda_getCurrentRawStream(device)
        kept = scratch = zeroed = None
        kept_size, scratch_size, zeroed_size = prepared.sizes
        if tables is not None:
            kept = self._kept(tables, prepared, tensors)
        elif kept_size:
            kept = self._kept_memory.on(device, stream, q, kept_size, keeps)
        if scratch_size:
            scratch = q.new_empty(scratch_size, dtype=torch.uint8)
        if zeroed_size:
            zeroed = q.new_zeros(zeroed_size, dtype=torch.uint8)
        addresses = (
            q_pointer, k_pointer, v_pointer, *pointers, *[x.data_ptr() for x in made],
            0 if kept is None else kept.data_ptr(), 0 if scratch is None else scratch.data_ptr(),
            0 if zeroed is None else zeroed.data_ptr(),
        )  # fmt: skip
        return prepared, addresses, made, (kept, scratch, zeroed), device

    def tables(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: str,
        declared: Mapping[str, Any],
        intake: str | None = None,
        out: TileTables | None = None,
    ) -> TileTables:
        """Fill the tables of a call, and nothing else, those of `out` where it is given; see `attngen.Kernel.work`."""
        declared = self._without_nothing(declared)
        given = self._check(OUT, q, k, v, None, (), layout, declared, intake)
        whole = self._prepare(OUT, given, q, None, (), layout, is_given_tables=False)
        prefix = self._prepare(tuple(whole.kept.offsets), given, q, None, (), layout, False)
        tensors = [declared[name] for name in self._names(declared)]
        own = tensors[: len(whole.tables.tensors)]
        if out is None:
            with torch_defaults():
                memory = q.new_empty(whole.kept.size_bytes, dtype=torch.uint8)
            out = TileTables.of(whole.tables, own, memory, passed_as(self.manifest))
        else:
            memory = self._memory_of(out)
            out.renew(whole.tables, own)
        made = [memory.data_ptr() + beyond for beyond in whole.kept.offsets.values()]
        no_memory, no_counter = (0, 0, 0), 0
        addresses = (*[x.data_ptr() for x in (q, k, v, *tensors)], *made, *no_memory, no_counter)
        device = q.get_device()
        self._kernels.launch(prefix.structs, addresses, device, torch._C._cuda_getCurrentRawStream(device))
        return out

    def _kept(self, tables: TileTables, prepared: Prepared, tensors: list[torch.Tensor]) -> torch.Tensor:
        """The memory of tables that an earlier call has filled."""
        if not self.manifest.kept:
            raise ArgumentError("tables", "tables", "None: this kernel reads none")
        TileTables.check(tables, prepared.tables, tensors[: len(prepared.tables.tensors)])
        return self._memory_of(tables)

    def _memory_of(self, tables: TileTables) -> torch.Tensor:
        if not isinstance(tables.memory, torch.Tensor):
            raise ArgumentError("tables", "tables of CPU tensors", "those of a call on this device")
        return tables.memory

    def _without_nothing(self, declared: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a call passes by name, without what it may leave out and says None for."""
        if not self._optional:
            return declared
        return {name: x for name, x in declared.items() if x is not None or name not in self._optional}

    def _names(self, declared: Mapping[str, Any]) -> tuple[str, ...]:
        """The tensors that a call passes by name, in the order in which they are bound."""
        tensors = self._tensors
        if self._optional:
            tensors = tuple(name for name in tensors if name not in self._optional or name in declared)
        return tensors + tuple(filter(declared.__contains__, self._beside))

    def _numbers(self, declared: Mapping[str, Any]) -> dict[str, Any]:
        """Python's numbers for scalars that are not: a tensor is the same key whatever it holds."""
        passed = {name: declared.get(name) for name in self._scalars}
        return {
            name: scalar_of(name, self._scalars[name], value)
            for name, value in passed.items()
            if type(value) not in (bool, int, float, type(None))
        }

    def _check_memory(
        self,
        wanted: tuple[str, ...],
        into: tuple[torch.Tensor, ...],
        passed: Mapping[str, torch.Tensor],
        prepared: Prepared,
        begins: tuple[int, ...],
    ) -> None:
        """What a signature does not tell of memory for results: where it starts, and whether it is anybody else's."""
        spans = [(begin, begin + size) for begin, size in zip(begins, prepared.extents, strict=True)]
        others = dict(passed)
        for number, (result, x) in enumerate(zip(wanted, into, strict=False), len(passed)):
            name, (begin, end) = self.manifest.value_of[result].passed_as, spans[number]
            check_no_tangent(name, x)
            if begin % ROW_ALIGNMENT:
                check_alignment(name, x)
            if any(
                first < end and begin < last for first, last in spans[:number]
            ):  # or only between their rows
                check_overlap(name, x, others)
            others[name] = x

    def _check(
        self,
        wanted: tuple[str, ...],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        softmax_scale: float | None,
        into: tuple[torch.Tensor, ...],
        layout: str,
        declared: Mapping[str, Any],
        intake: str | None,
    ) -> Given:
        """Look at everything that a call passes, or at q, k and v where what is wanted is made of nothing else."""
        memory = dict(zip(wanted, into, strict=False))
        if all(self.manifest.value_of[name].source == "scratch" for name in wanted):
            return check_rows_of_heads(self.manifest, q, k, v, softmax_scale, memory, layout, intake)
        return check_arguments(self.manifest, q, k, v, softmax_scale, memory, layout, declared, intake)

    def _prepare(
        self,
        wanted: tuple[str, ...],
        given: Given,
        q: torch.Tensor,
        softmax_scale: float | None,
        into: tuple[torch.Tensor, ...],
        layout: str,
        is_given_tables: bool,
        accumulates: bool = False,
    ) -> Prepared:
        """Have at hand all that the launches of a signature need."""
        kept = self.manifest.kept if is_given_tables else ()
        num_sms, memory = sms_of(self.manifest.arch, q.device), dict(zip(wanted, into, strict=False))
        bound = bind(self.manifest, given, wanted, num_sms, softmax_scale, kept, accumulates)
        with torch_defaults(), self._kernels.preparing(q.device):
            prepared = prepare_signature(bound, self._kernels.function, q, memory, layout)
            if prepared.counters:
                COUNTERS.prepare(q.get_device(), prepared.counters)
        return prepared


def _signature(x: torch.Tensor) -> tuple[Any, ...]:
    """What of a tensor decides how a call is launched, but for its address."""
    return (
        x.shape, x.stride(), x.dtype, x.get_device(), x.__class__, x.is_neg(),
        x.requires_grad and torch.is_grad_enabled(),
    )  # fmt: skip
