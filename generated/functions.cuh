// bf16: two packed in a register, the matrix instruction that takes them.
struct Bf16 {
  // PTX ISA: cvt.rn.bf16x2.f32; its first source is the upper half.
  DEV u32 pack(float lo, float hi) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
  }
  // D (16x8) += A (16x16) B (16x8). PTX ISA: mma.sync.m16n8k16.
  DEV void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// f16: two packed in a register, the matrix instruction that takes them.
struct F16 {
  // PTX ISA: cvt.rn.f16x2.f32; its first source is the upper half.
  DEV u32 pack(float lo, float hi) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
  }
  // D (16x8) += A (16x16) B (16x8). PTX ISA: mma.sync.m16n8k16.
  DEV void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// e4m3: four packed in a register.
struct E4m3 {
  // Rounded to the nearest, ends at 448. PTX ISA: cvt.rn.satfinite.e4m3x2.f32; its first source is the upper half.
  DEV u32 pack(float a, float b, float c, float d) {
    u32 r;
    asm("{\n"
        ".reg .b16 lo, hi;\n"
        "cvt.rn.satfinite.e4m3x2.f32 lo, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 hi, %4, %3;\n"
        "mov.b32 %0, {lo, hi};\n"
        "}" : "=r"(r) : "f"(a), "f"(b), "f"(c), "f"(d));
    return r;
  }
};

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

// Where a role stands in a ring of kStages stages: the next stage, and the parity of the phase it waits for there.
struct Cursor {
  u32 stage, phase;
};

// Go on to the next stage.
template <int kStages>
DEV void advance(Cursor& at) {
  at.stage += 1;
  if (at.stage == kStages) at.stage = 0, at.phase ^= 1;
}

// Make the barriers of a ring, by the arrivals that complete them: `full` of every stage, then `empty`.
template <int kStages>
DEV void init_ring(u32 ring, u32 fills, u32 releases) {
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    mbarrier_init(ring + 8 * i, fills);
    mbarrier_init(ring + 8 * (kStages + i), releases);
  }
}

template <int kStages>
DEV u32 full(u32 ring, Cursor at) { return ring + 8 * at.stage; }

template <int kStages>
DEV u32 empty(u32 ring, Cursor at) { return ring + 8 * (kStages + at.stage); }

// Draw from a counter for the whole warp; atomicInc wraps it to 0 after `last`.
DEV u32 draw(u32* counter, u32 last) {
  const u32 drawn = threadIdx.x % 32 == 0 ? atomicInc(counter, last) : 0;
  return __shfl_sync(~0u, drawn, 0);
}

// Draw from a counter for the whole block of threads, the number that leaves it at 0 the last. All threads meet.
DEV u32 draw_for_block(u32* counter, u32 last, u32 slot) {
  if (threadIdx.x == 0) store_shared(slot, atomicInc(counter, last));
  __syncthreads();
  return same_in_warp(load_shared(slot));
}

// Wait until a count in device memory has come to one's rank, or past it where lengths lie and sequences share counts;
// what was added before can then be added to, by the copy engine too.
DEV void take_rank(const u32* count, u32 rank) {
  while ((int)(load_acquire(count) - rank) < 0) {
  }
  fence_async_global();
}

// Count what the copy engine has written for this thread, which has waited for it: an end that is seen is a proxy fence.
DEV void pass_rank(u32* count) { add_release(count, 1); }

// The rows of one head of a sequence in K or V, where these are caches of pages: a row of a table lists the pages of the
// sequence's stored rows, of which its own begin at `start`.
struct PagedRows {
  const int* table;
  const u16* cache;  // row 0 of page 0, of the head
  i64 stride_page, stride_row;
  int start, pages, page_size;
  u32 magic, shift;  // i / page_size = (i * magic) >> (30 + shift), for i < 2^30
};

// A page, and a row of it.
struct PageRow {
  int page, row;
};

// Where a row of the sequence is: row i is stored in row i % page_size of page table[i / page_size]. Rows past the sequence's end must
// not be asked for: what the table says there means nothing. A number that no page has is kept within the cache.
DEV PageRow row_in_pages(const PagedRows& of, int row) {
  const u32 stored = of.start + row, place = __umulhi(4 * stored, of.magic) >> of.shift;
  return {max(0, min(__ldg(of.table + place), of.pages - 1)), (int)(stored - place * of.page_size)};
}

// Elements from `cache` to a row of the sequence.
DEV i64 offset_in_pages(const PagedRows& of, int row) {
  const PageRow at = row_in_pages(of, row);
  return at.page * of.stride_page + at.row * of.stride_row;
}

// Rows that follow one another in a page wherever a block of kRows begins, and so come by one copy: a piece.
template <int kRows>
DEV int rows_of_piece(int page_size) {
  return (page_size | kRows) & -(page_size | kRows);
}

// Where the piece of a block that is this lane's lies, the first the first lane's. Those behind the sequence's end are of a page that no
// cache has: they come as zeros.
template <int kRows>
DEV PageRow own_piece(const PagedRows& of, int first_row, int end_row) {
  const int row = first_row + (int)(stay_in_loop(threadIdx.x) % 32) * rows_of_piece<kRows>(of.page_size);
  return row < end_row ? row_in_pages(of, row) : PageRow{of.pages, 0};
}

// load_panels of rows that lie in pages, by a warp, each lane its own piece, of at least eight rows.
template <class Tile>
DEV void load_pieces(u32 dst, const TensorMap& map, u32 full, int page_size, PageRow piece, int head, u64 keep) {
  static_assert(Tile::kRows <= 256, "a piece for each lane");
  const int row = (int)(stay_in_loop(threadIdx.x) % 32) * rows_of_piece<Tile::kRows>(page_size);
  if (row == 0) mbarrier_arrive_expect(full, Tile::kBytes);
  __syncwarp();
  if (row < Tile::kRows) {
#pragma unroll
    for (int i = 0; i < Tile::kPanels; ++i) tma_load(dst + i * Tile::kPanelBytes + row * 128, map, full, i * Tile::kPanelCols, piece.row, head, piece.page, keep);
  }
}

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

// Where the numbers of a row stand in what a warp leaves: its maximum, what exponents refer to, and its sum, behind O, which lies as lanes
// hold it.
template <int kShareBytes, int kRowTiles>
DEV u32 numbers_of_row(u32 share, int i) { return share + kShareBytes - 256 * kRowTiles + 16 * row_in_tile<kRowTiles>(i, 0); }

// Leave in shared memory what a warp's own keys have come to.
template <int kShareBytes, int kRowTiles, int kColTiles>
DEV void leave_share(u32 share, const float (&o)[kRowTiles][kColTiles][4], const float (&total)[2 * kRowTiles], const float (&row_max)[2 * kRowTiles],
                     const float (&reference)[2 * kRowTiles]) {
#pragma unroll
  for (int t = 0; t < kRowTiles * kColTiles; ++t) {
    const float(&x)[4] = o[t / kColTiles][t % kColTiles];
    store_shared_16(share + (t * 32 + threadIdx.x % 32) * 16, uint4{__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])});
  }
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const uint4 numbers = {__float_as_uint(row_max[i]), __float_as_uint(reference[i]), __float_as_uint(total[i]), 0};
    if (threadIdx.x % 4 == 0) store_shared_16(numbers_of_row<kShareBytes, kRowTiles>(share, i), numbers);
  }
}

// leave_share of exponents that were not taken relative to a maximum.
template <int kShareBytes, int kRowTiles, int kColTiles>
DEV void leave_share(u32 share, const float (&o)[kRowTiles][kColTiles][4], const float (&total)[2 * kRowTiles]) {
  const float none[2 * kRowTiles] = {};
  leave_share<kShareBytes>(share, o, total, none, none);
}

// Of two maxima of a row, each with what exponents refer to, keep the larger.
DEV void keep_larger(float& row_max, float& reference, float other_max, float other_reference) {
  reference = other_max > row_max ? other_reference : reference;
  row_max = fmaxf(row_max, other_max);
}

// What sums under one reference are worth under that of the largest maximum: of two scales the smaller reference may be the greater.
DEV float worth(float reference, float of_largest) { return exp2_approx(-fabsf(reference - of_largest)); }

