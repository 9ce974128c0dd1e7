"""How kernels find rows that lie in pages: the device functions themselves, by g++."""

import ctypes
import random
from functools import cache

import pytest
import torch

from attngen.emit.device import used_by
from attngen.plan import division_by
from tests.quantize.on_cpu import CpuFunction, CpuKernels

LARGEST = 2**31 - 1
FIELDS = ("start", "pages", "page_size", "magic", "shift", "first_row", "end_row")
LOOK_UP = "__ldg(of.table + place)"
NOTED = """static int furthest_place;
static unsigned noted(unsigned place) {
  furthest_place = std::max(furthest_place, (int)place);
  return place;
}
"""
"""The furthest entry of the table that was read."""
GUARD, PATTERN = 512 * 8, 0x5A5A
PARAMS = """namespace probe {
struct Params {
  const int* table;
  const u16* cache;
  i64 stride_page, stride_row;
  int start, pages, page_size, magic, shift, first_row, end_row;
  unsigned char* out;
  int* furthest;
};
DEV PagedRows rows_of(const Params& p) {
  return {p.table, p.cache, p.stride_page, p.stride_row, p.start, p.pages, p.page_size, (u32)p.magic, (u32)p.shift};
}
"""
OFFSETS = """extern "C" __global__ void __launch_bounds__(32)
probe(const __grid_constant__ Params params) {
  for (int row = params.first_row + threadIdx.x; row < params.end_row; row += 32) {
    ((i64*)params.out)[row - params.first_row] = offset_in_pages(rows_of(params), row);
  }
}
}  // namespace probe
"""
LOAD = """constexpr int kGuard = 512;
constexpr uint4 kPattern = {0x5a5a5a5a, 0x5a5a5a5a, 0x5a5a5a5a, 0x5a5a5a5a};
using Tile = SmemTile<%d, %d, %d>;
extern "C" __global__ void __launch_bounds__(256)
probe(const __grid_constant__ Params params) {
  extern __shared__ __align__(16) unsigned char smem[];
  furthest_place = -1;
  for (int i = threadIdx.x; i < kGuard; i += %d) {
    at_shared<uint4>(smem_address(smem) + Tile::kBytes + 16 * i) = kPattern;
  }
  __syncthreads();
  load_paged_tile<Tile, %d>(smem_address(smem), rows_of(params), params.first_row, params.end_row);
  __syncthreads();
  for (int i = threadIdx.x; i < Tile::kRows * Tile::kChunks; i += %d) {
    const u32 row = i / Tile::kChunks, chunk = i %% Tile::kChunks;
    ((uint4*)params.out)[i] = load_shared_16(smem_address(smem) + Tile::address(row, chunk));
  }
  for (int i = threadIdx.x; i < kGuard; i += %d) {
    ((uint4*)params.out)[Tile::kRows * Tile::kChunks + i] = load_shared_16(smem_address(smem) + Tile::kBytes + 16 * i);
  }
  *params.furthest = furthest_place;
}
}  // namespace probe
"""


