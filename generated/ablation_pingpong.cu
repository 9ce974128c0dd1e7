// attn_fwd_sm90a_f16_d128_full_pingpong_0d8fa0ad
//
// Attention forward, pingpong schedule, for sm_90a: out = softmax(softmax_scale Q Kᵀ, masked) V and its
// log-sum-exp, inputs f16, output f16, softmax in f32. Mask: full.
// Emitted by attngen 0.1.0 from spec digest 0d8fa0ad434c92be. Launch: see the manifest beside this file.
//
// Notation: S = Q Kᵀ and P, the scores and probabilities of one block (acc_s, p); O, the output, unnormalised (acc_o);
// m and n, blocks of query rows and of keys; row_max in scaled log2 units.

#include "instructions.cuh"

// D (64x128) = A (64x16) Bᵀ, both rows of 16 in shared memory; + D where `keep`. PTX ISA: wgmma.mma_async.
DEV void wgmma(float (&d)[1][16][4], u64 a, u64 b, bool keep) {
  asm volatile(
      "{\n"
      ".reg .pred keep;\n"
      "setp.ne.b32 keep, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, keep, 1, 1, 0, 0;\n"
      "}"
      : "+f"(d[0][0][0]), "+f"(d[0][0][1]), "+f"(d[0][0][2]), "+f"(d[0][0][3]), "+f"(d[0][1][0]), "+f"(d[0][1][1]), "+f"(d[0][1][2]), "+f"(d[0][1][3]), "+f"(d[0][2][0]), "+f"(d[0][2][1]), "+f"(d[0][2][2]), "+f"(d[0][2][3]), "+f"(d[0][3][0]), "+f"(d[0][3][1]), "+f"(d[0][3][2]), "+f"(d[0][3][3]), "+f"(d[0][4][0]), "+f"(d[0][4][1]), "+f"(d[0][4][2]), "+f"(d[0][4][3]), "+f"(d[0][5][0]), "+f"(d[0][5][1]), "+f"(d[0][5][2]), "+f"(d[0][5][3]), "+f"(d[0][6][0]), "+f"(d[0][6][1]), "+f"(d[0][6][2]), "+f"(d[0][6][3]), "+f"(d[0][7][0]), "+f"(d[0][7][1]), "+f"(d[0][7][2]), "+f"(d[0][7][3]), "+f"(d[0][8][0]), "+f"(d[0][8][1]), "+f"(d[0][8][2]), "+f"(d[0][8][3]), "+f"(d[0][9][0]), "+f"(d[0][9][1]), "+f"(d[0][9][2]), "+f"(d[0][9][3]), "+f"(d[0][10][0]), "+f"(d[0][10][1]), "+f"(d[0][10][2]), "+f"(d[0][10][3]), "+f"(d[0][11][0]), "+f"(d[0][11][1]), "+f"(d[0][11][2]), "+f"(d[0][11][3]), "+f"(d[0][12][0]), "+f"(d[0][12][1]), "+f"(d[0][12][2]), "+f"(d[0][12][3]), "+f"(d[0][13][0]), "+f"(d[0][13][1]), "+f"(d[0][13][2]), "+f"(d[0][13][3]), "+f"(d[0][14][0]), "+f"(d[0][14][1]), "+f"(d[0][14][2]), "+f"(d[0][14][3]), "+f"(d[0][15][0]), "+f"(d[0][15][1]), "+f"(d[0][15][2]), "+f"(d[0][15][3])
      : "l"(a), "l"(b), "r"((u32)keep));
}