// Add up what all warps have left, under the largest maximum of each row: sums of rows, and of O the columns that are this warp's, whose
// first kOwn tiles of 8 follow those of the warp before.
template <int kWarps, int kColTiles, int kShareBytes, int kRowTiles, int kOwn>
DEV void join_shares(float (&o)[kRowTiles][kOwn][4], float (&total)[2 * kRowTiles], float (&row_max)[2 * kRowTiles], float (&reference)[2 * kRowTiles],
                     u32 shares, int warp) {
  float weight[kWarps][2 * kRowTiles];
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    uint4 numbers[kWarps];
    row_max[i] = reference[i] = lowest(), total[i] = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      numbers[w] = load_shared_16(numbers_of_row<kShareBytes, kRowTiles>(shares + w * kShareBytes, i));
      keep_larger(row_max[i], reference[i], __uint_as_float(numbers[w].x), __uint_as_float(numbers[w].y));
    }
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      weight[w][i] = worth(__uint_as_float(numbers[w].y), reference[i]);
      total[i] = __fmaf_rn(weight[w][i], __uint_as_float(numbers[w].z), total[i]);
    }
  }
  fill(o, 0.f);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int tile = warp * kOwn + j;
      if (kWarps * kOwn > kColTiles && tile >= kColTiles) continue;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const uint4 x = load_shared_16(shares + w * kShareBytes + ((r * kColTiles + tile) * 32 + threadIdx.x % 32) * 16);
        o[r][j][0] = __fmaf_rn(weight[w][2 * r], __uint_as_float(x.x), o[r][j][0]);
        o[r][j][1] = __fmaf_rn(weight[w][2 * r], __uint_as_float(x.y), o[r][j][1]);
        o[r][j][2] = __fmaf_rn(weight[w][2 * r + 1], __uint_as_float(x.z), o[r][j][2]);
        o[r][j][3] = __fmaf_rn(weight[w][2 * r + 1], __uint_as_float(x.w), o[r][j][3]);
      }
    }
  }
}

// join_shares of exponents that were not taken relative to a maximum: all count alike.
template <int kWarps, int kColTiles, int kShareBytes, int kRowTiles, int kOwn>
DEV void join_shares(float (&o)[kRowTiles][kOwn][4], float (&total)[2 * kRowTiles], u32 shares, int warp) {
  float row_max[2 * kRowTiles], reference[2 * kRowTiles];
  join_shares<kWarps, kColTiles, kShareBytes>(o, total, row_max, reference, shares, warp);
}

// Count a part of a tile, once every thread has left its own of what that has come to; whether all others had been counted. The count
// is back at 0 then. CUDA C++ Programming Guide, "Memory Fence Functions".
DEV bool count_part(u32* ticket, int parts) {
  __syncthreads();
  bool is_last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicInc(ticket, parts - 1) == parts - 1;
    __threadfence();
  }
  return __syncthreads_or(is_last);
}

// count_part by the kThreads threads that have rows of a tile, who meet at a named barrier.
template <int kBarrier, int kThreads>
DEV bool count_part_at(u32* ticket, int parts) {
  named_barrier_sync(kBarrier, kThreads);
  bool is_last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicInc(ticket, parts - 1) == parts - 1;
    __threadfence();
  }
  return named_barrier_or(kBarrier, kThreads, is_last);
}

// What the parts of a tile have left: where that of the first begins, f32 from one to the next for a number a row, and how many there are.
// Without maxima all count alike.
struct PartsOfTile {
  const float *out, *sums, *maxima, *references;
  i64 step;
  int parts;
};

// Which of kLanes lanes that have a row has the largest number, of equal ones the first. None is NaN.
template <int kLanes>
DEV int lane_of_largest(float x) {
  const u32 bits = __float_as_uint(x), ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  u32 largest = ordered;
  if (kLanes == 32) largest = __reduce_max_sync(~0u, ordered);
#pragma unroll
  for (int distance = kLanes == 32 ? 0 : kLanes / 2; distance > 0; distance /= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, distance));
  return __ffs(__ballot_sync(~0u, ordered == largest) >> (threadIdx.x % 32 / kLanes * kLanes)) - 1;
}

// Add up what all parts have left of a row, in their order, under the largest maximum. kLanes lanes have a row, four columns of every
// 4 * kLanes each. It comes from L2: others have written it while this kernel ran. Of the first parts all is asked for before anything
// is needed.
template <int kCols, int kLanes, int kVectors>
DEV void merge_row(float4 (&o)[kVectors], float& total, float& row_max, const PartsOfTile& of, int row) {
  constexpr int kBatch = kVectors <= 2 ? 8 : kVectors <= 4 ? 4 : 2;  // of which kLanes are a multiple
  const int lane = threadIdx.x % kLanes;
  row_max = lowest(), total = 0.f;
  float reference = 0.f, own_sum, own_reference;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) o[v] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
  for (int first = 0; first < of.parts; first += kBatch) {
    float4 x[kBatch][kVectors];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float4* from = (const float4*)(of.out + (min(first + i, of.parts - 1) * of.step + row) * kCols) + lane;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) x[i][v] = (v * kLanes + lane) * 4 < kCols ? __ldcg(from + v * kLanes) : float4{0.f, 0.f, 0.f, 0.f};
    }
    if (first % kLanes == 0) {  // each lane keeps the numbers of one of the next parts
      const bool has_own = first + lane < of.parts;
      const i64 own = (first + lane) * of.step + row;
      own_sum = has_own ? __ldcg(of.sums + own) : 0.f;
      own_reference = has_own && of.maxima ? __ldcg(of.references + own) : 0.f;
    }
    if (first == 0 && of.maxima) {
#pragma unroll 1
      for (int part = lane; part < of.parts; part += kLanes) {
        keep_larger(row_max, reference, __ldcg(of.maxima + part * of.step + row), __ldcg(of.references + part * of.step + row));
      }
      const int largest = lane_of_largest<kLanes>(row_max);
      row_max = __shfl_sync(~0u, row_max, largest, kLanes), reference = __shfl_sync(~0u, reference, largest, kLanes);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float its_sum = __shfl_sync(~0u, own_sum, first + i, kLanes), its_reference = __shfl_sync(~0u, own_reference, first + i, kLanes);
      const float weight = first + i < of.parts ? worth(its_reference, reference) : 0.f;
      total = __fmaf_rn(weight, its_sum, total);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        o[v].x = __fmaf_rn(weight, x[i][v].x, o[v].x), o[v].y = __fmaf_rn(weight, x[i][v].y, o[v].y);
        o[v].z = __fmaf_rn(weight, x[i][v].z, o[v].z), o[v].w = __fmaf_rn(weight, x[i][v].w, o[v].w);
      }
    }
  }
}

// Write two neighbouring columns, rounded.
template <class Element>
DEV void store_pair(u16* at, float x, float y) { *(u32*)at = Element::pack(x, y); }
template <class Element>
DEV void store_pair(float* at, float x, float y) { *(float2*)at = {x, y}; }

// Write a row that kLanes lanes have merged, times a factor.
template <class Element, int kCols, int kLanes, class Number, int kVectors>
DEV void store_merged(Number* row, const float4 (&o)[kVectors], float by) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = (v * kLanes + threadIdx.x % kLanes) * 4;
    if (column >= kCols) continue;
    store_pair<Element>(row + column, by * o[v].x, by * o[v].y);
    store_pair<Element>(row + column + 2, by * o[v].z, by * o[v].w);
  }
}

// Write this warp's columns of an accumulator to rows first_row .. , of which those at or past `end_row` are dropped.
template <class Element, int kCols, class Number, class Stride, int kRowTiles, int kOwn>
DEV void store_columns(Number* head, const float (&o)[kRowTiles][kOwn][4], int first_row, int end_row, Stride stride, int warp) {
#pragma unroll
  for (int r = 0; r < 2 * kRowTiles; ++r) {
    const int row = first_row + row_in_tile<kRowTiles>(r, 0);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int column = (warp * kOwn + j) * 8;
      if (row < end_row && column < kCols) {
        store_pair<Element>(head + row_offset(stride, row) + column + lane_column(), o[r / 2][j][r % 2 * 2], o[r / 2][j][r % 2 * 2 + 1]);
      }
    }
  }
}

// acc = A Bᵀ for this warp's rows of A, or those of another `warp`, + acc unless that is to start at zero: both in shared memory, columns
// contracted.
template <class Element, class ATile, class BTile, bool kStartsAtZero, int kUnroll, int kRowTiles, int kColTiles>
DEV void gemm_nt_ss(float (&acc)[kRowTiles][kColTiles][4], u32 a, u32 b, u32 warp = threadIdx.x / 32) {
  const u32 lane = stay_in_loop(threadIdx.x % 32);
  const u32 a_row = warp * kRowTiles * 16 + lane % 16, a_exchange = ATile::exchange(a_row) ^ lane / 16;
  const u32 b_row = lane / 16 * 8 + lane % 8, b_exchange = BTile::exchange(b_row) ^ lane / 8 % 2;
  if (kStartsAtZero) fill(acc, 0.f);
#pragma unroll kUnroll
  for (int k = 0; k < ATile::kChunks; k += 2) {
    const u32 a_column = a + a_row * ATile::kRowBytes + (k ^ a_exchange) * 16;
    const u32 b_column = b + b_row * BTile::kRowBytes + (k ^ b_exchange) * 16;
    u32 a_fragment[kRowTiles][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) ldmatrix_x4(a_fragment[r], a_column + r * 16 * ATile::kRowBytes);
#pragma unroll
    for (int j = 0; j < kColTiles; j += 2) {
      u32 b_fragment[4];
      ldmatrix_x4(b_fragment, b_column + j * 8 * BTile::kRowBytes);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        Element::mma(acc[r][j], a_fragment[r], b_fragment[0], b_fragment[1]);
        Element::mma(acc[r][j + 1], a_fragment[r], b_fragment[2], b_fragment[3]);
      }
    }
  }
}

