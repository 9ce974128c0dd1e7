"""Launching a kernel from its manifest on torch tensors: the path of every call, so it does little twice.

What depends only on shapes, strides, types and device is worked out once per signature; each call patches the
pointers, which are checked every time. Nothing is copied, padded or synchronised.
"""

import ctypes
import math
import operator
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attngen.dtypes import dtype, torch_dtype
from attngen.emit.manifest import KernelEntry, Manifest
from attngen.errors import ArgumentError, InternalError
from attngen.plan import evaluate_formula
from attngen.runtime.arguments import ROW_ALIGNMENT, Problem, check_arguments, strides
from attngen.runtime.driver import Function, Module, check_device, launch

SMALLEST_SCALE = 2.0**-126
"""FLT_MIN stands for a scale of 0, so that a score of -inf stays -inf."""
LARGEST_GRID = 2**31 - 1
MOST_SIGNATURES = 4096
"""Signatures remembered per kernel; a program with more starts over."""
_FORMATS = {"pointer": "Q", "i64": "q", "i32": "i", "f32": "f"}
_SIZES = {"pointer": 8, "i64": 8, "i32": 4, "f32": 4}


@dataclass(frozen=True)
class LaunchReport:
    """What a call would launch: for people, and for tests that count."""

    kernel: str
    grid: int
    threads: int
    smem_bytes: int
    workspace_bytes: dict[str, int]


class _Arguments(threading.local):
    """One thread's parameter struct of a launch, and the array that points at it.

    The driver reads the struct during the launch, with the interpreter's lock released; hence one a thread.
    """

    def __init__(self, template: bytes) -> None:
        self.struct = ctypes.create_string_buffer(template, len(template))
        self.array = (ctypes.c_void_p * 1)(ctypes.addressof(self.struct))
        self.address = ctypes.addressof(self.array)


@dataclass(frozen=True)
class _PreparedLaunch:
    """A launch of one signature: everything but the pointers, which come first in the struct."""

    function: Function
    grid: int
    threads: int
    smem_bytes: int
    arguments: _Arguments
    pick: Callable[[tuple[int, ...]], tuple[int, ...]]
    pack_into: Callable[..., None]


@dataclass(frozen=True)
class _Prepared:
    """Everything about a signature that does not change from call to call."""

    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    workspaces: tuple[tuple[int, ...], ...]
    launches: tuple[_PreparedLaunch, ...]


def _struct_format(kernel: KernelEntry) -> str:
    """The kernel's parameter struct for `struct`: naturally aligned fields in order."""
    format_, offset = "=", 0
    for param in kernel.params:
        padding = -offset % _SIZES[param.ctype]
        format_ += f"{padding}x" * bool(padding) + _FORMATS[param.ctype]
        offset += padding + _SIZES[param.ctype]
    return format_


