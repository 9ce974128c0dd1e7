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
