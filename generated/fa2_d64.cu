// attn_fwd_sm90a_bf16_d64_full_fa2_e0714259
//
// Attention forward, fa2 schedule, for sm_90a: out = softmax(softmax_scale Q Kᵀ, masked) V and its
// log-sum-exp, inputs bf16, output bf16, softmax in f32. Mask: full.
// Emitted by attngen 0.1.0 from spec digest e0714259cdb8b823. Launch: see the manifest beside this file.
//
// Notation: S = Q Kᵀ and P, the scores and probabilities of one block (acc_s, p); O, the output, unnormalised (acc_o);
// m and n, blocks of query rows and of keys; row_max in scaled log2 units.

#include "instructions.cuh"

#include "functions.cuh"

// ---- this kernel -----------------------------------------------------------------------------------------------------

constexpr int kBlockM = 128;  // tile.block_m: query rows of a block
constexpr int kBlockN = 64;  // tile.block_n: keys of a block
constexpr int kHeadDimQk = 64;  // problem.head_dim.qk
constexpr int kHeadDimV = 64;  // problem.head_dim.v
constexpr int kQkCols = 64;  // padded to 16, the k of mma.sync
constexpr int kVCols = 64;  // padded likewise
constexpr int kStages = 2;  // schedule.stages: K and V blocks in shared memory
constexpr int kThreads = 128;  // schedule.warps = 4
constexpr int kRowTiles = 2;  // 16-row tiles that each warp owns
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
  int m_block, head, batch, kv_head, seqlen_q, seqlen_k;
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

// One block of rows of one head. Blocks of rows are fastest, so that neighbours share K and V in L2.
DEV Tile decode_tile(const Params& params, int index) {
  Tile tile;
  const int m_max = (params.seqlen_q + kBlockM - 1) / kBlockM;
  const int row = index / m_max;
  tile.m_block = index % m_max;
  tile.head = row % params.num_heads_q;
  tile.batch = row / params.num_heads_q;
  tile.kv_head = tile.head / params.group;
  tile.seqlen_q = params.seqlen_q;
  tile.seqlen_k = params.seqlen_k;
  return tile;
}

// Blocks of keys that a block of rows visits, n_min .. n_max - 1; from n_full_begin to n_full_end - 1 no key is masked.
struct KeyBlocks {
  int n_min, n_full_begin, n_full_end, n_max;
};

// Which blocks of keys block m of rows visits, and which of them no row masks.
DEV KeyBlocks key_blocks(const Params& params, const Tile& tile, int m) {
  KeyBlocks seen;
  seen.n_max = (tile.seqlen_k + kBlockN - 1) / kBlockN;
  seen.n_min = min(0, seen.n_max);
  seen.n_full_begin = seen.n_min;
  seen.n_full_end = max(min(tile.seqlen_k / kBlockN, seen.n_max), seen.n_full_begin);
  return seen;
}

