"""Launching a quantizer's kernels on torch tensors, from its entries: as `Launcher` does, it does little twice.

Outputs are allocated by torch on its current stream, which the kernels run on; nothing is synchronised, and all of it
may be captured in a graph.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attngen.dtypes import dtype, torch_dtype
from attngen.emit.manifest import LaunchEntry, WorkspaceEntry
from attngen.emit.quantizer import QuantizerEntries
from attngen.errors import ArgumentError
from attngen.plan import evaluate_formula
from attngen.plan.quantizer import SOURCES, TENSORS
from attngen.quantize import DESCALES, Operands
from attngen.runtime.arguments import (
    ROW_ALIGNMENT,
    Problem,
    Strides,
    check_arguments,
    check_length,
    check_rows,
    strides,
)
from attngen.runtime.driver import Module, launch
from attngen.runtime.loaded import LoadedKernels
from attngen.runtime.prepared import (
    WORD,
    Arguments,
    PreparedLaunch,
    PreparedStruct,
    grid_of,
    offsets,
    pack,
    remember,
    sms_of,
)
from attngen.torch_state import is_altered, torch_defaults

_SOURCES = {torch_dtype(dtype(name)): name for name in SOURCES}
_OPERANDS = (*TENSORS, *DESCALES)
"""What the entries' outputs are in `Operands`, in order."""
_NO_STRIDES: Strides = (0, 0, 0)


@dataclass(frozen=True)
class _Expected:
    """What q, k and v must be, for `check_arguments`."""

    arch: str
    inputs: str
    output: str
    head_dim_qk: int
    head_dim_v: int
    scales: None = None  # they are 16-bit tensors


@dataclass(frozen=True)
class _Prepared:
    """Everything about a signature that does not change from call to call.

    Addresses are those of the tensors passed, then of the outputs, then of the maxima.

    Attributes:
        outputs: shape and type of each.
        maxima_shape: None where there are none.
    """

    problem: Problem
    outputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    maxima_shape: tuple[int, ...] | None
    struct: PreparedStruct


def check_sources(
    of: QuantizerEntries, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str
) -> Problem:
    """Check tensors that are to be quantised.

    Raises:
        ArgumentError: the first fault found.
    """
    if isinstance(q, torch.Tensor) and q.dtype not in _SOURCES:
        must = " or ".join(map(str, _SOURCES))
        raise ArgumentError("q", f"dtype {q.dtype}", must, "pass q.to(torch.bfloat16)")
    source = _SOURCES[q.dtype] if isinstance(q, torch.Tensor) else "bf16"
    expected = _Expected(of.arch, source, source, of.head_dim_qk, of.head_dim_v)
    return check_arguments(expected, q, k, v, None, None, layout)


def check_values(of: QuantizerEntries, v: torch.Tensor, layout: str) -> Problem:
    """Check e4m3 V that is to be laid out.

    Raises:
        ArgumentError: the first fault found.
    """
    seqlen = check_length(v, layout, "v")
    if v.dtype != torch.float8_e4m3fn:
        raise ArgumentError(
            "v", f"dtype {v.dtype}", "torch.float8_e4m3fn", "quantise it: kernel.quantize(q, k, v)"
        )
    if v.shape[-1] != of.head_dim_v:
        raise ArgumentError("v", f"shape {tuple(v.shape)}", f"head_dim {of.head_dim_v}")
    check_rows(of.arch, "v", v)
    heads = v.shape[2 if layout == "bshd" else 1]
    return Problem(v.shape[0], 0, seqlen, heads, heads, _NO_STRIDES, _NO_STRIDES, strides(v, layout))


