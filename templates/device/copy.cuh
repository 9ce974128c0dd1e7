// How a block's threads share the chunks of a tile: thread t copies chunks t, t + kThreads, ... Where a pass is a
// multiple of eight rows, a thread keeps its column and its exchange from pass to pass.
template <class Tile, int kThreads>
struct Passes {
  static constexpr int kCount = (Tile::kRows * Tile::kChunks + kThreads - 1) / kThreads;
  static constexpr bool kKeepsColumn = kThreads % (8 * Tile::kChunks) == 0;
  static constexpr bool kEven = Tile::kRows * Tile::kChunks % kThreads == 0;
};

// Which of so many threads this is; a warp may copy by itself.
template <int kThreads>
DEV u32 thread_of() { return kThreads == 32 ? threadIdx.x % 32 : threadIdx.x; }

// Start copying a tile: rows first_row .. of a head whose rows stand `stride` elements apart. Rows at or past
// `end_row` and columns past the head dim arrive as zeros. kOnce: nobody else reads them soon.
template <class Tile, int kThreads, bool kOnce = false, class Stride>
DEV void load_tile(u32 dst, const u16* head, Stride stride, int first_row, int end_row) {
  using Pass = Passes<Tile, kThreads>;
  const u32 thread = stay_in_loop(thread_of<kThreads>());
#pragma unroll
  for (int i = 0; i < Pass::kCount; ++i) {
    const u32 index = i * kThreads + thread, row = index / Tile::kChunks, chunk = index % Tile::kChunks;
    if (!Pass::kEven && row >= Tile::kRows) break;
    const bool valid = first_row + (int)row < end_row && (Tile::kValidChunks == Tile::kChunks || chunk < Tile::kValidChunks);
    const u16* src = valid ? head + row_offset(stride, first_row + (i64)row) + chunk * 8 : head;
    if (kOnce) cp_async_16_by(dst + Tile::address(row, chunk), src, valid ? 16 : 0, read_once());
    else cp_async_16(dst + Tile::address(row, chunk), src, valid ? 16 : 0);
  }
}

// load_tile where every row is known to exist.
template <class Tile, int kThreads>
DEV void load_whole_tile(u32 dst, const u16* head, i64 stride, int first_row) {
  using Pass = Passes<Tile, kThreads>;
  const u32 thread = stay_in_loop(thread_of<kThreads>());
  if (Pass::kEven && Pass::kKeepsColumn && Tile::kValidChunks == Tile::kChunks) {
    const u32 row = thread / Tile::kChunks, chunk = thread % Tile::kChunks;
    const u16* src = head + (first_row + (i64)row) * stride + chunk * 8;
    dst += Tile::address(row, chunk);
#pragma unroll
    for (int i = 0; i < Pass::kCount; ++i) {
      cp_async_16(dst + i * kThreads * 16, src, 16);
      src += kThreads / Tile::kChunks * stride;
    }
  } else {
    load_tile<Tile, kThreads>(dst, head, stride, first_row, first_row + Tile::kRows);
  }
}

// load_tile of rows that lie in pages. A warp copies rows of its own, at most 32 at a time: each of its lanes looks up where one of them
// is, and then all lanes copy chunks of every row.
template <class Tile, int kThreads, bool kOnce = false>
DEV void load_paged_tile(u32 dst, const PagedRows& rows, int first_row, int end_row) {
  constexpr int kWarps = kThreads / 32, kShare = (Tile::kRows + kWarps - 1) / kWarps, kGroup = kShare < 32 ? kShare : 32;
  constexpr bool kEven = Tile::kRows % (kWarps * kGroup) == 0 && kGroup * Tile::kChunks % 32 == 0;
  const u32 thread = stay_in_loop(thread_of<kThreads>()), lane = thread % 32;
#pragma unroll
  for (int i = 0; i < (kShare + kGroup - 1) / kGroup; ++i) {
    const u32 first = (i * kWarps + thread / 32) * kGroup;
    const int own_row = first_row + first + lane;
    const i64 own_offset = own_row < end_row ? offset_in_pages(rows, own_row) : 0;
#pragma unroll
    for (int j = 0; j < (kGroup * Tile::kChunks + 31) / 32; ++j) {
      const u32 index = j * 32 + lane, of_group = index / Tile::kChunks, chunk = index % Tile::kChunks, row = first + of_group;
      const u16* src = rows.cache + __shfl_sync(~0u, own_offset, of_group);
      const bool valid = first_row + (int)row < end_row && (Tile::kValidChunks == Tile::kChunks || chunk < Tile::kValidChunks);
      if (kEven || (of_group < kGroup && row < Tile::kRows)) {
        const u16* from = valid ? src + chunk * 8 : rows.cache;
        if (kOnce) cp_async_16_by(dst + Tile::address(row, chunk), from, valid ? 16 : 0, read_once());
        else cp_async_16(dst + Tile::address(row, chunk), from, valid ? 16 : 0);
      }
    }
  }
}

// Flip the sign of every element of a tile.
template <class Tile, int kThreads>
DEV void negate_tile(u32 tile) {
#pragma unroll 1
  for (int index = threadIdx.x; index < Tile::kRows * Tile::kChunks; index += kThreads) {
    uint4 x = load_shared_16(tile + index * 16);
    x.x ^= 0x80008000u, x.y ^= 0x80008000u, x.z ^= 0x80008000u, x.w ^= 0x80008000u;
    store_shared_16(tile + index * 16, x);
  }
}

// Write zeros over those of rows first .. end - 1 of a tile of keys that are not `shown`; row 0 is key first_key. kThreads share
// the rows.
template <class Tile, int kThreads, class Shown>
DEV void zero_hidden_rows(u32 tile, int first, int end, int first_key, Shown shown) {
  constexpr int kChunks = Tile::kBytes / Tile::kRows / 16;
#pragma unroll 1
  for (int row = first + stay_in_loop(threadIdx.x) % kThreads; row < end; row += kThreads) {
    if (!shown(first_key + row)) {
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) store_shared_16(tile + Tile::address(row, chunk), uint4{0, 0, 0, 0});
    }
  }
}

// Round an accumulator and write it to a tile; each warp writes its own rows.
template <class Element, class Tile, int kRowTiles, int kColTiles>
DEV void copy_tile(u32 dst, const float (&acc)[kRowTiles][kColTiles][4]) {
#pragma unroll
  for (int r = 0; r < 2 * kRowTiles; ++r) {
#pragma unroll
    for (int j = 0; j < kColTiles; ++j) {
      const u32 address = dst + Tile::address(row_in_tile<kRowTiles>(r), j) + lane_column() * 2;
      store_shared(address, Element::pack(acc[r / 2][j][r % 2 * 2], acc[r / 2][j][r % 2 * 2 + 1]));
    }
  }
}

// Write a tile to rows first_row .. of a head; rows at or past `end_row` are dropped.
template <class Tile, int kThreads, class Stride>
DEV void store_tile(u16* head, Stride stride, int first_row, int end_row, u32 src) {
#pragma unroll 4
  for (int index = threadIdx.x; index < Tile::kRows * Tile::kValidChunks; index += kThreads) {
    const int row = index / Tile::kValidChunks, chunk = index % Tile::kValidChunks;
    if (first_row + row < end_row) {
      *(uint4*)(head + row_offset(stride, first_row + row) + chunk * 8) = load_shared_16(src + Tile::address(row, chunk));
    }
  }
}
