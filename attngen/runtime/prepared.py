"""What a signature launches, worked out once: grids, parameter structs but for their addresses, memory between kernels.

Nothing here knows the values of a call, and nothing is launched.
"""

import ctypes
import math
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any, TypeVar

import torch

from attngen.arch import ARCHS
from attngen.dtypes import dtype, torch_dtype
from attngen.emit.manifest import KernelEntry, LaunchEntry, Manifest, WorkspaceEntry
from attngen.errors import ArgumentError
from attngen.plan import evaluate_formula
from attngen.runtime.arguments import Problem, strides
from attngen.runtime.declared import DeclaredValues
from attngen.runtime.driver import TENSOR_MAP_BYTES, Function
from attngen.runtime.tables import TableSignature
from attngen.runtime.tensor_maps import MapGeometry, address_comes_first, encode, geometry
from attngen.scaling import scale_values

MOST_SIGNATURES = 4096
"""Signatures that a launcher remembers; a program with more starts over."""
LARGEST_GRID = 2**31 - 1
LARGEST_TILE_NUMBER = 2**31 - 1
"""Kernels count tiles in an i32."""
WORKSPACE_ALIGNMENT = 256
"""Bytes; workspaces lie side by side in one piece of memory."""
WORD = 8
COUNTER = "counter.ptr"

_FORMATS = {"pointer": "Q", "i64": "q", "i32": "i", "f32": "f", "tensor_map": "128s"}
_SIZES = {"pointer": 8, "i64": 8, "i32": 4, "f32": 4, "tensor_map": TENSOR_MAP_BYTES}
_ALIGNMENTS = {**_SIZES, "tensor_map": 64}
_FIRST_ADDRESSES = ("q.ptr", "k.ptr", "v.ptr", "out.ptr", "lse.ptr", "tables", "scratch")

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class LaunchReport:
    """What a call would launch: for people, and for tests that count."""

    kernel: str
    grid: int
    threads: int
    smem_bytes: int
    workspace_bytes: dict[str, int]


