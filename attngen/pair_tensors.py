"""Tensors with an element for each pair of a query and a key, as the language declares and reads them."""

import torch

from attngen.errors import ArgumentError

_AXES = (("batch", "b"), ("num_heads_q", "h"), ("seqlen_q", "q_idx"), ("seqlen_k", "kv_idx"))
_FORMATS = {torch.bool: "bool", torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}


def declared_by_pair(name: str, x: torch.Tensor, sizes: tuple[int, int, int, int]) -> tuple[str, str]:
    """The declaration of a tensor, and the text of its element for a pair.

    Args:
        name: of the tensor.
        x: (batch or 1, heads or 1, queries or 1, keys or more, or 1).
        sizes: batch, query heads, queries and keys of the call.

    Raises:
        ArgumentError: the tensor has another shape, or a format that is not looked up.
    """
    if x.dim() != 4 or x.dtype not in _FORMATS:
        got, must = (
            f"{x.dtype} of shape {tuple(x.shape)}",
            "bool, float16, bfloat16 or float32 with 4 dimensions",
        )
        raise ArgumentError(name, got, must)
    dims, indices = [], []
    for (axis, index), size, wanted in zip(_AXES, x.shape, sizes, strict=True):
        if size == 1:
            dims.append("1")
            indices.append("0")
        elif size == wanted or (axis == "seqlen_k" and size > wanted):
            dims.append(axis if size == wanted else f"{name}_keys")
            indices.append(index)
        else:
            must = f"{wanted} or 1 for {axis}, as (batch, heads, queries, keys) are {sizes}"
            raise ArgumentError(name, f"shape {tuple(x.shape)}", must)
    return f"{_FORMATS[x.dtype]}[{', '.join(dims)}]", f"{name}[{', '.join(indices)}]"
