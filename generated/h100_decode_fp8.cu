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

constexpr int kBlockM = 16;  // tile.block_m: query rows of a block
constexpr int kBlockN = 128;  // tile.block_n: keys of a block
constexpr int kHeadDimQk = 128;  // problem.head_dim.qk
constexpr int kHeadDimV = 128;  // problem.head_dim.v
constexpr int kQkCols = 128;  // padded to 16, the k of mma.sync
constexpr int kVCols = 128;  // padded likewise
constexpr int kStages = 3;  // schedule.stages: K and V blocks in shared memory
constexpr int kThreads = 128;  // schedule.warps = 4
constexpr int kRowTiles = 1;  // 16-row tiles, which every warp has
constexpr int kWarps = 4;  // of those that have rows or keys of a tile
constexpr int kMergingLanes = 32;  // of a warp that merge a row
constexpr int kWarpKeys = 32;  // keys of a block that a warp has
constexpr int kShareBytes = 8448;  // what a warp's keys come to: O, and three numbers a row, in f32
using Input = F16;
using Output = Bf16;
using QTile = SmemTile<kBlockM, kQkCols, kHeadDimQk>;
using KTile = SmemTile<kWarpKeys, kQkCols, kHeadDimQk, 16>;
using VTile = SmemTile<kWarpKeys, kVCols, kHeadDimV, 16>;

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
  float* part_reference;
  u32* tickets;
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

// decode_tile for a whole warp, whose threads the compiler then knows to have one tile.
DEV Tile decode_tile_warp(const Params& params, int index) {
  Tile tile = decode_tile(params, index);
  tile.m_block = same_in_warp(tile.m_block);
  tile.head = same_in_warp(tile.head);
  tile.batch = same_in_warp(tile.batch);
  tile.kv_head = same_in_warp(tile.kv_head);
  tile.seqlen_q = same_in_warp(tile.seqlen_q);
  tile.seqlen_k = same_in_warp(tile.seqlen_k);
  tile.q_start = same_in_warp(tile.q_start);
  tile.k_start = same_in_warp(tile.k_start);
  tile.n_begin = same_in_warp(tile.n_begin);
  tile.n_end = same_in_warp(tile.n_end);
  tile.part = same_in_warp(tile.part);
  tile.parts = same_in_warp(tile.parts);
  return tile;
}

// Rows of a part for which there is a place.
DEV int part_rows(const Params& params) { return min(kBlockM, params.seqlen_q * params.group); }

// Where the rows of a tile's part stand in a dense f32 array (tiles, rows, cols), by the number of the tile.
DEV float* part_of(float* base, const Params& params, int number, int cols = 1) { return base + (i64)stay_in_loop(number) * part_rows(params) * cols; }

// The tile that has the first part of a tile's keys; the parts of a tile are as many tiles apart as there are heads.
DEV int first_part(const Params& params, const Tile& tile) { return (int)blockIdx.x - tile.part * (params.num_heads_q / params.group); }

// Parts of a tile for which the list had room: where lengths lie, not all.
DEV int parts_listed(const Params& params, const Tile& tile) {
  return min(tile.parts, (num_tiles(params) - first_part(params, tile) + (params.num_heads_q / params.group) - 1) / (params.num_heads_q / params.group));
}

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