class Launcher:
    """Runs one compiled kernel on CUDA tensors.

    Args:
        manifest: what to launch and with what.
        cubin: the machine code.
        load: makes a module of a cubin; tests pass a recorder.
        start: launches; tests pass a recorder.
    """

    def __init__(
        self,
        manifest: Manifest,
        cubin: bytes,
        load: Callable[[bytes], Any] = Module,
        start: Callable[..., None] = launch,
    ) -> None:
        self.manifest = manifest
        self._start = start
        self._load = lambda: load(cubin)
        self._functions: dict[str, Function] = {}
        self._prepared: dict[tuple[Any, ...], _Prepared] = {}
        self._output = torch_dtype(dtype(manifest.output))
        self._output_is_input = manifest.output == manifest.inputs
        self._pointers = ("q.ptr", "k.ptr", "v.ptr", "out.ptr", "lse.ptr") + tuple(
            f"workspace.{space.name}" for space in manifest.workspaces
        )

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        softmax_scale: float | None = None,
        return_lse: bool = False,
        out: torch.Tensor | None = None,
        layout: str = "bshd",
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Launch on torch's current stream of q's device; see `attngen.Kernel.__call__` for the arguments."""
        device = q.device
        if out is not None or q.requires_grad or k.requires_grad or v.requires_grad:
            check_arguments(self.manifest, q, k, v, softmax_scale, out, layout)
        key = (
            q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
            device, k.device, v.device, softmax_scale, layout, None if out is None else out.stride(),
        )  # fmt: skip
        prepared = self._prepared.get(key)
        if prepared is None:
            prepared = self._prepare(q, k, v, softmax_scale, out, layout)
            if len(self._prepared) >= MOST_SIGNATURES:
                self._prepared.clear()
            self._prepared[key] = prepared
        q_pointer, k_pointer, v_pointer = q.data_ptr(), k.data_ptr(), v.data_ptr()
        if (q_pointer | k_pointer | v_pointer) % ROW_ALIGNMENT:
            check_arguments(self.manifest, q, k, v, softmax_scale, out, layout)
        if out is None:
            shape = prepared.out_shape
            out = q.new_empty(shape) if self._output_is_input else q.new_empty(shape, dtype=self._output)
        lse = q.new_empty(prepared.lse_shape, dtype=torch.float32) if return_lse else None
        spaces = [q.new_empty(shape, dtype=torch.float32) for shape in prepared.workspaces]
        pointers = (
            q_pointer,
            k_pointer,
            v_pointer,
            out.data_ptr(),
            0 if lse is None else lse.data_ptr(),
            *[space.data_ptr() for space in spaces],
        )
        index: int = device.index
        stream = torch._C._cuda_getCurrentRawStream(index)
        if torch._C._cuda_getDevice() == index:
            self._launch(prepared, pointers, stream)
        else:
            with torch.cuda.device(device):
                self._launch(prepared, pointers, stream)
        return out, lse

    def _launch(self, prepared: _Prepared, pointers: tuple[int, ...], stream: int) -> None:
        for ready in prepared.launches:
            arguments = ready.arguments
            ready.pack_into(arguments.struct, 0, *ready.pick(pointers))
            self._start(
                ready.function, ready.grid, ready.threads, ready.smem_bytes, stream, arguments.address
            )

    def _prepare(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        softmax_scale: float | None,
        out: torch.Tensor | None,
        layout: str,
    ) -> _Prepared:
        """Check a signature and work out its launches."""
        problem = check_arguments(self.manifest, q, k, v, softmax_scale, out, layout)
        if q.is_cuda:
            check_device(self.manifest.arch, torch.cuda.get_device_capability(q.device))
        out_shape = (*q.shape[:3], self.manifest.head_dim_v)
        sample = torch.empty(out_shape, device="meta") if out is None else out
        scale = 1 / math.sqrt(self.manifest.head_dim_qk) if softmax_scale is None else softmax_scale
        values: dict[str, float] = {
            **problem.sizes,
            "softmax_scale_log2": max(abs(scale), SMALLEST_SCALE) * math.log2(math.e),
            "scale_is_negative": int(scale < 0),
            **dict.fromkeys(self._pointers, 0),
        }
        steps = (("q", problem.q), ("k", problem.k), ("v", problem.v), ("out", strides(sample, layout)))
        for name, (batch, seqlen, head) in steps:
            values |= {
                f"{name}.stride_batch": batch,
                f"{name}.stride_seqlen": seqlen,
                f"{name}.stride_head": head,
            }
        reports = explain_launch(self.manifest, problem)
        return _Prepared(
            out_shape,
            (problem.batch, problem.num_heads_q, problem.seqlen_q),
            tuple(
                tuple(evaluate_formula(size, problem.sizes) for size in space.shape)
                for space in self.manifest.workspaces
            ),
            tuple(self._prepare_launch(report, values, q.device) for report in reports if report.grid),
        )

    def _prepare_launch(
        self, report: LaunchReport, values: dict[str, float], device: torch.device
    ) -> _PreparedLaunch:
        """Pack what does not change; the pointers must be the first fields."""
        kernel = next(kernel for kernel in self.manifest.kernels if kernel.name == report.kernel)
        if not self._functions:
            module = self._load()  # type: ignore[no-untyped-call]
            self._functions = {k.name: module.function(k.name, k.smem_bytes) for k in self.manifest.kernels}
        function = self._functions[kernel.name]
        function.prepare(device.index)
        pointers = [param.value for param in kernel.params if param.ctype == "pointer"]
        if [param.value for param in kernel.params[: len(pointers)]] != pointers:
            raise InternalError(f"the pointers of {kernel.name} do not come first in its parameters")
        template = struct.pack(_struct_format(kernel), *(values[param.value] for param in kernel.params))
        return _PreparedLaunch(
            function,
            report.grid,
            report.threads,
            report.smem_bytes,
            _Arguments(template),
            operator.itemgetter(*(self._pointers.index(name) for name in pointers)),
            struct.Struct(f"={len(pointers)}Q").pack_into,
        )


def explain_launch(manifest: Manifest, problem: Problem) -> tuple[LaunchReport, ...]:
    """What a call of these sizes launches, from the manifest alone.

    Raises:
        ArgumentError: the grid would be larger than CUDA allows.
    """
    kernels = {kernel.name: kernel for kernel in manifest.kernels}
    sizes = problem.sizes
    workspace_bytes = {
        space.name: 4 * math.prod(evaluate_formula(size, sizes) for size in space.shape)
        for space in manifest.workspaces
    }
    reports = []
    for entry in manifest.launches:
        grid = evaluate_formula(entry.grid, sizes)
        if grid > LARGEST_GRID:
            raise ArgumentError("q", f"{grid} blocks of work", f"at most {LARGEST_GRID}", "split the batch")
        kernel = kernels[entry.kernel]
        reports.append(LaunchReport(kernel.name, grid, kernel.threads, kernel.smem_bytes, workspace_bytes))
    return tuple(reports)