// acc = A B, + acc unless that is to start at zero: A in registers, rows of B contracted.
template <class Element, class BTile, bool kStartsAtZero, int kRowTiles, int kColTiles, int kSteps>
DEV void gemm_nn_rs(float (&acc)[kRowTiles][kColTiles][4], const u32 (&a)[kRowTiles][kSteps][4], u32 b) {
  const u32 lane = stay_in_loop(threadIdx.x % 32), row = lane % 16, exchange = BTile::exchange(row) ^ lane / 16;
  if (kStartsAtZero) fill(acc, 0.f);
#pragma unroll
  for (int j = 0; j < kColTiles; j += 2) {
    const u32 column = b + row * BTile::kRowBytes + (j ^ exchange) * 16;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      u32 b_fragment[4];
      ldmatrix_x4_trans(b_fragment, column + k * 16 * BTile::kRowBytes);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        Element::mma(acc[r][j], a[r][k], b_fragment[0], b_fragment[1]);
        Element::mma(acc[r][j + 1], a[r][k], b_fragment[2], b_fragment[3]);
      }
    }
  }
}

// Round an accumulator to 16 bits: two neighbouring column tiles of D are one A operand, lane by lane.
template <class Element, int kRowTiles, int kColTiles>
DEV void convert_p(u32 (&p)[kRowTiles][kColTiles / 2][4], const float (&s)[kRowTiles][kColTiles][4]) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int j = 0; j < kColTiles; ++j) {
      p[r][j / 2][j % 2 * 2] = Element::pack(s[r][j][0], s[r][j][1]);
      p[r][j / 2][j % 2 * 2 + 1] = Element::pack(s[r][j][2], s[r][j][3]);
    }
  }
}

// Round an accumulator to 8 bits: four neighbouring column tiles of D are one A operand, lane by lane, of keys in the order
// in which a transposed V holds them.
template <class Element, int kRowTiles, int kColTiles>
DEV void convert_p_8bit(u32 (&p)[kRowTiles][kColTiles / 4][4], const float (&s)[kRowTiles][kColTiles][4]) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int j = 0; j < kColTiles; j += 2) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        p[r][j / 4][j / 2 % 2 * 2 + half] = Element::pack(s[r][j][2 * half], s[r][j][2 * half + 1], s[r][j + 1][2 * half], s[r][j + 1][2 * half + 1]);
      }
    }
  }
}

// Four e4m3 as four f16, exactly, neighbours packed. PTX ISA: cvt.rn.f16x2.e4m3x2.
DEV void f16_of_e4m3(u32& first, u32& second, u32 four) {
  asm("{\n"
      ".reg .b16 lo, hi;\n"
      "mov.b32 {lo, hi}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, lo;\n"
      "cvt.rn.f16x2.e4m3x2 %1, hi;\n"
      "}" : "=r"(first), "=r"(second) : "r"(four));
}

// gemm_nt_ss where B is e4m3, which becomes f16 in registers. Of every 16 columns a lane has four neighbours of B: those are columns
// 2t, 2t + 1, 2t + 8 and 2t + 9 of the instruction, and so they are of A.
template <class Element, class ATile, class BTile, bool kStartsAtZero, int kUnroll, int kRowTiles, int kColTiles>
DEV void gemm_nt_ss_8bit(float (&acc)[kRowTiles][kColTiles][4], u32 a, u32 b, u32 warp = threadIdx.x / 32) {
  const u32 lane = stay_in_loop(threadIdx.x % 32);
  const u32 a_row = warp * kRowTiles * 16 + lane / 4, a_exchange = ATile::exchange(a_row) ^ lane / 2 % 2;
  const u32 b_exchange = BTile::exchange(lane % 8);
  if (kStartsAtZero) fill(acc, 0.f);
#pragma unroll kUnroll
  for (int k = 0; k < BTile::kChunks; ++k) {
    const u32 a_column = a + a_row * ATile::kRowBytes + (2 * k ^ a_exchange) * 16 + lane % 2 * 8;
    const u32 b_column = b + lane % 8 * BTile::kRowBytes + (k ^ b_exchange) * 16;
    u32 a_fragment[kRowTiles][4];
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const uint2 x = load_shared_8(a_column + i * 8 * ATile::kRowBytes);
      a_fragment[i / 2][i % 2] = x.x, a_fragment[i / 2][i % 2 + 2] = x.y;
    }
#pragma unroll
    for (int j = 0; j < kColTiles; j += 4) {
      const u32 group = kColTiles % 4 == 0 ? j + lane / 8 : min(j + lane / 8, kColTiles - 1);
      u32 four[4];
      ldmatrix_x4(four, b_column + group * 8 * BTile::kRowBytes);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (j + i >= kColTiles) break;
        u32 b0, b1;
        f16_of_e4m3(b0, b1, four[i]);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) Element::mma(acc[r][j + i], a_fragment[r], b0, b1);
      }
    }
  }
}

// gemm_nn_rs where B is e4m3, which becomes f16 in registers. What is moved are pairs of columns: of every 16 the even ones come first.
template <class Element, class BTile, bool kStartsAtZero, int kRowTiles, int kColTiles, int kSteps>
DEV void gemm_nn_rs_8bit(float (&acc)[kRowTiles][kColTiles][4], const u32 (&a)[kRowTiles][kSteps][4], u32 b) {
  constexpr int kPairs = kColTiles / 2;
  const u32 lane = stay_in_loop(threadIdx.x % 32), row = lane % 16, exchange = BTile::exchange(row);
  if (kStartsAtZero) fill(acc, 0.f);
#pragma unroll
  for (int j = 0; j < kPairs; j += 2) {
    const u32 chunk = kPairs % 2 == 0 ? j + lane / 16 : min(j + lane / 16, kPairs - 1);
    const u32 column = b + row * BTile::kRowBytes + (chunk ^ exchange) * 16;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      u32 four[4];
      ldmatrix_x4_trans(four, column + k * 16 * BTile::kRowBytes);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (j + i >= kPairs) break;
        u32 even[2], odd[2];  // of two keys each
        f16_of_e4m3(even[0], odd[0], __byte_perm(four[2 * i], 0, 0x3120));
        f16_of_e4m3(even[1], odd[1], __byte_perm(four[2 * i + 1], 0, 0x3120));
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          Element::mma(acc[r][2 * (j + i)], a[r][k], even[0], even[1]);
          Element::mma(acc[r][2 * (j + i) + 1], a[r][k], odd[0], odd[1]);
        }
      }
    }
  }
}

// Keep one of two values and get a lane's in the place of the other: the lanes that differ in a bit of their number exchange them.
DEV void exchange_over(int bit, float& first, float& second) {
  const bool keeps_second = threadIdx.x & bit;
  const float got = __shfl_xor_sync(~0u, keeps_second ? first : second, bit);
  if (keeps_second) first = got;
  else second = got;
}

// The columns of an accumulator that gemm_nn_rs_8bit has left where all others have them: of every 16 a lane holds four neighbours, and is
// to hold two of each eight.
template <int kRowTiles, int kColTiles>
DEV void order_columns(float (&o)[kRowTiles][kColTiles][4]) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int j = 0; j < kColTiles; j += 2) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        float x0 = o[r][j][e], x1 = o[r][j + 1][e], x2 = o[r][j][e + 1], x3 = o[r][j + 1][e + 1];
        exchange_over(1, x0, x2), exchange_over(1, x1, x3);
        exchange_over(2, x0, x2), exchange_over(2, x1, x3);
        o[r][j][e] = x0, o[r][j][e + 1] = x1, o[r][j + 1][e] = x2, o[r][j + 1][e + 1] = x3;
      }
    }
  }
}

// The larger of two numbers of bf16 that are packed and another, by their magnitudes as bits.
DEV u32 larger_bits(u32 top, u32 pair) { return max(top, max(pair & 0x7fff, pair >> 16 & 0x7fff)); }

// Two numbers of bf16 that are packed, times a factor, as f16.
DEV u32 f16_of_bf16(u32 pair, float factor) { return F16::pack(__uint_as_float(pair << 16) * factor, __uint_as_float(pair & 0xffff0000) * factor); }

// The powers of two that bring the largest number of each row of a tile of bf16 to 2^14 or above, 2^126 at most; and scale is divided
// by it, which is 1 where it has not been written. A quad of lanes takes the rows whose scales it holds.
template <class Tile, int kRowTiles, bool kIsFirst>
DEV void find_powers(u32 tile, float (&powers)[2 * kRowTiles], float (&scale)[2 * kRowTiles], int warp) {
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const u32 row = row_in_tile<kRowTiles>(i, warp);
    u32 top = 0;
    for (u32 chunk = threadIdx.x % 4; chunk < Tile::kChunks; chunk += 4) {
      const uint4 x = load_shared_16(tile + Tile::address(row, chunk));
      top = larger_bits(larger_bits(larger_bits(larger_bits(top, x.x), x.y), x.z), x.w);
    }
    top = max(top, __shfl_xor_sync(~0u, top, 1));
    top = max(top, __shfl_xor_sync(~0u, top, 2));
    const int power = min(126, 141 - (int)(top >> 7));
    powers[i] = __int_as_float((127 + power) << 23);
    const float inverse = __int_as_float((127 - power) << 23);
    scale[i] = kIsFirst ? inverse : scale[i] * inverse;
  }
}

