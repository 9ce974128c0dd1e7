"""The manifest: what a program must know to launch an emitted kernel, in any language.

It stands beside the .cu as .json. The Python runtime launches from it and from nothing else.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, TypeVar

from attngen.plan import (
    PANEL_BYTES,
    Descales,
    Formula,
    Param,
    Plan,
    TensorMap,
    ceil_div,
    product,
)
from attngen.quantize import KEY_BLOCK

SCHEMA_VERSION = 6


@dataclass(frozen=True)
class TensorMapEntry:
    """A descriptor of the copy engine, as cuTensorMapEncodeTiled makes it.

    It has four dimensions, (cols, seqlen, heads, batch). Strides are the tensor's own, in bytes. No interleave, out of
    bounds reads as zeros.

    Attributes:
        tensor: "q", "k", "v" or "out"; the parameter of value "map.<tensor>" carries the descriptor.
        dtype: of its elements.
        dims: extents, cols first.
        box: extents of one copy, cols first.
        swizzle_bytes: span of the swizzle.
    """

    tensor: str
    dtype: str
    dims: tuple[Formula, ...]
    box: tuple[int, ...]
    swizzle_bytes: int


@dataclass(frozen=True)
class KernelEntry:
    """A kernel: its C symbol, its block, and the fields of the one struct it takes by value.

    The fields stand in the order given, each aligned to its size: pointer and i64 to 8 bytes, i32 and f32 to 4, a
    tensor map of 128 bytes to 64. A parameter of value "counter.ptr" points at an i32 in device memory that is 0
    before the launch, that the kernel leaves at 0, and that no launch which may run at the same time shares;
    one that starts early, in the same stream, touches it only after its wait.

    Attributes:
        starts_early: a launch may have the attribute "programmatic stream serialization": the kernel itself waits for
            what came before it in the stream. Without the attribute it is as right, and starts later.
    """

    name: str
    threads: int
    smem_bytes: int
    params: tuple[Param, ...]
    tensor_maps: tuple[TensorMapEntry, ...]
    starts_early: bool


@dataclass(frozen=True)
class WorkspaceEntry:
    """Device memory that every call needs, dense and uninitialised."""

    name: str
    dtype: str
    shape: tuple[Formula, ...]


@dataclass(frozen=True)
class LaunchEntry:
    """One launch, in order, on a one-dimensional grid.

    Attributes:
        tiles: what the blocks work on, together. A kernel counts them in an i32: the last tile's number, plus the
            grid's blocks where the kernel has a counter, must be at most 2^31 - 1.
    """

    kernel: str
    grid: Formula
    tiles: Formula


@dataclass(frozen=True)
class TensorEntry:
    """A tensor that the mask or the score reads, or the scales of 8-bit q, k or v; every call passes it by name.

    Parameters of value "tensor.<name>.ptr" and "tensor.<name>.stride_<i>" carry its address and strides in elements.

    Attributes:
        dtype: "bool", "u8", "i32", "f16", "bf16" or "f32".
        dims: each a formula over `attngen.expr.SIZE_NAMES`, or any other name, which the tensor binds; "size.<name>"
            carries what it binds.
    """

    name: str
    dtype: str
    dims: tuple[Formula, ...]


@dataclass(frozen=True)
class ScalarEntry:
    """A scalar that the mask or the score reads; the parameter of value "scalar.<name>" carries it, a bool as 0 or 1.

    Attributes:
        default: what a call passes that says nothing; None where it must say.
    """

    name: str
    type: str
    default: int | float | bool | None


@dataclass(frozen=True)
class Manifest:
    """Everything a launch needs. Formulas are over `attngen.plan.RUNTIME_SIZES`.

    Attributes:
        descales: of 8-bit q, k and v, which a call passes like tensors.
        scales: what shares a scale of 8-bit q, k and v; None for others. v is then (batch, num_heads_kv, head_dim_v,
            keys), its keys padded with zeros to a multiple of 128, and of every 16 of them these follow one another:
            0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15.
        score_factor: what exponentials take scores times, see `attngen.scaling.scale_values`.
        table_kernel: the kernel that fills the tables that the others read, if they read any; a call with the same
            tensors may leave it out.
        tables: the workspaces that it fills.
        up_to: most keys of the calls that this kernel is for; None for any.
        shorter: names of the kernels for calls of fewer keys, the fewest first, each with a manifest of its own: the
            first whose `up_to` is at least seqlen_k takes the call, and this one takes it if none does.
    """

    name: str
    arch: str
    direction: str
    head_dim_qk: int
    head_dim_v: int
    inputs: str
    output: str
    scales: str | None
    mask: str
    score: str
    score_factor: float
    table_kernel: str | None
    tables: tuple[str, ...]
    tensors: tuple[TensorEntry, ...]
    descales: tuple[TensorEntry, ...]
    scalars: tuple[ScalarEntry, ...]
    schedule: str
    spec_digest: str
    kernels: tuple[KernelEntry, ...]
    workspaces: tuple[WorkspaceEntry, ...]
    launches: tuple[LaunchEntry, ...]
    up_to: int | None
    shorter: tuple[str, ...]
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """The manifest as text; the same plan gives the same bytes."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is of another schema version.
        """
        data: dict[str, Any] = json.loads(text)
        if data.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"manifest schema_version is {data.get('schema_version')!r}, this attngen reads {SCHEMA_VERSION}"
            )
        kernels = tuple(_kernel_entry(kernel) for kernel in data.pop("kernels"))
        workspaces = tuple(
            WorkspaceEntry(w["name"], w["dtype"], tuple(w["shape"])) for w in data.pop("workspaces")
        )
        launches = tuple(LaunchEntry(**launch) for launch in data.pop("launches"))
        data["shorter"], data["tables"] = tuple(data["shorter"]), tuple(data["tables"])
        data["tensors"] = tuple(
            TensorEntry(**{**entry, "dims": tuple(entry["dims"])}) for entry in data["tensors"]
        )
        data["descales"] = tuple(
            TensorEntry(**{**entry, "dims": tuple(entry["dims"])}) for entry in data["descales"]
        )
        data["scalars"] = tuple(ScalarEntry(**entry) for entry in data["scalars"])
        return cls(kernels=kernels, workspaces=workspaces, launches=launches, **data)


class _HasManifest(Protocol):
    @property
    def manifest(self) -> Manifest: ...


_Kernel = TypeVar("_Kernel", bound=_HasManifest)


def serving(kernel: _Kernel, shorter: Sequence[_Kernel], seqlen_k: int) -> _Kernel:
    """Which of a kernel and those for fewer keys, the fewest first, takes a call of that many keys."""
    for each in shorter:
        if each.manifest.up_to is not None and seqlen_k <= each.manifest.up_to:
            return each
    return kernel


def _kernel_entry(data: dict[str, Any]) -> KernelEntry:
    maps = tuple(
        TensorMapEntry(**{**entry, "dims": tuple(entry["dims"]), "box": tuple(entry["box"])})
        for entry in data["tensor_maps"]
    )
    params = tuple(Param(**param) for param in data["params"])
    return KernelEntry(**{**data, "params": params, "tensor_maps": maps})


def _tensor_map(entry: TensorMap) -> TensorMapEntry:
    tensor = entry.tensor
    heads = "num_heads_kv" if tensor.heads == "kv" else "num_heads_q"
    rows: tuple[Formula, Formula] = (tensor.cols, f"seqlen_{tensor.axis}")
    if tensor.transposed:
        rows = (product(KEY_BLOCK, ceil_div(rows[1], KEY_BLOCK)), tensor.cols)
    dims = (*rows, heads, "batch")
    box = (entry.box_cols, entry.box_rows, 1, 1)
    return TensorMapEntry(tensor.name, tensor.dtype.name, dims, box, PANEL_BYTES)


def _descales(of: Descales) -> TensorEntry:
    heads = "num_heads_kv" if of.heads == "kv" else "num_heads_q"
    granules = () if of.granule is None else (ceil_div(f"seqlen_{of.axis}", of.granule),)
    return TensorEntry(of.name, "f32", ("batch", heads, *granules))


def manifest(plan: Plan) -> Manifest:
    """The manifest of a plan."""
    early = plan.arch.starts_early
    kernels = [
        KernelEntry(k.name, k.threads, k.smem_bytes, k.params, tuple(map(_tensor_map, k.tensor_maps)), early)
        for k in plan.kernels
    ]
    launches = [LaunchEntry(launch.kernel, launch.grid, launch.tiles) for launch in plan.launches]
    if (tables := plan.table_kernel) is not None:  # its parameters are the attention kernel's, maps included
        kernels.append(replace(kernels[0], name=tables.name, threads=tables.threads, smem_bytes=0))
        launches.insert(0, LaunchEntry(tables.name, tables.grid, tables.grid))
    return Manifest(
        name=plan.name,
        arch=plan.arch.name,
        direction="forward",
        head_dim_qk=plan.head_dim_qk,
        head_dim_v=plan.head_dim_v,
        inputs=plan.inputs.name,
        output=plan.output.name,
        scales=plan.quantizer.scales if plan.quantizer else None,
        mask=plan.mask_text,
        score=str(plan.score),
        score_factor=plan.score_factor,
        table_kernel=plan.table_kernel.name if plan.table_kernel else None,
        tables=tuple(end for table in plan.table_kernel.tables for end in table.ends)
        if plan.table_kernel
        else (),
        tensors=tuple(TensorEntry(t.name, t.dtype, t.dims) for t in plan.declarations.tensors.values()),
        descales=tuple(map(_descales, plan.scales)),
        scalars=tuple(ScalarEntry(s.name, s.type, s.default) for s in plan.declarations.scalars.values()),
        schedule=plan.schedule,
        spec_digest=plan.spec_digest,
        kernels=tuple(kernels),
        workspaces=tuple(WorkspaceEntry(w.name, "f32", w.shape) for w in plan.workspaces),
        launches=tuple(launches),
        up_to=plan.up_to,
        shorter=tuple(shorter.name for shorter in plan.shorter),
    )
