"""Tables of extremes filled by torch: what the kernels that fill them are held against. torch is imported late."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from attngen.expr.tables import HEAD_NAMES, Table
from attngen.expr.torch_value import evaluate

if TYPE_CHECKING:
    import torch

_SIZE_OF = {"b": "batch", "h": "num_heads_q", "h_kv": "num_heads_kv"}


def fill_tables(
    tables: Iterable[Table],
    sizes: Mapping[str, int],
    scalars: Mapping[str, Any],
    tensors: Mapping[str, "torch.Tensor"],
    block_m: int,
    block_n: int,
) -> dict[str, "torch.Tensor"]:
    """The tensors `{name}.lo` and `{name}.hi` of every table.

    Args:
        tables: those of `tile_classes`.
        sizes: of the call, a value for each of `declarations.SIZE_NAMES`.
        scalars: a value for each scalar that a lookup's indices read.
        tensors: what the mask looks up.
        block_m: rows of a tile.
        block_n: keys of a tile.
    """
    filled: dict[str, torch.Tensor] = {}
    for table in tables:
        filled |= _fill(table, sizes, scalars, tensors, {"q": block_m, "k": block_n})
    return filled


def _fill(
    table: Table,
    sizes: Mapping[str, int],
    scalars: Mapping[str, Any],
    tensors: Mapping[str, "torch.Tensor"],
    blocks: Mapping[str, int],
) -> dict[str, "torch.Tensor"]:
    import torch

    device = tensors[table.lookup.name].device
    letters = [letter for letter in "qk" if letter in table.reads]
    heads = [index.name for index in table.indices if index.name in HEAD_NAMES]
    rank = len(heads) + 2 * len(letters)  # (b, h, h_kv), then the blocks of q and k, then their rows and keys
    env: dict[str, Any] = {"seqlen_q": sizes["seqlen_q"], "seqlen_k": sizes["seqlen_k"], **scalars}

    def along(axis: int, size: int) -> "torch.Tensor":
        shape = [1] * rank
        shape[axis] = size
        return torch.arange(size, device=device).reshape(shape)

    for axis, index in enumerate(heads):
        env[index] = along(axis, sizes[_SIZE_OF[index]])
    for place, letter in enumerate(letters):
        axis, block, length = len(heads) + place, blocks[letter], sizes[f"seqlen_{letter}"]
        tile, row = along(axis, -(-length // block)), along(axis + len(letters), block)
        # The last row stands in for those past the end, so that it changes no extreme.
        env["q_idx" if letter == "q" else "kv_idx"] = (tile * block + row).clamp(max=length - 1)
    elements = torch.as_tensor(evaluate(table.lookup, env, tensors))
    within = tuple(range(rank - len(letters), rank))
    if table.lookup.type == "bool":
        numbers = elements.to(torch.uint8)
        least, greatest = numbers.amin(within).bool(), numbers.amax(within).bool()
    else:
        least, greatest = elements.amin(within), elements.amax(within)
    if table.lookup.type == "f32":
        least, greatest = (
            least.nan_to_num(-torch.inf, torch.inf, -torch.inf),
            greatest.nan_to_num(torch.inf, torch.inf, -torch.inf),
        )
    return {table.least.name: least, table.greatest.name: greatest}
