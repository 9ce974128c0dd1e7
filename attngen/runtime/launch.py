"""Launching a kernel from its manifest on torch tensors: the path of every call, so it does little twice.

What depends only on shapes, strides, types and device is worked out once per signature; each call patches the
pointers, which are checked every time. Nothing is copied, padded or synchronised.
"""

import ctypes
import math
import struct
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from attngen.arch import ARCHS
from attngen.dtypes import dtype, torch_dtype
from attngen.emit.manifest import KernelEntry, Manifest, serving
from attngen.errors import ArgumentError
from attngen.plan import evaluate_formula
from attngen.runtime.arguments import ROW_ALIGNMENT, Problem, check_arguments, strides
from attngen.runtime.counters import COUNTERS
from attngen.runtime.declared import DeclaredValues, check_declared
from attngen.runtime.driver import TENSOR_MAP_BYTES, Function, Module, check_device, launch, preparing
from attngen.runtime.tables import TileTables
from attngen.runtime.tensor_maps import MapGeometry, address_comes_first, encode, geometry

SMALLEST_SCALE = 2.0**-126
"""FLT_MIN stands for a scale of 0, so that a score of -inf stays -inf."""
LARGEST_GRID = 2**31 - 1
LARGEST_TILE_NUMBER = 2**31 - 1
"""Kernels count tiles in an i32."""
MOST_SIGNATURES = 4096
"""Signatures remembered per kernel; a program with more starts over."""
_FORMATS = {"pointer": "Q", "i64": "q", "i32": "i", "f32": "f", "tensor_map": "128s"}
_SIZES = {"pointer": 8, "i64": 8, "i32": 4, "f32": 4, "tensor_map": TENSOR_MAP_BYTES}
_ALIGNMENTS = {**_SIZES, "tensor_map": 64}
_WORD = 8
COUNTER = "counter.ptr"


