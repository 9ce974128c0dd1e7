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

// How many groups of columns have a scale of their own: one where all share a number.
template <class Scale>
struct GroupsOf {
  static constexpr int kCount = 1;
};
template <int kGroups, int N>
struct GroupsOf<float[kGroups][N]> {
  static constexpr int kCount = kGroups;
};

// The scale of a group of columns and a row.
DEV float scale_of(float scale, int, int) { return scale; }
template <int kGroups, int N>
DEV float scale_of(const float (&scale)[kGroups][N], int group, int row) { return scale[group][row]; }

// The largest scaled score of row i of this lane; unscaled where all columns share a scale, which comes after.
template <int kRowTiles, int kColTiles, class Scale>
DEV float largest_score(const float (&s)[kRowTiles][kColTiles][4], const Scale& scale_log2, int i) {
  constexpr int kGroups = GroupsOf<Scale>::kCount;
  float top = -infinity();
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    float largest = -infinity();
#pragma unroll
    for (int t = 0; t < kColTiles / kGroups; ++t) {
      const float(&x)[4] = s[i / 2][g * kColTiles / kGroups + t];
      largest = fmaxf(largest, fmaxf(x[i % 2 * 2], x[i % 2 * 2 + 1]));
    }
    top = kGroups == 1 ? largest : fmaxf(top, largest * scale_of(scale_log2, g, i));
  }
  return top;
}

// The same, or 0 if that is larger: numbers that are not negative are ordered as the integers of their bits, and of integers
// one instruction takes the largest of three. Programming Guide: DPX.
template <int kRowTiles, int kColTiles, class Scale>
DEV float largest_positive_score(const float (&s)[kRowTiles][kColTiles][4], const Scale& scale_log2, int i) {
  constexpr int kGroups = GroupsOf<Scale>::kCount;
  float top = 0.f;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    int largest = 0;
#pragma unroll
    for (int t = 0; t < kColTiles / kGroups; ++t) {
      const float(&x)[4] = s[i / 2][g * kColTiles / kGroups + t];
      largest = max(max(largest, __float_as_int(x[i % 2 * 2])), __float_as_int(x[i % 2 * 2 + 1]));
    }
    top = kGroups == 1 ? __int_as_float(largest) : fmaxf(top, __int_as_float(largest) * scale_of(scale_log2, g, i));
  }
  return top;
}

// Of row i: row_max = max(row_max, scaled top), alpha = 2^(old - new). Units: log2, scaled.
template <int N, class Scale>
DEV void raise_row_max(float (&row_max)[N], float (&alpha)[N], float top, const Scale& scale_log2, int i) {
  const float old = row_max[i];
  row_max[i] = fmaxf(old, GroupsOf<Scale>::kCount == 1 ? top * scale_of(scale_log2, 0, i) : top);
  alpha[i] = exp2_approx(old - exponent_reference(row_max[i]));
}

// row_max = max(row_max, scaled maxima of s), alpha = 2^(old - new).
template <int kRowTiles, int kColTiles, class Scale>
DEV void update_row_max(float (&row_max)[2 * kRowTiles], float (&alpha)[2 * kRowTiles], const float (&s)[kRowTiles][kColTiles][4],
                        const Scale& scale_log2) {
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) raise_row_max(row_max, alpha, quad_max(largest_score(s, scale_log2, i)), scale_log2, i);
}

// The same by integers, unless a row of this warp has had no maximum that is not negative, and has none now.
template <int kRowTiles, int kColTiles, class Scale>
DEV void update_row_max_by_integers(float (&row_max)[2 * kRowTiles], float (&alpha)[2 * kRowTiles], const float (&s)[kRowTiles][kColTiles][4],
                                    const Scale& scale_log2) {
  float top[2 * kRowTiles];
  bool will_do = true;
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    top[i] = quad_max(largest_positive_score(s, scale_log2, i));
    will_do &= top[i] > 0.f || row_max[i] >= 0.f;
  }
  if (!__all_sync(~0u, will_do)) {
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) top[i] = quad_max(largest_score(s, scale_log2, i));
  }
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) raise_row_max(row_max, alpha, top[i], scale_log2, i);
}