// The keys that row q_idx sees are first_key .. end_key - 1.
DEV int end_key(const Params& params, const Tile& tile, int q_idx) {
  int end = tile.seqlen_k;
  return end;
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
attn_fwd_sm90a_bf16_d64_full_fa2_e0714259(const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) unsigned char smem[];
  const u32 q_smem = smem_address(smem) + 0;
  const u32 k_smem = smem_address(smem) + 16384;
  const u32 v_smem = smem_address(smem) + 32768;
  const u32 out_smem = smem_address(smem) + 0;  // over q, once that is no longer needed
  wait_for_earlier_kernels();
  let_next_kernel_start();
  int load_at = 0;  // stage of the ring
  int read_at = 0;  // stage of the ring
  float acc_s[kRowTiles][8][4];
  u32 p[kRowTiles][4][4];
  float acc_o[kRowTiles][8][4];
  float row_max[2 * kRowTiles];
  float alpha[2 * kRowTiles];
  float reference[2 * kRowTiles];
  float exponent_scale[1][2 * kRowTiles];
  float row_sum[2 * kRowTiles];
  float total[2 * kRowTiles];
  float inv_sum[2 * kRowTiles];
  float row_lse[2 * kRowTiles];

  Tile tile = decode_tile(params, blockIdx.x);
  const KeyBlocks seen = key_blocks(params, tile, tile.m_block);
  fill(acc_o, 0.f);
  fill(row_max, lowest());
  fill(reference, lowest());
  fill(row_sum, 0.f);
  if (seen.n_max > seen.n_min) {
    load_tile<QTile, kThreads>(q_smem, head_of(params.q, tile.batch, params.q_stride_batch, tile.head, params.q_stride_head), params.q_stride_seqlen, tile.m_block * kBlockM, tile.seqlen_q);
    load_tile<KTile, kThreads>(k_smem + load_at * KTile::kBytes, head_of(params.k, tile.batch, params.k_stride_batch, tile.kv_head, params.k_stride_head), params.k_stride_seqlen, (seen.n_max - 1) * kBlockN, tile.seqlen_k);
    load_tile<VTile, kThreads>(v_smem + load_at * VTile::kBytes, head_of(params.v, tile.batch, params.v_stride_batch, tile.kv_head, params.v_stride_head), params.v_stride_seqlen, (seen.n_max - 1) * kBlockN, tile.seqlen_k);
    cp_async_commit();
    load_at = load_at + 1 == kStages ? 0 : load_at + 1;
    if (params.scale_is_negative) {
      cp_async_wait<0>();
      __syncthreads();
      negate_tile<QTile, kThreads>(q_smem);
    }
    #pragma unroll 1
    for (int n = seen.n_max - 1; n >= seen.n_full_end; --n) {  // partial tiles
      cp_async_wait<0>();
      __syncthreads();
      if (n - 1 >= seen.n_min) {
        load_whole_tile<KTile, kThreads>(k_smem + load_at * KTile::kBytes, head_of(params.k, tile.batch, params.k_stride_batch, tile.kv_head, params.k_stride_head), params.k_stride_seqlen, (n - 1) * kBlockN);
        load_whole_tile<VTile, kThreads>(v_smem + load_at * VTile::kBytes, head_of(params.v, tile.batch, params.v_stride_batch, tile.kv_head, params.v_stride_head), params.v_stride_seqlen, (n - 1) * kBlockN);
      }
      cp_async_commit();
      load_at = load_at + 1 == kStages ? 0 : load_at + 1;
      // S = Q Kᵀ
      gemm_nt_ss<Input, QTile, KTile, true, 4>(acc_s, q_smem, k_smem + read_at * KTile::kBytes);
      {
        int end[2 * kRowTiles];  // of the keys each row sees, counted from this lane's first column
      #pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i) {
          const int q_idx = tile.m_block * kBlockM + row_in_tile<kRowTiles>(i), column = n * kBlockN + lane_column();
          end[i] = end_key(params, tile, q_idx) - column;
        }
        mask_scores(acc_s, end);
      }
      // online softmax
      update_row_max(row_max, reference, alpha, exponent_scale, acc_s, params.softmax_scale_log2, 1073741824.0f);
      exponentiate(acc_s, row_sum, reference, alpha, exponent_scale);
      scale_rows(acc_o, alpha);
      convert_p<Input>(p, acc_s);
      // O += P V
      gemm_nn_rs<Input, VTile, false>(acc_o, p, v_smem + read_at * VTile::kBytes);
      read_at = read_at + 1 == kStages ? 0 : read_at + 1;
    }
    #pragma unroll 1
    for (int n = seen.n_full_end - 1; n >= seen.n_full_begin; --n) {  // full tiles
      cp_async_wait<0>();
      __syncthreads();
      if (n - 1 >= seen.n_min) {
        load_whole_tile<KTile, kThreads>(k_smem + load_at * KTile::kBytes, head_of(params.k, tile.batch, params.k_stride_batch, tile.kv_head, params.k_stride_head), params.k_stride_seqlen, (n - 1) * kBlockN);
        load_whole_tile<VTile, kThreads>(v_smem + load_at * VTile::kBytes, head_of(params.v, tile.batch, params.v_stride_batch, tile.kv_head, params.v_stride_head), params.v_stride_seqlen, (n - 1) * kBlockN);
      }
      cp_async_commit();
      load_at = load_at + 1 == kStages ? 0 : load_at + 1;
      // S = Q Kᵀ
      gemm_nt_ss<Input, QTile, KTile, true, 4>(acc_s, q_smem, k_smem + read_at * KTile::kBytes);
      // online softmax
      update_row_max(row_max, reference, alpha, exponent_scale, acc_s, params.softmax_scale_log2, 1073741824.0f);
      exponentiate(acc_s, row_sum, reference, alpha, exponent_scale);
      scale_rows(acc_o, alpha);
      convert_p<Input>(p, acc_s);
      // O += P V
      gemm_nn_rs<Input, VTile, false>(acc_o, p, v_smem + read_at * VTile::kBytes);
      read_at = read_at + 1 == kStages ? 0 : read_at + 1;
    }
  }
  // normalise once, at the end
  tile = decode_tile(params, stay_in_loop(blockIdx.x));
  reduce_rows(total, row_sum);
  finish_rows_of_scores(inv_sum, row_lse, row_max, total, params.softmax_scale_log2, 1073741824.0f);
  scale_rows(acc_o, inv_sum);
  if (params.lse != 0) store_rows<kRowTiles>(dense_head(params.lse, params, tile), row_lse, tile.m_block * kBlockM, tile.seqlen_q);
  __syncthreads();
  copy_tile<Output, OutTile>(out_smem, acc_o);
  __syncthreads();
  store_tile<OutTile, kThreads>(head_of(params.out, tile.batch, params.out_stride_batch, tile.head, params.out_stride_head), params.out_stride_seqlen, tile.m_block * kBlockM, tile.seqlen_q, out_smem);
}