_NOTHING: Mapping[str, Any] = {}


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
        alignment = _ALIGNMENTS["tensor_map"]
        self._memory = ctypes.create_string_buffer(len(template) + alignment)
        start = -(-ctypes.addressof(self._memory) // alignment) * alignment
        ctypes.memmove(start, template, len(template))
        self._array = (ctypes.c_void_p * 1)(start)
        words = (ctypes.c_uint64 * (len(template) // _WORD)).from_address(start)
        self.words_and_address = (
            words,
            ctypes.addressof(self._array),
        )  # one look into the thread's own a launch


@dataclass(frozen=True)
class _PreparedLaunch:
    """A launch of one signature: everything but the addresses.

    Attributes:
        patches: (word of the struct, number of the address that goes there).
        encodings: the same for tensor maps that must be encoded anew for every address.
        fills_tables: it is the table kernel's, which a call with tables leaves out.
    """

    function: Function
    grid: int
    threads: int
    smem_bytes: int
    arguments: _Arguments
    patches: tuple[tuple[int, int], ...]
    encodings: tuple[tuple[int, int, MapGeometry], ...]
    fills_tables: bool


@dataclass(frozen=True)
class _Prepared:
    """Everything about a signature that does not change from call to call.

    Attributes:
        out_shape: of a fresh output; None where it has the shape, the strides and the type of q.
        draws_tiles: whether the kernels need a tile counter, whose address is then the last one.
        manifest: of the kernel that takes the call; `sizes`, of the call.
    """

    out_shape: tuple[int, ...] | None
    lse_shape: tuple[int, ...]
    workspaces: dict[str, tuple[int, ...]]
    launches: tuple[_PreparedLaunch, ...]
    draws_tiles: bool
    manifest: Manifest
    sizes: Mapping[str, int]

    @cached_property
    def without_tables(self) -> tuple[_PreparedLaunch, ...]:
        """The launches of a call that brings its tables."""
        return tuple(ready for ready in self.launches if not ready.fills_tables)


def _offsets(kernel: KernelEntry) -> dict[str, int]:
    """Where each field of the kernel's parameter struct starts, in bytes, by its value's name."""
    offsets, end = {}, 0
    for param in kernel.params:
        offsets[param.value] = end + -end % _ALIGNMENTS[param.ctype]
        end = offsets[param.value] + _SIZES[param.ctype]
    return offsets


def _pack(kernel: KernelEntry, values: Mapping[str, Any]) -> bytes:
    """The kernel's parameter struct, up to a multiple of its widest alignment."""
    offsets = _offsets(kernel)
    widest = max(_ALIGNMENTS[param.ctype] for param in kernel.params)
    end = max(offsets[param.value] + _SIZES[param.ctype] for param in kernel.params)
    data = bytearray(end + -end % widest)
    for param in kernel.params:
        struct.pack_into(f"={_FORMATS[param.ctype]}", data, offsets[param.value], values[param.value])
    return bytes(data)


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
        self._start = start
        self._load = lambda: load(cubin)
        self._functions: dict[str, Function] = {}
        self._prepared: dict[tuple[Any, ...], _Prepared] = {}
        self._output = torch_dtype(dtype(manifest.output))
        self._draws_tiles = any(map(_draws_tiles, manifest.kernels))
        self._tensors = tuple(tensor.name for tensor in manifest.tensors)
        self._addresses = (
            *("q.ptr", "k.ptr", "v.ptr", "out.ptr", "lse.ptr"),
            *(f"workspace.{space.name}" for space in manifest.workspaces),
            *(f"tensor.{tensor.name}.ptr" for tensor in manifest.tensors),
            *((COUNTER,) if self._draws_tiles else ()),
        )

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
        try:
            device = q.get_device()  # -1 off the GPU; costs half of what q.device does in a key
            if out is not None or q.requires_grad or k.requires_grad or v.requires_grad:
                check_arguments(self.manifest, q, k, v, softmax_scale, out, layout)
            key: tuple[Any, ...] = (
                q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
                device, k.get_device(), v.get_device(), layout, None if out is None else out.stride(),
                None if softmax_scale is None else (softmax_scale, softmax_scale.__class__),  # True equals 1.0
            )  # fmt: skip
            if declared:
                key += tuple(
                    (name, x.__class__, (x.shape, x.stride(), x.dtype, x.get_device(), x.requires_grad)
                    if isinstance(x, torch.Tensor) else x)
                    for name, x in declared.items()
                )  # fmt: skip
            prepared = self._prepared.get(key)
        except (AttributeError, TypeError, RuntimeError):  # None, no tensor, one without strides, a list
            problem = check_arguments(self.manifest, q, k, v, softmax_scale, out, layout)
            check_declared(self.manifest, declared, problem.sizes, q.device)
            raise
        if prepared is None:
            prepared = self._prepare(q, k, v, softmax_scale, out, layout, declared)
            if len(self._prepared) >= MOST_SIGNATURES:
                self._prepared.clear()
            self._prepared[key] = prepared
        q_pointer, k_pointer, v_pointer = q.data_ptr(), k.data_ptr(), v.data_ptr()
        if (q_pointer | k_pointer | v_pointer) % ROW_ALIGNMENT:
            check_arguments(self.manifest, q, k, v, softmax_scale, out, layout)
        if out is None:
            shape = prepared.out_shape  # None where it is q's: not to spell it takes a third less
            out = torch.empty_like(q) if shape is None else q.new_empty(shape, dtype=self._output)
        lse = q.new_empty(prepared.lse_shape, dtype=torch.float32) if return_lse else None
        lse_pointer = 0 if lse is None else lse.data_ptr()
        addresses: tuple[int, ...] = (q_pointer, k_pointer, v_pointer, out.data_ptr(), lse_pointer)
        if prepared.workspaces:
            if tables is not None:
                TileTables.check(tables, prepared.manifest, prepared.sizes, declared)
            known = _NOTHING if tables is None else tables.workspaces
            spaces = [
                known[name] if name in known else q.new_empty(shape, dtype=torch.float32)
                for name, shape in prepared.workspaces.items()
            ]
            addresses += tuple(space.data_ptr() for space in spaces)
        elif tables is not None:
            raise ArgumentError("tables", "tables", "None: this kernel reads none")
        if declared:
            addresses += tuple(declared[name].data_ptr() for name in self._tensors)
        launches = prepared.launches if tables is None else prepared.without_tables
        stream = torch._C._cuda_getCurrentRawStream(device)
        if torch._C._cuda_getDevice() == device:
            self._launch(prepared, launches, addresses, device, stream)
        else:
            with torch.cuda.device(device):
                self._launch(prepared, launches, addresses, device, stream)
        return out, lse

    def tables(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str, declared: Mapping[str, Any]
    ) -> TileTables:
        """Fill the tables of a call, and nothing else; see `attngen.Kernel.tables`."""
        problem = check_arguments(self.manifest, q, k, v, None, None, layout)
        if (launcher := serving(self, self._shorter, problem.seqlen_k)) is not self:
            return launcher.tables(q, k, v, layout, declared)
        prepared = self._prepare(q, k, v, None, None, layout, declared)
        spaces = {
            name: q.new_empty(shape, dtype=torch.float32) for name, shape in prepared.workspaces.items()
        }
        pointers = [space.data_ptr() for space in spaces.values()]
        addresses = (*(0,) * 5, *pointers, *(declared[name].data_ptr() for name in self._tensors))
        with torch.cuda.device(q.device):
            stream = torch._C._cuda_getCurrentRawStream(q.get_device())
            fills = tuple(ready for ready in prepared.launches if ready.fills_tables)
            self._launch(prepared, fills, addresses, q.get_device(), stream)
        filled = {name: space for name, space in spaces.items() if name in self.manifest.tables}
        return TileTables.of(self.manifest, problem.sizes, declared, filled)

    def _launch(
        self,
        prepared: _Prepared,
        launches: tuple[_PreparedLaunch, ...],
        addresses: tuple[int, ...],
        device: int,
        stream: int,
    ) -> None:
        if prepared.draws_tiles:
            addresses = (*addresses, COUNTERS.address(device, stream))
        for ready in launches:
            words, address = ready.arguments.words_and_address
            for word, number in ready.patches:
                words[word] = addresses[number]
            for word, number, map_ in ready.encodings:
                start = ctypes.addressof(words) + word * _WORD
                ctypes.memmove(start, encode(map_, addresses[number]), TENSOR_MAP_BYTES)
            self._start(ready.function, ready.grid, ready.threads, ready.smem_bytes, device, stream, address)

    def _prepare(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        softmax_scale: float | None,
        out: torch.Tensor | None,
        layout: str,
        declared: Mapping[str, Any],
    ) -> _Prepared:
        """Check a signature and work out its launches, of the kernel that takes it."""
        problem = check_arguments(self.manifest, q, k, v, softmax_scale, out, layout)
        if (launcher := serving(self, self._shorter, problem.seqlen_k)) is not self:
            return launcher._prepare(q, k, v, softmax_scale, out, layout, declared)
        values = check_declared(self.manifest, declared, problem.sizes, q.device)
        if q.is_cuda:
            check_device(self.manifest.arch, torch.cuda.get_device_capability(q.device))
        with preparing(q.device.index) if q.is_cuda else nullcontext():
            return self._prepare_launches(problem, q, softmax_scale, out, layout, values)

    def _prepare_launches(
        self,
        problem: Problem,
        q: torch.Tensor,
        softmax_scale: float | None,
        out: torch.Tensor | None,
        layout: str,
        declared: DeclaredValues,
    ) -> _Prepared:
        """Work out what a signature launches, and have at hand all that it needs."""
        out_shape = (*q.shape[:3], self.manifest.head_dim_v)
        sample = torch.empty(out_shape, device="meta") if out is None else out
        scale = 1 / math.sqrt(self.manifest.head_dim_qk) if softmax_scale is None else softmax_scale
        sizes = {**problem.sizes, "num_sms": _num_sms(self.manifest, q.device)}
        values: dict[str, Any] = {
            **sizes,
            "softmax_scale_log2": max(abs(scale), SMALLEST_SCALE) * math.log2(math.e),
            "scale_is_negative": int(scale < 0),
            "softmax_scale": scale,
            "score_factor_log2": self.manifest.score_factor * math.log2(math.e),
            **declared.parameters,
            **dict.fromkeys(self._addresses, 0),
        }
        steps = {"q": problem.q, "k": problem.k, "v": problem.v, "out": strides(sample, layout)}
        for name, (batch, seqlen, head) in steps.items():
            values |= {
                f"{name}.stride_batch": batch,
                f"{name}.stride_seqlen": seqlen,
                f"{name}.stride_head": head,
            }
        maps = {
            entry.tensor: geometry(entry, sizes, steps[entry.tensor])
            for kernel in self.manifest.kernels
            for entry in kernel.tensor_maps
        }
        values |= {f"map.{tensor}": encode(map_, 0) for tensor, map_ in maps.items()}
        reports = explain_launch(self.manifest, problem, sizes["num_sms"])
        launches = tuple(
            self._prepare_launch(report, values, maps, q.device) for report in reports if report.grid
        )
        draws_tiles = self._draws_tiles and bool(launches)
        if draws_tiles:
            COUNTERS.prepare(q.get_device())
        return _Prepared(
            None
            if (q.shape, q.stride(), q.dtype) == (out_shape, sample.stride(), self._output)
            else out_shape,
            (problem.batch, problem.num_heads_q, problem.seqlen_q),
            {
                space.name: tuple(evaluate_formula(size, sizes) for size in space.shape)
                for space in self.manifest.workspaces
            },
            launches,
            draws_tiles,
            self.manifest,
            problem.sizes,
        )

    def _prepare_launch(
        self,
        report: LaunchReport,
        values: dict[str, Any],
        maps: dict[str, MapGeometry],
        device: torch.device,
    ) -> _PreparedLaunch:
        """Pack what does not change, and tell where the addresses go."""
        kernel = next(kernel for kernel in self.manifest.kernels if kernel.name == report.kernel)
        if not self._functions:
            module = self._load()  # type: ignore[no-untyped-call]
            self._functions = {k.name: module.function(k.name, k.smem_bytes) for k in self.manifest.kernels}
        function = self._functions[kernel.name]
        function.prepare(device.index)
        words = {name: offset // _WORD for name, offset in _offsets(kernel).items()}
        patches = {words[name]: name for name in self._addresses if name in words}
        tensors = {words[f"map.{entry.tensor}"]: entry.tensor for entry in kernel.tensor_maps}
        encodings: dict[int, str] = {}
        (patches if not tensors or address_comes_first() else encodings).update(
            {word: f"{tensor}.ptr" for word, tensor in tensors.items()}
        )
        return _PreparedLaunch(
            function,
            report.grid,
            report.threads,
            report.smem_bytes,
            _Arguments(_pack(kernel, values)),
            tuple((word, self._addresses.index(name)) for word, name in patches.items()),
            tuple(
                (word, self._addresses.index(name), maps[tensors[word]]) for word, name in encodings.items()
            ),
            kernel.name == self.manifest.table_kernel,
        )


def _draws_tiles(kernel: KernelEntry) -> bool:
    return any(param.value == COUNTER for param in kernel.params)


def _num_sms(manifest: Manifest, device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return ARCHS[manifest.arch].num_sms


def explain_launch(
    manifest: Manifest, problem: Problem, num_sms: int | None = None
) -> tuple[LaunchReport, ...]:
    """What a call of these sizes launches, from the manifest alone.

    Args:
        manifest: of the kernel.
        problem: the sizes of the call.
        num_sms: of the GPU; the manifest's arch tells where None.

    Raises:
        ArgumentError: the grid would be larger than CUDA allows, or the tiles more than a kernel can count.
    """
    kernels = {kernel.name: kernel for kernel in manifest.kernels}
    sizes = {**problem.sizes, "num_sms": num_sms or ARCHS[manifest.arch].num_sms}
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
        tiles = evaluate_formula(entry.tiles, sizes)
        # Each block draws once more than there is work for it, so numbers run on by as many as there are blocks.
        most = LARGEST_TILE_NUMBER + 1 - (grid if _draws_tiles(kernel) else 0)
        if tiles > most:
            raise ArgumentError("q", f"{tiles} tiles of work", f"at most {most}", "split the batch")
        reports.append(LaunchReport(kernel.name, grid, kernel.threads, kernel.smem_bytes, workspace_bytes))
    return tuple(reports)