// D (64x128) = A (64x16, registers) B (16 rows in shared memory); + D where `keep`. PTX ISA: wgmma.mma_async, B transposed.
DEV void wgmma(float (&d)[1][16][4], const u32 (&a)[4], u64 b, bool keep) {
  asm volatile(
      "{\n"
      ".reg .pred keep;\n"
      "setp.ne.b32 keep, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, keep, 1, 1, 1;\n"
      "}"
      : "+f"(d[0][0][0]), "+f"(d[0][0][1]), "+f"(d[0][0][2]), "+f"(d[0][0][3]), "+f"(d[0][1][0]), "+f"(d[0][1][1]), "+f"(d[0][1][2]), "+f"(d[0][1][3]), "+f"(d[0][2][0]), "+f"(d[0][2][1]), "+f"(d[0][2][2]), "+f"(d[0][2][3]), "+f"(d[0][3][0]), "+f"(d[0][3][1]), "+f"(d[0][3][2]), "+f"(d[0][3][3]), "+f"(d[0][4][0]), "+f"(d[0][4][1]), "+f"(d[0][4][2]), "+f"(d[0][4][3]), "+f"(d[0][5][0]), "+f"(d[0][5][1]), "+f"(d[0][5][2]), "+f"(d[0][5][3]), "+f"(d[0][6][0]), "+f"(d[0][6][1]), "+f"(d[0][6][2]), "+f"(d[0][6][3]), "+f"(d[0][7][0]), "+f"(d[0][7][1]), "+f"(d[0][7][2]), "+f"(d[0][7][3]), "+f"(d[0][8][0]), "+f"(d[0][8][1]), "+f"(d[0][8][2]), "+f"(d[0][8][3]), "+f"(d[0][9][0]), "+f"(d[0][9][1]), "+f"(d[0][9][2]), "+f"(d[0][9][3]), "+f"(d[0][10][0]), "+f"(d[0][10][1]), "+f"(d[0][10][2]), "+f"(d[0][10][3]), "+f"(d[0][11][0]), "+f"(d[0][11][1]), "+f"(d[0][11][2]), "+f"(d[0][11][3]), "+f"(d[0][12][0]), "+f"(d[0][12][1]), "+f"(d[0][12][2]), "+f"(d[0][12][3]), "+f"(d[0][13][0]), "+f"(d[0][13][1]), "+f"(d[0][13][2]), "+f"(d[0][13][3]), "+f"(d[0][14][0]), "+f"(d[0][14][1]), "+f"(d[0][14][2]), "+f"(d[0][14][3]), "+f"(d[0][15][0]), "+f"(d[0][15][1]), "+f"(d[0][15][2]), "+f"(d[0][15][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((u32)keep));
}

#include "functions.cuh"

// ---- this kernel -----------------------------------------------------------------------------------------------------

constexpr int kBlockM = 128;  // tile.block_m: query rows of a block
constexpr int kBlockN = 128;  // tile.block_n: keys of a block
constexpr int kQkCols = 128;  // padded to 16, the k of wgmma
constexpr int kVCols = 128;  // columns of O
constexpr int kThreads = 384;  // 2 consumer warpgroups of 128, and the producer's 4 warps
constexpr int kRowTiles = 1;  // 16-row tiles that each warp owns
constexpr int kTurnBarrier = 1;  // named barriers, one a warpgroup, at which it waits for its turn
constexpr int kOwnBarrier = 3;  // named barriers, one a warpgroup, at which its own threads meet
using Input = F16;
using Output = F16;
using QTile = PanelTile<kBlockM, kQkCols>;
using KTile = PanelTile<kBlockN, kQkCols>;
using VTile = PanelTile<kBlockN, kVCols>;
using OutTile = PanelTile<kBlockM, kVCols>;

struct Params {
  TensorMap q_map;
  TensorMap k_map;
  TensorMap v_map;
  TensorMap out_map;
  float* lse;
  u32* tile_counter;
  int batch;
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
  int index;
  bool exists;
};

// Where a head starts in a dense f32 array (batch, num_heads_q, seqlen_q, cols).
DEV float* dense_head(float* base, const Params& params, const Tile& tile, int cols = 1) {
  return base + ((i64)stay_in_loop(tile.batch) * params.num_heads_q + stay_in_loop(tile.head)) * params.seqlen_q * cols;
}

// Blocks of rows of all heads; a block of threads works on its own number first, then on those it draws.
DEV int num_tiles(const Params& params) { return (params.seqlen_q + kBlockM - 1) / kBlockM * params.batch * params.num_heads_q; }

// One block of rows of one head. Heads are fastest; the rows that see the most keys start first.
DEV Tile decode_tile(const Params& params, int index) {
  Tile tile;
  const int m_max = (params.seqlen_q + kBlockM - 1) / kBlockM;
  const int row = index / params.num_heads_q;
  tile.m_block = m_max - (row % m_max) - 1;
  tile.head = index % params.num_heads_q;
  tile.batch = row / m_max;
  tile.kv_head = tile.head / params.group;
  tile.seqlen_q = params.seqlen_q;
  tile.seqlen_k = params.seqlen_k;
  tile.index = index;
  tile.exists = index < num_tiles(params);
  return tile;
}

// Blocks of keys that a block of rows visits, n_min .. n_max - 1; from n_full_begin to n_full_end - 1 no key is masked.
struct KeyBlocks {
  int n_min, n_full_begin, n_full_end, n_max;
};

// Which blocks of keys block m of rows visits, and which of them no row masks. The last is peeled off and masked anyway.
DEV KeyBlocks key_blocks(const Params& params, const Tile& tile, int m) {
  KeyBlocks seen;
  seen.n_max = (tile.seqlen_k + kBlockN - 1) / kBlockN;
  seen.n_min = min(0, seen.n_max);
  const int n_last = max(seen.n_max - 1, seen.n_min);
  seen.n_full_begin = seen.n_min;
  seen.n_full_end = max(min(tile.seqlen_k / kBlockN, n_last), seen.n_full_begin);
  return seen;
}

// The keys that row q_idx sees are first_key .. end_key - 1.
DEV int end_key(const Params& params, const Tile& tile, int q_idx) {
  int end = tile.seqlen_k;
  return end;
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
attn_fwd_sm90a_f16_d128_full_pingpong_0d8fa0ad(const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) unsigned char smem[];
  const u32 q_smem = smem_address(smem) + 0;
  const u32 k_smem = smem_address(smem) + 32768;
  const u32 v_smem = smem_address(smem) + 98304;
  const u32 out_smem = smem_address(smem) + 163840;
  const u32 q_ring = smem_address(smem) + 196608;  // 1 times full, then empty
  const u32 k_ring = smem_address(smem) + 196624;  // 2 times full, then empty
  const u32 v_ring = smem_address(smem) + 196656;  // 2 times full, then empty
  const u32 tile_ring = smem_address(smem) + 196688;  // 1 times full, then empty
  const u32 tile_slot = smem_address(smem) + 196704;
  const int warpgroup = same_in_warp(threadIdx.x / 128);
  if (threadIdx.x == 0) {
    init_ring<1>(q_ring, 1, 2);
    init_ring<2>(k_ring, 1, 2);
    init_ring<2>(v_ring, 1, 2);
    init_ring<1>(tile_ring, 1, 2);
    fence_mbarrier_init();
    prefetch_tensor_map(params.q_map);
    prefetch_tensor_map(params.k_map);
    prefetch_tensor_map(params.v_map);
    prefetch_tensor_map(params.out_map);
  }
  __syncthreads();
  wait_for_earlier_kernels();
  let_next_kernel_start();
  if (warpgroup == 2) {  // producer
    keep_registers<24>();
    if (threadIdx.x % 128 < 32 && elect_one()) {
      Cursor q_at = {0, 1};
      Cursor k_at = {0, 1};
      Cursor v_at = {0, 1};
      Cursor tile_at = {0, 1};

      for (Tile tile = decode_tile(params, blockIdx.x); tile.exists;) {
        const KeyBlocks seen = key_blocks(params, tile, tile.m_block);
        if (seen.n_max > seen.n_min) {
          mbarrier_wait(empty<2>(k_ring, k_at), k_at.phase);
          load_panels<KTile>(k_smem + k_at.stage * KTile::kBytes, params.k_map, full<2>(k_ring, k_at), 0, (seen.n_max - 1) * kBlockN, tile.kv_head, tile.batch, kEvictLast);
          advance<2>(k_at);
        }
        mbarrier_wait(empty<1>(q_ring, q_at), q_at.phase);
        load_panels<QTile>(q_smem, params.q_map, full<1>(q_ring, q_at), 0, tile.m_block * kBlockM, tile.head, tile.batch, kEvictFirst);
        advance<1>(q_at);
        if (seen.n_max > seen.n_min) {
          #pragma unroll 1
          for (int n = seen.n_max - 2; n >= seen.n_min; --n) {  // any tiles
            mbarrier_wait(empty<2>(k_ring, k_at), k_at.phase);
            load_panels<KTile>(k_smem + k_at.stage * KTile::kBytes, params.k_map, full<2>(k_ring, k_at), 0, n * kBlockN, tile.kv_head, tile.batch, kEvictLast);
            advance<2>(k_at);
            mbarrier_wait(empty<2>(v_ring, v_at), v_at.phase);
            load_panels<VTile>(v_smem + v_at.stage * VTile::kBytes, params.v_map, full<2>(v_ring, v_at), 0, (n + 1) * kBlockN, tile.kv_head, tile.batch, kEvictLast);
            advance<2>(v_at);
          }
          mbarrier_wait(empty<2>(v_ring, v_at), v_at.phase);
          load_panels<VTile>(v_smem + v_at.stage * VTile::kBytes, params.v_map, full<2>(v_ring, v_at), 0, seen.n_min * kBlockN, tile.kv_head, tile.batch, kEvictLast);
          advance<2>(v_at);
        }
        mbarrier_wait(empty<1>(tile_ring, tile_at), tile_at.phase);
        tile = decode_tile(params, gridDim.x + atomicInc(params.tile_counter, num_tiles(params) - 1));  // back to 0 after the last
        store_shared(tile_slot, tile.index);
        mbarrier_arrive(full<1>(tile_ring, tile_at));
        advance<1>(tile_at);
      }
    }
  } else {  // consumer
    take_registers<240>();
    const bool is_first_thread = threadIdx.x % 128 == 0;
    const int next_warpgroup = warpgroup == 1 ? 0 : warpgroup + 1;
    Cursor q_at = {0, 0};
    Cursor k_at = {0, 0};
    Cursor v_at = {0, 0};
    Cursor tile_at = {0, 0};
    float acc_s[kRowTiles][16][4];
    u32 p[kRowTiles][8][4];
    float acc_o[kRowTiles][16][4];
    float row_max[2 * kRowTiles];
    float alpha[2 * kRowTiles];
    float reference[2 * kRowTiles];
    float row_sum[2 * kRowTiles];
    float total[2 * kRowTiles];
    float inv_sum[2 * kRowTiles];
    float row_lse[2 * kRowTiles];

    if (next_warpgroup == 0) {
      // the first warpgroup goes first
      named_barrier_arrive(kTurnBarrier + next_warpgroup, 256);
    }
    for (Tile tile = decode_tile(params, blockIdx.x); tile.exists;) {
      const KeyBlocks seen = key_blocks(params, tile, tile.m_block);
      fill(acc_o, 0.f);
      fill(row_max, lowest());
      fill(row_sum, 0.f);
      mbarrier_wait_warp(full<1>(q_ring, q_at), q_at.phase);
      if (params.scale_is_negative) {
        negate_own_rows<QTile>(q_smem, warpgroup);
        fence_async();
        named_barrier_sync(kOwnBarrier + warpgroup, 128);
      }
      if (seen.n_max > seen.n_min) {
        // the last block of keys: scores only, O follows one block behind
        mbarrier_wait(full<2>(k_ring, k_at), k_at.phase);
        issue_gemm_nt_ss<QTile, KTile, kQkCols, true>(acc_s, q_smem, k_smem + k_at.stage * KTile::kBytes, warpgroup);
        wgmma_wait<0>();
        pin(acc_s);
        if (is_first_thread) mbarrier_arrive(empty<2>(k_ring, k_at));
        advance<2>(k_at);
        {
          int end[2 * kRowTiles];  // of the keys each row sees, counted from this lane's first column
        #pragma unroll
          for (int i = 0; i < 2 * kRowTiles; ++i) {
            const int q_idx = tile.m_block * kBlockM + row_in_tile<kRowTiles>(i), column = (seen.n_max - 1) * kBlockN + lane_column();
            end[i] = end_key(params, tile, q_idx) - column;
          }
          mask_scores(acc_s, end);
        }
        update_row_max_by_integers(row_max, reference, alpha, acc_s, params.softmax_scale_log2, 134217728.0f);
        exponentiate(acc_s, row_sum, reference, alpha, params.softmax_scale_log2);
        convert_p<Input>(p, acc_s);
        #pragma unroll 1
        for (int n = seen.n_full_end - 1; n >= seen.n_full_begin; --n) {  // full tiles
          mbarrier_wait(full<2>(k_ring, k_at), k_at.phase);
          named_barrier_sync(kTurnBarrier + warpgroup, 256);
          // S = Q K[n]ᵀ, and behind it O += P V[n + 1]
          issue_gemm_nt_ss<QTile, KTile, kQkCols, true>(acc_s, q_smem, k_smem + k_at.stage * KTile::kBytes, warpgroup);
          mbarrier_wait(full<2>(v_ring, v_at), v_at.phase);
          issue_gemm_nn_rs<VTile, false>(acc_o, p, v_smem + v_at.stage * VTile::kBytes);
          named_barrier_arrive(kTurnBarrier + next_warpgroup, 256);
          wgmma_wait<0>();
          pin(acc_s);
          if (is_first_thread) mbarrier_arrive(empty<2>(k_ring, k_at));
          advance<2>(k_at);
          wgmma_wait<0>();
          pin(acc_o);
          pin(p);
          if (is_first_thread) mbarrier_arrive(empty<2>(v_ring, v_at));
          advance<2>(v_at);
          // online softmax of block n
          update_row_max_by_integers(row_max, reference, alpha, acc_s, params.softmax_scale_log2, 134217728.0f);
          scale_rows(acc_o, alpha);
          exponentiate(acc_s, row_sum, reference, alpha, params.softmax_scale_log2);
          convert_p<Input>(p, acc_s);
        }
      }
      named_barrier_sync(kOwnBarrier + warpgroup, 128);
      if (is_first_thread) mbarrier_arrive(empty<1>(q_ring, q_at));
      advance<1>(q_at);
      if (seen.n_max > seen.n_min) {
        // O of the first block of keys
        mbarrier_wait(full<2>(v_ring, v_at), v_at.phase);
        issue_gemm_nn_rs<VTile, false>(acc_o, p, v_smem + v_at.stage * VTile::kBytes);
        wgmma_wait<0>();
        pin(acc_o);
        pin(p);
        if (is_first_thread) mbarrier_arrive(empty<2>(v_ring, v_at));
        advance<2>(v_at);
      }
      // normalise once, at the end
      reduce_rows(total, row_sum);
      finish_rows_of_scores(inv_sum, row_lse, row_max, total, params.softmax_scale_log2, 134217728.0f);
      scale_rows(acc_o, inv_sum);
      if (params.lse != 0) store_rows<kRowTiles>(dense_head(params.lse, params, tile), row_lse, tile.m_block * kBlockM, tile.seqlen_q);
      if (is_first_thread) tma_store_wait_read();
      named_barrier_sync(kOwnBarrier + warpgroup, 128);
      stage_tile<Output, OutTile>(out_smem, acc_o);
      fence_async();
      named_barrier_sync(kOwnBarrier + warpgroup, 128);
      if (is_first_thread) store_panels<OutTile>(params.out_map, out_smem, warpgroup, tile.m_block * kBlockM, tile.head, tile.batch);
      mbarrier_wait_warp(full<1>(tile_ring, tile_at), tile_at.phase);
      tile = decode_tile(params, same_in_warp(load_shared(tile_slot)));
      named_barrier_sync(kOwnBarrier + warpgroup, 128);
      if (is_first_thread) mbarrier_arrive(empty<1>(tile_ring, tile_at));
      advance<1>(tile_at);
    }
    if (is_first_thread) tma_store_wait_read();
  }
}

