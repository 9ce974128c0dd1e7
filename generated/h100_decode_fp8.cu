// attn_fwd_sm90a_bf16_e4m3_d128_causal_fa2_9728ef22
//
// Attention forward, fa2 schedule, for sm_90a: out = softmax(softmax_scale Q Kᵀ, masked) V and its
// log-sum-exp, inputs bf16, K and V in e4m3, output bf16, softmax in f32. Mask: causal.
// Emitted by attngen 0.1.0 from spec digest 9728ef22627a91c8. Launch: see the manifest beside this file.
//
// Notation: S = Q Kᵀ and P, the scores and probabilities of one block (acc_s, p); O, the output, unnormalised (acc_o);
// m and n, blocks of query rows and of keys; row_max in scaled log2 units.

#include "instructions.cuh"

#include "functions.cuh"

// ---- this kernel -----------------------------------------------------------------------------------------------------

constexpr int kBlockM = 32;  // tile.block_m: query rows of a block
constexpr int kBlockN = 64;  // tile.block_n: keys of a block
constexpr int kHeadDimQk = 128;  // problem.head_dim.qk
constexpr int kHeadDimV = 128;  // problem.head_dim.v
constexpr int kQkCols = 128;  // padded to 16, the k of mma.sync
constexpr int kVCols = 128;  // padded likewise
constexpr int kStages = 3;  // schedule.stages: K and V blocks in shared memory
constexpr int kThreads = 64;  // schedule.warps = 2
constexpr int kRowTiles = 1;  // 16-row tiles that each warp owns
using Input = F16;
using Output = Bf16;
using QTile = SmemTile<kBlockM, kQkCols, kHeadDimQk>;
using KTile = SmemTile<kBlockN, kQkCols, kHeadDimQk, 16>;
using VTile = SmemTile<kBlockN, kVCols, kHeadDimV, 16>;
using OutTile = SmemTile<kBlockM, kVCols, kHeadDimV>;

struct Params {
  int4* tiles;
  const int* seqused_k;
  const int* leftpad_k;
  const int* block_table;
  const int* cache_batch_idx;
  u16* q;
  u16* k;
  u16* v;
  u16* out;
  float* lse;
  i64 q_stride_batch;
  i64 q_stride_seqlen;
  i64 q_stride_head;
  i64 k_stride_page;
  i64 k_stride_seqlen;
  i64 k_stride_head;
  i64 v_stride_page;
  i64 v_stride_seqlen;
  i64 v_stride_head;
  i64 out_stride_batch;
  i64 out_stride_seqlen;
  i64 out_stride_head;
  int seqlen_q;
  int seqlen_k;
  int num_heads_q;
  int group;
  int scale_is_negative;
  float softmax_scale_log2;
  float* part_out;
  float* part_sum;
  float* part_max;
  float* k_descale;
  i64 k_descale_stride_0;
  i64 k_descale_stride_1;
  float* v_descale;
  i64 v_descale_stride_0;
  i64 v_descale_stride_1;
  int batch;
  int num_sms;
  int num_heads_kv;
  i64 block_table_stride;
  int table_rows;
  int pages;
  int page_size;
  int page_size_magic;
  int page_size_shift;
};

// What this block works on. seqlen_q and seqlen_k are this sequence's own.
struct Tile {
  int m_block, head, batch, kv_head, seqlen_q, seqlen_k, q_start, k_start, n_begin, n_end, part, parts;
};

// Where a head starts. Computed where it is used, not ahead of the loops: registers are scarce there.
template <class Element>
DEV Element* head_of(Element* base, int batch, i64 stride_batch, int head, i64 stride_head) {
  return base + stay_in_loop(batch) * stride_batch + stay_in_loop(head) * stride_head;
}

// Where the keys of a tile lie in K or V, a cache of pages. A number that no row of the table has is kept within it.
DEV PagedRows paged_rows(const Params& params, const Tile& tile, const u16* cache, i64 stride_page, i64 stride_row, i64 stride_head) {
  const int given = params.cache_batch_idx ? __ldg(params.cache_batch_idx + tile.batch) : tile.batch;
  const int* table = params.block_table + stay_in_loop(max(0, min(given, params.table_rows - 1))) * params.block_table_stride;
  const u16* of_head = cache + stay_in_loop(tile.kv_head) * stride_head;
  return {table, of_head, stride_page, stride_row, tile.k_start, params.pages, params.page_size,
          (u32)params.page_size_magic, (u32)params.page_size_shift};
}

