"""What a signature launches, made ready for the driver: parameter structs but for their addresses, and grids.

Nothing here knows the addresses of a call, and nothing is launched.
"""

import ctypes
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import torch

from attngen.arch import ARCHS
from attngen.bind import Bound, Given, Region, TableSignature, bind, extent
from attngen.plan import BLOCK_MAP, COUNTER, PAGES_BY_ROW, TICKETS, KernelEntry, Manifest, why_by_row
from attngen.runtime.driver import TENSOR_MAP_BYTES, Function
from attngen.runtime.tensor_maps import MapGeometry, address_comes_first, encode, geometry

MOST_SIGNATURES = 4096
"""Signatures that a launcher remembers; a program with more starts over."""
WORD = 8

_FORMATS = {"pointer": "Q", "i64": "q", "i32": "i", "f32": "f", "tensor_map": "128s"}
_SIZES = {"pointer": 8, "i64": 8, "i32": 4, "f32": 4, "tensor_map": TENSOR_MAP_BYTES}
_ALIGNMENTS = {**_SIZES, "tensor_map": 64}
_REGIONS = ("kept", "scratch", "zeroed")

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class LaunchReport:
    """What a call would launch: for people, and for tests that count.

    Attributes:
        why: it is this kernel's and not another's of the call, where pages decide.
    """

    kernel: str
    grid: int
    threads: int
    smem_bytes: int
    workspace_bytes: dict[str, int]
    why: str = ""


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
    """A launch of one signature: what the driver is told besides parameters."""

    function: Function
    grid: int
    threads: int
    smem_bytes: int


@dataclass(frozen=True)
class PreparedStruct:
    """A parameter struct, all but its addresses, and the launches that read it one after another.

    Attributes:
        patches: (word of the struct, number of an address, bytes beyond it) for each pointer.
        encodings: (word, number, bytes beyond, map) of tensor maps that must be encoded anew for every address.
    """

    arguments: Arguments
    patches: tuple[tuple[int, int, int], ...]
    encodings: tuple[tuple[int, int, int, MapGeometry], ...]
    launches: tuple[PreparedLaunch, ...]

    def patch(self, addresses: tuple[int, ...]) -> int:
        """Put a call's addresses into this thread's struct; returns where the driver finds what points at it."""
        words, address = self.arguments.words_and_address
        for word, number, beyond in self.patches:
            words[word] = addresses[number] + beyond
        for word, number, beyond, map_ in self.encodings:
            start = ctypes.addressof(words) + word * WORD
            ctypes.memmove(start, encode(map_, addresses[number] + beyond), TENSOR_MAP_BYTES)
        return address

    def with_addresses(self, addresses: tuple[int, ...]) -> "PreparedStruct":
        """A struct of its own that holds these addresses; those that follow them count from 0 there."""
        self.patch((*addresses, 0))
        words, _ = self.arguments.words_and_address
        known = len(addresses)
        rest = tuple(
            (word, number - known, beyond) for word, number, beyond in self.patches if number >= known
        )
        return PreparedStruct(Arguments(bytes(words)), rest, (), self.launches)


@dataclass(frozen=True)
class Prepared:
    """Everything about a signature that does not change from call to call; it holds no tensor of the first one.

    Addresses are, in this order: the tensors that are passed, the values that are wanted, the memory of kept, of
    scratch and of zeroed values, and the counters.

    Attributes:
        kept: where the values that outlive a call lie in their memory.
        outputs: shape and type of each wanted value, in the call's layout; a shape of None is that of q, with its
            strides and type.
        zeroed: which of these are 0 before the first launch.
        sizes: what kept, scratch and zeroed values take, in bytes.
        counters: how many of them the kernels need.
        extents: bytes from where each tensor that is passed begins to where it ends, those for results last.
        rows: which of the tensors behind q, k and v have rows that start on 16 bytes, at any address of theirs.
        tables: what tables of this signature are known by.
    """

    kept: Region
    outputs: tuple[tuple[tuple[int, ...] | None, torch.dtype], ...]
    zeroed: tuple[int, ...]
    sizes: tuple[int, int, int]
    structs: tuple[PreparedStruct, ...]
    counters: int
    extents: tuple[int, ...]
    rows: tuple[int, ...]
    tables: TableSignature


