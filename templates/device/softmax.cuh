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

// row_max = max(row_max, scaled maxima of s), alpha = 2^(old - new). Units: log2, scaled.
template <int kRowTiles, int kColTiles>
DEV void update_row_max(float (&row_max)[2 * kRowTiles], float (&alpha)[2 * kRowTiles], const float (&s)[kRowTiles][kColTiles][4],
                        float softmax_scale_log2) {
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    float top = -infinity();
#pragma unroll
    for (int j = 0; j < kColTiles; ++j) top = fmaxf(top, fmaxf(s[i / 2][j][i % 2 * 2], s[i / 2][j][i % 2 * 2 + 1]));
    const float old = row_max[i];
    row_max[i] = fmaxf(old, quad_max(top) * softmax_scale_log2);
    alpha[i] = exp2_approx(old - exponent_reference(row_max[i]));
  }
}

// s = 2^(scaled s - row_max), row_sum = alpha row_sum + this lane's sums of s.
template <int kRowTiles, int kColTiles>
DEV void exponentiate(float (&s)[kRowTiles][kColTiles][4], float (&row_sum)[2 * kRowTiles], const float (&row_max)[2 * kRowTiles],
                      const float (&alpha)[2 * kRowTiles], float softmax_scale_log2) {
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const float reference = exponent_reference(row_max[i]);
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < kColTiles; ++j) {
#pragma unroll
      for (int e = i % 2 * 2; e < i % 2 * 2 + 2; ++e) {
        s[i / 2][j][e] = exp2_approx(__fmaf_rn(s[i / 2][j][e], softmax_scale_log2, -reference));
        sum += s[i / 2][j][e];
      }
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

// inv_sum = 1 / row_sum, lse = natural log-sum-exp; a row that saw no key gets 0 and -inf.
template <int N>
DEV void finish_rows(float (&inv_sum)[N], float (&lse)[N], const float (&row_max)[N], const float (&row_sum)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const bool sees_none = row_sum[i] == 0.f;
    inv_sum[i] = sees_none ? 0.f : __frcp_rn(row_sum[i]);
    lse[i] = sees_none ? -infinity() : (row_max[i] + log2_approx(row_sum[i])) * 0.6931471805599453f;
  }
}