// Where a head starts in a dense f32 array (batch, num_heads_q, seqlen_q, cols).
DEV float* dense_head(float* base, const Params& params, const Tile& tile, int cols = 1) {
  return base + ((i64)stay_in_loop(tile.batch) * params.num_heads_q + stay_in_loop(tile.head)) * params.seqlen_q * cols;
}

// An entry of the list of tiles: a sequence, which block of it, and where its queries and keys start and how many there are.
struct Entry {
  int sequence, block, q_start, seqlen_q, k_start, seqlen_k, n_begin, n_end, part, parts;
};

// How many the list has, which stands before the first.
DEV int num_entries(const Params& params) { return __ldg(&params.tiles->x); }

// Entry `row` of the list, 48 bytes each.
DEV Entry read_entry(const Params& params, int row) {
  const int4* entry = params.tiles + 3 * (i64)row + 3;
  const int4 first = __ldg(entry), second = __ldg(entry + 1), third = __ldg(entry + 2);
  return {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w, third.x, third.y};
}

// What is listed, for each head; a block of threads beyond has nothing to do.
DEV int num_tiles(const Params& params) { return params.num_heads_q / params.group * num_entries(params); }

// One entry of the list, for one head. Heads are fastest; the longest tiles start first.
DEV Tile decode_tile(const Params& params, int index) {
  Tile tile;
  const int row = floor_divide(index, params.num_heads_q / params.group);
  const Entry entry = read_entry(params, row);
  tile.m_block = entry.block;
  tile.head = floor_modulo(index, params.num_heads_q / params.group) * params.group;
  tile.batch = entry.sequence;
  tile.kv_head = tile.head / params.group;
  tile.seqlen_q = entry.seqlen_q;
  tile.seqlen_k = entry.seqlen_k;
  tile.q_start = entry.q_start;
  tile.k_start = entry.k_start;
  tile.n_begin = entry.n_begin;
  tile.n_end = entry.n_end;
  tile.part = entry.part;
  tile.parts = entry.parts;
  return tile;
}

// Rows of a part for which there is a place.
DEV int part_rows(const Params& params) { return min(kBlockM, params.seqlen_q * params.group); }

// Where the rows of a part stand in a dense f32 array (tiles, rows, cols).
DEV float* part_of(float* base, const Params& params, int cols = 1) { return base + (i64)stay_in_loop(blockIdx.x) * part_rows(params) * cols; }

// The descale of this tile's head.
DEV float read_k_descale(const Params& params, const Tile& tile) {
  return __ldg(params.k_descale + tile.batch * params.k_descale_stride_0 + tile.kv_head * params.k_descale_stride_1);
}

// The descale of this tile's head.
DEV float read_v_descale(const Params& params, const Tile& tile) {
  return __ldg(params.v_descale + tile.batch * params.v_descale_stride_0 + tile.kv_head * params.v_descale_stride_1);
}

// Blocks of keys that a block of rows visits, n_min .. n_max - 1; from n_full_begin to n_full_end - 1 no key is masked.
struct KeyBlocks {
  int n_min, n_full_begin, n_full_end, n_max;
};

// Which blocks of keys block m of rows visits, and which of them no row masks.
DEV KeyBlocks key_blocks(const Params& params, const Tile& tile, int m) {
  KeyBlocks seen;
  const int q_first = m * kBlockM / params.group, q_last = floor_divide(min((m * kBlockM) + kBlockM, params.group * tile.seqlen_q) - 1, params.group);
  const int end_any = max(min(q_last + tile.seqlen_k - tile.seqlen_q + 1, tile.seqlen_k), 0);
  seen.n_max = min(tile.n_end, (end_any + kBlockN - 1) / kBlockN);
  seen.n_min = min(tile.n_begin, seen.n_max);
  seen.n_full_begin = seen.n_min;
  const int end_all = max(min(q_first + tile.seqlen_k - tile.seqlen_q + 1, tile.seqlen_k), 0);
  seen.n_full_end = max(min(end_all / kBlockN, seen.n_max), seen.n_full_begin);
  return seen;
}

// The keys that row q_idx sees are first_key .. end_key - 1.
DEV int end_key(const Params& params, const Tile& tile, int q_idx) {
  int end = tile.seqlen_k;
  end = clamp_key(q_idx + tile.seqlen_k - tile.seqlen_q + 1, end);
  return end;
}