// s = 2^(scaled s - row_max + lift), row_sum = alpha row_sum + this lane's sums of s.
template <int kRowTiles, int kColTiles, class Scale>
DEV void exponentiate(float (&s)[kRowTiles][kColTiles][4], float (&row_sum)[2 * kRowTiles], const float (&row_max)[2 * kRowTiles],
                      const float (&alpha)[2 * kRowTiles], const Scale& scale_log2, float lift = 0.f) {
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const float reference = exponent_reference(row_max[i]) - lift;
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < kColTiles; ++j) {
#pragma unroll
      for (int e = i % 2 * 2; e < i % 2 * 2 + 2; ++e) {
        s[i / 2][j][e] = exp2_approx(__fmaf_rn(s[i / 2][j][e], scale_of(scale_log2, j * GroupsOf<Scale>::kCount / kColTiles, i), -reference));
        sum += s[i / 2][j][e];
      }
    }
    row_sum[i] = __fmaf_rn(row_sum[i], alpha[i], sum);
  }
}

// s = 2^(scaled s), row_sum = row_sum + this lane's sums of s: of scores that need no maximum.
template <int kRowTiles, int kColTiles>
DEV void exponentiate_bounded(float (&s)[kRowTiles][kColTiles][4], float (&row_sum)[2 * kRowTiles], float scale_log2) {
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColTiles; ++j) {
#pragma unroll
      for (int e = i % 2 * 2; e < i % 2 * 2 + 2; ++e) {
        s[i / 2][j][e] = exp2_approx(s[i / 2][j][e] * scale_log2);
        row_sum[i] += s[i / 2][j][e];
      }
    }
  }
}

// As `exponentiate`, and s times a weight of its group of columns, in the exponents; the sums are without it.
template <int kColTiles, class Scale, int kGroups>
DEV void exponentiate_weighted(float (&s)[1][kColTiles][4], float (&row_sum)[2], const float (&row_max)[2], const float (&alpha)[2],
                               const Scale& scale_log2, float lift, const float (&weight)[kGroups][2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = 0.f;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const float reference = exponent_reference(row_max[i]) - lift - log2_approx(weight[g][i]);
      float of_group = 0.f;
#pragma unroll
      for (int t = 0; t < kColTiles / kGroups; ++t) {
        const int j = g * kColTiles / kGroups + t;
#pragma unroll
        for (int e = i * 2; e < i * 2 + 2; ++e) {
          s[0][j][e] = exp2_approx(__fmaf_rn(s[0][j][e], scale_of(scale_log2, j * GroupsOf<Scale>::kCount / kColTiles, i), -reference));
          of_group += s[0][j][e];
        }
      }
      sum = __fmaf_rn(of_group, __frcp_rn(weight[g][i]), sum);
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

// o = o times a factor per row, plus a part, in the columns of the part.
template <int kFirstColumn, int kColTiles, int kPartTiles>
DEV void promote(float (&o)[1][kColTiles][4], const float (&part)[1][kPartTiles][4], const float (&by)[2]) {
#pragma unroll
  for (int j = 0; j < kPartTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) o[0][kFirstColumn / 8 + j][e] = __fmaf_rn(o[0][kFirstColumn / 8 + j][e], by[e / 2], part[0][j][e]);
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

// inv_sum = top / row_sum, lse = natural log-sum-exp, both of sums that are lifted; a row that saw no key gets 0 and -inf.
template <int N>
DEV void finish_rows(float (&inv_sum)[N], float (&lse)[N], const float (&row_max)[N], const float (&row_sum)[N], float lift = 0.f, float top = 1.f) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const bool sees_none = row_sum[i] == 0.f;
    inv_sum[i] = sees_none ? 0.f : top * __frcp_rn(row_sum[i]);
    lse[i] = sees_none ? -infinity() : (row_max[i] - lift + log2_approx(row_sum[i])) * 0.6931471805599453f;
  }
}

// The same of exponents that were not taken relative to a maximum.
template <int N>
DEV void finish_rows(float (&inv_sum)[N], float (&lse)[N], const float (&row_sum)[N]) {
  const float none[N] = {};
  finish_rows(inv_sum, lse, none, row_sum);
}