class QuantizeLauncher:
    """Runs the kernels of one quantizer on CUDA tensors.

    Args:
        entries: what to launch and with what.
        cubin: the machine code, which may hold other kernels too.
        load: makes a module of a cubin; tests pass a recorder.
        start: launches; tests pass a recorder.
    """

    def __init__(
        self,
        entries: QuantizerEntries,
        cubin: bytes,
        load: Callable[[bytes], Any] = Module,
        start: Callable[..., None] = launch,
    ) -> None:
        self.entries = entries
        self._kernels = LoadedKernels(entries.arch, entries.kernels, cubin, load, start)
        self._prepared: dict[tuple[Any, ...], _Prepared] = {}

    def quantize(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str = "bshd") -> Operands:
        """Quantise on torch's current stream of q's device.

        Args:
            q: (batch, seqlen_q, num_heads_q, head_dim_qk), bf16 or f16, last dimension contiguous, rows on 16 bytes.
            k: (batch, seqlen_k, num_heads_kv, head_dim_qk), of the same type; num_heads_kv divides num_heads_q.
            v: (batch, seqlen_k, num_heads_kv, head_dim_v), likewise.
            layout: "bhsd" exchanges seqlen and heads in q, k and v; the operands are the same.

        Raises:
            ArgumentError: an argument the kernels cannot take; nothing was touched.
            ToolchainError: this machine cannot run the kernels.
        """
        if is_altered():
            check_sources(self.entries, q, k, v, layout)
            with torch_defaults():
                return self.quantize(q, k, v, layout)
        try:
            device = q.get_device()
            if q.requires_grad or k.requires_grad or v.requires_grad:
                check_sources(self.entries, q, k, v, layout)
            key: tuple[Any, ...] = (
                q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
                device, k.get_device(), v.get_device(), layout, q.__class__, k.__class__, v.__class__,
            )  # fmt: skip
            prepared = self._prepared.get(key)
            pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr())
        except (AttributeError, TypeError, RuntimeError):  # no tensor, no strides
            check_sources(self.entries, q, k, v, layout)
            raise
        if prepared is None:
            prepared = self._prepare(q, k, v, layout)
            remember(self._prepared, key, prepared)
        if (pointers[0] | pointers[1] | pointers[2]) % ROW_ALIGNMENT or 0 in pointers:
            check_sources(self.entries, q, k, v, layout)
        made = [q.new_empty(shape, dtype=dtype) for shape, dtype in prepared.outputs]
        addresses = (*pointers, *[x.data_ptr() for x in made])
        if prepared.maxima_shape is not None:
            maxima = q.new_zeros(prepared.maxima_shape, dtype=torch.float32)
            addresses += (maxima.data_ptr(),)
        self._launch(prepared.struct, addresses, device)
        entries, sizes = self.entries, prepared.problem
        if entries.scales == "per_tensor":
            made[3:] = [descale.expand(sizes.batch, sizes.num_heads_kv) for descale in made[3:]]
        return Operands(
            **dict(zip(_OPERANDS, made, strict=True)), scales=entries.scales, hadamard=entries.hadamard
        )

    def pack_v(self, v: torch.Tensor, layout: str = "bshd") -> torch.Tensor:
        """Lay e4m3 V out as the attention kernel reads it; see `attngen.quantize.pack_values`.

        Args:
            v: (batch, seqlen_k, num_heads_kv, head_dim_v), e4m3, last dimension contiguous, rows on 16 bytes.
            layout: "bhsd" exchanges seqlen and heads.

        Raises:
            ArgumentError: a tensor the kernel cannot take; nothing was touched.
            ToolchainError: this machine cannot run the kernel.
        """
        if is_altered():
            check_values(self.entries, v, layout)
            with torch_defaults():
                return self.pack_v(v, layout)
        try:
            if v.requires_grad:
                check_values(self.entries, v, layout)
            key = (v.shape, v.stride(), v.dtype, v.get_device(), layout, v.__class__)
            prepared = self._prepared.get(key)
            pointer = v.data_ptr()
        except (AttributeError, TypeError, RuntimeError):
            check_values(self.entries, v, layout)
            raise
        if prepared is None:
            prepared = self._prepare_pack(v, layout)
            remember(self._prepared, key, prepared)
        if pointer % ROW_ALIGNMENT or not pointer:
            check_values(self.entries, v, layout)
        ((shape, dtype),) = prepared.outputs
        packed = v.new_empty(shape, dtype=dtype)
        self._launch(prepared.struct, (pointer, packed.data_ptr()), v.get_device())
        return packed

    def _launch(self, struct: PreparedStruct, addresses: tuple[int, ...], device: int) -> None:
        """On torch's current stream of the device."""
        self._kernels.launch((struct,), addresses, device, torch._C._cuda_getCurrentRawStream(device))

    def _prepare(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str) -> _Prepared:
        problem, entries = check_sources(self.entries, q, k, v, layout), self.entries
        spaces = entries.outputs + ((entries.maxima,) if entries.maxima else ())
        names = ("q.ptr", "k.ptr", "v.ptr", *(f"{space.name}.ptr" for space in spaces))
        struct = self._struct(entries.quantize[_SOURCES[q.dtype]], problem, names, q.device)
        outputs = tuple(_allocation(space, problem) for space in entries.outputs)
        return _Prepared(
            problem, outputs, _allocation(entries.maxima, problem)[0] if entries.maxima else None, struct
        )

    def _prepare_pack(self, v: torch.Tensor, layout: str) -> _Prepared:
        problem = check_values(self.entries, v, layout)
        (space,) = (space for space in self.entries.outputs if space.name == "v8")
        struct = self._struct((self.entries.pack,), problem, ("v.ptr", "v8.ptr"), v.device)
        return _Prepared(problem, (_allocation(space, problem),), None, struct)

    def _struct(
        self,
        launches: tuple[LaunchEntry, ...],
        problem: Problem,
        names: tuple[str, ...],
        device: torch.device,
    ) -> PreparedStruct:
        """What launches share: every field but the addresses, which are those of `names`, in order; others are 0."""
        kernels = {kernel.name: kernel for kernel in self.entries.kernels}
        first = kernels[launches[0].kernel]
        sizes = {**problem.sizes, "num_sms": sms_of(self.entries.arch, device)}
        values: dict[str, Any] = {param.value: 0 for param in first.params} | sizes
        for tensor, steps in (("q", problem.q), ("k", problem.k), ("v", problem.v)):
            for dim, step in zip(("batch", "seqlen", "head"), steps, strict=True):
                values[f"{tensor}.stride_{dim}"] = step
        ready = []
        with torch_defaults(), self._kernels.preparing(device):
            for entry in launches:
                grid = grid_of(entry, sizes, persistent=True)
                kernel = kernels[entry.kernel]
                if grid:
                    function = self._kernels.function(kernel, device.index)
                    ready.append(PreparedLaunch(function, grid, kernel.threads, kernel.smem_bytes, False))
        words = {name: offset // WORD for name, offset in offsets(first).items()}
        patches = tuple((words[name], number) for number, name in enumerate(names))
        return PreparedStruct(Arguments(pack(first, values)), patches, (), (), tuple(ready))


def _allocation(space: WorkspaceEntry, problem: Problem) -> tuple[tuple[int, ...], torch.dtype]:
    sizes: Mapping[str, int] = problem.sizes
    return tuple(evaluate_formula(size, sizes) for size in space.shape), torch_dtype(dtype(space.dtype))