extern "C" __global__ void __launch_bounds__(kThreads, 4)
attn_fwd_sm90a_bf16_e4m3_d128_causal_fa2_9728ef22(const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) unsigned char smem[];
  const u32 q_smem = smem_address(smem) + 0;
  const u32 k_smem = smem_address(smem) + 8192;
  const u32 v_smem = smem_address(smem) + 32768;
  const u32 out_smem = smem_address(smem) + 0;  // over q, once that is no longer needed
  wait_for_earlier_kernels();
  let_next_kernel_start();
  if ((int)blockIdx.x >= (int)same_in_warp(num_tiles(params))) return;
  int load_at = 0;  // stage of the ring
  int read_at = 0;  // stage of the ring
  float acc_s[kRowTiles][8][4];
  u32 p[kRowTiles][4][4];
  float acc_o[kRowTiles][16][4];
  float row_max[2 * kRowTiles];
  float alpha[2 * kRowTiles];
  float reference[2 * kRowTiles];
  float exponent_scale[1][2 * kRowTiles];
  float row_sum[2 * kRowTiles];
  float total[2 * kRowTiles];
  float inv_sum[2 * kRowTiles];
  float row_lse[2 * kRowTiles];
  float score_scale[2 * kRowTiles];
  float value_scale[2 * kRowTiles];

  Tile tile = decode_tile(params, blockIdx.x);
  const KeyBlocks seen = key_blocks(params, tile, tile.m_block);
  fill(acc_o, 0.f);
  fill(row_max, lowest());
  fill(reference, lowest());
  fill(row_sum, 0.f);
  fill(score_scale, read_k_descale(params, tile));
  fill(value_scale, read_v_descale(params, tile));
  if (seen.n_max > seen.n_min) {
    load_tile<QTile, kThreads>(q_smem, head_of(params.q, tile.batch, params.q_stride_batch, tile.head, params.q_stride_head), PackedRows{params.q_stride_seqlen, params.q_stride_head, params.group}, tile.m_block * kBlockM, tile.seqlen_q * params.group);
    load_paged_tile<KTile, kThreads>(k_smem + load_at * KTile::kBytes, paged_rows(params, tile, params.k, params.k_stride_page / 2, params.k_stride_seqlen / 2, params.k_stride_head / 2), (seen.n_max - 1) * kBlockN, tile.seqlen_k);
    load_paged_tile<VTile, kThreads>(v_smem + load_at * VTile::kBytes, paged_rows(params, tile, params.v, params.v_stride_page / 2, params.v_stride_seqlen / 2, params.v_stride_head / 2), (seen.n_max - 1) * kBlockN, tile.seqlen_k);
    cp_async_commit();
    load_at = load_at + 1 == kStages ? 0 : load_at + 1;
    if (seen.n_max - 2 >= seen.n_min) {
      load_paged_tile<KTile, kThreads>(k_smem + load_at * KTile::kBytes, paged_rows(params, tile, params.k, params.k_stride_page / 2, params.k_stride_seqlen / 2, params.k_stride_head / 2), (seen.n_max - 2) * kBlockN, tile.seqlen_k);
      load_paged_tile<VTile, kThreads>(v_smem + load_at * VTile::kBytes, paged_rows(params, tile, params.v, params.v_stride_page / 2, params.v_stride_seqlen / 2, params.v_stride_head / 2), (seen.n_max - 2) * kBlockN, tile.seqlen_k);
    }
    cp_async_commit();
    load_at = load_at + 1 == kStages ? 0 : load_at + 1;
    cp_async_wait<1>();
    __syncthreads();
    fit_rows<QTile, kRowTiles, false>(q_smem, score_scale);
    if (params.scale_is_negative) {
      cp_async_wait<0>();
      __syncthreads();
      negate_tile<QTile, kThreads>(q_smem);
    }
    #pragma unroll 1
    for (int n = seen.n_max - 1; n >= seen.n_full_end; --n) {  // partial tiles
      cp_async_wait<1>();
      __syncthreads();
      if (n - 2 >= seen.n_min) {
        load_paged_tile<KTile, kThreads>(k_smem + load_at * KTile::kBytes, paged_rows(params, tile, params.k, params.k_stride_page / 2, params.k_stride_seqlen / 2, params.k_stride_head / 2), (n - 2) * kBlockN, tile.seqlen_k);
        load_paged_tile<VTile, kThreads>(v_smem + load_at * VTile::kBytes, paged_rows(params, tile, params.v, params.v_stride_page / 2, params.v_stride_seqlen / 2, params.v_stride_head / 2), (n - 2) * kBlockN, tile.seqlen_k);
      }
      cp_async_commit();
      load_at = load_at + 1 == kStages ? 0 : load_at + 1;
      // S = Q Kᵀ
      gemm_nt_ss_8bit<Input, QTile, KTile, true, 4>(acc_s, q_smem, k_smem + read_at * KTile::kBytes);
      scale_rows(acc_s, score_scale);
      {
        int end[2 * kRowTiles];  // of the keys each row sees, counted from this lane's first column
      #pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i) {
          const int q_idx = (tile.m_block * kBlockM + row_in_tile<kRowTiles>(i)) / params.group, column = n * kBlockN + lane_column();
          end[i] = end_key(params, tile, q_idx) - column;
        }
        mask_scores(acc_s, end);
      }
      // online softmax
      update_row_max(row_max, reference, alpha, exponent_scale, acc_s, params.softmax_scale_log2, 268435456.0f);
      exponentiate(acc_s, row_sum, reference, alpha, exponent_scale);
      if (warp_rescales(alpha)) scale_rows(acc_o, alpha);
      convert_p<Input>(p, acc_s);
      // O += P V
      gemm_nn_rs_8bit<Input, VTile, false>(acc_o, p, v_smem + read_at * VTile::kBytes);
      read_at = read_at + 1 == kStages ? 0 : read_at + 1;
    }
    #pragma unroll 1
    for (int n = seen.n_full_end - 1; n >= seen.n_full_begin; --n) {  // full tiles
      cp_async_wait<1>();
      __syncthreads();
      if (n - 2 >= seen.n_min) {
        load_paged_tile<KTile, kThreads>(k_smem + load_at * KTile::kBytes, paged_rows(params, tile, params.k, params.k_stride_page / 2, params.k_stride_seqlen / 2, params.k_stride_head / 2), (n - 2) * kBlockN, tile.seqlen_k);
        load_paged_tile<VTile, kThreads>(v_smem + load_at * VTile::kBytes, paged_rows(params, tile, params.v, params.v_stride_page / 2, params.v_stride_seqlen / 2, params.v_stride_head / 2), (n - 2) * kBlockN, tile.seqlen_k);
      }
      cp_async_commit();
      load_at = load_at + 1 == kStages ? 0 : load_at + 1;
      // S = Q Kᵀ
      gemm_nt_ss_8bit<Input, QTile, KTile, true, 4>(acc_s, q_smem, k_smem + read_at * KTile::kBytes);
      scale_rows(acc_s, score_scale);
      // online softmax
      update_row_max(row_max, reference, alpha, exponent_scale, acc_s, params.softmax_scale_log2, 268435456.0f);
      exponentiate(acc_s, row_sum, reference, alpha, exponent_scale);
      if (warp_rescales(alpha)) scale_rows(acc_o, alpha);
      convert_p<Input>(p, acc_s);
      // O += P V
      gemm_nn_rs_8bit<Input, VTile, false>(acc_o, p, v_smem + read_at * VTile::kBytes);
      read_at = read_at + 1 == kStages ? 0 : read_at + 1;
    }
    // V in real numbers, and columns in order
    order_columns(acc_o);
    scale_rows(acc_o, value_scale);
  }
  // normalise once, at the end
  tile = decode_tile(params, stay_in_loop(blockIdx.x));
  reduce_rows(total, row_sum);
  if (tile.parts > 1) {
    store_fragment<kHeadDimV>(part_of(params.part_out, params, kHeadDimV), acc_o, 0, tile.seqlen_q * params.group - tile.m_block * kBlockM, kHeadDimV);
    store_rows<kRowTiles>(part_of(params.part_sum, params), total, 0, tile.seqlen_q * params.group - tile.m_block * kBlockM);
    store_rows<kRowTiles>(part_of(params.part_max, params), row_max, 0, tile.seqlen_q * params.group - tile.m_block * kBlockM);
  }
  if (tile.parts == 1) {
    finish_rows_of_scores(inv_sum, row_lse, row_max, total, params.softmax_scale_log2, 268435456.0f);
    scale_rows(acc_o, inv_sum);
    if (params.lse != 0) store_rows<kRowTiles>(dense_head(params.lse, params, tile), row_lse, tile.m_block * kBlockM, tile.seqlen_q * params.group, PackedRows{1, params.seqlen_q, params.group});
    __syncthreads();
    copy_tile<Output, OutTile>(out_smem, acc_o);
    __syncthreads();
    store_tile<OutTile, kThreads>(head_of(params.out, tile.batch, params.out_stride_batch, tile.head, params.out_stride_head), PackedRows{params.out_stride_seqlen, params.out_stride_head, params.group}, tile.m_block * kBlockM, tile.seqlen_q * params.group, out_smem);
  }
}

