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
