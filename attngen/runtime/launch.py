"""Launching a kernel from its manifest on torch tensors: the path of every call, so it does little twice.

What depends only on shapes, strides, types and device is worked out once per signature; each call patches the
pointers, which are checked every time. Nothing is copied, padded or synchronised.
"""

import ctypes
import math
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attngen.dtypes import dtype, torch_dtype
from attngen.emit.manifest import KernelEntry, Manifest
from attngen.errors import ArgumentError
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


class _Block(threading.local):
    """One thread's parameter structs and the array that points at the struct."""

    def __init__(self, bytes_: int) -> None:
        self.struct = (ctypes.c_char * max(bytes_, 8))()
        self.array = (ctypes.c_void_p * 1)(ctypes.addressof(self.struct))
        self.address = ctypes.addressof(self.array)


class _ParamLayout:
    """Where the fields of a kernel's parameter struct stand: naturally aligned, in order."""

    def __init__(self, kernel: KernelEntry) -> None:
        self.format, offset = "=", 0
        for param in kernel.params:
            padding = -offset % _SIZES[param.ctype]
            self.format += f"{padding}x" * bool(padding) + _FORMATS[param.ctype]
            offset += padding + _SIZES[param.ctype]
        self.packer = struct.Struct(self.format)
        self.values = tuple(param.value for param in kernel.params)
        pointers = [i for i, param in enumerate(kernel.params) if param.ctype == "pointer"]
        if pointers != list(range(len(pointers))):
            raise ValueError("the pointers of a kernel's parameters come first")
        self.pointers = tuple(self.values[: len(pointers)])
        self.block = _Block(self.packer.size)


@dataclass(frozen=True)
class _Prepared:
    """Everything about a signature that does not change from call to call."""

    problem: Problem
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    workspaces: tuple[tuple[str, tuple[int, ...]], ...]
    launches: tuple[tuple[_ParamLayout, Function, int, int, int, tuple[float, ...]], ...]


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
        module = load(cubin)
        self._kernels = {
            kernel.name: (kernel, _ParamLayout(kernel), module.function(kernel.name, kernel.smem_bytes))
            for kernel in manifest.kernels
        }
        self._prepared: dict[tuple[Any, ...], _Prepared] = {}
        self._output = torch_dtype(dtype(manifest.output))
        self._default_scale = 1 / math.sqrt(manifest.head_dim_qk)

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
        scale = self._default_scale if softmax_scale is None else softmax_scale
        if out is not None or q.requires_grad or k.requires_grad or v.requires_grad:
            check_arguments(self.manifest, q, k, v, softmax_scale, out, layout)
        key = (
            q.shape, q.stride(), q.dtype, k.shape, k.stride(), k.dtype, v.shape, v.stride(), v.dtype,
            k.device == device, v.device == device, device, layout, scale, None if out is None else out.stride(),
        )  # fmt: skip
        prepared = self._prepared.get(key)
        if prepared is None:
            prepared = self._prepare(q, k, v, softmax_scale, out, layout)
            if len(self._prepared) >= MOST_SIGNATURES:
                self._prepared.clear()
            self._prepared[key] = prepared
        pointers = {"q.ptr": q.data_ptr(), "k.ptr": k.data_ptr(), "v.ptr": v.data_ptr(), "lse.ptr": 0}
        if (pointers["q.ptr"] | pointers["k.ptr"] | pointers["v.ptr"]) % ROW_ALIGNMENT:
            check_arguments(self.manifest, q, k, v, softmax_scale, out, layout)
        if out is None:
            out = torch.empty(prepared.out_shape, dtype=self._output, device=device)
        pointers["out.ptr"] = out.data_ptr()
        lse = None
        if return_lse:
            lse = torch.empty(prepared.lse_shape, dtype=torch.float32, device=device)
            pointers["lse.ptr"] = lse.data_ptr()
        spaces = [torch.empty(shape, dtype=torch.float32, device=device) for _, shape in prepared.workspaces]
        for (name, _), space in zip(prepared.workspaces, spaces, strict=True):
            pointers[f"workspace.{name}"] = space.data_ptr()
        index: int = device.index
        stream = torch._C._cuda_getCurrentRawStream(index)  # type: ignore[attr-defined]
        if torch._C._cuda_getDevice() == index:  # type: ignore[attr-defined]
            self._launch(prepared, pointers, stream)
        else:
            with torch.cuda.device(device):
                self._launch(prepared, pointers, stream)
        return out, lse

    def _launch(self, prepared: _Prepared, pointers: dict[str, int], stream: int) -> None:
        for layout, function, grid, threads, smem_bytes, rest in prepared.launches:
            block = layout.block
            layout.packer.pack_into(block.struct, 0, *[pointers[name] for name in layout.pointers], *rest)
            self._start(function, grid, threads, smem_bytes, stream, block.address)

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
        scale = self._default_scale if softmax_scale is None else softmax_scale
        values: dict[str, float] = {
            **problem.sizes,
            "softmax_scale_log2": max(abs(scale), SMALLEST_SCALE) * math.log2(math.e),
            "scale_is_negative": int(scale < 0),
        }
        steps = (("q", problem.q), ("k", problem.k), ("v", problem.v), ("out", strides(sample, layout)))
        for name, (batch, seqlen, head) in steps:
            values |= {
                f"{name}.stride_batch": batch,
                f"{name}.stride_seqlen": seqlen,
                f"{name}.stride_head": head,
            }
        launches = []
        for report in self.explain(problem):
            if report.grid == 0:
                continue
            _, params, function = self._kernels[report.kernel]
            if q.is_cuda:
                function.prepare(q.device.index)
            rest = tuple(values[name] for name in params.values[len(params.pointers) :])
            launches.append((params, function, report.grid, report.threads, report.smem_bytes, rest))
        return _Prepared(
            problem,
            out_shape,
            (problem.batch, problem.num_heads_q, problem.seqlen_q),
            tuple(
                (space.name, tuple(evaluate_formula(size, problem.sizes) for size in space.shape))
                for space in self.manifest.workspaces
            ),
            tuple(launches),
        )

    def explain(self, problem: Problem) -> tuple[LaunchReport, ...]:
        """What a call of these sizes launches."""
        return explain_launch(self.manifest, problem)


def explain_launch(manifest: Manifest, problem: Problem) -> tuple[LaunchReport, ...]:
    """What a call of these sizes launches, from the manifest alone.

    Raises:
        ArgumentError: the grid would be larger than CUDA allows.
    """
    kernels = {kernel.name: kernel for kernel in manifest.kernels}
    sizes = problem.sizes
    workspace_bytes = {
        space.name: 4 * math.prod(evaluate_formula(size, sizes) for size in space.shape) for space in manifest.workspaces
    }
    reports = []
    for entry in manifest.launches:
        grid = evaluate_formula(entry.grid, sizes)
        if grid > LARGEST_GRID:
            raise ArgumentError("q", f"{grid} blocks of work", f"at most {LARGEST_GRID}", "split the batch")
        kernel = kernels[entry.kernel]
        reports.append(
            LaunchReport(kernel.name, grid, kernel.threads, kernel.smem_bytes, workspace_bytes)
        )
    return tuple(reports)
