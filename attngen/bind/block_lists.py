"""What a call passes for given blocks: a map, or lists as other libraries have them; only shapes are looked at."""

from collections.abc import Mapping
from typing import Any

import torch

from attngen.errors import ArgumentError, shown
from attngen.expr import GIVEN_BLOCKS
from attngen.plan import BLOCK_LISTS, BLOCK_MAP, MORE_BLOCK_LISTS, Manifest, evaluate_formula

BLOCKS = GIVEN_BLOCKS.name
"""The argument of a call."""
_NAMES_OF_LISTS = (
    ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"),
    ("mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx"),
)
"""Attributes of lists: those of torch's BlockMask, and of FlashAttention-4's block-sparse tensors; counts, indices, and
both of the blocks in which a mask hides nothing, which may be None."""
_SIZE_NAMES = ("BLOCK_SIZE", "block_size")
"""Attributes that say rows and keys of a block, where lists have them."""
_TAKES = (
    "a bool tensor (batch or 1, heads or 1, blocks of rows, blocks of keys), lists (counts, indices) of kept blocks, "
    "or an object that has these, as torch's BlockMask"
)


def spread_blocks(passed: Mapping[str, Any], block_m: int, block_n: int) -> Mapping[str, Any]:
    """What a call passes by name, with lists of kept blocks each by the name of its own value.

    Args:
        passed: by name; `blocks` may be a map, which is left as it is, a tuple of counts and indices, or an object
            whose attributes are such.
        block_m: rows of a block.
        block_n: keys of a block.

    Raises:
        ArgumentError: `blocks` is none of these, or its blocks are of another size.
    """
    blocks = passed.get(BLOCKS)
    if blocks is None or isinstance(blocks, torch.Tensor):
        return passed
    lists = _lists_of(blocks)
    sizes = _sizes_of(blocks)
    if sizes is not None and sizes != (block_m, block_n):
        got = f"{type(blocks).__name__} with blocks of {sizes}"
        cure = f"make it with blocks of {(block_m, block_n)}, or compile with {_written(sizes)}"
        raise ArgumentError(BLOCKS, got, f"blocks of {(block_m, block_n)}, as the spec has them", cure)
    rest = {name: value for name, value in passed.items() if name != BLOCKS}
    return {**dict(zip((*BLOCK_LISTS, *MORE_BLOCK_LISTS), lists, strict=False)), **rest}


def _sizes_of(blocks: Any) -> tuple[int, int] | None:
    """Rows and keys of a block, as lists say it: two numbers, or one for both."""
    said = next((size for name in _SIZE_NAMES if (size := getattr(blocks, name, None)) is not None), None)
    if said is None:
        return None
    sizes = (said, said) if isinstance(said, int) else tuple(said) if isinstance(said, tuple | list) else ()
    if len(sizes) != 2 or not all(isinstance(size, int) for size in sizes):
        got = f"{type(blocks).__name__} with blocks of {shown(said)}"
        raise ArgumentError(BLOCKS, got, "two numbers, rows and keys of a block, or one for both")
    return sizes


def _written(sizes: tuple[int, int]) -> str:
    block_m, block_n = sizes
    return f"blocks: {{block_m: {block_m}, block_n: {block_n}}}"


def _lists_of(blocks: Any) -> tuple[torch.Tensor, ...]:
    """Counts and indices, and those of a second kind where there is one."""
    names = next((names for names in _NAMES_OF_LISTS if hasattr(blocks, names[0])), None)
    if names is not None:
        found: list[Any] = [getattr(blocks, name, None) for name in names]
    elif isinstance(blocks, tuple) and len(blocks) == 2:
        found = [*blocks]
    else:
        raise ArgumentError(BLOCKS, type(blocks).__name__, _TAKES)
    if found[2:] == [None, None]:
        del found[2:]
    for name, x in zip(names or ("counts", "indices"), found, strict=False):
        if not isinstance(x, torch.Tensor):
            raise ArgumentError(BLOCKS, f"{type(x).__name__} for {name}", "a torch tensor of i32")
    return _alike(found)


def _alike(lists: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Lists for as many batches and heads: what is one for all is repeated by a stride of 0."""
    leading = [x.shape[:2] for x in lists]
    if len(set(leading)) == 1 or any(x.dim() < 3 for x in lists):
        return tuple(lists)
    most = [max(sizes) for sizes in zip(*leading, strict=True)]
    if any(size not in (1, largest) for sizes in leading for size, largest in zip(sizes, most, strict=True)):
        got = " and ".join(str(tuple(x.shape)) for x in lists)
        raise ArgumentError(BLOCKS, f"lists of {got}", "lists for the same batches and heads")
    return tuple(x.expand(*most, *x.shape[2:]) for x in lists)


def sizes_of_map(manifest: Manifest, passed: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes of the map of a call, by the names of its dimensions; none where calls pass no blocks.

    What is no tensor of at least two dimensions says nothing of them, and is refused where it is looked at.

    Raises:
        ArgumentError: a call passes no blocks, or those of other batches or heads than it has.
    """
    if BLOCK_MAP not in manifest.value_of:
        return {}
    of_lists = next((passed[name] for name in BLOCK_LISTS if name in passed), None)
    found = passed.get(BLOCKS, of_lists)
    if found is None:
        raise ArgumentError(BLOCKS, "nothing", _TAKES)
    if not isinstance(found, torch.Tensor) or found.dim() < 2:
        return {}
    for size, name, noun in zip(found.shape, ("batch", "num_heads_q"), ("batches", "heads"), strict=False):
        if size not in (1, sizes[name]):
            must = f"{sizes[name]}, as q has, or 1 for all"
            raise ArgumentError(BLOCKS, f"shape {tuple(found.shape)} with {size} {noun}", must)
    batch, heads, *counts = GIVEN_BLOCKS.dims
    bound = {str(batch): found.shape[0], str(heads): found.shape[1]}
    shape = manifest.value_of[BLOCK_MAP].shape[2:]
    return bound | {str(dim): evaluate_formula(size, sizes) for dim, size in zip(counts, shape, strict=True)}