class Params(ctypes.Structure):
    """The struct of the probes."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("table", "cache")),
        *((name, ctypes.c_int64) for name in ("stride_page", "stride_row")),
        *((name, ctypes.c_int32) for name in FIELDS),
        ("out", ctypes.c_void_p),
        ("furthest", ctypes.c_void_p),
    ]


@cache
def compiled(probe: str) -> CpuFunction:
    """A probe, with the functions of the library that it calls, of which one tells which entries it reads."""
    text = PARAMS + probe
    library = "\n\n".join(used_by(text))
    assert library.count(LOOK_UP) == 1
    library = library.replace(LOOK_UP, "__ldg(of.table + noted(place))")
    return CpuKernels("\n\n".join([NOTED, library, text])).function("probe", 0, False)


def pointer(x: torch.Tensor) -> int:
    return x.data_ptr()


@pytest.mark.parametrize("page_size", [1, 2, 3, 5, 16, 24, 127, 528, 7808, 2**20 + 1, 2**29 + 1, 2**30 - 512])
def test_every_row_below_2_30_is_in_its_page(page_size: int) -> None:
    """First and last rows of pages, and random ones, up to the longest sequence; offsets have 64 bits."""
    draw, longest = random.Random(page_size), 2**30 - 512
    pages = min(-(-longest // page_size), 2**20)
    longest = min(longest, pages * page_size)
    table = torch.arange(pages, dtype=torch.int32)
    edges = [page_size * draw.randrange(pages) for _ in range(20)] + [longest]
    rows = {0, longest - 1, *(draw.randrange(longest) for _ in range(20))}
    rows |= {row for edge in edges for row in (edge - 1, edge, edge + 1) if 0 <= row < longest}
    stride_page, stride_row, found = 2**33, 3, torch.zeros(1, dtype=torch.int64)
    for row in sorted(rows):
        start = draw.choice((0, row // 2, row))
        numbers = dict(
            zip(FIELDS, (start, LARGEST, page_size, *division_by(page_size).values()), strict=False)
        )
        numbers |= {"first_row": row - start, "end_row": row - start + 1}
        compiled(OFFSETS).run(
            ctypes.byref(
                Params(
                    table=pointer(table),
                    stride_page=stride_page,
                    stride_row=stride_row,
                    out=pointer(found),
                    **numbers,
                )
            ),
            1,
            32,
        )
        assert found.item() == row // page_size * stride_page + row % page_size * stride_row, row


@pytest.mark.parametrize(
    ("rows", "cols", "valid", "threads"),
    [
        (64, 128, 128, 128),
        (64, 48, 40, 128),
        (16, 64, 64, 256),
        (128, 32, 32, 64),
        (16, 256, 256, 96),
    ],
)
def test_a_tile_of_rows_in_pages_is_that_of_rows_that_follow_one_another(
    rows: int, cols: int, valid: int, threads: int
) -> None:
    """Pages of any size, in any order, of which one number is no page's; past the end, and past a row, zeros.

    All else is poison, and so is what the table says of rows that nobody asks for, which is not read; nothing is
    written behind the tile.
    """
    make, probe = torch.Generator().manual_seed(0), compiled(LOAD % (rows, cols, valid, *4 * (threads,)))
    for page_size, start, first_row, end_row in (
        (1, 0, 0, 2 * rows),
        (3, 5, rows, rows + 1),
        (16, 7, rows, 2 * rows - 3),
        (24, 0, 2 * rows, 2 * rows),
        (528, 600, 0, rows),
    ):
        stored = torch.randint(1, 2**15, (start + end_row, valid), generator=make).to(torch.int16)
        needed = -(-(start + end_row) // page_size)
        pages = torch.randperm(2 * needed, generator=make)[: needed - 1].tolist()
        pages.append(2 * needed)  # past the last page of the cache, which has one more: kept within
        cache = torch.full((2 * needed + 1, page_size, 2, valid + 8), -1, dtype=torch.int16)
        for place, page in enumerate(pages):
            own = stored[place * page_size : (place + 1) * page_size]
            cache[page, : len(own), 1, :valid] = own
        table = torch.full((needed + 4,), LARGEST, dtype=torch.int32)
        table[: needed - 1] = torch.tensor(pages[:-1], dtype=torch.int32)
        if start >= page_size:
            table[: start // page_size] = -7
        head, found = cache[:, :, 1, :valid], torch.zeros(rows * cols + GUARD, dtype=torch.int16)
        furthest = torch.zeros(1, dtype=torch.int32)
        numbers = (start, len(cache), page_size, *division_by(page_size).values(), first_row, end_row)
        params = Params(
            pointer(table),
            pointer(head),
            head.stride(0),
            head.stride(1),
            *numbers,
            pointer(found),
            pointer(furthest),
        )
        probe.run(ctypes.byref(params), 1, threads)
        expected = torch.zeros(rows, cols, dtype=torch.int16)
        own = stored[start + first_row : start + end_row][:rows]
        expected[: len(own), :valid] = own
        assert torch.equal(found[:-GUARD].view(rows, cols), expected) and (found[-GUARD:] == PATTERN).all()
        assert furthest.item() < needed and (furthest.item() >= 0) == (end_row > first_row)


def test_pages_may_lie_further_apart_than_32_bits_count() -> None:
    """The second page begins more than 2^31 elements behind the first."""
    step = 2**31 + 64
    cache = torch.empty(step + 4096, dtype=torch.int16)
    cache[: 16 * 64] = -1
    cache[step : step + 16 * 64] = torch.arange(16 * 64, dtype=torch.int16)
    table, found = torch.ones(1, dtype=torch.int32), torch.zeros(16 * 64 + GUARD, dtype=torch.int16)
    numbers = (0, 2, 16, *division_by(16).values(), 0, 16)
    params = Params(pointer(table), pointer(cache), step, 64, *numbers, pointer(found), pointer(table))
    compiled(LOAD % (16, 64, 64, *4 * (256,))).run(ctypes.byref(params), 1, 256)
    assert torch.equal(found[:-GUARD], torch.arange(16 * 64, dtype=torch.int16))