extern "C" __global__ void __launch_bounds__(kThreads, 2)
attn_fwd_sm90a_bf16_e4m3_d128_causal_fa2_9728ef22(const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) unsigned char smem[];
  const u32 q_smem = smem_address(smem) + 0;
  const u32 k_smem = smem_address(smem) + 4096;
  const u32 v_smem = smem_address(smem) + 53248;
  const u32 shares_smem = smem_address(smem) + 0;  // over q, once that is no longer needed
  const int warp = same_in_warp(threadIdx.x / 32);
  wait_for_earlier_kernels();
  let_next_kernel_start();
  int read_at = 0;  // stage of the ring
  float acc_s[kRowTiles][4][4];
  u32 p[kRowTiles][2][4];
  float acc_o[kRowTiles][16][4];
  float joined[kRowTiles][4][4];
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

  const int listed = same_in_warp(num_tiles(params));
  Tile tile = decode_tile_warp(params, blockIdx.x);
  if ((int)blockIdx.x >= listed) return;  // an entry without a tile is read, and nothing by it: the two loads wait together
  const KeyBlocks seen = key_blocks(params, tile, tile.m_block);
  fill(acc_o, 0.f);
  fill(row_max, lowest());
  fill(reference, lowest());
  fill(row_sum, 0.f);
  fill(score_scale, read_k_descale(params, tile));
  fill(value_scale, read_v_descale(params, tile));
  if (seen.n_max > seen.n_min) {
    if (warp == 0) {
      load_tile<QTile, 32>(q_smem, head_of(params.q, tile.batch, params.q_stride_batch, tile.head, params.q_stride_head), PackedRows{params.q_stride_seqlen, params.q_stride_head, params.group}, tile.m_block * kBlockM, tile.seqlen_q * params.group);
    }
    cp_async_commit();
    load_paged_tile<KTile, 32, true>(k_smem + (read_at * kWarps + warp) * KTile::kBytes, paged_rows(params, tile, params.k, params.k_stride_page / 2, params.k_stride_seqlen / 2, params.k_stride_head / 2), (seen.n_max - 1) * kBlockN + warp * kWarpKeys, tile.seqlen_k);
    load_paged_tile<VTile, 32, true>(v_smem + (read_at * kWarps + warp) * VTile::kBytes, paged_rows(params, tile, params.v, params.v_stride_page / 2, params.v_stride_seqlen / 2, params.v_stride_head / 2), (seen.n_max - 1) * kBlockN + warp * kWarpKeys, tile.seqlen_k);
    cp_async_commit();
    read_at = read_at + 1 == kStages ? 0 : read_at + 1;
    if (seen.n_max - 2 >= seen.n_min) {
      load_paged_tile<KTile, 32, true>(k_smem + (read_at * kWarps + warp) * KTile::kBytes, paged_rows(params, tile, params.k, params.k_stride_page / 2, params.k_stride_seqlen / 2, params.k_stride_head / 2), (seen.n_max - 2) * kBlockN + warp * kWarpKeys, tile.seqlen_k);
      load_paged_tile<VTile, 32, true>(v_smem + (read_at * kWarps + warp) * VTile::kBytes, paged_rows(params, tile, params.v, params.v_stride_page / 2, params.v_stride_seqlen / 2, params.v_stride_head / 2), (seen.n_max - 2) * kBlockN + warp * kWarpKeys, tile.seqlen_k);
    }
    cp_async_commit();
    read_at = read_at + 1 == kStages ? 0 : read_at + 1;
    if (seen.n_max - 3 >= seen.n_min) {
      load_paged_tile<KTile, 32, true>(k_smem + (read_at * kWarps + warp) * KTile::kBytes, paged_rows(params, tile, params.k, params.k_stride_page / 2, params.k_stride_seqlen / 2, params.k_stride_head / 2), (seen.n_max - 3) * kBlockN + warp * kWarpKeys, tile.seqlen_k);
      load_paged_tile<VTile, 32, true>(v_smem + (read_at * kWarps + warp) * VTile::kBytes, paged_rows(params, tile, params.v, params.v_stride_page / 2, params.v_stride_seqlen / 2, params.v_stride_head / 2), (seen.n_max - 3) * kBlockN + warp * kWarpKeys, tile.seqlen_k);
    }
    cp_async_commit();
    read_at = read_at + 1 == kStages ? 0 : read_at + 1;
    cp_async_wait<3>();
    __syncthreads();
    {
      float powers[2 * kRowTiles];
      find_powers<QTile, kRowTiles, false>(q_smem, powers, score_scale, 0);
      __syncthreads();  // all have looked
      if (warp == 0) fit_rows<QTile, kRowTiles>(q_smem, powers, 0);
    }
    if (warp == 0) {
      if (params.scale_is_negative) {
        __syncwarp();
        negate_tile<QTile, 32>(q_smem);
      }
    }
    __syncthreads();
    #pragma unroll 1
    for (int n = seen.n_max - 1; n >= seen.n_full_end; --n) {  // partial tiles
      cp_async_wait<2>();
      __syncwarp();
      // S = Q Kᵀ
      gemm_nt_ss_8bit<Input, QTile, KTile, true, 4>(acc_s, q_smem, k_smem + (read_at * kWarps + warp) * KTile::kBytes, 0);
      scale_rows(acc_s, score_scale);
      {
        int end[2 * kRowTiles];  // of the keys each row sees, counted from this lane's first column
      #pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i) {
          const int q_idx = (tile.m_block * kBlockM + row_in_tile<kRowTiles>(i, 0)) / params.group, column = n * kBlockN + warp * kWarpKeys + lane_column();
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
      gemm_nn_rs_8bit<Input, VTile, false>(acc_o, p, v_smem + (read_at * kWarps + warp) * VTile::kBytes);
      __syncwarp();
      if (n - 3 >= seen.n_min) {
        load_paged_tile<KTile, 32, true>(k_smem + (read_at * kWarps + warp) * KTile::kBytes, paged_rows(params, tile, params.k, params.k_stride_page / 2, params.k_stride_seqlen / 2, params.k_stride_head / 2), (n - 3) * kBlockN + warp * kWarpKeys, tile.seqlen_k);
        load_paged_tile<VTile, 32, true>(v_smem + (read_at * kWarps + warp) * VTile::kBytes, paged_rows(params, tile, params.v, params.v_stride_page / 2, params.v_stride_seqlen / 2, params.v_stride_head / 2), (n - 3) * kBlockN + warp * kWarpKeys, tile.seqlen_k);
      }
      cp_async_commit();
      read_at = read_at + 1 == kStages ? 0 : read_at + 1;
    }
    #pragma unroll 1
    for (int n = seen.n_full_end - 1; n >= seen.n_full_begin; --n) {  // full tiles
      cp_async_wait<2>();
      __syncwarp();
      // S = Q Kᵀ
      gemm_nt_ss_8bit<Input, QTile, KTile, true, 4>(acc_s, q_smem, k_smem + (read_at * kWarps + warp) * KTile::kBytes, 0);
      scale_rows(acc_s, score_scale);
      // online softmax
      update_row_max(row_max, reference, alpha, exponent_scale, acc_s, params.softmax_scale_log2, 268435456.0f);
      exponentiate(acc_s, row_sum, reference, alpha, exponent_scale);
      if (warp_rescales(alpha)) scale_rows(acc_o, alpha);
      convert_p<Input>(p, acc_s);
      // O += P V
      gemm_nn_rs_8bit<Input, VTile, false>(acc_o, p, v_smem + (read_at * kWarps + warp) * VTile::kBytes);
      __syncwarp();
      if (n - 3 >= seen.n_min) {
        load_paged_tile<KTile, 32, true>(k_smem + (read_at * kWarps + warp) * KTile::kBytes, paged_rows(params, tile, params.k, params.k_stride_page / 2, params.k_stride_seqlen / 2, params.k_stride_head / 2), (n - 3) * kBlockN + warp * kWarpKeys, tile.seqlen_k);
        load_paged_tile<VTile, 32, true>(v_smem + (read_at * kWarps + warp) * VTile::kBytes, paged_rows(params, tile, params.v, params.v_stride_page / 2, params.v_stride_seqlen / 2, params.v_stride_head / 2), (n - 3) * kBlockN + warp * kWarpKeys, tile.seqlen_k);
      }
      cp_async_commit();
      read_at = read_at + 1 == kStages ? 0 : read_at + 1;
    }
    // V in real numbers, and columns in order
    order_columns(acc_o);
    scale_rows(acc_o, value_scale);
  }
  // what the keys of all warps have come to
  reduce_rows(total, row_sum);
  __syncthreads();
  leave_share<kShareBytes>(shares_smem + warp * kShareBytes, acc_o, total, row_max, reference);
  __syncthreads();
  join_shares<kWarps, kVCols / 8, kShareBytes>(joined, total, row_max, reference, shares_smem, warp);
  if (tile.parts == 1) {
    finish_rows_of_scores(inv_sum, row_lse, row_max, total, params.softmax_scale_log2, 268435456.0f);
    scale_rows(joined, inv_sum);
    if (warp == 0) {
      if (params.lse != 0) store_rows<kRowTiles>(dense_head(params.lse, params, tile), row_lse, tile.m_block * kBlockM, tile.seqlen_q * params.group, PackedRows{1, params.seqlen_q, params.group}, 0);
    }
    store_columns<Output, kHeadDimV>(head_of(params.out, tile.batch, params.out_stride_batch, tile.head, params.out_stride_head), joined, tile.m_block * kBlockM, tile.seqlen_q * params.group, PackedRows{params.out_stride_seqlen, params.out_stride_head, params.group}, warp);
  }
  if (tile.parts > 1) {
    store_columns<float, kHeadDimV>(part_of(params.part_out, params, blockIdx.x, kHeadDimV), joined, 0, tile.seqlen_q * params.group - tile.m_block * kBlockM, kHeadDimV, warp);
    if (warp == 0) {
      store_rows<kRowTiles>(part_of(params.part_sum, params, blockIdx.x), total, 0, tile.seqlen_q * params.group - tile.m_block * kBlockM, 0);
      store_rows<kRowTiles>(part_of(params.part_max, params, blockIdx.x), row_max, 0, tile.seqlen_q * params.group - tile.m_block * kBlockM, 0);
      store_rows<kRowTiles>(part_of(params.part_reference, params, blockIdx.x), reference, 0, tile.seqlen_q * params.group - tile.m_block * kBlockM, 0);
    }
    const bool is_last = count_part(params.tickets + first_part(params, tile), parts_listed(params, tile));
    if (is_last) {
      {
        const int first = first_part(params, tile), parts = parts_listed(params, tile);
        const int rows = min(kBlockM, tile.seqlen_q * params.group - tile.m_block * kBlockM);
        auto* const of_head = head_of(params.out, tile.batch, params.out_stride_batch, tile.head, params.out_stride_head);
        float* const lse_of_head = params.lse == 0 ? 0 : dense_head(params.lse, params, tile);
        const PartsOfTile left = {part_of(params.part_out, params, first, kHeadDimV), part_of(params.part_sum, params, first), part_of(params.part_max, params, first), part_of(params.part_reference, params, first), (i64)(params.num_heads_q / params.group) * part_rows(params), parts};
      #pragma unroll 1
        for (int row = warp * (32 / kMergingLanes); row < rows; row += kWarps * (32 / kMergingLanes)) {
          const int own = row + threadIdx.x % 32 / kMergingLanes, number = tile.m_block * kBlockM + min(own, rows - 1);
          const int query = number / params.group, head = number % params.group;  // which of the group
          float4 o[(kHeadDimV + 4 * kMergingLanes - 1) / (4 * kMergingLanes)];
          float total[1], row_max[1], by[1], lse[1];
          merge_row<kHeadDimV, kMergingLanes>(o, total[0], row_max[0], left, min(own, rows - 1));
          finish_rows_of_scores(by, lse, row_max, total, params.softmax_scale_log2, 268435456.0f);
          if (own < rows) {
            store_merged<Output, kHeadDimV, kMergingLanes>(of_head + query * params.out_stride_seqlen + head * params.out_stride_head, o, by[0]);
            if (threadIdx.x % kMergingLanes == 0 && lse_of_head) lse_of_head[(i64)head * params.seqlen_q + query] = lse[0];
          }
        }
      }
    }
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
  const u32 most_entries = ((params.batch * ((((params.seqlen_q * params.group) + 16 - 1) / 16) + 0)) + (((params.num_sms * 8) + max(1, params.num_heads_kv) - 1) / max(1, params.num_heads_kv)));
  for (int i = threadIdx.x; i < kBuckets * 32; i += 1024) places[i] = 0;
  __syncthreads();
  // Blocks of keys of a part. Each lane tries a width, and guesses in keys how long a call would then take; the first of the least counts.
  __shared__ u64 work_of_warps[32];
  __shared__ u32 parts_by[32];  // of all sequences, by the width of each lane
  if (threadIdx.x < 32) parts_by[threadIdx.x] = 0;
  auto tiles_and_blocks = [&](int b) {
    if (b >= params.batch) return uint2{0, 0};
    const Span queries = queries_of(params, b), keys = keys_of(params, b);
    const u32 tiles = tiles_of(params, queries.start, queries.end);
    const Span visited = visited_by(params, b, queries, keys, tiles);
    return uint2{tiles, (u32)(visited.end - visited.start)};
  };
  u64 work = 0;
#pragma unroll 1
  for (int b = threadIdx.x; b < params.batch; b += 1024) {
    const uint2 of = tiles_and_blocks(b);
    work += (u64)of.x * of.y;
  }
  work = sum_of_lanes(work);
  if (lane == 0) work_of_warps[warp] = work;
  __syncthreads();
  const u64 all_work = sum_of_lanes(work_of_warps[lane]) * (params.num_heads_q / params.group), resident = params.num_sms * 2;
  auto for_each = [&](u64 parts) { return (int)min((all_work + parts - 1) / parts, (u64)1073741824); };
  const int narrowest = for_each(resident), waves = min(max(lane - 22, 2), 4);
  const int tried = max(1, lane < 24 ? narrowest + lane * max(1, narrowest / 32) : for_each(resident * waves));
  u32 parts_tried = 0;
#pragma unroll 1
  for (int first = warp * 32; first < params.batch; first += 1024) {
    const uint2 of = tiles_and_blocks(first + lane);
#pragma unroll 1
    for (int from = 0; from < min(32, params.batch - first); ++from) {
      const u32 tiles = __shfl_sync(~0u, of.x, from), blocks = __shfl_sync(~0u, of.y, from);
      parts_tried += tiles * max(1u, (blocks + tried - 1) / tried);
    }
  }
  atomicAdd(&parts_by[lane], parts_tried);
  __syncthreads();
  const u64 all_parts = (u64)parts_by[lane] * (params.num_heads_q / params.group), in_keys = (u64)tried * kBlockN;
  const u64 shared_out = (all_work * kBlockN + all_parts * 768 + resident - 1) / resident;
  const u64 guess = (all_parts <= resident ? 2 * (in_keys + 768) : 2 * shared_out + in_keys);
  u64 least = guess;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) least = min(least, __shfl_xor_sync(~0u, least, distance));
  const int width = __shfl_sync(~0u, tried, __ffs(__ballot_sync(~0u, guess == least)) - 1);
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

