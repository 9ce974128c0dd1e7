"""How expressions of a plan are written, and the functions by which its kernels look elements up."""

from collections.abc import Iterable, Iterator
from typing import Any

from attngen.emit.environment import macros
from attngen.emit.terms import expressions_of
from attngen.emit.tile_text import FIELDS, VARIABLES, blocks
from attngen.expr import (
    ALL_KEPT,
    GIVEN_BLOCKS,
    SIZE_NAMES,
    SOME_KEPT,
    Boundary,
    Expr,
    Leaves,
    cuda_body,
    nodes,
)
from attngen.plan import KEYS, QUERIES, KernelPlan, walk
from attngen.plan.steps import LookUp

_NAMES = {**VARIABLES, **FIELDS, "score": "score"}
_C_TYPES = {"bool": "bool", "i32": "int", "f32": "float"}
_ELEMENTS = {
    "bool": ("bool", "__ldg({}) != 0"),
    "u8": ("int", "__ldg({})"),
    "i32": ("int", "__ldg({})"),
    "f32": ("float", "__ldg({})"),
    "f16": ("float", "f16_to_float(__ldg({}))"),
    "bf16": ("float", "bf16_to_float(__ldg({}))"),
}


def table_texts(plan: KernelPlan) -> list[dict[str, Any]]:
    """What the kernel that fills the tables of a plan looks up for each, as CUDA text."""
    sizes = _table_sizes(plan)
    return [
        {
            "name": table.name,
            "lookup": str(table.lookup),
            "c_type": _C_TYPES[table.lookup.type],
            "indices": [{"name": VARIABLES[each.name], "size": sizes[each.name]} for each in table.indices],
            "reads_q": "q" in table.reads,
            "reads_k": "k" in table.reads,
            "value": cuda_body([table.lookup], leaves(plan)),
        }
        for table in plan.tables
    ]


def lookup_functions(plan: KernelPlan) -> Iterator[str]:
    """A function for each tensor that a kernel reads one by one, for each end of its tables, and each boundary."""
    yield from _tensor_functions(plan, expressions_of(plan))
    sizes = _table_sizes(plan)
    for table in plan.tables:
        indices = [VARIABLES[index.name] for index in table.indices]
        place = indices[0]
        for index, variable in zip(table.indices[1:], indices[1:], strict=True):
            place = f"({place}) * ({sizes[index.name]}) + {variable}"
        for space, field in zip(table.ends, table.fields, strict=True):
            element = f"__ldg(params.{field} + {place})"
            yield macros("mask.cuh.j2").lookup(
                {
                    "name": field,
                    "type": f"The {'smallest' if space.endswith('lo') else 'largest'} {table.lookup} of a block.",
                    "c_type": _C_TYPES[table.lookup.type],
                    "indices": ", ".join(map("int {}".format, indices)),
                    "element": f"{element} != 0" if table.lookup.type == "bool" else element,
                }
            )
    for boundary in plan.boundaries:
        yield _boundary_function(plan, boundary)


def finding_functions(plan: KernelPlan) -> Iterator[str]:
    """A function for each tensor that the conditions of a plan's boundaries look up."""
    yield from _tensor_functions(plan, [each.condition for each in plan.boundaries])


def boundary_texts(plan: KernelPlan) -> list[dict[str, Any]]:
    """Of each boundary of a plan what its kernel asks, as CUDA text, and where it keeps what it finds."""
    sizes = _boundary_sizes(plan)
    return [
        {
            "field": each.field,
            "condition": str(each.condition),
            "along": each.along,
            "indices": [{"name": index.name, "size": sizes[index.name]} for index in each.indices],
            "holds": cuda_body([each.condition], leaves(plan)),
        }
        for each in plan.boundaries
    ]


