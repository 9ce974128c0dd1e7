// A tile in panels of 128 bytes, as the copy engine writes and wgmma reads them: the 16-byte chunks of a row are exchanged
// with the row's number, and the pattern repeats every eight rows (1024 bytes).
template <int kRows_, int kCols, int kElementBytes = 2>
struct PanelTile {
  static constexpr int kRows = kRows_, kPanelCols = 128 / kElementBytes, kPanels = (kCols + kPanelCols - 1) / kPanelCols;
  static constexpr int kPanelBytes = kRows * 128, kBytes = kPanels * kPanelBytes, kStepCols = 32 / kElementBytes;
  static constexpr u32 kSignBits = kElementBytes == 2 ? 0x80008000u : 0x80808080u;
  // Byte offset of the panel that column `column` begins, or of the row of that number of a tile that is transposed.
  DEV constexpr u32 columns_at(int column) { return kElementBytes == 1 ? column * 128 : column / kPanelCols * kPanelBytes; }
  // Byte offset of a chunk from the start of the tile.
  DEV u32 address(u32 row, u32 chunk) { return chunk / 8 * kPanelBytes + row * 128 + (chunk % 8 ^ row % 8) * 16; }
};

// Start filling a tile with what lies at first_column, first_row of a head; `full` completes when it has landed.
template <class Tile>
DEV void load_panels(u32 dst, const TensorMap& map, u32 full, int first_column, int first_row, int head, int batch, u64 keep) {
  mbarrier_arrive_expect(full, Tile::kBytes);
#pragma unroll
  for (int i = 0; i < Tile::kPanels; ++i) tma_load(dst + i * Tile::kPanelBytes, map, full, first_column + i * Tile::kPanelCols, first_row, head, batch, keep);
}

// Start filling a stage with a number of each of kRows rows, beside a tile whose arrival `full` waits for.
template <int kRows>
DEV void load_row_numbers(u32 dst, const float* src, u32 full) {
  mbarrier_expect(full, kRows * 4);
  bulk_load(dst, src, kRows * 4, full);
}

// Round an accumulator and write it to this warpgroup's 64 rows of a tile, each warp its sixteen.
template <class Element, class Tile, int kColTiles>
DEV void stage_tile(u32 dst, const float (&acc)[1][kColTiles][4]) {
  const u32 row = threadIdx.x / 32 * 16 + threadIdx.x % 16, half = threadIdx.x / 16 % 2;
#pragma unroll
  for (int j = 0; j < kColTiles; j += 2) {
    const float(&x)[4] = acc[0][j];
    if (j + 1 < kColTiles) {
      const float(&y)[4] = acc[0][j + 1 < kColTiles ? j + 1 : j];
      stmatrix_x4(dst + Tile::address(row, j + half), Element::pack(x[0], x[1]), Element::pack(x[2], x[3]), Element::pack(y[0], y[1]), Element::pack(y[2], y[3]));
    } else {
      stmatrix_x2(dst + Tile::address(row, j), Element::pack(x[0], x[1]), Element::pack(x[2], x[3]));
    }
  }
}

// Start writing this warpgroup's 64 rows of a tile to device memory.
template <class Tile>
DEV void store_panels(const TensorMap& map, u32 src, int warpgroup, int first_row, int head, int batch) {
#pragma unroll
  for (int i = 0; i < Tile::kPanels; ++i) tma_store(map, src + i * Tile::kPanelBytes + warpgroup * 64 * 128, i * Tile::kPanelCols, first_row + warpgroup * 64, head, batch);
  tma_store_commit();
}

// Flip the sign of this warpgroup's 64 rows of a tile.
template <class Tile>
DEV void negate_own_rows(u32 tile, int warpgroup) {
#pragma unroll 1
  for (int index = threadIdx.x % 128; index < Tile::kPanels * 512; index += 128) {
    const u32 address = tile + index / 512 * Tile::kPanelBytes + warpgroup * 64 * 128 + index % 512 * 16;
    uint4 x = load_shared_16(address);
    x.x ^= Tile::kSignBits, x.y ^= Tile::kSignBits, x.z ^= Tile::kSignBits, x.w ^= Tile::kSignBits;
    store_shared_16(address, x);
  }
}

// Write zeros over rows first .. end - 1 of a tile; the threads of a warpgroup share them.
template <class Tile>
DEV void zero_rows(u32 tile, int first, int end) {
#pragma unroll
  for (int i = 0; i < Tile::kPanels; ++i) {
#pragma unroll 1
    for (int chunk = first * 8 + threadIdx.x % 128; chunk < end * 8; chunk += 128) store_shared_16(tile + i * Tile::kPanelBytes + chunk * 16, uint4{0, 0, 0, 0});
  }
}

// Start copying this warpgroup's 64 rows of a tile: rows first_row .. of a head. Rows at or past `end_row` and columns past the head dim
// arrive as zeros.
template <class Tile, int kValid, class Stride>
DEV void load_own_rows(u32 dst, const u16* head, Stride stride, int first_row, int end_row, int warpgroup) {
  constexpr int kChunks = Tile::kPanels * 8;
#pragma unroll
  for (int i = 0; i < kChunks / 2; ++i) {
    const int index = i * 128 + threadIdx.x % 128, row = warpgroup * 64 + index / kChunks, chunk = index % kChunks;
    const bool valid = first_row + row < end_row && chunk < kValid / 8;
    cp_async_16(dst + Tile::address(row, chunk), valid ? head + row_offset(stride, first_row + row) + chunk * 8 : head, valid ? 16 : 0);
  }
}

// Write those of this warpgroup's 64 rows of a tile that lie before `end_row` to rows first_row .. of a head.
template <class Tile, int kValid, class Stride>
DEV void store_own_rows(u16* head, Stride stride, int first_row, int end_row, u32 src, int warpgroup) {
  constexpr int kChunks = kValid / 8;
#pragma unroll 1
  for (int index = threadIdx.x % 128; index < 64 * kChunks; index += 128) {
    const int row = warpgroup * 64 + index / kChunks, chunk = index % kChunks;
    if (first_row + row < end_row) *(uint4*)(head + row_offset(stride, first_row + row) + chunk * 8) = load_shared_16(src + Tile::address(row, chunk));
  }
}

// Write a tile of pairs, A operand of wgmma, to this warpgroup's 64 columns of a tile, each warp its sixteen: rows become columns.
template <class Tile, int kSteps>
DEV void stage_transposed(u32 dst, const u32 (&x)[1][kSteps][4]) {
  const u32 lane = threadIdx.x % 32;
  dst += Tile::address(lane / 16 * 8 + lane % 8, threadIdx.x / 32 * 2 + lane / 8 % 2);
#pragma unroll
  for (int i = 0; i < kSteps; ++i) stmatrix_x4_trans(dst + i * 16 * 128, x[0][i][0], x[0][i][1], x[0][i][2], x[0][i][3]);
}

// Write zeros over this warpgroup's 64 columns of a tile: a panel.
template <class Tile>
DEV void clear_own_columns(u32 tile, int warpgroup) {
#pragma unroll
  for (int chunk = threadIdx.x % 128; chunk < Tile::kRows * 8; chunk += 128) store_shared_16(tile + warpgroup * Tile::kPanelBytes + chunk * 16, uint4{0, 0, 0, 0});
}
