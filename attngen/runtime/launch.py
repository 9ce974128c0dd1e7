"""Launching a kernel from its manifest on torch tensors: the path of every call, so it does little twice.

What depends only on shapes, strides, types and device is worked out once per signature (`runtime/prepared.py`); each
call patches the pointers, which are checked every time. Nothing is copied, padded or synchronised.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from attngen.dtypes import dtype, torch_dtype
from attngen.emit.manifest import Manifest, serving
from attngen.errors import ArgumentError
from attngen.runtime.arguments import ROW_ALIGNMENT, Problem, check_arguments, check_overlap
from attngen.runtime.counters import COUNTERS
from attngen.runtime.declared import DeclaredValues, check_declared
from attngen.runtime.driver import Module, launch
from attngen.runtime.loaded import LoadedKernels
from attngen.runtime.numbers import scalar_of, softmax_scale_of
from attngen.runtime.prepared import Prepared, PreparedStruct, prepare_signature, remember
from attngen.runtime.tables import TableMemory, TileTables
from attngen.runtime.tensors import check_plain
from attngen.torch_state import is_altered, torch_defaults

_NOTHING: Mapping[str, Any] = {}


class Launcher:
    """Runs one compiled kernel on CUDA tensors.

    Args:
        manifest: what to launch and with what.
        cubin: the machine code.
        shorter: launchers of kernels for fewer keys, the fewest first.
        load: makes a module of a cubin; tests pass a recorder.
        start: launches; tests pass a recorder.
    """

    def __init__(
        self,
        manifest: Manifest,
        cubin: bytes,
        shorter: "tuple[Launcher, ...]" = (),
        load: Callable[[bytes], Any] = Module,
        start: Callable[..., None] = launch,
    ) -> None:
        self.manifest = manifest
        self._shorter = shorter
        self._kernels = LoadedKernels(manifest.arch, manifest.kernels, cubin, load, start)
        self._prepared: dict[tuple[Any, ...], Prepared] = {}
        self._table_memory = TableMemory()
        self._output = torch_dtype(dtype(manifest.output))
        self._tensors = tuple(entry.name for entry in (*manifest.tensors, *manifest.descales))
        self._declared = len(manifest.tensors)  # of those, the ones that tables may be made of
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
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Launch on torch's current stream of q's device; see `attngen.Kernel.__call__` for the arguments."""
        if is_altered():
            self._check(q, k, v, softmax_scale, out, layout, declared)
            with torch_defaults():
                return self.run(q, k, v, softmax_scale, return_lse, out, layout, declared, tables)
        try:
            if softmax_scale is not None and softmax_scale.__class__ is not float:
                softmax_scale = softmax_scale_of(softmax_scale)
            device = q.get_device()  # -1 off the GPU; costs half of what q.device does in a key
            if out is not None or q.requires_grad or k.requires_grad or v.requires_grad:
                check_arguments(self.manifest, q, k, v, softmax_scale, out, layout)
            key: tuple[Any, ...] = (
                q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
                device, k.get_device(), v.get_device(), layout, None if out is None else out.stride(), softmax_scale,
                q.__class__ is k.__class__ is v.__class__ is torch.Tensor or (q.__class__, k.__class__, v.__class__),
            )  # fmt: skip
            tensors: list[torch.Tensor] = []
            if declared:
                tensors = [declared[name] for name in self._tensors]
                key += (
                    *declared,
                    *[(x.shape, x.stride(), x.dtype, x.get_device(), x.__class__, x.is_neg(),
                       x.requires_grad and torch.is_grad_enabled()) for x in tensors],
                    *[(x or repr(x), x.__class__) for x in map(declared.get, self._scalars)],  # 0.0, -0.0 and False
                )  # fmt: skip
                if out is not None:
                    check_overlap(out, dict(zip(self._tensors, tensors, strict=True)))
            prepared = self._prepared.get(key)
            q_pointer, k_pointer, v_pointer = q.data_ptr(), k.data_ptr(), v.data_ptr()
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
            # nothing, no tensor, no strides, a list, an array
            self._check(q, k, v, softmax_scale, out, layout, declared)
            raise
        if prepared is None:
            if numbers := self._numbers(declared):
                declared = {**declared, **numbers}
                return self.run(q, k, v, softmax_scale, return_lse, out, layout, declared, tables)
            prepared = self._prepare(q, k, v, softmax_scale, out, layout, declared)
            remember(self._prepared, key, prepared)
        if (q_pointer | k_pointer | v_pointer) % ROW_ALIGNMENT or not (q_pointer and k_pointer and v_pointer):
            check_arguments(self.manifest, q, k, v, softmax_scale, out, layout)  # of the empty some lie at 0
        if out is None:
            shape = prepared.out_shape  # None where it is q's: not to spell it takes a third less
            out = torch.empty_like(q) if shape is None else q.new_empty(shape, dtype=self._output)
        lse = q.new_empty(prepared.lse_shape, dtype=torch.float32) if return_lse else None
        structs, memory, scratch = prepared.structs, None, None
        stream = torch._C._cuda_getCurrentRawStream(device)
        if tables is not None:
            if not self.manifest.tables:
                raise ArgumentError("tables", "tables", "None: this kernel reads none")
            TileTables.check(tables, prepared.tables, tensors[: self._declared])
            structs, memory = prepared.without_tables, tables.memory
        elif prepared.tables_size:
            memory = self._table_memory.on(device, stream, q, prepared.tables_size)
        if prepared.scratch_size:
            scratch = q.new_empty(prepared.scratch_size)
        addresses: tuple[int, ...] = (
            q_pointer, k_pointer, v_pointer, out.data_ptr(), 0 if lse is None else lse.data_ptr(),
            0 if memory is None else memory.data_ptr(), 0 if scratch is None else scratch.data_ptr(),
        )  # fmt: skip
        if tensors:
            pointers = tuple([x.data_ptr() for x in tensors])
            if 0 in pointers:
                for name, x in zip(self._tensors, tensors, strict=True):
                    check_plain(name, x)
            addresses += pointers
        self._launch(prepared, structs, addresses, device, stream)
        return out, lse

    def tables(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str, declared: Mapping[str, Any]
    ) -> TileTables:
        """Fill the tables of a call, and nothing else; see `attngen.Kernel.tables`."""
        prepared = self._prepare(q, k, v, None, None, layout, declared)
        with torch_defaults():
            memory = q.new_empty(prepared.tables_size)
        tensors = [declared[name] for name in self._tensors]
        addresses = (*(0,) * 5, memory.data_ptr(), 0, *[x.data_ptr() for x in tensors])
        device = q.get_device()
        stream = torch._C._cuda_getCurrentRawStream(device)
        self._launch(prepared, prepared.of_tables, addresses, device, stream)
        return TileTables.of(prepared.tables, tensors[: self._declared], memory)

    def _numbers(self, declared: Mapping[str, Any]) -> dict[str, Any]:
        """Python's numbers for scalars that are not: a tensor is the same key whatever it holds."""
        passed = {name: declared.get(name) for name in self._scalars}
        return {
            name: scalar_of(name, self._scalars[name], value)
            for name, value in passed.items()
            if type(value) not in (bool, int, float, type(None))
        }

    def _check(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        softmax_scale: float | None,
        out: torch.Tensor | None,
        layout: str,
        declared: Mapping[str, Any],
    ) -> tuple[Problem, DeclaredValues]:
        """Look at everything that a call passes."""
        problem = check_arguments(self.manifest, q, k, v, softmax_scale, out, layout)
        return problem, check_declared(self.manifest, declared, problem.sizes, q.device)

    def _launch(
        self,
        prepared: Prepared,
        structs: tuple[PreparedStruct, ...],
        addresses: tuple[int, ...],
        device: int,
        stream: int,
    ) -> None:
        if prepared.draws_tiles:
            addresses = (*addresses, COUNTERS.address(device, stream))
        self._kernels.launch(structs, addresses, device, stream)

    def _prepare(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        softmax_scale: float | None,
        out: torch.Tensor | None,
        layout: str,
        declared: Mapping[str, Any],
    ) -> Prepared:
        """Check a signature and have at hand all that its launches need, of the kernel that takes it."""
        problem, values = self._check(q, k, v, softmax_scale, out, layout, declared)
        if (launcher := serving(self, self._shorter, problem.seqlen_k)) is not self:
            return launcher._prepare(q, k, v, softmax_scale, out, layout, declared)
        with torch_defaults(), self._kernels.preparing(q.device):
            function = self._kernels.function
            prepared = prepare_signature(
                self.manifest, function, problem, q, softmax_scale, out, layout, values
            )
            if prepared.draws_tiles:
                COUNTERS.prepare(q.get_device())
        return prepared