def _tensor_functions(plan: KernelPlan, exprs: Iterable[Expr]) -> Iterator[str]:
    """A function for each tensor of which expressions have some lookup that is not loaded ahead."""
    ahead = {step.lookup for step in walk(plan.worker.program) if isinstance(step, LookUp)}
    names = {each.name for each in nodes(*exprs) if each.op == "lookup" and each not in ahead}
    if names & {SOME_KEPT, ALL_KEPT}:
        names.add(GIVEN_BLOCKS.name)
    for name, tensor in plan.declarations.tensors.items():
        if name not in names:
            continue
        c_type, element = _ELEMENTS[tensor.dtype]
        steps = [f"i{i} * params.stride_{i}_of_{name}" for i in range(len(tensor.dims))]
        yield macros("mask.cuh.j2").lookup(
            {
                "name": f"arg_{name}",
                "type": f"{name}: {tensor}",
                "c_type": c_type,
                "indices": ", ".join(f"int i{i}" for i in range(len(tensor.dims))),
                "element": element.format(" + ".join((f"params.arg_{name}", *steps))),
            }
        )


def _boundary_function(plan: KernelPlan, boundary: Boundary) -> str:
    """What reads a boundary; there may be more rows of all heads than an int counts."""
    sizes, (first, *rest) = _boundary_sizes(plan), boundary.indices
    place = first.name
    for number, index in enumerate(rest):
        place = f"{f'({place})' if number else f'(i64){place}'} * {sizes[index.name]} + {index.name}"
    what = "key" if boundary.along == "kv_idx" else "row"
    return str(
        macros("mask.cuh.j2").lookup(
            {
                "name": boundary.field,
                "type": f"The first {what} for which {boundary.condition}.",
                "c_type": "int",
                "indices": ", ".join(f"int {index.name}" for index in boundary.indices),
                "element": f"__ldg(params.{boundary.field} + {place})",
            }
        )
    )


def leaves(plan: KernelPlan, exact: bool = True, key_step: str = "") -> Leaves:
    """How names and tensors are written in the functions of a plan."""
    scalars = {
        scalar.name: f"(params.arg_{scalar.name} != 0)"
        if scalar.type == "bool"
        else f"params.arg_{scalar.name}"
        for scalar in plan.declarations.scalars.values()
    }
    sizes = {
        tensor.name: [_size(plan, dim) for dim in tensor.dims]
        for tensor in plan.declarations.tensors.values()
    }
    readers = {name: f"read_arg_{name}" for name in plan.declarations.tensors}
    if GIVEN_BLOCKS.name in sizes:
        batch, heads, rows, columns = sizes[GIVEN_BLOCKS.name]
        readers |= {SOME_KEPT: "some_kept", ALL_KEPT: "all_kept"}
        sizes |= dict.fromkeys((SOME_KEPT, ALL_KEPT), [batch, heads, rows, rows, columns, columns])
    of_tables = _table_sizes(plan)
    for table in plan.tables:
        for space, field in zip(table.ends, table.fields, strict=True):
            readers[space] = f"read_{field}"
            sizes[space] = [of_tables[index.name] for index in table.indices]
    for boundary in plan.boundaries:
        readers[boundary.name] = f"read_{boundary.field}"
        sizes[boundary.name] = [_boundary_sizes(plan)[index.name] for index in boundary.indices]
    names = _NAMES | scalars | ({"kv_idx": "kv_first"} if key_step else {})
    return Leaves(names, readers, sizes, of_tables, exact, key_step)


def _size(plan: KernelPlan, dim: str | int) -> str:
    """A dimension of a tensor, as the parameter that carries it."""
    if isinstance(dim, int):
        return str(dim)
    has_own = dim in SIZE_NAMES and any(param.name == dim for param in plan.params)
    return f"params.{dim}" if has_own else f"params.size_of_{dim}"


def _head_sizes(plan: KernelPlan) -> dict[str, str]:
    return {
        "b": _size(plan, "batch"),
        "h": "params.num_heads_q",
        "h_kv": "params.size_of_num_heads_kv",
    }


def _boundary_sizes(plan: KernelPlan) -> dict[str, str]:
    """How many values each index of a boundary takes."""
    return _head_sizes(plan) | {"q_idx": "params.seqlen_q", "kv_idx": "params.seqlen_k"}


def _table_sizes(plan: KernelPlan) -> dict[str, str]:
    """How many values each index of a table takes."""
    return _head_sizes(plan) | {
        "q_idx.tile": blocks(QUERIES, "call"),
        "kv_idx.tile": blocks(KEYS, "call"),
    }
