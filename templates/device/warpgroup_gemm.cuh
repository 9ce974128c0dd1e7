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
