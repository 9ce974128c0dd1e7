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
