"""How a tile of which every row exists comes to shared memory: the device function itself, by g++."""

import ctypes

import pytest
import torch

from attngen.emit.device import used_by
from tests.quantize.on_cpu import CpuKernels

PROBE = """namespace probe {{
struct Params {{
  const u16* rows;
  u16* found;
  int first_row;
}};
using Tile = SmemTile<{rows}, {cols}, {valid}>;
extern "C" __global__ void __launch_bounds__({threads})
load(const __grid_constant__ Params params) {{
  extern __shared__ __align__(16) unsigned char smem[];
  const u32 tile = smem_address(smem);
  constexpr int kAll = Tile::kBytes / 16 + {threads};
  load_whole_tile<Tile, {threads}>(tile, params.rows, {stride}, params.first_row);
  __syncthreads();
  for (int i = threadIdx.x; i < kAll; i += {threads}) {{
    const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
    ((uint4*)params.found)[i] = load_shared_16(tile + (row < Tile::kRows ? Tile::address(row, chunk) : i * 16));
  }}
}}
}}  // namespace probe
"""


@pytest.mark.parametrize(
    ("rows", "cols", "valid", "threads"),
    [
        (48, 32, 32, 256),  # fewer chunks than threads
        (48, 64, 64, 256),  # threads that a pass has no chunk for, in the last
        (64, 64, 64, 128),
        (16, 128, 128, 32),
        (48, 96, 96, 128),  # a pass that does not keep its columns
        (32, 48, 40, 64),  # columns that are padded
    ],
)
def test_a_tile_and_nothing_behind_it_is_written(rows: int, cols: int, valid: int, threads: int) -> None:
    """Every row arrives, its padded columns as zeros, and what follows the tile in shared memory stays 0."""
    stride, first = valid + 8, 3
    text = PROBE.format(rows=rows, cols=cols, valid=valid, threads=threads, stride=stride)
    kernel = CpuKernels("\n\n".join([*used_by(text), text])).function("load", 0, False)

    class Params(ctypes.Structure):
        _fields_ = [("rows", ctypes.c_void_p), ("found", ctypes.c_void_p), ("first_row", ctypes.c_int32)]

    source = torch.randint(1, 2**15, (first + rows + threads, stride), dtype=torch.int16)
    found = torch.zeros(rows * cols + 8 * threads, dtype=torch.int16)
    kernel.run(ctypes.byref(Params(source.data_ptr(), found.data_ptr(), first)), 1, threads)
    tile, behind = found[: rows * cols].view(rows, cols), found[rows * cols :]
    assert torch.equal(tile[:, :valid], source[first : first + rows, :valid])
    assert (tile[:, valid:] == 0).all() and (behind == 0).all()