// ---- the list of this kernel's tiles ---------------------------------------------------------------------------------
//
// Each warp takes its share of the sequences, 32 at a time: a lane finds the rows of one, then each takes a tile after the other. Tiles
// of sequences of a length are counted, the counts of what is longer, or of warps before, say where a tile's place is, and the same way
// is gone again.

// The rows of queries of sequence b.
DEV Span queries_of(const Params& params, int b) {
  return {0, params.seqlen_q};
}
// The rows of keys of sequence b.
DEV Span keys_of(const Params& params, int b) {
  const int used = __ldg(params.seqused_k + b);
  const int skipped = params.leftpad_k ? __ldg(params.leftpad_k + b) : 0;
  return span_within(params.seqlen_k, 0, params.seqlen_k, used, skipped);
}
// How many tiles some rows are.
DEV u32 tiles_of(const Params& params, int start, int end) { return end <= start ? 0 : (int)(((i64)(end - start) * params.group + kBlockM - 1) / kBlockM); }

// How many blocks a tile of a sequence visits at most.
DEV int most_visited(int rows, int seen) {
  const int blocks = (seen + kBlockN - 1) / kBlockN;
  return blocks;
}

// Blocks of keys that are cut: those that a tile of a sequence visits, begin .. end - 1.
DEV Span visited_by(const Params& params, int b, const Span& queries, const Span& keys, u32 tiles) {
  if (tiles == 0) return {0, 0};
  if (tiles == 1) {
    Tile tile = {};
    tile.batch = b, tile.seqlen_q = queries.end - queries.start, tile.seqlen_k = keys.end - keys.start;
    tile.n_end = 1073741824;
    const KeyBlocks seen = key_blocks(params, tile, 0);
    return {seen.n_min, max(seen.n_min, seen.n_max)};
  }
  return {0, (keys.end - keys.start + kBlockN - 1) / kBlockN};
}

