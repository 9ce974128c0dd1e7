"""The binder: from what a call is given to what it launches and allocates. GPU and simulator run what it says.

It works once for each signature, which is all that is not an address: nothing here knows where a tensor is, and
nothing is launched or allocated.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from attngen.bind.arguments import Given, strides
from attngen.dtypes import element_dtype
from attngen.errors import ArgumentError
from attngen.plan import (
    PAGES_BY_ROW,
    SMALLEST_PIECE,
    KernelEntry,
    Launch,
    Manifest,
    Value,
    division_by,
    evaluate_formula,
)
from attngen.scaling import scale_values

LARGEST_GRID = 2**31 - 1
LARGEST_TILE_NUMBER = 2**31 - 1
"""Kernels count tiles in an i32."""
ALIGNMENT = 256
"""Bytes; values that share a piece of memory start on a multiple of it."""


@dataclass(frozen=True)
class Allocation:
    """A value that a call makes.

    Attributes:
        shape: in the order of its axes.
        stored: the shape of its memory; one element where that stands for all.
    """

    value: Value
    shape: tuple[int, ...]

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape of its memory: one element where that stands for all."""
        return (1,) * len(self.shape) if self.value.shared else self.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""
        return element_dtype(self.value.dtype)

    @property
    def size_bytes(self) -> int:
        """Bytes of its memory."""
        return math.prod(self.stored) * self.dtype.itemsize

    @property
    def strides(self) -> tuple[int, ...]:
        """In elements, as those of a tensor that is passed."""
        if not math.prod(self.shape):
            return (0,) * len(self.shape)
        steps = [math.prod(self.stored[axis + 1 :]) for axis in range(len(self.stored))]
        return tuple(0 if size == 1 else step for size, step in zip(self.stored, steps, strict=True))


@dataclass(frozen=True)
class Region:
    """Values that lie in one piece of memory, each so many bytes from its start."""

    offsets: Mapping[str, int]
    size_bytes: int

    @classmethod
    def of(cls, allocations: Collection[Allocation]) -> "Region":
        """Lay values out one after another."""
        offsets, end = {}, 0
        for each in allocations:
            offsets[each.value.name] = end
            end += each.size_bytes + -each.size_bytes % ALIGNMENT
        return cls(offsets, end)


@dataclass(frozen=True)
class Bound:
    """What a call of one signature launches and allocates.

    Attributes:
        given: what it passes.
        sizes: `given.sizes`, and num_sms.
        wanted: names of the values that it returns.
        launches: in order.
        made: what they write, the wanted values among it, and the kept values that they read, by name.
        softmax_scale: what products are multiplied by.
        scalars: what parameters carry besides sizes, addresses, strides and tensor maps.
        accumulates: the wanted values are added to what their memory holds.
    """

    manifest: Manifest
    given: Given
    sizes: Mapping[str, int]
    wanted: tuple[str, ...]
    launches: tuple[Launch, ...]
    made: Mapping[str, Allocation]
    softmax_scale: float
    scalars: Mapping[str, Any]
    accumulates: bool = False

    @cached_property
    def kept(self) -> Region:
        """Values whose memory outlives the call."""
        return Region.of([each for each in self._inner if each.value.source == "kept"])

    @cached_property
    def scratch(self) -> Region:
        """Values of this call alone."""
        rest = [each for each in self._inner if each.value.source != "kept"]
        return Region.of([each for each in rest if not each.value.zeroed])

    @cached_property
    def zeroed(self) -> Region:
        """Values of this call alone that are 0 at first."""
        return Region.of([each for each in self._inner if each.value.zeroed])

    @property
    def _inner(self) -> list[Allocation]:
        return [each for name, each in self.made.items() if name not in self.wanted]

    def grid(self, launch: Launch) -> int:
        """Blocks of threads of a launch.

        Raises:
            ArgumentError: more than CUDA allows, or more tiles than a kernel can count.
        """
        grid, tiles = (evaluate_formula(formula, self.sizes) for formula in (launch.grid, launch.tiles))
        if grid > LARGEST_GRID:
            raise ArgumentError("q", f"{grid} blocks of work", f"at most {LARGEST_GRID}", "split the batch")
        repeats = self.manifest.kernel_of[launch.kernel].repeats
        most = LARGEST_TILE_NUMBER + 1 - (grid if repeats else 0)  # each block draws once more than there is
        if tiles > most:
            raise ArgumentError("q", f"{tiles} tiles of work", f"at most {most}", "split the batch")
        return grid

    def kernels(self) -> list[tuple[KernelEntry, int]]:
        """What is launched on how many blocks, in order; nothing on none."""
        entries = ((self.manifest.kernel_of[launch.kernel], self.grid(launch)) for launch in self.launches)
        return [(kernel, grid) for kernel, grid in entries if grid]

    def strides_of(self, name: str) -> tuple[int, ...]:
        """The strides of a value, in elements."""
        if name in self.made:
            return self.made[name].strides
        x = self.given.tensors[name]
        return strides(x) if self.manifest.value_of[name].axes else x.stride()

    def numbers(self, into: Mapping[str, torch.Tensor], layout: str) -> dict[str, Any]:
        """What parameters carry, by the names of their values, but addresses and maps.

        Args:
            into: memory that the caller passes for outputs, in the call's layout; those that the call makes are dense
                in that layout.
            layout: of the call.
        """
        numbers: dict[str, Any] = {**self.sizes, **self.scalars}
        for name in (*self.given.tensors, *self.made):
            value = self.manifest.value_of[name]
            steps = self.strides_of(name)
            if name in self.made and value.source == "output" and value.axes:
                steps = self._output_strides(value, into.get(name), layout)
            numbers |= {
                f"{name}.stride_{axis}": step for axis, step in zip(value.stride_names, steps, strict=True)
            }
        return numbers

    def _output_strides(self, value: Value, output: torch.Tensor | None, layout: str) -> tuple[int, ...]:
        if output is None:
            shape = self.made[value.name].shape
            if layout == "bhsd" and len(shape) == 4:
                shape = (shape[0], shape[2], shape[1], shape[3])
            output = torch.empty(shape, device="meta", dtype=element_dtype(value.dtype))
        return strides(output.transpose(1, 2) if layout == "bhsd" and output.dim() == 4 else output)


