// attn_fwd_sm90a_bf16_d64_causal_serial_bc036e8e
//
// Attention forward, serial schedule, for sm_90a: out = softmax(softmax_scale Q Kᵀ, masked) V and its
// log-sum-exp, inputs bf16, output bf16, softmax in f32. Mask: causal.
// Emitted by attngen 0.1.0 from spec digest bc036e8e0aced1ed. Launch: see the manifest beside this file.
//
// Notation: S = Q Kᵀ and P, the scores and probabilities of one block (acc_s, p); O, the output, unnormalised (acc_o);
// m and n, blocks of query rows and of keys; row_max in scaled log2 units.

#include "instructions.cuh"

#include "functions.cuh"

// ---- this kernel -----------------------------------------------------------------------------------------------------

constexpr int kBlockM = 64;  // tile.block_m: query rows of a block
constexpr int kBlockN = 64;  // tile.block_n: keys of a block
constexpr int kHeadDimQk = 64;  // problem.head_dim.qk
constexpr int kHeadDimV = 64;  // problem.head_dim.v
constexpr int kQkCols = 64;  // padded to 16, the k of mma.sync
constexpr int kVCols = 64;  // padded likewise
constexpr int kThreads = 128;  // schedule.warps = 4
constexpr int kRowTiles = 1;  // 16-row tiles that each warp owns
using Input = Bf16;
using Output = Bf16;
using QTile = SmemTile<kBlockM, kQkCols, kHeadDimQk>;
using KTile = SmemTile<kBlockN, kQkCols, kHeadDimQk>;
using VTile = SmemTile<kBlockN, kVCols, kHeadDimV>;
using OutTile = SmemTile<kBlockM, kVCols, kHeadDimV>;

struct Params {
  u16* q;
  u16* k;
  u16* v;
  u16* out;
  float* lse;
  float* o_acc;
  float* saved_max;
  float* saved_sum;
  i64 q_stride_batch;
  i64 q_stride_seqlen;
  i64 q_stride_head;
  i64 k_stride_batch;
  i64 k_stride_seqlen;
  i64 k_stride_head;
  i64 v_stride_batch;
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
};

// What this block works on. seqlen_q and seqlen_k are this sequence's own.
struct Tile {
  int head, batch, kv_head, seqlen_q, seqlen_k;
};

// Where a head starts. Computed where it is used, not ahead of the loops: registers are scarce there.
template <class Element>
DEV Element* head_of(Element* base, int batch, i64 stride_batch, int head, i64 stride_head) {
  return base + stay_in_loop(batch) * stride_batch + stay_in_loop(head) * stride_head;
}

// Where a head starts in a dense f32 array (batch, num_heads_q, seqlen_q, cols).
DEV float* dense_head(float* base, const Params& params, const Tile& tile, int cols = 1) {
  return base + ((i64)stay_in_loop(tile.batch) * params.num_heads_q + stay_in_loop(tile.head)) * params.seqlen_q * cols;
}

// One whole head.
DEV Tile decode_tile(const Params& params, int index) {
  Tile tile;
  tile.head = index % params.num_heads_q;
  tile.batch = index / params.num_heads_q;
  tile.kv_head = tile.head / params.group;
  tile.seqlen_q = params.seqlen_q;
  tile.seqlen_k = params.seqlen_k;
  return tile;
}

// Blocks of keys that a block of rows visits, n_min .. n_max - 1; from n_full_begin to n_full_end - 1 no key is masked.
struct KeyBlocks {
  int n_min, n_full_begin, n_full_end, n_max;
  __device__ bool visits(int n) const { return n_min <= n && n < n_max; }
};

