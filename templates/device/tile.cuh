// A tile in shared memory, kCols wide of which kValid mean something; a chunk of 16 bytes has kElements. Rows follow one another
// without padding; chunks of a row are exchanged so that eight rows of one column lie on different banks.
template <int kRows_, int kCols, int kValid, int kElements = 8>
struct SmemTile {
  static constexpr int kRows = kRows_, kChunks = kCols / kElements, kValidChunks = kValid / kElements;
  static constexpr int kRowBytes = kChunks * 16, kBytes = kRows * kRowBytes;
  static constexpr int kSpan = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : kChunks % 2 == 0 ? 2 : 1;
  // What the chunks of a row are exchanged by; the same for rows 8 apart.
  DEV u32 exchange(u32 row) { return row / (8 / kSpan) % kSpan; }
  // Byte offset of a chunk from the start of the tile.
  DEV u32 address(u32 row, u32 chunk) { return row * kRowBytes + (chunk ^ exchange(row)) * 16; }
};

// Which row of the tile element `i` of a per-row vector stands for: a warp owns 16 * kRowTiles rows, a lane two of
// every 16 (PTX ISA: fragments of mma.m16n8k16). Where each warp has all rows, it counts as the first.
template <int kRowTiles>
DEV int row_in_tile(int i, int warp = threadIdx.x / 32) {
  const int lane = threadIdx.x % 32;
  return (warp * kRowTiles + i / 2) * 16 + i % 2 * 8 + lane / 4;
}

// The first of the two neighbouring columns that this lane holds of every 8.
DEV int lane_column() { return threadIdx.x % 4 * 2; }

// A key bound, kept within 0 .. end; some bounds need 64 bits.
DEV int clamp_key(int key, int end) { return max(0, min(key, end)); }
DEV int clamp_key(i64 key, int end) { return (int)max((i64)0, min(key, (i64)end)); }

// Rows of all heads of a group in turn: row i * group + j is row i of its head j.
struct PackedRows {
  i64 stride, stride_head;
  int group;
};

// Where a row of a head stands whose rows are so many elements apart, or are packed.
DEV i64 row_offset(i64 stride, i64 row) { return row * stride; }
DEV i64 row_offset(const PackedRows& rows, i64 row) {
  const int index = (int)row / rows.group;
  return index * rows.stride + ((int)row - index * rows.group) * rows.stride_head;
}