def bind(
    manifest: Manifest,
    given: Given,
    wanted: tuple[str, ...],
    num_sms: int,
    softmax_scale: float | None = None,
    known: Collection[str] = (),
    accumulates: bool = False,
) -> Bound:
    """Work out what a call launches and allocates.

    Args:
        manifest: of the call.
        given: its arguments.
        wanted: names of values to make.
        num_sms: multiprocessors of the GPU.
        softmax_scale: 1/sqrt(head_dim_qk) where None.
        known: names of more values that need not be made: an earlier call has, or nobody asks for their addresses.
        accumulates: as of `Bound`.
    """
    declared_sizes = {f"size.{name}": size for name, size in given.declared_sizes.items()}
    sizes = {**given.sizes, **declared_sizes, "num_sms": num_sms}
    _check_pieces(manifest, sizes)
    launches = manifest.launches_for({*given.tensors, *known}, wanted, sizes)
    read = [name for launch in launches for name in launch.reads]
    written = [name for launch in launches for name in launch.writes]
    needed = {*wanted, *read}
    kept = (name for name in read if manifest.value_of[name].source == "kept")
    entries = (manifest.value_of[name] for name in dict.fromkeys((*written, *kept)))
    of_shapes = {**given.declared_sizes, **sizes}
    made = {
        value.name: Allocation(value, tuple(evaluate_formula(size, of_shapes) for size in value.shape))
        for value in entries
        if not value.optional or value.name in needed
    }
    for name, each in made.items():
        _check_covered(each, given.tensors.get(name.replace("gradient.", "tensor.", 1)))
    scale = 1 / math.sqrt(manifest.head_dim_qk) if softmax_scale is None else softmax_scale
    scalars = {
        **scale_values(scale, manifest.score_factor),
        **{f"scalar.{name}": value for name, value in given.scalars.items()},
        "accumulates": int(accumulates),
        **(division_by(sizes["page_size"]) if manifest.lengths.is_paged("keys") else {}),
    }
    return Bound(manifest, given, sizes, wanted, launches, made, scale, scalars, accumulates)


def _check_pieces(manifest: Manifest, sizes: Mapping[str, int]) -> None:
    """Refuse pages whose rows are to be looked up one by one, where no kernel of the call does."""
    guards = [launch.when for launch in manifest.launches if "out" in launch.writes]
    if not sizes.get(PAGES_BY_ROW) or any(guard is None or guard.holds(sizes) for guard in guards):
        return
    cure = "schedule.kind auto and fa2 take pages of any size, and padding"
    if rows := sizes["page_size"] % SMALLEST_PIECE and sizes["page_size"]:
        must = f"a multiple of {SMALLEST_PIECE}, which the copy engine brings at a time"
        raise ArgumentError("k", f"pages of {rows} rows", must, cure)
    raise ArgumentError(
        "leftpad_k", "padding", "None: the copy engine brings keys from a page's first on", cure
    )


def _check_covered(gradient: Allocation, declared: torch.Tensor | None) -> None:
    """Refuse a declared tensor that is shorter than its index: what is clamped to its end belongs to many pairs."""
    if declared is None or gradient.shape == tuple(declared.shape):
        return
    name = gradient.value.passed_as.removeprefix("d")
    must = f"{gradient.shape} at least where its gradient is wanted: an element for each pair"
    raise ArgumentError(name, f"shape {tuple(declared.shape)}", must)
