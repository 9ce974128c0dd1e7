"""Keys that lie in pages: what a call passes for them, and how a kernel divides by a page's size.

K and V are caches of pages, each of `page_size` rows of all heads. The row of a table that is a request's lists the
pages of its keys, in order: its key i is row i % page_size of page table[i // page_size]. Where a row lies is worked
out in one place: `offset_in_pages` (templates/device/pages.cuh) for kernels, `PageTable` (simulate/page_table.py) for
the simulator.
"""

from attngen.plan.call import Value
from attngen.plan.formulas import Formula, common_power
from attngen.plan.lengths import Lengths

PAGES_OF_HEADS = ("page", "seqlen", "head", "column")
"""Axes of a cache, of which the rows of a page run along the sequence."""
BLOCK_TABLE = Value("block_table", "i32", ("table_rows", "max_pages"), "given", "block_table")
"""Which pages hold the keys of each request; entries behind the last page that it needs mean nothing."""
CACHE_ROWS = Value("cache_batch_idx", "i32", ("batch",), "given", "cache_batch_idx", optional=True)
"""Which row of the table is each request's; without it the row of its number."""
SMALLEST_PIECE = 8
"""Rows of a page that the copy engine brings at least at a time: the 128-byte swizzle repeats every eight."""
PAGE_DIVISION = ("page_size.magic", "page_size.shift")
"""Values of the parameters by which kernels divide by a page's size, see `division_by`."""
LARGEST_DIVIDEND = 2**30
"""Rows are fewer, as all lengths are."""


def page_values(lengths: Lengths) -> tuple[Value, ...]:
    """What a call passes by name to say where its keys lie, beside what says how many they are."""
    return (BLOCK_TABLE, CACHE_ROWS) if lengths.is_paged("keys") else ()


def piece_of(block: int) -> Formula:
    """Rows of a page that follow one another in every block of so many keys, and so come by one copy."""
    return common_power("page_size", block)


def why_by_row(page_size: int, skips_keys: bool) -> str:
    """Why the copy engine cannot bring the keys of a call by pieces of pages; nothing where it can.

    Args:
        page_size: rows of a page.
        skips_keys: what counts of a request may begin anywhere in a page.
    """
    if page_size % SMALLEST_PIECE:
        return f"pages of {page_size} rows are no multiple of {SMALLEST_PIECE}"
    return "with leftpad_k keys begin anywhere in a page" if skips_keys else ""


def division_by(size: int) -> dict[str, int]:
    """The numbers by which a row, below 2^30, is divided by the size of a page, from 1 to 2^30: by the name of each.

    row // size = (row * magic) >> (30 + shift), exactly, since magic = 2^(30 + shift) / size is rounded up by less than
    1, shift being the bits of size - 1: what that adds to the quotient, row / 2^(30 + shift), is less than 1 / size.
    Source: Granlund and Montgomery, "Division by invariant integers using multiplication", theorem 4.2.
    """
    shift = (size - 1).bit_length()
    magic = -(-(LARGEST_DIVIDEND << shift) // size)
    return dict(zip(PAGE_DIVISION, (magic, shift), strict=True))
