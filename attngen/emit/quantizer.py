"""Quantizer -> the text of its kernels, for the end of an attention kernel's file or one of its own; its manifest."""

from dataclasses import dataclass
from typing import Any

import jinja2

from attngen.dtypes import E4M3, F32
from attngen.emit.device import used_by
from attngen.emit.environment import strict_environment
from attngen.emit.manifest import KernelEntry, LaunchEntry, WorkspaceEntry
from attngen.plan import Launch, Param, Quantizer, Workspace
from attngen.plan.quantizer import SOURCES, TENSORS
from attngen.quantize import DESCALES, ScaleKind

_PAIRS = {"bf16": "Bf16Pair", "f16": "F16Pair"}
_POINTEES = {
    **dict.fromkeys(TENSORS, "const u16"),
    **{f"{name}8": "unsigned char" for name in TENSORS},
    **dict.fromkeys((*DESCALES, "maxima"), "float"),
}
_C_TYPES = {"i64": "i64", "i32": "int"}


@dataclass(frozen=True)
class QuantizerEntries:
    """What launches a quantizer's kernels, which stand in one cubin.

    Parameters carry, by the name of their value: "q.ptr", "q.stride_batch", "q.stride_seqlen" and "q.stride_head" (in
    elements), likewise of k and v; "<name>.ptr" of each output and of "maxima"; run-time sizes by their own names.

    Attributes:
        arch: that the kernels are compiled for.
        scales, hadamard: as of `attngen.quantize.Operands`.
        kernels: every kernel; all have the same parameters.
        outputs: q8, k8, v8 and their descales, dense.
        maxima: zeroed before each call that quantises; None where none is needed.
        quantize: the launches for Q, K and V of a format, in order.
        pack: the launch for e4m3 V; it reads v and writes v8, and nothing else.
    """

    arch: str
    head_dim_qk: int
    head_dim_v: int
    scales: ScaleKind
    hadamard: bool
    kernels: tuple[KernelEntry, ...]
    outputs: tuple[WorkspaceEntry, ...]
    maxima: WorkspaceEntry | None
    quantize: dict[str, tuple[LaunchEntry, ...]]
    pack: LaunchEntry


def quantizer_functions(quantizer: Quantizer, env: jinja2.Environment) -> str:
    """The kernels of a quantizer, in a namespace of their own; `used_by` has what they call."""
    macros: Any = env.get_template("quantize.cuh.j2").module
    factor = f"{quantizer.head_dim_qk**-0.5:.9g}f"
    sources = [(source, _PAIRS[source]) for source in SOURCES]
    declarations = [_declaration(param) for param in quantizer.params]
    return str(macros.kernels(quantizer, declarations, sources, factor)).strip("\n")


def quantizer_text(quantizer: Quantizer) -> str:
    """A whole file with nothing but a quantizer's kernels."""
    text = quantizer_functions(quantizer, strict_environment())
    return "\n\n".join([*used_by(text), text]) + "\n"


def quantizer_entries(quantizer: Quantizer) -> QuantizerEntries:
    """The manifest of a quantizer."""
    launches = {source: tuple(map(_launch, quantizer.launches(source))) for source in SOURCES}
    pack = _launch(quantizer.pack_launch)
    smem = {launch.kernel: quantizer.smem_bytes for each in launches.values() for launch in each}
    return QuantizerEntries(
        quantizer.arch.name,
        quantizer.head_dim_qk,
        quantizer.head_dim_v,
        quantizer.scales,
        quantizer.hadamard_seed is not None,
        tuple(
            KernelEntry(
                name, quantizer.threads, smem_bytes, quantizer.params, (), quantizer.arch.starts_early
            )
            for name, smem_bytes in {**smem, pack.kernel: 0}.items()
        ),
        tuple(map(_workspace, quantizer.outputs)),
        _workspace(quantizer.maxima) if quantizer.maxima else None,
        launches,
        pack,
    )


def _declaration(param: Param) -> str:
    if param.ctype == "pointer":
        return f"{_POINTEES[param.name]}* {param.name}"
    return f"{_C_TYPES[param.ctype]} {param.name}"


def _launch(launch: Launch) -> LaunchEntry:
    return LaunchEntry(launch.kernel, launch.grid, launch.tiles)


def _workspace(space: Workspace) -> WorkspaceEntry:
    dtype = E4M3 if space.name.endswith("8") else F32
    return WorkspaceEntry(space.name, dtype.name, space.shape)