// Where the parts of a tile begin, how many there are, and of how many blocks each is: as long as each other, at most `width`.
struct Parts {
  int begin, count, width;
};

DEV Parts parts_of(const Span& visited, int width) {
  const int blocks = visited.end - visited.start;
  if (blocks <= 0) return { visited.start, 1, width};
  const int count = (blocks + width - 1) / width, even = (blocks + count - 1) / count;
  return {visited.start, (blocks + even - 1) / even, even};
}

extern "C" __global__ void __launch_bounds__(1024, 1)
attn_fwd_sm90a_bf16_e4m3_d128_causal_fa2_9728ef22_tiles(const __grid_constant__ Params params) {
  constexpr int kBuckets = 225;
  __shared__ u32 places[kBuckets * 32];  // of the longest tiles first, and of each length of each warp
  __shared__ u32 of_warps[32];
  wait_for_earlier_kernels();
  let_next_kernel_start();
  const int warp = same_in_warp(threadIdx.x / 32), lane = threadIdx.x % 32;
  const int sequences = params.batch;
  const int share = (sequences + 31) / 32, end = min((warp + 1) * share, sequences);
  const u32 most_entries = ((params.batch * ((((params.seqlen_q * params.group) + 32 - 1) / 32) + 0)) + (((params.num_sms * 16) + max(1, params.num_heads_kv) - 1) / max(1, params.num_heads_kv)));
  for (int i = threadIdx.x; i < kBuckets * 32; i += 1024) places[i] = 0;
  __syncthreads();
  // Blocks of keys of a part: as many as give each block of threads that the GPU holds one part.
  u32 work = 0;
#pragma unroll 1
  for (int b = threadIdx.x; b < params.batch; b += 1024) {
    const Span queries = queries_of(params, b), keys = keys_of(params, b);
    const u32 tiles = tiles_of(params, queries.start, queries.end);
    const Span visited = visited_by(params, b, queries, keys, tiles);
    work += tiles * (visited.end - visited.start);
  }
  work = sum_up_to_lane(work);
  if (lane == 31) of_warps[warp] = work;
  __syncthreads();
  const u64 all_work = (u64)__shfl_sync(~0u, sum_up_to_lane(of_warps[lane]), 31) * (params.num_heads_q / params.group);
  auto for_each = [&](u32 parts) { return (int)min((all_work + parts - 1) / parts, (u64)1073741824); };
  const u32 resident = params.num_sms * 4;
  const int least = 1, longest = max(16, for_each(resident * 4));
  const int width = min(max(for_each(resident), least), longest);
  __syncthreads();
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {  // to count, and to list
#pragma unroll 1
    for (int first = warp * share; first < end; first += 32) {
      // Of the rows of this lane's sequence those from `before` on and before its own are nobody's.
      const int b = first + lane;
      int before = 0;
      Span own = {0, 0}, other = {0, 0};
      if (b < end) {
        own = queries_of(params, b), other = keys_of(params, b);
      }
      const u32 of_rows = tiles_of(params, own.start, own.end);
      const Span visited = visited_by(params, b, own, other, of_rows);
      const Parts parts = parts_of(visited, width);
      const u32 tiles = tiles_of(params, before, own.start) + of_rows * parts.count;
      const u32 up_to = sum_up_to_lane(tiles), all = __shfl_sync(~0u, up_to, 31);
#pragma unroll 1
      for (u32 i = lane; i - lane < all; i += 32) {
        // The rows that this lane's tile is of, and what they see.
        const int from = lane_of(up_to, i), start = __shfl_sync(~0u, own.start, from), stop = __shfl_sync(~0u, own.end, from);
        const int begin = __shfl_sync(~0u, before, from);
        const Span seen = {__shfl_sync(~0u, other.start, from), __shfl_sync(~0u, other.end, from)};
        u32 block = i - __shfl_sync(~0u, up_to - tiles, from);
        const Parts cut = {__shfl_sync(~0u, parts.begin, from), __shfl_sync(~0u, parts.count, from), __shfl_sync(~0u, parts.width, from)};
        const u32 ahead = tiles_of(params, begin, start), of_sequence = tiles_of(params, start, stop) * cut.count;
        const bool exists = i < all, is_used = exists && block - ahead < of_sequence;  // of those ahead it wraps
        Span rows = {begin, start};
        int part = 0, of_tile = 1;  // parts of a block of rows follow one another
        if (is_used) {
          rows = {start, stop}, block -= ahead, of_tile = cut.count, part = block % of_tile;
          block = of_sequence / of_tile - 1 - block / of_tile;
        }
        const int sequence = max(0, min(first + from, params.batch - 1));
        const int from_q = rows.start, of_q = rows.end - rows.start;
        const int from_k = is_used ? seen.start : 0, of_k = is_used ? seen.end - seen.start : 0;
        const int length = is_used ? most_visited(of_q, of_k) : 0;
        const int slot = exists ? (kBuckets - 1 - length_bucket(length)) * 32 + warp : -1;
        // Those of this length are listed in the order of the lanes; the last says how many there are now.
        const u32 alike = __match_any_sync(~0u, slot);
        const u32 place = exists ? places[slot] + __popc(alike & ((1u << lane) - 1)) : 0;
        __syncwarp();
        if (exists && alike >> lane == 1) places[slot] = place + 1;
        __syncwarp();
        if (pass == 1 && exists && place < most_entries) {
          const int n_begin = cut.begin + part * cut.width;
          params.tiles[3 * (i64)place + 3] = {sequence, (int)block, from_q, of_q};
          params.tiles[3 * (i64)place + 4] = {from_k, of_k, is_used ? n_begin : 0, is_used ? n_begin + cut.width : 0};
          params.tiles[3 * (i64)place + 5] = {part, of_tile, 0, 0};
        }
      }
    }
    if (pass == 0) {
      __syncthreads();
      const u32 listed = add_up_counts<kBuckets>(places, of_warps);
      if (threadIdx.x == 0) params.tiles[0] = {(int)min(listed, most_entries), 0, 0, 0}, params.tiles[1] = {0, 0, 0, 0}, params.tiles[2] = {0, 0, 0, 0};
    }
  }
}