// Make the rows of a tile of bf16 f16, each times its power of two.
template <class Tile, int kRowTiles>
DEV void fit_rows(u32 tile, const float (&powers)[2 * kRowTiles], int warp) {
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const u32 row = row_in_tile<kRowTiles>(i, warp);
    for (u32 chunk = threadIdx.x % 4; chunk < Tile::kChunks; chunk += 4) {
      const u32 address = tile + Tile::address(row, chunk);
      const uint4 x = load_shared_16(address);
      store_shared_16(address, uint4{f16_of_bf16(x.x, powers[i]), f16_of_bf16(x.y, powers[i]), f16_of_bf16(x.z, powers[i]), f16_of_bf16(x.w, powers[i])});
    }
  }
}

// Start copying the descale of each of some keys, which `of` gives the address of, or 0 for none; kThreads share them. Those of none, and at
// or past `end`, arrive as zeros.
template <int kThreads, class Of>
DEV void load_descales(u32 dst, const float* descales, int keys, int first_key, int end, Of of) {
#pragma unroll 1
  for (int i = stay_in_loop(thread_of<kThreads>()); i < keys; i += kThreads) {
    const float* src = first_key + i < end ? of(first_key + i) : 0;
    cp_async_4(dst + 4 * i, src ? src : descales, src ? 4 : 0);
  }
}

// Multiply the columns of a tile by numbers in shared memory, times a factor.
template <int kRowTiles, int kColTiles>
DEV void scale_columns(float (&s)[kRowTiles][kColTiles][4], u32 by, float factor) {
#pragma unroll
  for (int j = 0; j < kColTiles; ++j) {
    const float2 pair = load_shared_floats(by + 4 * (8 * j + lane_column()));
    const float even = pair.x * factor, odd = pair.y * factor;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) s[r][j][0] *= even, s[r][j][1] *= odd, s[r][j][2] *= even, s[r][j][3] *= odd;
  }
}

// Let a reference, the same in all rows, be a power of two that none of some numbers in shared memory passes, nor one before; and factor what
// the one before is of it. Numbers that are not negative are ordered as their bits.
template <int kRows>
DEV void raise_reference(float (&reference)[kRows], float (&factor)[kRows], u32 numbers, int count) {
  u32 top = __float_as_uint(0x1p-126f);
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < count; i += 32) top = max(top, load_shared(numbers + 4 * i));
  top = min(__reduce_max_sync(~0u, top), __float_as_uint(0x1p126f));
  const float raised = fmaxf(reference[0], __uint_as_float(top + 0x7fffff & 0x7f800000));
  fill(factor, reference[0] / raised);
  fill(reference, raised);
}

// Keep the compiler from moving or copying registers that wgmma reads or writes behind its back.
template <int kRowTiles, int kColTiles>
DEV void pin(float (&x)[kRowTiles][kColTiles][4]) {
#pragma unroll
  for (int i = 0; i < kRowTiles * kColTiles * 4; ++i) asm volatile("" : "+f"(x[i / 4 / kColTiles][i / 4 % kColTiles][i % 4])::"memory");
}

template <int kRowTiles, int kColTiles>
DEV void pin(u32 (&x)[kRowTiles][kColTiles][4]) {
#pragma unroll
  for (int i = 0; i < kRowTiles * kColTiles * 4; ++i) asm volatile("" : "+r"(x[i / 4 / kColTiles][i / 4 % kColTiles][i % 4])::"memory");
}

// What wgmma takes for a matrix in panels that is contracted along its rows (K-major): eight rows 1024 bytes apart.
// PTX ISA: matrix descriptor of wgmma, 128-byte swizzle.
DEV u64 k_major(u32 address) { return 1ull << 62 | 64ull << 32 | 1ull << 16 | (u64)((address & 0x3ffff) >> 4); }

// What wgmma takes for a matrix in panels that is contracted down its columns (MN-major): panels kPanelBytes apart, eight rows
// 1024 bytes.
template <u32 kPanelBytes>
DEV u64 mn_major(u32 address) { return 1ull << 62 | 64ull << 32 | (u64)(kPanelBytes >> 4) << 16 | (u64)((address & 0x3ffff) >> 4); }

// Start acc = A Bᵀ for this warpgroup's 64 rows of A, + acc unless that is to start at zero: kDepth columns contracted.
template <class ATile, class BTile, int kDepth, bool kStartsAtZero, int kColTiles>
DEV void issue_gemm_nt_ss(float (&acc)[1][kColTiles][4], u32 a, u32 b, int warpgroup) {
  pin(acc);
  wgmma_fence();
  const u64 a_matrix = k_major(a + warpgroup * 64 * 128), b_matrix = k_major(b);
#pragma unroll
  for (int k = 0; k < kDepth / ATile::kStepCols; ++k) {  // a step is 32 bytes, 4 times to a panel; addresses are in 16 bytes
    wgmma(acc, a_matrix + (k / 4 * ATile::kPanelBytes + k % 4 * 32) / 16, b_matrix + (k / 4 * BTile::kPanelBytes + k % 4 * 32) / 16, k > 0 || !kStartsAtZero);
  }
  wgmma_commit();
  pin(acc);
}

// Start acc = A B, A in registers, + acc unless that is to start at zero: rows of B contracted.
template <class BTile, bool kStartsAtZero, int kColTiles, int kSteps>
DEV void issue_gemm_nn_rs(float (&acc)[1][kColTiles][4], u32 (&a)[1][kSteps][4], u32 b) {
  pin(acc);
  pin(a);
  wgmma_fence();
  const u64 b_matrix = mn_major<BTile::kPanelBytes>(b);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) wgmma(acc, a[0][k], b_matrix + k * 16 * 128 / 16, k > 0 || !kStartsAtZero);
  wgmma_commit();
  pin(acc);
}

// Start acc = A Bᵀ, A in registers, + acc unless that is to start at zero: columns of B contracted.
template <class BTile, bool kStartsAtZero, int kColTiles, int kSteps>
DEV void issue_gemm_nt_rs(float (&acc)[1][kColTiles][4], u32 (&a)[1][kSteps][4], u32 b) {
  pin(acc);
  pin(a);
  wgmma_fence();
  const u64 b_matrix = k_major(b);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) wgmma(acc, a[0][k], b_matrix + (k / 4 * BTile::kPanelBytes + k % 4 * 32) / 16, k > 0 || !kStartsAtZero);
  wgmma_commit();
  pin(acc);
}

// Start acc = A B, both in shared memory, for the 64 rows of A of a number, + acc unless that is to start at zero: rows of B contracted.
template <class ATile, class BTile, int kDepth, bool kStartsAtZero, int kColTiles>
DEV void issue_gemm_nn_ss(float (&acc)[1][kColTiles][4], u32 a, u32 b, int rows) {
  pin(acc);
  wgmma_fence();
  const u64 a_matrix = k_major(a + rows * 64 * 128), b_matrix = mn_major<BTile::kPanelBytes>(b);
#pragma unroll
  for (int k = 0; k < kDepth / ATile::kStepCols; ++k) {
    wgmma_rows(acc, a_matrix + (k / 4 * ATile::kPanelBytes + k % 4 * 32) / 16, b_matrix + k * 16 * 128 / 16, k > 0 || !kStartsAtZero);
  }
  wgmma_commit();
  pin(acc);
}

// Read the first columns of this warpgroup's 64 rows of a tile, as A operand of wgmma.
template <class Tile, int kSteps>
DEV void keep_columns(u32 (&kept)[1][kSteps][4], u32 tile) {
  const u32 lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) ldmatrix_x4(kept[0][k], tile + Tile::address(row, 2 * k + lane / 16));
}

// issue_gemm_nt_ss where the first columns of A are in registers too, and are taken from there.
template <class ATile, class BTile, int kDepth, bool kStartsAtZero, int kColTiles, int kKept>
DEV void issue_gemm_nt_kept(float (&acc)[1][kColTiles][4], const u32 (&kept)[1][kKept][4], u32 a, u32 b, int warpgroup) {
  pin(acc);
  wgmma_fence();
  const u64 a_matrix = k_major(a + warpgroup * 64 * 128), b_matrix = k_major(b);
#pragma unroll
  for (int k = 0; k < kDepth / ATile::kStepCols; ++k) {
    const u64 of_b = b_matrix + (k / 4 * BTile::kPanelBytes + k % 4 * 32) / 16;
    if (k < kKept) wgmma_columns(acc, kept[0][k < kKept ? k : 0], of_b, k > 0 || !kStartsAtZero);
    else wgmma(acc, a_matrix + (k / 4 * ATile::kPanelBytes + k % 4 * 32) / 16, of_b, k > 0 || !kStartsAtZero);
  }
  wgmma_commit();
  pin(acc);
}

// A scale, FLT_MIN where it would be less: a score of -inf times it stays -inf.
DEV float normal_scale(float scale) { return fmaxf(scale, 0x1p-126f); }

