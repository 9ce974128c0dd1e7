"""What a kernel needs beside tiles for the spec's mask and score: parameters, and tables of extremes."""

from collections.abc import Mapping
from typing import Any

from attngen.dtypes import BF16, F32, DType, dtype
from attngen.expr import INDEX_NAMES, Declarations, Expr, TileClasses, free_names, name, nodes, tensor_names
from attngen.plan import Param, table_value
from attngen.plan.steps import ByTanh
from attngen.schedules import Pairs
from attngen.schedules.pairs import loads_by_key


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
    read: Declarations = common["declarations"]
    classes: TileClasses | None = common["tile_classes"]
    tables = classes.tables if classes else ()
    dims = dict.fromkeys(dim for tensor in read.tensors.values() for dim in tensor.dims)
    dims |= dict.fromkeys(("batch", "num_heads_kv") if tables else ())
    return (
        *_scale_params(pairs),
        *(Param(f"arg_{tensor}", "pointer", f"tensor.{tensor}.ptr") for tensor in read.tensors),
        *(
            Param(f"stride_{i}_of_{name}", "i64", f"tensor.{name}.stride_{i}")
            for name, tensor in read.tensors.items()
            for i in range(len(tensor.dims))
        ),
        *(
            Param(field, "pointer", f"{table_value(end, common['up_to'])}.ptr")
            for table in tables
            for field, end in zip(table.fields, table.ends, strict=True)
        ),
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


def lookups_by_key(score: Expr, declared: Declarations) -> dict[Expr, DType]:
    """Lookups of a score whose 16-bit elements two neighbouring keys may find side by side, and their formats.

    The last index is the key itself, and nothing else of them depends on the key or the product.
    """
    return {
        each: dtype(declared.tensors[each.name].dtype)
        for each in nodes(score)
        if each.op == "lookup"
        and each.args[-1] is name("kv_idx")
        and declared.tensors[each.name].dtype in ("f16", "bf16")
        and not any(free_names(index) & {"kv_idx", "score"} for index in each.args[:-1])
    }


def adds_a_bias(score: Expr, declared: Declarations) -> bool:
    """Whether it is made with + - * alone, and all that it looks up for each key is one of `lookups_by_key`."""
    loads = loads_by_key(score)
    if len(loads) != 1 or set(loads) != lookups_by_key(score, declared).keys():
        return False
    rest = set(nodes(score)) - set(nodes(*loads))
    return all(each.op in ("const", "name", "lookup") or each.name in ("+", "-", "*") for each in rest)


COLUMNS_SEEDED = 128
"""The most columns of Q and K with which the score GEMM adds to something. The tensor core drops bits of accumulators
at each step of 16 columns: of 8192 an H200 lost 0.005 in eight steps and 0.011 in sixteen; added behind, 0.001."""


def can_seed(inputs: DType, head_dim_qk: int) -> bool:
    """Whether the score GEMM may add to something: e4m3's sums are too coarse, and f16's P shows what they drop."""
    return inputs in (BF16, F32) and head_dim_qk <= COLUMNS_SEEDED


COLUMNS_BY_TANH, COLUMNS_BY_TANH_AND_MORE = 224, 128
"""The most columns of O with which a score is computed in two steps: of a capped product, and of any other, which also
wants two warpgroups and no lookup by key. NVRTC 13.0.88 compiles these without spills, and not all that are beyond."""


def two_steps_by_tanh(pairs: Pairs, v_cols: int, warpgroups: int) -> ByTanh | None:
    """`Pairs.by_tanh`, where a kernel of so many columns of O and warpgroups has the registers for it."""
    if _is_capped_product(pairs.score):
        has_room = v_cols <= COLUMNS_BY_TANH
    else:
        has_room = v_cols <= COLUMNS_BY_TANH_AND_MORE and warpgroups == 2 and not loads_by_key(pairs.score)
    return pairs.by_tanh if has_room else None


def _is_capped_product(score: Expr) -> bool:
    """Whether it is tanh of the product and scalars, times scalars."""
    while score.op == "arith" and score.name == "*":
        a, b = score.args
        score = a if "score" in free_names(a) else b
    return score.name == "tanh" and not tensor_names(score) and free_names(score).isdisjoint(INDEX_NAMES)