class Arguments(threading.local):
    """One thread's parameter struct, and the array that points at it.

    The driver reads the struct during the launch, with the interpreter's lock released; hence one a thread.
    """

    def __init__(self, template: bytes) -> None:
        alignment = _ALIGNMENTS["tensor_map"]
        self._memory = ctypes.create_string_buffer(len(template) + alignment)
        start = -(-ctypes.addressof(self._memory) // alignment) * alignment
        ctypes.memmove(start, template, len(template))
        self._array = (ctypes.c_void_p * 1)(start)
        words = (ctypes.c_uint64 * (len(template) // WORD)).from_address(start)
        self.words_and_address = (
            words,
            ctypes.addressof(self._array),
        )  # one look into the thread's own a launch


@dataclass(frozen=True)
class PreparedLaunch:
    """A launch of one signature: what the driver is told besides parameters.

    Attributes:
        fills_tables: it is the table kernel's, which a call with tables leaves out.
    """

    function: Function
    grid: int
    threads: int
    smem_bytes: int
    fills_tables: bool


@dataclass(frozen=True)
class PreparedStruct:
    """A parameter struct, all but its addresses, and the launches that read it one after another.

    Attributes:
        patches: (word of the struct, number of the address that goes there).
        workspaces: (word, number of an address, bytes beyond it that the workspace starts).
        encodings: (word, number, map) of tensor maps that must be encoded anew for every address.
    """

    arguments: Arguments
    patches: tuple[tuple[int, int], ...]
    workspaces: tuple[tuple[int, int, int], ...]
    encodings: tuple[tuple[int, int, MapGeometry], ...]
    launches: tuple[PreparedLaunch, ...]

    def only(self, fills_tables: bool) -> "PreparedStruct":
        """With the launches alone that fill tables, or with the others."""
        kept = tuple(ready for ready in self.launches if ready.fills_tables == fills_tables)
        return replace(self, launches=kept)


@dataclass(frozen=True)
class Prepared:
    """Everything about a signature that does not change from call to call.

    Addresses are, in this order: q, k, v, out, lse, the memory of tables, that of the other workspaces, the declared
    tensors, and the tile counter.

    Attributes:
        out_shape: of a fresh output; None where it has the shape, the strides and the type of q.
        tables_size: what tables take, in elements of q.
        scratch_size: what the other workspaces take, in elements of q.
        draws_tiles: whether the kernels need a tile counter.
        tables: what tables of this signature are known by.
    """

    out_shape: tuple[int, ...] | None
    lse_shape: tuple[int, ...]
    tables_size: int
    scratch_size: int
    structs: tuple[PreparedStruct, ...]
    draws_tiles: bool
    tables: TableSignature

    @cached_property
    def without_tables(self) -> tuple[PreparedStruct, ...]:
        """What is launched by a call that brings its tables."""
        return tuple(each.only(fills_tables=False) for each in self.structs)

    @cached_property
    def of_tables(self) -> tuple[PreparedStruct, ...]:
        """What fills tables and nothing else."""
        return tuple(each.only(fills_tables=True) for each in self.structs)


def remember(prepared: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    """Keep what a signature's preparation gave; all that was kept is dropped where it would be too much."""
    if len(prepared) >= MOST_SIGNATURES:
        prepared.clear()
    prepared[key] = value


def prepare_signature(
    manifest: Manifest,
    function: Callable[[KernelEntry, int], Function],
    problem: Problem,
    q: torch.Tensor,
    softmax_scale: float | None,
    out: torch.Tensor | None,
    layout: str,
    declared: DeclaredValues,
) -> Prepared:
    """Work out what a signature launches; its arguments have been checked.

    Args:
        manifest: of the kernel that takes the call.
        function: makes a kernel of it ready on a device.
        problem: sizes and strides of the call.
        q: of the call, like those that follow.
        softmax_scale: 1/sqrt(head_dim_qk) where None.
        out: None where it will be allocated.
        layout: "bshd" or "bhsd".
        declared: the scalars and tensors that the spec declares.
    """
    out_shape, output = (*q.shape[:3], manifest.head_dim_v), torch_dtype(dtype(manifest.output))
    sample = torch.empty(out_shape, dtype=output, device="meta") if out is None else out
    out_is_like_q = (q.shape, q.stride(), q.dtype) == (out_shape, sample.stride(), output)
    scale = 1 / math.sqrt(manifest.head_dim_qk) if softmax_scale is None else softmax_scale
    sizes = {**problem.sizes, "num_sms": sms_of(manifest.arch, q.device)}
    steps = {"q": problem.q, "k": problem.k, "v": problem.v, "out": strides(sample, layout)}
    values: dict[str, Any] = {
        **sizes,
        **scale_values(scale, manifest.score_factor),
        **declared.parameters,
    }
    for name, (batch, seqlen, head) in steps.items():
        values |= {
            f"{name}.stride_batch": batch,
            f"{name}.stride_seqlen": seqlen,
            f"{name}.stride_head": head,
        }
    maps = {
        entry.tensor: geometry(entry, sizes, steps[entry.tensor])
        for kernel in manifest.kernels
        for entry in kernel.tensor_maps
    }
    values |= {f"map.{tensor}": encode(map_, 0) for tensor, map_ in maps.items()}
    numbers = {name: number for number, name in enumerate(_addresses(manifest))}
    spaces, taken = _workspaces(manifest, sizes)
    values |= dict.fromkeys((*numbers, *spaces), 0)
    kernels = {kernel.name: kernel for kernel in manifest.kernels}
    reports = [report for report in explain_launch(manifest, problem, sizes["num_sms"]) if report.grid]
    structs = []
    for _, readers in groupby(reports, lambda report: kernels[report.kernel].params):
        of_struct = tuple(readers)
        launches = tuple(
            PreparedLaunch(
                function(kernels[report.kernel], q.get_device()),
                report.grid,
                report.threads,
                report.smem_bytes,
                report.kernel == manifest.table_kernel,
            )
            for report in of_struct
        )
        structs.append(_struct(kernels[of_struct[0].kernel], launches, values, maps, numbers, spaces))
    return Prepared(
        None if out_is_like_q else out_shape,
        (problem.batch, problem.num_heads_q, problem.seqlen_q),
        taken["tables"] // q.element_size(),
        taken["scratch"] // q.element_size(),
        tuple(structs),
        bool(reports) and any(map(_draws_tiles, manifest.kernels)),
        TableSignature.of(manifest, problem.sizes, declared),
    )


def _addresses(manifest: Manifest) -> tuple[str, ...]:
    """What a call's addresses are of, in order."""
    tensors = (f"tensor.{entry.name}.ptr" for entry in (*manifest.tensors, *manifest.descales))
    return (*_FIRST_ADDRESSES, *tensors, COUNTER)


def _workspaces(
    manifest: Manifest, sizes: Mapping[str, int]
) -> tuple[dict[str, tuple[str, int]], dict[str, int]]:
    """Which memory each workspace lies in and how many bytes from its start, and how many bytes each memory takes."""
    spaces, ends = {}, {"tables": 0, "scratch": 0}
    for space in manifest.workspaces:
        memory = "tables" if space.name in manifest.tables else "scratch"
        spaces[f"workspace.{space.name}"] = memory, ends[memory]
        taken = _bytes(space, sizes)
        ends[memory] += taken + -taken % WORKSPACE_ALIGNMENT
    return spaces, ends


def _bytes(space: WorkspaceEntry, sizes: Mapping[str, int]) -> int:
    return 4 * math.prod(evaluate_formula(size, sizes) for size in space.shape)


def _struct(
    kernel: KernelEntry,
    launches: tuple[PreparedLaunch, ...],
    values: Mapping[str, Any],
    maps: Mapping[str, MapGeometry],
    numbers: Mapping[str, int],
    spaces: Mapping[str, tuple[str, int]],
) -> PreparedStruct:
    """Pack what does not change, and tell where the addresses go.

    Args:
        kernel: the first that reads the struct.
        launches: all that do.
        values: of the fields; an address is 0.
        maps: by tensor.
        numbers: of the addresses, by name.
        spaces: of the fields that are workspaces: in which memory, and how many bytes from its start.
    """
    words = {name: offset // WORD for name, offset in offsets(kernel).items()}
    patches = [(words[name], number) for name, number in numbers.items() if name in words]
    mapped = [
        (words[f"map.{entry.tensor}"], numbers[f"{entry.tensor}.ptr"], maps[entry.tensor])
        for entry in kernel.tensor_maps
    ]
    if mapped and address_comes_first():
        patches += [(word, number) for word, number, _ in mapped]
        mapped = []
    return PreparedStruct(
        Arguments(pack(kernel, values)),
        tuple(patches),
        tuple(
            (words[name], numbers[memory], beyond)
            for name, (memory, beyond) in spaces.items()
            if name in words
        ),
        tuple(mapped),
        launches,
    )


def offsets(kernel: KernelEntry) -> dict[str, int]:
    """Where each field of the kernel's parameter struct starts, in bytes, by its value's name."""
    starts, end = {}, 0
    for param in kernel.params:
        starts[param.value] = end + -end % _ALIGNMENTS[param.ctype]
        end = starts[param.value] + _SIZES[param.ctype]
    return starts


def pack(kernel: KernelEntry, values: Mapping[str, Any]) -> bytes:
    """The kernel's parameter struct, up to a multiple of its widest alignment."""
    starts = offsets(kernel)
    widest = max(_ALIGNMENTS[param.ctype] for param in kernel.params)
    end = max(starts[param.value] + _SIZES[param.ctype] for param in kernel.params)
    data = bytearray(end + -end % widest)
    for param in kernel.params:
        struct.pack_into(f"={_FORMATS[param.ctype]}", data, starts[param.value], values[param.value])
    return bytes(data)


def _draws_tiles(kernel: KernelEntry) -> bool:
    return any(param.value == COUNTER for param in kernel.params)


def sms_of(arch: str, device: torch.device) -> int:
    """Multiprocessors of a device; of the target's largest part where it is no GPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return ARCHS[arch].num_sms


def grid_of(entry: LaunchEntry, sizes: Mapping[str, int], persistent: bool) -> int:
    """How many blocks of threads a launch has.

    Args:
        entry: the launch.
        sizes: of the call.
        persistent: whether a block may work on many tiles, and look once more than there is work for it: their numbers
            run on by as many as there are blocks.

    Raises:
        ArgumentError: more than CUDA allows, or more tiles than a kernel can count.
    """
    grid, tiles = evaluate_formula(entry.grid, sizes), evaluate_formula(entry.tiles, sizes)
    if grid > LARGEST_GRID:
        raise ArgumentError("q", f"{grid} blocks of work", f"at most {LARGEST_GRID}", "split the batch")
    most = LARGEST_TILE_NUMBER + 1 - (grid if persistent else 0)
    if tiles > most:
        raise ArgumentError("q", f"{tiles} tiles of work", f"at most {most}", "split the batch")
    return grid


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
    workspace_bytes = {space.name: _bytes(space, sizes) for space in manifest.workspaces}
    reports = []
    for entry in manifest.launches:
        kernel = kernels[entry.kernel]
        grid = grid_of(entry, sizes, persistent=_draws_tiles(kernel))
        reports.append(LaunchReport(kernel.name, grid, kernel.threads, kernel.smem_bytes, workspace_bytes))
    return tuple(reports)