// Scales of the scores of a block: those of rows times K's scale of each group of columns, which lies in shared memory. In
// log2 units they meet scores of -inf, and stay normal numbers.
template <bool kInNaturalUnits, int kGroups>
DEV void read_score_scales(float (&dst)[kGroups][2], const float (&of_rows)[1][2], u32 staged) {
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const float of_keys = __uint_as_float(load_shared(staged + 4 * g));
#pragma unroll
    for (int i = 0; i < 2; ++i) dst[g][i] = kInNaturalUnits ? of_rows[0][i] * of_keys : normal_scale(of_rows[0][i] * of_keys);
  }
}

// Multiply the scores of a block by the scale of each key, which lie in shared memory.
template <int kGroups>
DEV void scale_keys(float (&s)[1][kGroups][4], u32 staged) {
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const uint2 pair = load_shared_8(staged + 4 * (i * 8 + lane_column()));
    const float even = __uint_as_float(pair.x), odd = __uint_as_float(pair.y);
    s[0][i][0] *= even, s[0][i][1] *= odd, s[0][i][2] *= even, s[0][i][3] *= odd;
  }
}

// V's scale of each group of columns in relation to the largest of the head; e4m3 rounds P to 0 long before 2^-32.
template <int kGroups>
DEV void read_value_weights(float (&weight)[kGroups][2], const float (&top)[2], u32 staged) {
#pragma unroll
  for (int g = 0; g < kGroups; ++g) fill(weight[g], fmaxf(__fdividef(__uint_as_float(load_shared(staged + 4 * g)), top[0]), 0x1p-32f));
}

// Copy a value per row.
template <int N>
DEV void copy_rows(float (&dst)[N], const float (&src)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) dst[i] = src[i];
}

// The largest value among the four lanes that share a row.
DEV float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 1));
}

// The sum over the four lanes that share a row.
DEV float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 2);
  return x + __shfl_xor_sync(~0u, x, 1);
}

// What exponents are taken relative to: the maximum, or 0 for a row that has seen no key.
DEV float exponent_reference(float row_max) { return row_max == -infinity() ? 0.f : row_max; }

// Keep the scores of columns before end[row], counted from this lane's first; the others become -inf.
template <int kRowTiles, int kColTiles>
DEV void mask_scores(float (&s)[kRowTiles][kColTiles][4], const int (&end)[2 * kRowTiles]) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int j = 0; j < kColTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[r][j][e] = 8 * j + e % 2 < end[2 * r + e / 2] ? s[r][j][e] : -infinity();
    }
  }
}

// Keep the scores of columns from first[row] on, counted likewise.
template <int kRowTiles, int kColTiles>
DEV void mask_scores_before(float (&s)[kRowTiles][kColTiles][4], const int (&first)[2 * kRowTiles]) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int j = 0; j < kColTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[r][j][e] = 8 * j + e % 2 >= first[2 * r + e / 2] ? s[r][j][e] : -infinity();
    }
  }
}

// How many groups of columns have a scale of their own: one where all share a number.
template <class Scale>
struct GroupsOf {
  static constexpr int kCount = 1;
};
template <int kGroups, int N>
struct GroupsOf<float[kGroups][N]> {
  static constexpr int kCount = kGroups;
};

// The scale of a group of columns and a row.
DEV float scale_of(float scale, int, int) { return scale; }
template <int kGroups, int N>
DEV float scale_of(const float (&scale)[kGroups][N], int group, int row) { return scale[group][row]; }

// The largest scaled score of row i of this lane; unscaled where all columns share a scale, which comes after.
template <int kRowTiles, int kColTiles, class Scale>
DEV float largest_score(const float (&s)[kRowTiles][kColTiles][4], const Scale& scale_log2, int i) {
  constexpr int kGroups = GroupsOf<Scale>::kCount;
  float top = -infinity();
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    float largest = -infinity();
#pragma unroll
    for (int t = 0; t < kColTiles / kGroups; ++t) {
      const float(&x)[4] = s[i / 2][g * kColTiles / kGroups + t];
      largest = fmaxf(largest, fmaxf(x[i % 2 * 2], x[i % 2 * 2 + 1]));
    }
    top = kGroups == 1 ? largest : fmaxf(top, __fmul_ru(largest, scale_of(scale_log2, g, i)));
  }
  return top;
}

// The largest score of row i, or 0 if that is larger: numbers that are not negative are ordered as the integers of their bits, and
// of integers one instruction takes the largest of three. Programming Guide: DPX.
template <int kRowTiles, int kColTiles, class Scale>
DEV float largest_positive_score(const float (&s)[kRowTiles][kColTiles][4], const Scale& scale_log2, int i) {
  constexpr int kGroups = GroupsOf<Scale>::kCount;
  float top = 0.f;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    int largest = 0;
#pragma unroll
    for (int t = 0; t < kColTiles / kGroups; ++t) {
      const float(&x)[4] = s[i / 2][g * kColTiles / kGroups + t];
      largest = max(max(largest, __float_as_int(x[i % 2 * 2])), __float_as_int(x[i % 2 * 2 + 1]));
    }
    top = kGroups == 1 ? __int_as_float(largest) : fmaxf(top, __fmul_ru(__int_as_float(largest), scale_of(scale_log2, g, i)));
  }
  return top;
}

// ---- the maximum, where operands have scales of their own: row_max is in log2 units, rounded up, so that no exponent is positive

// Of row i: row_max = max(row_max, scaled top), alpha = 2^(old - new).
template <int kGroups, int N>
DEV void raise_row_max(float (&row_max)[N], float (&alpha)[N], float top, const float (&scale_log2)[kGroups][N], int i) {
  const float old = row_max[i];
  row_max[i] = fmaxf(old, kGroups == 1 ? __fmul_ru(top, scale_log2[0][i]) : top);
  alpha[i] = exp2_approx(old - exponent_reference(row_max[i]));
}

// row_max = max(row_max, scaled maxima of s), alpha = 2^(old - new).
template <int kRowTiles, int kColTiles, int kGroups>
DEV void update_row_max(float (&row_max)[2 * kRowTiles], float (&alpha)[2 * kRowTiles], const float (&s)[kRowTiles][kColTiles][4],
                        const float (&scale_log2)[kGroups][2 * kRowTiles]) {
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) raise_row_max(row_max, alpha, quad_max(largest_score(s, scale_log2, i)), scale_log2, i);
}

// update_row_max by integers, unless a row of this warp has had no maximum that is not negative, and has none now.
template <int kRowTiles, int kColTiles, int kGroups>
DEV void update_row_max_by_integers(float (&row_max)[2 * kRowTiles], float (&alpha)[2 * kRowTiles], const float (&s)[kRowTiles][kColTiles][4],
                                    const float (&scale_log2)[kGroups][2 * kRowTiles]) {
  float top[2 * kRowTiles];
  bool will_do = true;
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    top[i] = quad_max(largest_positive_score(s, scale_log2, i));
    will_do &= top[i] > 0.f || row_max[i] >= 0.f;
  }
  if (!__all_sync(~0u, will_do)) {
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) top[i] = quad_max(largest_score(s, scale_log2, i));
  }
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) raise_row_max(row_max, alpha, top[i], scale_log2, i);
}

// ---- the maximum, where all scores share a scale: row_max is a score, of a row that has seen no key the lowest number

// The maximum of a row, what it refers exponents to, and the exponent of what was summed under the old one.
struct Maximum {
  float row_max, reference, of_old;
};

// A row's maximum from a block's.
DEV Maximum raised(float old, float top, float scale_log2) {
  const float row_max = fmaxf(old, top), reference = __fmul_ru(row_max, scale_log2);
  return {row_max, reference, __fmul_ru(old, scale_log2) - reference};
}

// A row's maximum from a block's, where the scores of row i become relative to the maximum here, before anything is rounded.
template <int kRowTiles, int kColTiles>
DEV Maximum subtracted(float (&s)[kRowTiles][kColTiles][4], float old, float row_max, float scale_log2, int i) {
#pragma unroll
  for (int j = 0; j < kColTiles; ++j) {
#pragma unroll
    for (int e = i % 2 * 2; e < i % 2 * 2 + 2; ++e) s[i / 2][j][e] -= row_max;
  }
  return {row_max, 0.f, (old - row_max) * scale_log2};
}

// row_max = max(row_max, maxima of s), alpha = 2^(old reference - new), by integers as above. One vote sees also to rows whose maximum
// is coarse: rounding it in log2 units would tell.
template <int kRowTiles, int kColTiles>
DEV void update_row_max_by_integers(float (&row_max)[2 * kRowTiles], float (&reference)[2 * kRowTiles], float (&alpha)[2 * kRowTiles],
                                    float (&s)[kRowTiles][kColTiles][4], float scale_log2, float coarse) {
  Maximum of[2 * kRowTiles];
  bool will_do = true;
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    of[i] = raised(row_max[i], quad_max(largest_positive_score(s, scale_log2, i)), scale_log2);
    will_do &= (of[i].row_max > 0.f || row_max[i] >= 0.f) && fabsf(of[i].reference) < coarse;
  }
  if (!__all_sync(~0u, will_do)) {
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      of[i] = raised(row_max[i], quad_max(largest_score(s, scale_log2, i)), scale_log2);
      if (!(fabsf(of[i].reference) < coarse)) of[i] = subtracted(s, row_max[i], of[i].row_max, scale_log2, i);
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) row_max[i] = of[i].row_max, reference[i] = of[i].reference, alpha[i] = exp2_approx(of[i].of_old);
}