// ---- the parts of this kernel's tiles become rows of O --------------------------------------------------------------
//
// The blocks of threads of a tile's parts take its rows in turn. Each thread adds up four columns of every kParts-th part, and the sums
// meet in shared memory in the order of the parts.

extern "C" __global__ void __launch_bounds__(128)
attn_fwd_sm90a_bf16_e4m3_d128_causal_fa2_9728ef22_merge(const __grid_constant__ Params params) {
  constexpr int kRowThreads = 32, kParts = 128 / kRowThreads, kAhead = 4;
  __shared__ float4 sums[kParts][kRowThreads];
  wait_for_earlier_kernels();
  let_next_kernel_start();
  if ((int)blockIdx.x >= num_tiles(params)) return;
  const Tile tile = decode_tile(params, blockIdx.x);
  if (tile.parts == 1) return;
  // Parts for which the list had no room, where lengths lie, are left out.
  const int heads = (params.num_heads_q / params.group), parts = min(tile.parts, tile.part + (num_tiles(params) - (int)blockIdx.x + heads - 1) / heads);
  const int rows = min(kBlockM, tile.seqlen_q * params.group - tile.m_block * kBlockM);
  const int lane = threadIdx.x % 32, own = threadIdx.x / kRowThreads, column = threadIdx.x % kRowThreads * 4;
#pragma unroll 1
  for (int row = tile.part; row < rows; row += parts) {
    // Row `row` of a part: the parts of a tile are as many tiles apart as there are heads.
    auto at = [&](int part) { return ((i64)blockIdx.x + (i64)(part - tile.part) * heads) * part_rows(params) + row; };
    // Columns of the first parts are on their way while the weights are worked out.
    auto columns_of = [&](int part) { return *(const float4*)(params.part_out + at(part) * kHeadDimV + column); };
    float4 ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (own < kParts && own + i * kParts < parts) ahead[i] = columns_of(own + i * kParts);
    }
    float top = lowest(), total = 0.f;
    auto join = [&](float other_top, float other_total) {
      const float larger = fmaxf(top, other_top);
      total = total * exp2_approx((top - larger) * params.softmax_scale_log2) + other_total * exp2_approx((other_top - larger) * params.softmax_scale_log2);
      top = larger;
    };
    for (int part = lane; part < parts; part += 32) join(params.part_max[at(part)], params.part_sum[at(part)]);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) join(__shfl_xor_sync(~0u, top, distance), __shfl_xor_sync(~0u, total, distance));
    total = __shfl_sync(~0u, total, 0);  // of which lanes have added up in different orders
    auto weight = [&](int part) { return exp2_approx((params.part_max[at(part)] - top) * params.softmax_scale_log2); };
    float4 sum = {0.f, 0.f, 0.f, 0.f};
    auto add = [&](int part, const float4& x) {
      const float by = weight(part);
      sum.x += by * x.x, sum.y += by * x.y, sum.z += by * x.z, sum.w += by * x.w;
    };
    if (own < kParts) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (own + i * kParts < parts) add(own + i * kParts, ahead[i]);
      }
#pragma unroll 4
      for (int part = own + kAhead * kParts; part < parts; part += kParts) add(part, columns_of(part));
      sums[own][column / 4] = sum;
    }
    __syncthreads();
    if (threadIdx.x < kRowThreads) {
#pragma unroll
      for (int i = 1; i < kParts; ++i) {
        const float4 x = sums[i][threadIdx.x];
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
      }
      float by[1], lse[1];
      const float row_max[1] = {top};
      const float row_sum[1] = {total};
      finish_rows_of_scores(by, lse, row_max, row_sum, params.softmax_scale_log2, 268435456.0f);
      const int number = tile.m_block * kBlockM + row;
      const int query = number / params.group, head = number % params.group;  // which of the group
      auto* out = head_of(params.out, tile.batch, params.out_stride_batch, tile.head, params.out_stride_head) + query * params.out_stride_seqlen + head * params.out_stride_head + column;
      *(uint2*)out = uint2{Output::pack(by[0] * sum.x, by[0] * sum.y), Output::pack(by[0] * sum.z, by[0] * sum.w)};
      if (threadIdx.x == 0 && params.lse != 0) dense_head(params.lse, params, tile)[(i64)head * params.seqlen_q + query] = lse[0];
    }
    __syncthreads();
  }
}

