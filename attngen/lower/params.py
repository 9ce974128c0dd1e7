"""The fields of a kernel's parameter struct."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from attngen.expr import Boundary, Declarations, Expr, Table, TileClasses, free_names, tensor_names
from attngen.plan import (
    BLOCK_TABLE,
    LETTERS,
    PAGE_DIVISION,
    TICKETS,
    KernelPlan,
    Lengths,
    Param,
    PartRows,
    Rows,
    Tensor,
    page_values,
    table_value,
)
from attngen.schedules import Pairs


def declarations_read_by(declared: Declarations, *exprs: Expr) -> Declarations:
    """What expressions read of a spec's scalars and tensors."""
    names = frozenset().union(*map(free_names, exprs))
    tensors = frozenset().union(*map(tensor_names, exprs))
    return Declarations(
        {name: scalar for name, scalar in declared.scalars.items() if name in names},
        {name: tensor for name, tensor in declared.tensors.items() if name in tensors},
    )


def pair_params(pairs: Pairs, common: Mapping[str, Any], sizes: tuple[str, ...]) -> tuple[Param, ...]:
    """What scores and expressions read: scale, tensors, tables, sizes of these that no other field has, scalars.

    Args:
        pairs: of the spec.
        common: fields of the kernel's plan: what it reads of the spec's declarations, how it classes blocks of keys.
        sizes: fields that are there anyway.
    """
    classes: TileClasses | None = common["tile_classes"]
    tables = classes.tables if classes else ()
    boundaries = pairs.visible.boundaries if pairs.visible else ()
    names = {end: table_value(end, common["up_to"]) for table in tables for end in table.ends}
    return (
        *_scale_params(pairs),
        *expression_params(common["declarations"], tables, names, sizes, boundaries),
    )


def expression_params(
    read: Declarations,
    tables: tuple[Table, ...],
    names: Mapping[str, str],
    sizes: tuple[str, ...],
    boundaries: tuple[Boundary, ...],
) -> tuple[Param, ...]:
    """What expressions read: tensors, tables, boundaries, sizes of these that no other field has, scalars.

    Args:
        read: of the spec's declarations.
        tables: extremes of lookups.
        names: of the values that are their ends.
        sizes: fields that are there anyway.
        boundaries: of the keys that a row sees, or of the rows that see a key.
    """
    dims = dict.fromkeys(dim for tensor in read.tensors.values() for dim in tensor.dims)
    dims |= dict.fromkeys(("batch", "num_heads_kv") if tables or boundaries else ())
    return (
        *(Param(f"arg_{tensor}", "pointer", f"tensor.{tensor}.ptr") for tensor in read.tensors),
        *(
            Param(f"stride_{i}_of_{name}", "i64", f"tensor.{name}.stride_{i}")
            for name, tensor in read.tensors.items()
            for i in range(len(tensor.dims))
        ),
        *(
            Param(field, "pointer", f"{names[end]}.ptr")
            for table in tables
            for field, end in zip(table.fields, table.ends, strict=True)
        ),
        *(Param(each.field, "pointer", f"{each.name}.ptr") for each in boundaries),
        *(
            Param(f"size_of_{dim}", "i32", f"size.{dim}")
            for dim in dims
            if isinstance(dim, str) and dim not in sizes
        ),
        *(
            Param(f"arg_{scalar.name}", "f32" if scalar.type == "f32" else "i32", f"scalar.{scalar.name}")
            for scalar in read.scalars.values()
        ),
    )


def _scale_params(pairs: Pairs) -> tuple[Param, ...]:
    """What carries the scale: for a score, for the exponentials, and for what is added before either."""
    is_seeded, modifies = pairs.added is not None, pairs.modifies_scores
    scale = "seeded_scale" if is_seeded else "softmax_scale"
    return (
        *((Param("scale_is_negative", "i32", "scale_is_negative"),) if is_seeded or not modifies else ()),
        *((Param("softmax_scale", "f32", scale),) if modifies else ()),
        Param("softmax_scale_log2", "f32", "score_factor_log2" if modifies else f"{scale}_log2"),
        *((Param("softmax_scale_inverse", "f32", "seeded_scale_inverse"),) if is_seeded else ()),
    )