// What a row's scores and its maximum are multiplied by: the scale or, for a coarse maximum, the power of two below it, of which
// products are exact. Scores that are not the largest are then so much smaller that they hardly count by either.
DEV void refer_to(float& reference, float& alpha, float& exponent_scale, float row_max, float scale_log2, float coarse) {
  const float power = __int_as_float(__float_as_int(scale_log2) & 0x7f800000);
  const float rounded = row_max * scale_log2, exact = __fmul_ru(row_max, power), old = reference;
  const bool is_fine = fabsf(rounded) < coarse;
  exponent_scale = is_fine ? scale_log2 : power;
  reference = is_fine ? rounded : exact;
  alpha = exp2_approx(-fabsf(old - reference));  // of two scales the new reference may be less
}

// update_row_max without a vote, for which the exponentials of one row would wait until the other's maximum is known.
template <int kRowTiles, int kColTiles>
DEV void update_row_max(float (&row_max)[2 * kRowTiles], float (&reference)[2 * kRowTiles], float (&alpha)[2 * kRowTiles],
                        float (&exponent_scale)[1][2 * kRowTiles], const float (&s)[kRowTiles][kColTiles][4], float scale_log2, float coarse) {
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    row_max[i] = fmaxf(row_max[i], quad_max(largest_score(s, scale_log2, i)));
    refer_to(reference[i], alpha[i], exponent_scale[0][i], row_max[i], scale_log2, coarse);
  }
}

// References of exponents where operands have scales of their own: the maxima, or 0 for a row that has seen no key.
template <int N>
struct MaximumOrZero {
  const float (&row_max)[N];
  __device__ __forceinline__ float operator[](int i) const { return exponent_reference(row_max[i]); }
};

// s = 2^(scaled s - reference + lift), row_sum = alpha row_sum + this lane's sums of s.
template <int kRowTiles, int kColTiles, class Reference, class Scale>
DEV void exponentiate(float (&s)[kRowTiles][kColTiles][4], float (&row_sum)[2 * kRowTiles], const Reference& reference,
                      const float (&alpha)[2 * kRowTiles], const Scale& scale_log2, float lift = 0.f) {
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const float lowered = reference[i] - lift;
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < kColTiles; ++j) {
#pragma unroll
      for (int e = i % 2 * 2; e < i % 2 * 2 + 2; ++e) {
        s[i / 2][j][e] = exp2_approx(__fmaf_rn(s[i / 2][j][e], scale_of(scale_log2, j * GroupsOf<Scale>::kCount / kColTiles, i), -lowered));
        sum += s[i / 2][j][e];
      }
    }
    row_sum[i] = __fmaf_rn(row_sum[i], alpha[i], sum);
  }
}

// s = 2^(scaled s), row_sum = row_sum + this lane's sums of s: of scores that need no maximum.
template <int kRowTiles, int kColTiles>
DEV void exponentiate_bounded(float (&s)[kRowTiles][kColTiles][4], float (&row_sum)[2 * kRowTiles], float scale_log2) {
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColTiles; ++j) {
#pragma unroll
      for (int e = i % 2 * 2; e < i % 2 * 2 + 2; ++e) {
        s[i / 2][j][e] = exp2_approx(s[i / 2][j][e] * scale_log2);
        row_sum[i] += s[i / 2][j][e];
      }
    }
  }
}

// As `exponentiate`, and s times a weight of its group of columns, in the exponents; the sums are without it.
template <int kColTiles, class Reference, class Scale, int kGroups>
DEV void exponentiate_weighted(float (&s)[1][kColTiles][4], float (&row_sum)[2], const Reference& reference, const float (&alpha)[2],
                               const Scale& scale_log2, float lift, const float (&weight)[kGroups][2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = 0.f;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const float lowered = reference[i] - lift - log2_approx(weight[g][i]);
      float of_group = 0.f;
#pragma unroll
      for (int t = 0; t < kColTiles / kGroups; ++t) {
        const int j = g * kColTiles / kGroups + t;
#pragma unroll
        for (int e = i * 2; e < i * 2 + 2; ++e) {
          s[0][j][e] = exp2_approx(__fmaf_rn(s[0][j][e], scale_of(scale_log2, j * GroupsOf<Scale>::kCount / kColTiles, i), -lowered));
          of_group += s[0][j][e];
        }
      }
      sum = __fmaf_rn(of_group, __frcp_rn(weight[g][i]), sum);
    }
    row_sum[i] = __fmaf_rn(row_sum[i], alpha[i], sum);
  }
}

// Multiply every row of an accumulator by its factor.
template <int kRowTiles, int kColTiles>
DEV void scale_rows(float (&acc)[kRowTiles][kColTiles][4], const float (&by)[2 * kRowTiles]) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int j = 0; j < kColTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[r][j][e] *= by[2 * r + e / 2];
    }
  }
}

// o = o times a factor per row, plus a part, in the columns of the part.
template <int kFirstColumn, int kColTiles, int kPartTiles>
DEV void promote(float (&o)[1][kColTiles][4], const float (&part)[1][kPartTiles][4], const float (&by)[2]) {
#pragma unroll
  for (int j = 0; j < kPartTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) o[0][kFirstColumn / 8 + j][e] = __fmaf_rn(o[0][kFirstColumn / 8 + j][e], by[e / 2], part[0][j][e]);
  }
}

// Whether some row of the warp has a factor other than 1.
template <int N>
DEV bool warp_rescales(const float (&by)[N]) {
  bool rescales = false;
#pragma unroll
  for (int i = 0; i < N; ++i) rescales |= by[i] != 1.f;
  return __any_sync(~0u, rescales);
}

// Add up the parts that the four lanes of a row hold.
template <int N>
DEV void reduce_rows(float (&total)[N], const float (&part)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) total[i] = quad_sum(part[i]);
}

// inv_sum = top / row_sum, lse = natural log-sum-exp, both of sums that are lifted; a row that saw no key gets 0 and -inf. No row that
// did sums up to less than 2^-100, but one of e4m3 whose maximum was rounded up by more; its inverse would be infinite.
template <int N>
DEV void finish_rows(float (&inv_sum)[N], float (&lse)[N], const float (&row_max)[N], const float (&row_sum)[N], float lift = 0.f, float top = 1.f) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const bool sees_none = row_sum[i] < 0x1p-100f;
    inv_sum[i] = sees_none ? 0.f : top * __frcp_rn(row_sum[i]);
    lse[i] = sees_none ? -infinity() : (row_max[i] - lift + log2_approx(row_sum[i])) * 0.6931471805599453f;
  }
}

// finish_rows of exponents that were not taken relative to a maximum.
template <int N>
DEV void finish_rows(float (&inv_sum)[N], float (&lse)[N], const float (&row_sum)[N]) {
  const float none[N] = {};
  finish_rows(inv_sum, lse, none, row_sum);
}

// finish_rows of maxima that are scores; coarse ones are brought to natural units at once. A maximum in log2 units is rounded before it meets
// the sum: whether ptxas would contract the two hangs on the text around them, and a sequence has the bits of a dense call.
template <int N>
DEV void finish_rows_of_scores(float (&inv_sum)[N], float (&lse)[N], const float (&row_max)[N], const float (&row_sum)[N], float scale_log2,
                               float coarse, float lift = 0.f, float top = 1.f) {
  float reference[N];
#pragma unroll
  for (int i = 0; i < N; ++i) reference[i] = __fmul_rn(row_max[i], scale_log2);
  finish_rows(inv_sum, lse, reference, row_sum, lift, top);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float of_sum = (log2_approx(row_sum[i]) - lift) * 0.6931471805599453f;
    if (row_sum[i] != 0.f && !(fabsf(reference[i]) < coarse)) lse[i] = __fmaf_rz(row_max[i], scale_log2 * 0.6931471805599453f, of_sum);
  }
}

// A sink, a logit of no value, joins the sum of each row, of which lse is the logarithm: by = by times the keys' share of the new sum.
// Exponents are 0 or less, but for a sink of +inf, beside which keys vanish; where there is neither a key nor a sink nothing changes.
template <int N>
DEV void join_sink(float (&by)[N], float (&lse)[N], const float (&sink)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float largest = fminf(fmaxf(fmaxf(lse[i], sink[i]), lowest()), -lowest());
    const float of_keys = exp2_approx((lse[i] - largest) * 1.4426950408889634f);
    const float total = of_keys + exp2_approx((sink[i] - largest) * 1.4426950408889634f);
    by[i] *= total == 0.f ? 0.f : of_keys * __frcp_rn(total);
    lse[i] = largest + log2_approx(total) * 0.6931471805599453f;
  }
}
template <int N>
DEV void join_sink(float (&by)[N], float (&lse)[N], float sink) {
  float of_rows[N];
  fill(of_rows, sink);
  join_sink(by, lse, of_rows);
}

// An index of a tensor, kept within its dimension.
DEV int clamp_index(int index, int size) { return max(0, min(index, size - 1)); }
DEV int clamp_index(i64 index, int size) { return (int)max((i64)0, min(index, (i64)size - 1)); }

