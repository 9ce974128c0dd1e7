"""How a gradient leaves the registers: the device functions themselves, by g++, of every width of a tile."""

import ctypes

import pytest
import torch

from attngen.emit.device import used_by
from tests.quantize.on_cpu import CpuKernels

PROBE = """namespace probe {{
struct Params {{
  float* out;
  i64 stride;
  int first_row, end_row, adds;
}};
using Tile = SmemTile<64, {cols}, {valid}, 4>;
extern "C" __global__ void __launch_bounds__(128)
store(const __grid_constant__ Params params) {{
  extern __shared__ __align__(16) unsigned char smem[];
  float acc[1][{cols} / 8][4];
  for (int r = 0; r < 2; ++r)
    for (int j = 0; j < {cols} / 8; ++j)
      for (int e = 0; e < 2; ++e) acc[0][j][2 * r + e] = row_in_tile<1>(r) * 1000 + 8 * j + lane_column() + e;
  copy_tile_f32<Tile>(smem_address(smem), acc);
  __syncthreads();
  const auto& [out, stride, first_row, end_row, adds] = params;
  store_gradient<Tile, RowF32, Tile::kRows, 128>(out, stride, first_row, end_row, smem_address(smem), adds);
}}
}}  // namespace probe
"""
"""Each element of an accumulator is a thousand times its row, and its column."""


@pytest.mark.matrix(most=5)
@pytest.mark.parametrize(
    ("cols", "valid"), [(32, 32), (48, 40), (64, 64), (128, 128), (192, 192), (256, 256)]
)
@pytest.mark.parametrize("adds", [False, True])
def test_rows_and_columns_arrive_where_they_belong(cols: int, valid: int, adds: bool) -> None:
    """Or are added to what is there; padded columns, rows past the end and what lies between rows are left alone."""
    text = PROBE.format(cols=cols, valid=valid)
    kernel = CpuKernels("\n\n".join([*used_by(text), text])).function("store", 0, False)

    class Params(ctypes.Structure):
        _fields_ = [("out", ctypes.c_void_p), ("stride", ctypes.c_int64)] + [
            (name, ctypes.c_int32) for name in ("first_row", "end_row", "adds")
        ]

    out = torch.randint(0, 9, (150, valid + 4), generator=torch.Generator().manual_seed(0)).float()
    before = out.clone()
    kernel.run(ctypes.byref(Params(out.data_ptr(), out.stride(0), 64, 123, adds)), 1, 128)
    expected = before.clone()
    made = 1000.0 * torch.arange(59)[:, None] + torch.arange(valid)
    expected[64:123, :valid] = made + before[64:123, :valid] if adds else made
    assert torch.equal(out, expected)
