"""Compiling a file of `probe_sources.py` and running its kernels on a GPU."""

import ctypes
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from attngen.api import resolve_arch
from attngen.expr import VALUE_TYPES, Declarations
from attngen.fuzz.draw_pairs import declaration_texts
from attngen.lower import lower
from attngen.plan import KernelPlan
from attngen.runtime.driver import Module, launch, preparing
from attngen.runtime.nvrtc import compile_source
from attngen.spec import Spec, load
from tests.language.probe_sources import PROBE_THREADS

INDICES = ("b", "h", "h_kv", "q_idx", "kv_idx", "seqlen_q", "seqlen_k")
"""What an expression may read that is sampled, in the order of the struct Samples, without `score`."""
Field = tuple[str, Any]
"""A type of C and a value, one field of a parameter struct."""
_C_TYPES: Mapping[str, Any] = {
    "pointer": ctypes.c_uint64,
    "i64": ctypes.c_int64,
    "i32": ctypes.c_int32,
    "f32": ctypes.c_float,
}
_INDEX = {"bool": "{}", "i32": "{} == 0", "f32": "{} == 0.0"}


class Probe:
    """A compiled file of probes, loaded on a GPU."""

    def __init__(self, source: str, arch: str, device: str) -> None:
        self.device = (
            torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
        )
        self._module = Module(compile_source(source, arch).cubin)

    def run(
        self, kernel: str, blocks: int, *arguments: Iterable[Field], threads: int = PROBE_THREADS
    ) -> None:
        """Launch a kernel on torch's stream with some structs for arguments."""
        device = self.device.index
        with preparing(device):
            function = self._module.function(kernel, 0)
            function.prepare(device)
        structs = [struct_of(fields) for fields in arguments]
        addresses = (ctypes.c_void_p * len(structs))(*(ctypes.addressof(struct) for struct in structs))
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream().cuda_stream
            launch(function, blocks, threads, 0, device, stream, ctypes.addressof(addresses))


def sample_fields(samples: Mapping[str, torch.Tensor], found: torch.Tensor) -> list[Field]:
    """The struct Samples of probes.cu.j2."""
    pointers = [samples[name].data_ptr() for name in (*INDICES, "score")] + [found.data_ptr()]
    return [*(("pointer", pointer) for pointer in pointers), ("i32", found.shape[1])]


def moved(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors on a device, with the strides that they have."""
    return {
        name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)
        for name, x in tensors.items()
    }


def as_f32(bits: torch.Tensor) -> torch.Tensor:
    """The f32 whose bits a probe wrote as an i64."""
    return bits.to(torch.int32).view(torch.float32)


def struct_of(fields: Iterable[Field]) -> ctypes.Structure:
    """A parameter struct with these fields, one after the other."""
    types, values = zip(*fields, strict=True)
    named = [(f"field{place}", _C_TYPES[each]) for place, each in enumerate(types)]
    made: ctypes.Structure = type("Struct", (ctypes.Structure,), {"_fields_": named})(*values)
    return made


def parameters(
    plan: KernelPlan,
    sizes: Mapping[str, int],
    scalars: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    spaces: Mapping[str, torch.Tensor] | None = None,
) -> list[Field]:
    """The parameters of a plan's kernels, with zeros for what no expression reads.

    Args:
        plan: says which there are.
        sizes: of the call.
        scalars: a value for each declared scalar.
        tensors: of the declarations, on the GPU; their shapes are the sizes of new names.
        spaces: the tables of extremes, by name.
    """
    values: dict[str, Any] = {**sizes, **{f"size.{name}": size for name, size in sizes.items()}}
    for name, tensor in plan.declarations.tensors.items():
        dims = zip(tensor.dims, tensors[name].shape, strict=True)
        values |= {f"size.{dim}": size for dim, size in dims if isinstance(dim, str)}
    values |= {f"scalar.{name}": value for name, value in scalars.items()}
    for name, x in tensors.items():
        values[f"tensor.{name}.ptr"] = x.data_ptr()
        values |= {f"tensor.{name}.stride_{i}": stride for i, stride in enumerate(x.stride())}
    values |= {f"{name}.ptr": space.data_ptr() for name, space in (spaces or {}).items()}
    return [(param.ctype, values.get(param.value, 0)) for param in plan.params]


def spec_of(
    mask: str, declarations: Declarations, target: str, tile: tuple[int, int] = (64, 32), kind: str = "fa2"
) -> Spec:
    """A spec with this mask and these declarations, all of which it must read."""
    return load(
        {
            "target": target,
            "problem": {"head_dim": 64},
            **declaration_texts(declarations),
            "mask": mask,
            "tile": {"block_m": tile[0], "block_n": tile[1]},
            "schedule": {"kind": kind, "warps": tile[0] // 16},
        }
    )


def plan_that_reads_all(declarations: Declarations, target: str) -> KernelPlan:
    """The plan of a kernel that has every declared scalar and tensor among its parameters."""
    reads = [_INDEX[each.type].format(each.name) for each in declarations.scalars.values()]
    for tensor in declarations.tensors.values():
        element = f"{tensor.name}[{', '.join('0' for _ in tensor.dims)}]"
        reads.append(_INDEX[VALUE_TYPES[tensor.dtype]].format(element))
    spec = spec_of(" and ".join(["b == 0", "h_kv == 0", *reads]), declarations, target)
    return lower(spec, resolve_arch(spec)).attention