// The quotient rounded down.
DEV int floor_divide(int a, int b) { return a / b - ((a % b != 0) & ((a ^ b) < 0)); }
DEV i64 floor_divide(i64 a, i64 b) { return a / b - ((a % b != 0) & ((a ^ b) < 0)); }

// What floor_divide leaves; it has the sign of b.
DEV int floor_modulo(int a, int b) { return a % b + ((a % b != 0) & ((a ^ b) < 0) ? b : 0); }
DEV i64 floor_modulo(i64 a, i64 b) { return a % b + ((a % b != 0) & ((a ^ b) < 0) ? b : 0); }

// -1, 0 or 1; 0 of a NaN.
template <class T>
DEV T sign(T x) { return (T)((x > 0) - (x < 0)); }

// 1 / (1 + e^-x)
DEV float sigmoid(float x) { return __fdiv_rn(1.f, __fadd_rn(1.f, expf(-x))); }

// e^x by ex2.approx.
DEV float exp_approx(float x) { return exp2_approx(x * 1.4426950408889634f); }

// ln(x) by lg2.approx.
DEV float log_approx(float x) { return log2_approx(x) * 0.6931471805599453f; }

// 1 / (1 + e^-x) by ex2.approx and rcp.approx.
DEV float sigmoid_approx(float x) { return rcp_approx(1.f + exp_approx(-x)); }

// tanh(x) = 1 - 2 / (1 + e^2x) by ex2.approx and rcp.approx; tanh.approx, 2^-11 off, would show in the log-sum-exp.
DEV float tanh_far(float x) { return 1.f - 2.f * rcp_approx(1.f + exp2_approx(x * 2.8853900817779268f)); }

// tanh(x): up to 0.3125 by the odd polynomial of degree 5 whose relative error is least there, 2^-19.4 (Remez), which leaves the
// unit for exponentials free.
DEV float tanh_approx(float x) {
  const float y = x * x, near = x * __fmaf_rn(y, __fmaf_rn(y, 0.12577038f, -0.33306009f), 0.99999851f);
  return fabsf(x) <= 0.3125f ? near : tanh_far(x);
}

// gain tanh(multiple s); where s is no larger than `reach`, by the same polynomial with its coefficients multiplied out.
struct TanhOfMultiple {
  float multiple, gain, reach, a1, a3, a5;
  __device__ float near(float s) const {
    const float y = s * s;
    return s * __fmaf_rn(y, __fmaf_rn(y, a5, a3), a1);
  }
  __device__ float far(float s) const { return gain * tanh_far(multiple * s); }
};

// The coefficients for that. Where one overflows nothing is near; where one may vanish, as of caps that bend hardly anything,
// only what the others are enough for.
DEV TanhOfMultiple tanh_of_multiple(float multiple, float gain) {
  const float size = fabsf(multiple), square = multiple * multiple;
  const float of_1 = gain * multiple, of_3 = of_1 * square, of_5 = of_3 * square;
  const float most = fabsf(of_5) >= 0x1p-100f ? 0.3125f : fabsf(of_3) >= 0x1p-100f ? 0x1p-5f : 0x1p-12f;
  const bool holds = fabsf(of_1) < 0x1p100f && fabsf(of_3) < 0x1p100f && fabsf(of_5) < 0x1p100f;
  return {multiple, gain, holds ? fminf(most / size, 0x1p60f) : -1.f, of_1 * 0.99999851f, of_3 * -0.33306009f, of_5 * 0.12577038f};
}

// The smallest and the largest of the values that a block of threads takes; a NaN may be anything.
template <class T>
struct Extremes {
  T lo = largest(T()), hi = smallest(T());
  DEV bool largest(bool) { return true; }
  DEV bool smallest(bool) { return false; }
  DEV int largest(int) { return 0x7fffffff; }
  DEV int smallest(int) { return 0x80000000; }
  DEV float largest(float) { return infinity(); }
  DEV float smallest(float) { return -infinity(); }
  __device__ void take(T value) {
    const bool is_number = value == value;
    lo = min_of(lo, is_number ? value : smallest(T()));
    hi = max_of(hi, is_number ? value : largest(T()));
  }
  DEV T min_of(T a, T b) { return b < a ? b : a; }
  DEV T max_of(T a, T b) { return a < b ? b : a; }
  __device__ void reduce() {
    __shared__ T los[4], his[4];
#pragma unroll
    for (int step = 16; step; step /= 2) {
      lo = min_of(lo, (T)__shfl_xor_sync(~0u, lo, step));
      hi = max_of(hi, (T)__shfl_xor_sync(~0u, hi, step));
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) los[threadIdx.x / 32] = lo, his[threadIdx.x / 32] = hi;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < 4; ++warp) lo = min_of(lo, los[warp]), hi = max_of(hi, his[warp]);
  }
};

// A bf16 of a tensor as f32.
DEV float bf16_to_float(u16 x) { return __uint_as_float((u32)x << 16); }

// An f16 of a tensor as f32.
DEV float f16_to_float(u16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

// One of two bf16 in a register as f32.
DEV float bf16_of_pair(u32 pair, int which) { return __uint_as_float(which ? pair & 0xffff0000 : pair << 16); }

// One of two f16 in a register as f32.
DEV float f16_of_pair(u32 pair, int which) { return f16_to_float(which ? pair >> 16 : pair); }

// Whether 16-bit elements of two neighbouring keys, the first even, lie in 4 bytes on a multiple of 4, in every row.
DEV bool lies_in_pairs(const u16* base, i64 to_rows, i64 to_key) { return to_key == 1 && !(to_rows & 1) && !((u64)base & 3); }

// Whether f32 elements of two such keys lie in 8 bytes on a multiple of 8, in every row.
DEV bool lies_in_pairs(const float* base, i64 to_rows, i64 to_key) { return to_key == 1 && !(to_rows & 1) && !((u64)base & 7); }

// Write the elements of two neighbouring keys, as many as exist; at once where they lie in a pair.
DEV void store_two(float* p, i64 to_key, float even, float odd, int exist, bool in_pairs) {
  if (in_pairs && exist > 1) {
    *(float2*)p = {even, odd};
  } else {
    if (exist > 0) p[0] = even;
    if (exist > 1) p[to_key] = odd;
  }
}
DEV void store_two(u16* p, i64 to_key, u32 both, int exist, bool in_pairs) {
  if (in_pairs && exist > 1) {
    *(u32*)p = both;
  } else {
    if (exist > 0) p[0] = (u16)both;
    if (exist > 1) p[to_key] = (u16)(both >> 16);
  }
}

// Elements of a row at the pairs of keys that a thread has scores of: those of rows 0 .. 7 of its tile, or of rows 8 .. 15.
template <int kColumns>
DEV void look_up_row(u32 (&found)[kColumns][4], int half, const u16* row, i64 to_key, int kv_first, int size, bool in_pairs) {
  if (in_pairs) {
#pragma unroll
    for (int i = 0; i < 2 * kColumns; ++i) found[i / 2][i % 2 * 2 + half] = load_u32(row + kv_first + 8 * i);
  } else {
#pragma unroll
    for (int i = 0; i < 2 * kColumns; ++i) {
      const int kv_idx = kv_first + 8 * i;
      const u32 even = load_u16(row + clamp_index(kv_idx, size) * to_key), odd = load_u16(row + clamp_index(kv_idx + 1, size) * to_key);
      found[i / 2][i % 2 * 2 + half] = even | odd << 16;
    }
  }
}

// Two bf16 of a register as f32.
struct Bf16Pair {
  DEV float low(u32 x) { return __uint_as_float(x << 16); }
  DEV float high(u32 x) { return __uint_as_float(x & 0xffff0000u); }
};

// Two f16 of a register as f32.
struct F16Pair {
  DEV float low(u32 x) { return f16_to_float((u16)x); }
  DEV float high(u32 x) { return f16_to_float((u16)(x >> 16)); }
};

// Eight elements of a row: 16 bytes of 16-bit ones.
struct Eight {
  float x[8];
};

// Eight elements as f32, from 16 packed bytes or as they are.
template <class Pair>
DEV Eight eight(uint4 packed) {
  const u32 pairs[4] = {packed.x, packed.y, packed.z, packed.w};
  Eight e;
#pragma unroll
  for (int i = 0; i < 4; ++i) e.x[2 * i] = Pair::low(pairs[i]), e.x[2 * i + 1] = Pair::high(pairs[i]);
  return e;
}
template <class Pair>
DEV Eight eight(const Eight& e) { return e; }

// Change signs of 16-bit elements: bit 15 - p of `signs` is for the lower half of register p, bit 31 - p for the upper.
DEV uint4 change_signs(uint4 packed, u32 signs) {
  packed.x ^= signs & 0x80008000u;
  packed.y ^= signs << 1 & 0x80008000u;
  packed.z ^= signs << 2 & 0x80008000u;
  packed.w ^= signs << 3 & 0x80008000u;
  return packed;
}

// A finite number itself, any other NaN.
DEV float finite_or_nan(float x) { return __fmaf_rn(0.f, x, x); }

// Their sum and their difference.
DEV void butterfly(float& a, float& b) {
  const float difference = __fsub_rn(a, b);
  a = __fadd_rn(a, b), b = difference;
}

// Multiply a row by the Hadamard matrix, entries 1 and -1. Lane l of a quad holds the columns 32 i + 8 l + j as row[i].x[j].
template <int kVectors>
DEV void hadamard(Eight (&row)[kVectors]) {
#pragma unroll
  for (int step = 1; step < 8; step *= 2) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (!(j & step)) butterfly(row[i].x[j], row[i].x[j + step]);
      }
    }
  }
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const float sign = threadIdx.x & step ? -1.f : 1.f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) row[i].x[j] = __fmaf_rn(row[i].x[j], sign, __shfl_xor_sync(~0u, row[i].x[j], step));
    }
  }