def row_strides(tensors: Iterable[str]) -> tuple[Param, ...]:
    """Strides of tensors of rows of heads, in elements."""
    return tuple(
        Param(f"{tensor}_stride_{axis}", "i64", f"{tensor}.stride_{axis}")
        for tensor in tensors
        for axis in ("batch", "seqlen", "head")
    )


def params(scratch: tuple[Tensor | Rows, ...], of_pairs: tuple[Param, ...]) -> tuple[Param, ...]:
    """The fields of the parameter struct: pointers, strides in elements, sizes, scale, and what expressions read."""
    tensors = ("q", "k", "v", "out")
    return (
        *(Param(tensor, "pointer", f"{tensor}.ptr") for tensor in tensors),
        Param("lse", "pointer", "lse.ptr"),
        *(Param(place.name, "pointer", f"{place.name}.ptr") for place in scratch),
        *row_strides(tensors),
        *(Param(size, "i32", size) for size in ("seqlen_q", "seqlen_k", "num_heads_q", "group")),
        *of_pairs,
    )


def part_params(parts: tuple[PartRows, ...]) -> tuple[Param, ...]:
    """Where parts are left, and where they are counted."""
    if not parts:
        return ()
    return (
        *(Param(place.name, "pointer", f"{place.name}.ptr") for place in parts),
        Param("tickets", "pointer", TICKETS),
    )


def with_lengths(plan: KernelPlan, lengths: Lengths) -> KernelPlan:
    """The kernel for sequences that have lengths of their own: what it works on is listed in device memory.

    Its struct then also carries what the list is made of (`attngen.plan.ListTiles` takes the same one).
    """
    if lengths.are_dense and not plan.split:
        return plan
    listed = replace(plan, lengths=lengths, scheduler=replace(plan.scheduler, is_listed=True))
    of_page = _page_strides(listed)
    kept = tuple(
        of_page.get(param.value, param) for param in plan.params if param.value not in _batch_strides(listed)
    )
    own = {param.name for param in kept}
    sizes: tuple[str, ...] = (
        "batch",
        *(f"tokens_{letter}" for axis, letter in LETTERS.items() if lengths.is_by_token(axis)),
    )
    if plan.split and plan.split.keys is None:
        sizes = (*sizes, "num_sms", "num_heads_kv")
    params = (
        Param("tiles", "pointer", f"{listed.tile_list}.ptr"),
        *(Param(each.name, "pointer", f"{each.name}.ptr") for each in lengths.arguments),
        *(Param(each.name, "pointer", f"{each.name}.ptr") for each in page_values(lengths)),
        *kept,
        *(Param(size, "i32", size) for size in sizes if size not in own),
        *(_page_numbers() if lengths.is_paged("keys") else ()),
    )
    return replace(listed, params=params)


def _page_strides(plan: KernelPlan) -> dict[str, Param]:
    """From a page to the next, in the place of strides from batch to batch that caches have not."""
    caches = [tensor.name for tensor in plan.reads if plan.lengths.is_paged(tensor.axis)]
    return {
        f"{name}.stride_batch": Param(f"{name}_stride_page", "i64", f"{name}.stride_page") for name in caches
    }


def _page_numbers() -> tuple[Param, ...]:
    """How a table and a cache are laid out, and by what a row is divided to tell its page."""
    return (
        Param(f"{BLOCK_TABLE.name}_stride", "i64", f"{BLOCK_TABLE.name}.stride_0"),
        *(Param(size, "i32", size) for size in ("table_rows", "pages", "page_size")),
        *(Param(value.replace(".", "_"), "i32", value) for value in PAGE_DIVISION),
    )


def _batch_strides(plan: KernelPlan) -> frozenset[str]:
    """Strides that tensors have not in which the sequences follow one another."""
    tensors = (*plan.reads, *plan.outputs)
    return frozenset(
        f"{tensor.name}.stride_batch" for tensor in tensors if plan.lengths.is_by_token(tensor.axis)
    )
