"""What a call passes for keys that lie in pages: the sizes of a table and of caches, from shapes alone.

Which pages a table names lies in device memory and is read by `check_pages` alone, where somebody asks.
"""

from collections.abc import Mapping
from typing import Any

import torch

from attngen.bind.tensors import check_plain
from attngen.errors import ArgumentError
from attngen.expr import LARGEST_LENGTH, LARGEST_TILE
from attngen.plan import BLOCK_TABLE, CACHE_ROWS, PAGES_BY_ROW, why_by_row

_TABLE, _ROWS, _SKIPPED = BLOCK_TABLE.name, CACHE_ROWS.name, "leftpad_k"


def page_sizes(
    sizes: Mapping[str, int], batch: int, said_by: str, passed: Mapping[str, Any]
) -> dict[str, int]:
    """What follows from a call's table: table_rows, max_pages, pages_by_row, and seqlen_k, which bounds lengths.

    Args:
        sizes: that follow from k and v: pages, page_size.
        batch: requests of the call.
        said_by: the argument that tells how many they are.
        passed: what the call passes by name.

    Raises:
        ArgumentError: a cache without pages, or of pages without rows; a table that is no matrix of contiguous rows, or
            has not a row for each request; requests that say otherwise which row is theirs than by a row of integers.
    """
    for size, got, must in (
        ("pages", "0 pages", "at least one"),
        ("page_size", "pages of 0 rows", "of one or more"),
    ):
        if not sizes[size]:
            raise ArgumentError("k", got, must)
    table = _integers(_TABLE, passed.get(_TABLE), 2, "batch, max_pages", "the pages of each request")
    rows, most = table.shape
    if most > 1 and table.stride(1) != 1:
        cure = f"pass {_TABLE}.contiguous()"
        raise ArgumentError(
            _TABLE, f"stride {table.stride(1)} in the last dimension", "1 (contiguous rows)", cure
        )
    if max(1, most) * sizes["page_size"] > LARGEST_LENGTH:
        got = f"{most} pages of {sizes['page_size']} rows"
        raise ArgumentError(_TABLE, got, f"at most 2^30 - {LARGEST_TILE} rows", f"pass {_TABLE}[:, :n]")
    if passed.get(_ROWS) is None and rows != batch:
        must = f"{batch}, as {said_by} has {batch} sequences"
        raise ArgumentError(_TABLE, f"{rows} rows", must, f"{_ROWS} says which rows are meant")
    if passed.get(_ROWS) is not None:
        own = _integers(_ROWS, passed[_ROWS], 1, "batch", "which row of the table is each request's")
        if own.shape[0] > 1 and own.stride(0) != 1:
            cure = f"pass {_ROWS}.contiguous()"
            raise ArgumentError(_ROWS, f"stride {own.stride(0)}", "contiguous elements", cure)
        if batch and not rows:
            raise ArgumentError(_TABLE, "0 rows", f"at least one, for {batch} sequences")
    why = why_by_row(sizes["page_size"], skips_keys=passed.get(_SKIPPED) is not None)
    return {
        "table_rows": rows,
        "max_pages": most,
        "seqlen_k": most * sizes["page_size"],
        PAGES_BY_ROW: int(bool(why)),
    }


def _integers(name: str, x: Any, dims: int, form: str, what: str) -> torch.Tensor:
    """A tensor of so many dimensions; its type is checked with that of others that are passed by name."""
    if not isinstance(x, torch.Tensor):
        got = "nothing" if x is None else type(x).__name__
        raise ArgumentError(name, got, f"a torch tensor: i32[{form}], {what}")
    check_plain(name, x)
    if x.dim() != dims:
        raise ArgumentError(name, f"{x.dim()} dimensions", f"{dims}: i32[{form}]")
    return x


def check_pages(sizes: Mapping[str, int], passed: Mapping[str, torch.Tensor]) -> None:
    """Read which pages hold the keys of each request, which synchronises, and refuse what no cache has.

    Args:
        sizes: of the call.
        passed: its tensors, by the names of their values; lengths are those that there are.

    Raises:
        ArgumentError: a row that the table has not, or a page that the caches have not and that a request needs.
    """
    rows = list(range(sizes["batch"]))
    if _ROWS in passed:
        rows = passed[_ROWS].tolist()
        for request, row in enumerate(rows):
            if not 0 <= row < sizes["table_rows"]:
                must = f"0 to {sizes['table_rows'] - 1}, a row of {_TABLE}"
                raise ArgumentError(f"{_ROWS}[{request}]", str(row), must)
    table, used = passed[_TABLE].tolist(), passed["seqused_k"].tolist()
    skipped = passed["leftpad_k"].tolist() if "leftpad_k" in passed else [0] * len(used)
    for request, (row, first, end) in enumerate(zip(rows, skipped, used, strict=True)):
        for place in range(first // sizes["page_size"], -(-end // sizes["page_size"]) if first < end else 0):
            if not 0 <= (page := table[row][place]) < sizes["pages"]:
                must = f"0 to {sizes['pages'] - 1}: request {request} has keys in that page of k"
                raise ArgumentError(f"{_TABLE}[{row}, {place}]", str(page), must)