#pragma unroll
  for (int step = 1; step < kVectors; step *= 2) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (!(i & step)) butterfly(row[i].x[j], row[i + step].x[j]);
      }
    }
  }
}

// The largest finite magnitude of packed elements.
template <class Pair, int kCount>
DEV float max_magnitude(const uint4* x) {
  float amax = 0.f;
#pragma unroll
  for (int i = 0; i < 8 * kCount; ++i) amax = fmaxf(amax, fabsf(finite_or_nan(eight<Pair>(x[i / 8]).x[i % 8])));  // passes over NaN
  return amax;
}

// The largest finite magnitude of a row in f32, of which what is not finite becomes NaN.
template <int kVectors>
DEV float max_magnitude(Eight (&row)[kVectors]) {
  float amax = 0.f;
#pragma unroll
  for (int i = 0; i < 8 * kVectors; ++i) amax = max_or_nan(amax, fabsf(row[i / 8].x[i % 8]));
  if (amax < infinity()) return amax;
  amax = 0.f;
#pragma unroll
  for (int i = 0; i < 8 * kVectors; ++i) {
    float& x = row[i / 8].x[i % 8];
    x = finite_or_nan(x);
    amax = fmaxf(amax, fabsf(x));
  }
  return amax;
}

// The largest of what the threads of a group of warps hold, a power of two, none of it negative. All threads of the block
// call it.
DEV float max_of_warps(float x, int warps) {
  __shared__ u32 found[32];
  const u32 of_warp = __reduce_max_sync(~0u, __float_as_uint(x)), warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) found[warp] = of_warp;
  __syncthreads();
  return __uint_as_float(__reduce_max_sync(~0u, found[(warp & -warps) + (threadIdx.x & (warps - 1))]));
}

// What elements are multiplied by, and what undoes it.
struct GranuleScale {
  float reciprocal, descale;
};

// The scale of elements whose largest magnitude is amax: that becomes 448. 448 * 2^-126 keeps both factors normal.
DEV GranuleScale granule_scale(float amax) {
  amax = amax == 0.f ? 448.f : fmaxf(amax, 0x1.cp-118f);
  return {__fdiv_rn(448.f, amax), __fdiv_rn(amax, 448.f)};
}

// The scale of elements whose largest magnitude is amax, with a power of two for a descale. P takes it up, which then moves P's exponent alone.
DEV GranuleScale power_scale(float amax) {
  const float descale = __uint_as_float(__float_as_uint(granule_scale(amax).descale) + 0x7fffffu & 0x7f800000u);
  return {__fdiv_rn(1.f, descale), descale};
}

// Four elements as e4m3.
DEV u32 quantized(float a, float b, float c, float d, float reciprocal) {
  return E4m3::pack(__fmul_rn(a, reciprocal), __fmul_rn(b, reciprocal), __fmul_rn(c, reciprocal), __fmul_rn(d, reciprocal));
}

// Eight elements as e4m3.
DEV uint2 quantized_eight(const Eight& e, float reciprocal) {
  return {quantized(e.x[0], e.x[1], e.x[2], e.x[3], reciprocal), quantized(e.x[4], e.x[5], e.x[6], e.x[7], reciprocal)};
}

// Four keys that follow one another in packed V, and 16 bytes of each: what a lane loads of 128 keys. Eight lanes, or four
// where a key has no more chunks, take consecutive chunks of a key, the others of the warp other keys.
struct ValueUnit {
  int chunk, word;
  template <int kChunks>
  DEV ValueUnit of_warp(int number) {
    constexpr int kLanes = kChunks > 4 ? 8 : 4;
    const int lane = threadIdx.x % 32;
    return {number / kLanes * kLanes + lane % kLanes, number % kLanes * (32 / kLanes) + lane / kLanes};
  }
  // The i-th of the keys: the accumulator of a score GEMM gives a lane keys in this order.
  __device__ int key(int i) const { return word / 4 * 16 + i / 2 * 8 + word % 4 * 2 + i % 2; }
};

// Start the loads of a unit: from the first of 128 keys, of which `keys` exist, each `stride` bytes after the other.
template <int kChunks>
DEV void load_unit(uint4 (&x)[4], const unsigned char* first, i64 stride, int keys, const ValueUnit& unit) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = load_global_16(first + unit.key(i) * stride + unit.chunk * 16, unit.chunk < kChunks && unit.key(i) < keys);
  }
}

// Where a word of four keys stands in a tile of packed V, 128 bytes a column: the eight chunks of 16 bytes are exchanged so
// that neither eight lanes' columns nor a column's chunks meet in a bank.
DEV u32 value_address(int column, int word) { return column * 128 + ((word / 4 ^ column / 8 ^ column / 64) % 8) * 16 + word % 4 * 4; }

// Write a tile of packed V to 128 bytes of each of its rows.
template <int kThreads, int kColumns>
DEV void store_values(unsigned char* to, i64 stride, u32 tile) {
#pragma unroll
  for (int i = 0; i < (kColumns * 8 + kThreads - 1) / kThreads; ++i) {
    const int column = (i * kThreads + threadIdx.x) / 8, chunk = threadIdx.x % 8;
    if (column < kColumns) *(uint4*)(to + column * stride + chunk * 16) = load_shared_16(tile + value_address(column, chunk * 4));
  }
}

// Byte i of the four words becomes word i.
DEV void transpose_bytes(u32 (&x)[4]) {
  const u32 a = __byte_perm(x[0], x[1], 0x5140), b = __byte_perm(x[2], x[3], 0x5140);
  const u32 c = __byte_perm(x[0], x[1], 0x7362), d = __byte_perm(x[2], x[3], 0x7362);
  x[0] = __byte_perm(a, b, 0x5410), x[1] = __byte_perm(a, b, 0x7632);
  x[2] = __byte_perm(c, d, 0x5410), x[3] = __byte_perm(c, d, 0x7632);
}

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

// Rows of a sequence, start .. end - 1, as they stand in a tensor.
struct Span {
  int start, end;
};

// What a sequence has of `rows` rows that says it is from `start` on and before `stop`: the first `used`, without the first `skipped`.
// Whatever the numbers are, there are such rows.
DEV Span span_within(int rows, int start, int stop, int used, int skipped) {
  const int first = min(max(start, 0), rows), room = min(max(stop, first), rows) - first;
  const int begin = first + min(max(skipped, 0), room);
  return {begin, max(begin, first + min(max(used, 0), room))};
}

// Which of the lengths that count as alike a number of blocks is: exact below 16, an eighth of an octave from there on.
DEV int length_bucket(int blocks) {
  const int octave = max(0, 28 - __clz(blocks));
  return octave * 8 + (blocks >> octave);
}

// The sum of the numbers of this lane and of those before it.
DEV u32 sum_up_to_lane(u32 x) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const u32 before = __shfl_up_sync(~0u, x, distance);
    if (threadIdx.x % 32 >= distance) x += before;
  }
  return x;
}

// The sum of the numbers of all lanes.
DEV u64 sum_of_lanes(u64 x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

// Each of kRows times 32 counts becomes the sum of those before it; 32 warps share the rows. `of_warps` has room for 32 sums. The sum
// of all.
template <int kRows>
DEV u32 add_up_counts(u32* counts, u32* of_warps) {
  constexpr int kShare = (kRows + 31) / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 sum = 0;
  for (int row = warp * kShare; row < min((warp + 1) * kShare, kRows); ++row) {
    const u32 count = counts[row * 32 + lane], up_to = sum_up_to_lane(count);
    counts[row * 32 + lane] = sum + up_to - count;
    sum += __shfl_sync(~0u, up_to, 31);
  }
  if (lane == 0) of_warps[warp] = sum;
  __syncthreads();
  const u32 up_to = sum_up_to_lane(of_warps[lane]), before = __shfl_sync(~0u, up_to, warp) - sum;
  for (int row = warp * kShare; row < min((warp + 1) * kShare, kRows); ++row) counts[row * 32 + lane] += before;
  __syncthreads();
  return __shfl_sync(~0u, up_to, 31);
}

// How many of 32 counts that grow from lane to lane are not above `x`, which is below the last: the lane to whose share it belongs.
DEV int lane_of(u32 up_to, u32 x) {
  int lane = 0;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    if (__shfl_sync(~0u, up_to, lane + step - 1) <= x) lane += step;
  }
  return lane;
}