def remember(prepared: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    """Keep what a signature's preparation gave; all that was kept is dropped where it would be too much."""
    if len(prepared) >= MOST_SIGNATURES:
        prepared.clear()
    prepared[key] = value


def prepare_signature(
    bound: Bound,
    function: Callable[[KernelEntry, int], Function],
    q: torch.Tensor,
    into: Mapping[str, torch.Tensor],
    layout: str,
) -> Prepared:
    """Have at hand what a signature launches.

    Args:
        bound: what that is.
        function: makes a kernel ready on a device.
        q: of the call, like those that follow.
        into: memory for the first of the wanted values; the others will be allocated.
        layout: "bshd" or "bhsd".
    """
    numbers = bound.numbers(into, layout)
    places = _places(bound)
    launched = bound.kernels()
    structs = []
    for _, readers in groupby(launched, lambda each: (each[0].params, each[0].tensor_maps)):
        of_struct = tuple(readers)
        launches = tuple(
            PreparedLaunch(function(kernel, q.get_device()), grid, kernel.threads, kernel.smem_bytes)
            for kernel, grid in of_struct
        )
        structs.append(_struct(bound, of_struct[0][0], launches, numbers, places))
    return Prepared(
        bound.kept,
        tuple(_output(bound, name, q, layout) for name in bound.wanted),
        tuple(number for number, name in enumerate(bound.wanted) if bound.made[name].value.zeroed),
        (bound.kept.size_bytes, bound.scratch.size_bytes, bound.zeroed.size_bytes),
        tuple(structs),
        max((_counters(kernel, grid) for kernel, grid in launched), default=0),
        tuple(map(extent, (*bound.given.tensors.values(), *into.values()))),
        tuple(
            i for i, name in enumerate(tuple(bound.given.tensors)[3:]) if bound.manifest.value_of[name].axes
        ),
        TableSignature.of(bound.launches[-1].kernel, bound.given, bound.manifest),
    )


def _counters(kernel: KernelEntry, grid: int) -> int:
    """How many counters a launch needs: one to draw tiles from, or one for each tile."""
    carried = {param.value for param in kernel.params}
    return grid if TICKETS in carried else int(COUNTER in carried)


def _places(bound: Bound) -> dict[str, tuple[int, int]]:
    """Where each pointer of a call leads: the number of an address, and bytes beyond it."""
    wholes = (*bound.given.tensors, *bound.wanted, *_REGIONS)
    number_of = {name: number for number, name in enumerate(wholes)}
    places = {f"{name}.ptr": (number, 0) for name, number in number_of.items() if name not in _REGIONS}
    places |= dict.fromkeys((COUNTER, TICKETS), (len(wholes), 0))
    for region, values in zip(_REGIONS, (bound.kept, bound.scratch, bound.zeroed), strict=True):
        places |= {f"{name}.ptr": (number_of[region], beyond) for name, beyond in values.offsets.items()}
    return places


def _output(
    bound: Bound, name: str, q: torch.Tensor, layout: str
) -> tuple[tuple[int, ...] | None, torch.dtype]:
    """The shape of a wanted value, in the call's layout where it is an output, and its type."""
    made = bound.made[name]
    shape = made.stored
    if made.value.source == "output" and len(made.value.axes) == 4 and layout == "bhsd":
        shape = (shape[0], shape[2], shape[1], shape[3])
    dense = torch.empty(shape, dtype=made.dtype, device="meta").stride()
    is_like_q = (q.shape, q.stride(), q.dtype) == (shape, dense, made.dtype)
    return None if is_like_q else shape, made.dtype


def _struct(
    bound: Bound,
    kernel: KernelEntry,
    launches: tuple[PreparedLaunch, ...],
    numbers: Mapping[str, Any],
    places: Mapping[str, tuple[int, int]],
) -> PreparedStruct:
    """Pack what does not change, and tell where the addresses go.

    Args:
        bound: what the call launches.
        kernel: the first that reads the struct.
        launches: all that do.
        numbers: what fields carry but addresses and maps.
        places: of the addresses, see `_places`.
    """
    words = {name: offset // WORD for name, offset in offsets(kernel).items()}
    maps = {  # of what the call has
        entry.value: geometry(entry, bound.sizes, [_stride(numbers, entry.value, axis) for axis in _ROWS])
        for entry in kernel.tensor_maps
        if f"{entry.value}.ptr" in places
    }
    nothing = {
        param.value: bytes(TENSOR_MAP_BYTES) if param.ctype == "tensor_map" else 0 for param in kernel.params
    }
    fields: dict[str, Any] = {**nothing, **numbers}
    fields |= {f"{name}.map": encode(map_, 0) for name, map_ in maps.items()}
    patches = [(word, *places[name]) for name, word in words.items() if name in places]
    mapped = [(words[f"{name}.map"], *places[f"{name}.ptr"], map_) for name, map_ in maps.items()]
    if mapped and address_comes_first():
        patches += [(word, number, beyond) for word, number, beyond, _ in mapped]
        mapped = []
    return PreparedStruct(Arguments(pack(kernel, fields)), tuple(patches), tuple(mapped), launches)


_ROWS = ("batch", "seqlen", "head")
"""Axes whose strides a tensor map holds; ragged sequences are one batch, and each page of a cache is one."""


def _stride(numbers: Mapping[str, Any], value: str, axis: str) -> int:
    pages = numbers.get(f"{value}.stride_page", 0) if axis == "batch" else 0
    return int(numbers.get(f"{value}.stride_{axis}", pages))


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


def sms_of(arch: str, device: torch.device) -> int:
    """Multiprocessors of a device; of the target's largest part where it is no GPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return ARCHS[arch].num_sms


def explain_launch(manifest: Manifest, given: Given, num_sms: int | None = None) -> tuple[LaunchReport, ...]:
    """What a call launches, from the manifest alone.

    Args:
        manifest: of the call.
        given: its arguments.
        num_sms: of the GPU; the manifest's arch tells where None.

    Raises:
        ArgumentError: the grid would be larger than CUDA allows, or the tiles more than a kernel can count.
    """
    known = [*(value.name for value in manifest.declared), *given.intake.beside, BLOCK_MAP]
    bound = bind(manifest, given, ("out",), num_sms or ARCHS[manifest.arch].num_sms, known=known)
    why = ""
    if any(launch.when and launch.when.size == PAGES_BY_ROW for launch in manifest.launches):
        by_row = why_by_row(bound.sizes["page_size"], skips_keys=bool(bound.sizes[PAGES_BY_ROW]))
        why = f"rows are looked up: {by_row}" if by_row else "the copy engine brings pieces of pages"
    workspace_bytes = {name: made.size_bytes for name, made in bound.made.items() if name != "out"}
    return tuple(
        LaunchReport(kernel.name, grid, kernel.threads, kernel.smem_bytes, workspace_bytes, why)
        for kernel, grid in bound.kernels()
    )
