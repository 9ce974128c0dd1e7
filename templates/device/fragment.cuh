// Read an accumulator from rows first_row .. of f32 that stand `stride` elements apart; rows at or past `end_row` read as zero.
template <int kCols, int kRowTiles, int kColTiles>
DEV void load_fragment(float (&acc)[kRowTiles][kColTiles][4], const float* head, int first_row, int end_row, i64 stride) {
#pragma unroll
  for (int r = 0; r < 2 * kRowTiles; ++r) {
    const int row = first_row + row_in_tile<kRowTiles>(r);
#pragma unroll
    for (int j = 0; j < kColTiles; ++j) {
      const bool valid = row < end_row && 8 * j < kCols;
      const float2 x = valid ? *(const float2*)(head + row * stride + 8 * j + lane_column()) : float2{0.f, 0.f};
      acc[r / 2][j][r % 2 * 2] = x.x, acc[r / 2][j][r % 2 * 2 + 1] = x.y;
    }
  }
}

// Write an accumulator to rows first_row .. of f32 that stand `stride` elements apart; rows at or past `end_row` are dropped.
template <int kCols, class Stride, int kRowTiles, int kColTiles>
DEV void store_fragment(float* head, const float (&acc)[kRowTiles][kColTiles][4], int first_row, int end_row, Stride stride) {
#pragma unroll
  for (int r = 0; r < 2 * kRowTiles; ++r) {
    const int row = first_row + row_in_tile<kRowTiles>(r);
#pragma unroll
    for (int j = 0; j < kColTiles; ++j) {
      if (row < end_row && 8 * j < kCols) {
        *(float2*)(head + row_offset(stride, row) + 8 * j + lane_column()) = {acc[r / 2][j][r % 2 * 2], acc[r / 2][j][r % 2 * 2 + 1]};
      }
    }
  }
}

// Read one value per row.
template <int kRowTiles, int kRows>
DEV void load_rows(float (&dst)[kRows], const float* head, int first_row, int end_row) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = first_row + row_in_tile<kRowTiles>(r);
    dst[r] = row < end_row ? head[row] : 0.f;
  }
}

// Read one value per row, of rows that are all there.
template <int kRowTiles, int kRows>
DEV void load_whole_rows(float (&dst)[kRows], const float* head, int first_row) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) dst[r] = head[first_row + row_in_tile<kRowTiles>(r)];
}

// Read one value per row into the first of the four lanes that share it; the others hold 0.
template <int kRowTiles, int kRows>
DEV void load_rows_partial(float (&dst)[kRows], const float* head, int first_row, int end_row) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = first_row + row_in_tile<kRowTiles>(r);
    dst[r] = row < end_row && threadIdx.x % 4 == 0 ? head[row] : 0.f;
  }
}

// Write one value per row, of this warp's rows or of those of another `warp`.
template <int kRowTiles, int kRows>
DEV void store_rows(float* head, const float (&src)[kRows], int first_row, int end_row, int warp = threadIdx.x / 32) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = first_row + row_in_tile<kRowTiles>(r, warp);
    if (row < end_row && threadIdx.x % 4 == 0) head[row] = src[r];
  }
}

// store_rows where rows are packed.
template <int kRowTiles, int kRows>
DEV void store_rows(float* head, const float (&src)[kRows], int first_row, int end_row, const PackedRows& rows, int warp = threadIdx.x / 32) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = first_row + row_in_tile<kRowTiles>(r, warp);
    if (row < end_row && threadIdx.x % 4 == 0) head[row_offset(rows, row)] = src[r];
  }
}

// Fill registers.
template <int N>
DEV void fill(float (&x)[N], float value) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = value;
}

// Multiply the registers of a tile.
template <int kRowTiles, int kColTiles>
DEV void multiply(float (&x)[kRowTiles][kColTiles][4], float factor) {
#pragma unroll
  for (int i = 0; i < kRowTiles * kColTiles * 4; ++i) x[i / 4 / kColTiles][i / 4 % kColTiles][i % 4] *= factor;
}

// Fill the registers of a tile.
template <int kRowTiles, int kColTiles>
DEV void fill(float (&x)[kRowTiles][kColTiles][4], float value) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int j = 0; j < kColTiles; ++j) fill(x[r][j], value);
  }
}

// Write this warpgroup's accumulator to shared memory as its registers stand: by warp, four registers, lane.
template <int kColTiles>
DEV void stage_registers(u32 dst, const float (&acc)[1][kColTiles][4]) {
  dst += threadIdx.x % 128 / 32 * (kColTiles * 512) + threadIdx.x % 32 * 16;
#pragma unroll
  for (int j = 0; j < kColTiles; ++j) {
    const float(&x)[4] = acc[0][j];
    store_shared_16(dst + j * 512, uint4{__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])});
  }
}