// Which blocks of keys block m of rows visits, and which of them no row masks.
DEV KeyBlocks key_blocks(const Params& params, const Tile& tile, int m) {
  KeyBlocks seen;
  const int q_first = m * kBlockM, q_last = min(q_first + kBlockM, tile.seqlen_q) - 1;
  const int end_any = max(min(q_last + tile.seqlen_k - tile.seqlen_q + 1, tile.seqlen_k), 0);
  seen.n_max = (end_any + kBlockN - 1) / kBlockN;
  seen.n_min = min(0, seen.n_max);
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

extern "C" __global__ void __launch_bounds__(kThreads, 1)
attn_fwd_sm90a_bf16_d64_causal_serial_bc036e8e(const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) unsigned char smem[];
  const u32 q_smem = smem_address(smem) + 0;
  const u32 k_smem = smem_address(smem) + 8192;
  const u32 v_smem = smem_address(smem) + 16384;
  const u32 out_smem = smem_address(smem) + 0;  // over q, once that is no longer needed
  wait_for_earlier_kernels();
  let_next_kernel_start();
  float acc_s[kRowTiles][8][4];
  u32 p[kRowTiles][4][4];
  float acc_o[kRowTiles][8][4];
  float row_max[2 * kRowTiles];
  float alpha[2 * kRowTiles];
  float reference[2 * kRowTiles];
  float row_sum[2 * kRowTiles];
  float total[2 * kRowTiles];
  float inv_sum[2 * kRowTiles];
  float row_lse[2 * kRowTiles];

  Tile tile = decode_tile(params, blockIdx.x);
  const int m_max = (tile.seqlen_q + kBlockM - 1) / kBlockM, n_end = (tile.seqlen_k + kBlockN - 1) / kBlockN;
  // line 2: O = 0, row_sum = 0, row_max = lowest in device memory
  #pragma unroll 1
  for (int m = 0; m < m_max; ++m) {  // any tiles
    fill(acc_o, 0.f);
    fill(row_max, lowest());
    fill(total, 0.f);
    store_fragment<kHeadDimV>(dense_head(params.o_acc, params, tile, kHeadDimV), acc_o, m * kBlockM, tile.seqlen_q, kHeadDimV);
    store_rows<kRowTiles>(dense_head(params.saved_max, params, tile), row_max, m * kBlockM, tile.seqlen_q);
    store_rows<kRowTiles>(dense_head(params.saved_sum, params, tile), total, m * kBlockM, tile.seqlen_q);
  }
  // line 5: every block of keys
  #pragma unroll 1
  for (int n = 0; n < n_end; ++n) {  // any tiles
    __syncthreads();
    load_tile<KTile, kThreads>(k_smem, head_of(params.k, tile.batch, params.k_stride_batch, tile.kv_head, params.k_stride_head), params.k_stride_seqlen, n * kBlockN, tile.seqlen_k);
    load_tile<VTile, kThreads>(v_smem, head_of(params.v, tile.batch, params.v_stride_batch, tile.kv_head, params.v_stride_head), params.v_stride_seqlen, n * kBlockN, tile.seqlen_k);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    // line 7: every block of rows that sees it
    #pragma unroll 1
    for (int m = 0; m < m_max; ++m) {  // any tiles
      if (key_blocks(params, tile, m).visits(n)) {
        __syncthreads();
        // line 8: load Q, O, row_sum, row_max
        load_tile<QTile, kThreads>(q_smem, head_of(params.q, tile.batch, params.q_stride_batch, tile.head, params.q_stride_head), params.q_stride_seqlen, m * kBlockM, tile.seqlen_q);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        if (params.scale_is_negative) {
          negate_tile<QTile, kThreads>(q_smem);
          __syncthreads();
        }
        load_fragment<kHeadDimV>(acc_o, dense_head(params.o_acc, params, tile, kHeadDimV), m * kBlockM, tile.seqlen_q, kHeadDimV);
        load_rows<kRowTiles>(row_max, dense_head(params.saved_max, params, tile), m * kBlockM, tile.seqlen_q);
        load_rows_partial<kRowTiles>(row_sum, dense_head(params.saved_sum, params, tile), m * kBlockM, tile.seqlen_q);
        load_rows<kRowTiles>(total, dense_head(params.saved_sum, params, tile), m * kBlockM, tile.seqlen_q);
        // line 9: S = Q Kᵀ
        gemm_nt_ss<Input, QTile, KTile, true, 4>(acc_s, q_smem, k_smem);
        {
          int end[2 * kRowTiles];  // of the keys each row sees, counted from this lane's first column
        #pragma unroll
          for (int i = 0; i < 2 * kRowTiles; ++i) {
            const int q_idx = m * kBlockM + row_in_tile<kRowTiles>(i), column = n * kBlockN + lane_column();
            end[i] = end_key(params, tile, q_idx) - column;
          }
          mask_scores(acc_s, end);
        }
        // lines 10 and 11: new row_max and row_sum
        update_row_max_by_integers(row_max, reference, alpha, acc_s, params.softmax_scale_log2, 134217728.0f);
        exponentiate(acc_s, row_sum, reference, alpha, params.softmax_scale_log2);
        // line 12: O = (row_sum alpha O + P V) / new row_sum
        scale_rows(acc_o, total);
        scale_rows(acc_o, alpha);
        convert_p<Input>(p, acc_s);
        gemm_nn_rs<Input, VTile, false>(acc_o, p, v_smem);
        reduce_rows(total, row_sum);
        finish_rows_of_scores(inv_sum, row_lse, row_max, total, params.softmax_scale_log2, 134217728.0f);
        scale_rows(acc_o, inv_sum);
        store_fragment<kHeadDimV>(dense_head(params.o_acc, params, tile, kHeadDimV), acc_o, m * kBlockM, tile.seqlen_q, kHeadDimV);
        // line 13: write row_sum and row_max
        store_rows<kRowTiles>(dense_head(params.saved_max, params, tile), row_max, m * kBlockM, tile.seqlen_q);
        store_rows<kRowTiles>(dense_head(params.saved_sum, params, tile), total, m * kBlockM, tile.seqlen_q);
      }
    }
  }
  // round O to the output type, lse = row_max + log row_sum
  __syncthreads();
  #pragma unroll 1
  for (int m = 0; m < m_max; ++m) {  // any tiles
    load_fragment<kHeadDimV>(acc_o, dense_head(params.o_acc, params, tile, kHeadDimV), m * kBlockM, tile.seqlen_q, kHeadDimV);
    load_rows<kRowTiles>(row_max, dense_head(params.saved_max, params, tile), m * kBlockM, tile.seqlen_q);
    load_rows<kRowTiles>(total, dense_head(params.saved_sum, params, tile), m * kBlockM, tile.seqlen_q);
    finish_rows_of_scores(inv_sum, row_lse, row_max, total, params.softmax_scale_log2, 134217728.0f);
    if (params.lse != 0) store_rows<kRowTiles>(dense_head(params.lse, params, tile), row_lse, m * kBlockM, tile.seqlen_q);
    __syncthreads();
    copy_tile<Output, OutTile>(out_smem, acc_o);
    __syncthreads();
    store_tile<OutTile, kThreads>(head_of(params.out, tile.batch, params.out_stride_batch, tile.head, params.out_stride_head), params.out_stride_seqlen, m * kBlockM, tile.seqlen_q, out_smem);
  }
}

