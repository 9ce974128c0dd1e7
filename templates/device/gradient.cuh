// Write an accumulator to a tile of f32; each warp writes its own rows.
template <class Tile, int kRowTiles, int kColTiles>
DEV void copy_tile_f32(u32 dst, const float (&acc)[kRowTiles][kColTiles][4]) {
#pragma unroll
  for (int r = 0; r < 2 * kRowTiles; ++r) {
#pragma unroll
    for (int j = 0; j < kColTiles; ++j) {
      const u32 address = dst + Tile::address(row_in_tile<kRowTiles>(r), 2 * j + lane_column() / 4) + lane_column() % 4 * 4;
      store_shared_8(address, acc[r / 2][j][r % 2 * 2], acc[r / 2][j][r % 2 * 2 + 1]);
    }
  }
}

// Of two 16-bit elements of a register those that are told to stay; the others become 0.
DEV void keep_halves(u32& pair, const bool (&stay)[2]) {
  pair &= (stay[0] ? 0x0000ffffu : 0u) | (stay[1] ? 0xffff0000u : 0u);
}

// Eight neighbours of a row in device memory: 16 bytes of 16-bit elements.
template <class Format, class Pair>
struct PackedRow {
  using Element = u16;
  DEV Eight load(const u16* p) { return eight<Pair>(*(const uint4*)p); }
  DEV void store(u16* p, const Eight& e) {
    *(uint4*)p = {Format::pack(e.x[0], e.x[1]), Format::pack(e.x[2], e.x[3]), Format::pack(e.x[4], e.x[5]), Format::pack(e.x[6], e.x[7])};
  }
};

// Eight neighbours of a row in device memory: f32.
struct RowF32 {
  using Element = float;
  DEV Eight load(const float* p) {
    const float4 low = *(const float4*)p, high = *(const float4*)(p + 4);
    return {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  }
  DEV void store(float* p, const Eight& e) {
    *(float4*)p = {e.x[0], e.x[1], e.x[2], e.x[3]}, *(float4*)(p + 4) = {e.x[4], e.x[5], e.x[6], e.x[7]};
  }
};

// Write the rows of a tile of f32 that kThreads threads own, in order, to rows first_row .. of a head, or add them to what stands
// there; rows at or past `end_row` are dropped.
template <class Tile, class Row, int kRows, int kThreads>
DEV void store_gradient(typename Row::Element* head, i64 stride, int first_row, int end_row, u32 src, bool adds) {
  constexpr int kEights = Tile::kValidChunks / 2;
#pragma unroll 1
  for (int index = threadIdx.x % kThreads; index < kRows * kEights; index += kThreads) {
    const int row = threadIdx.x / kThreads * kRows + index / kEights, column = index % kEights * 8;
    if (first_row + row >= end_row) continue;
    typename Row::Element* p = head + (first_row + row) * stride + column;
    const uint4 low = load_shared_16(src + Tile::address(row, column / 4)), high = load_shared_16(src + Tile::address(row, column / 4 + 1));
    const u32 bits[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    Eight given = {};
    if (adds) given = Row::load(p);
#pragma unroll
    for (int i = 0; i < 8; ++i) given.x[i] = adds ? given.x[i] + __uint_as_float(bits[i]) : __uint_as_float(bits[i]);
    Row::store(p, given);
  }
}
