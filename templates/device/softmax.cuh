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
    top = kGroups == 1 ? largest : fmaxf(top, __fmul_ru(largest, scale_of(scale_log2, g, i)));
  }
  return top;
}

// The largest score of row i, or 0 if that is larger: numbers that are not negative are ordered as the integers of their bits, and
// of integers one instruction takes the largest of three. Programming Guide: DPX.
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
    top = kGroups == 1 ? __int_as_float(largest) : fmaxf(top, __fmul_ru(__int_as_float(largest), scale_of(scale_log2, g, i)));
  }
  return top;
}

// ---- the maximum, where operands have scales of their own: row_max is in log2 units, rounded up, so that no exponent is positive

// Of row i: row_max = max(row_max, scaled top), alpha = 2^(old - new).
template <int kGroups, int N>
DEV void raise_row_max(float (&row_max)[N], float (&alpha)[N], float top, const float (&scale_log2)[kGroups][N], int i) {
  const float old = row_max[i];
  row_max[i] = fmaxf(old, kGroups == 1 ? __fmul_ru(top, scale_log2[0][i]) : top);
  alpha[i] = exp2_approx(old - exponent_reference(row_max[i]));
}

// row_max = max(row_max, scaled maxima of s), alpha = 2^(old - new).
template <int kRowTiles, int kColTiles, int kGroups>
DEV void update_row_max(float (&row_max)[2 * kRowTiles], float (&alpha)[2 * kRowTiles], const float (&s)[kRowTiles][kColTiles][4],
                        const float (&scale_log2)[kGroups][2 * kRowTiles]) {
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) raise_row_max(row_max, alpha, quad_max(largest_score(s, scale_log2, i)), scale_log2, i);
}

// update_row_max by integers, unless a row of this warp has had no maximum that is not negative, and has none now.
template <int kRowTiles, int kColTiles, int kGroups>
DEV void update_row_max_by_integers(float (&row_max)[2 * kRowTiles], float (&alpha)[2 * kRowTiles], const float (&s)[kRowTiles][kColTiles][4],
                                    const float (&scale_log2)[kGroups][2 * kRowTiles]) {
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

// ---- the maximum, where all scores share a scale: row_max is a score, of a row that has seen no key the lowest number

// The maximum of a row, what it refers exponents to, and the exponent of what was summed under the old one.
struct Maximum {
  float row_max, reference, of_old;
};

// A row's maximum from a block's.
DEV Maximum raised(float old, float top, float scale_log2) {
  const float row_max = fmaxf(old, top), reference = __fmul_ru(row_max, scale_log2);
  return {row_max, reference, __fmul_ru(old, scale_log2) - reference};
}

// A row's maximum from a block's, where the scores of row i become relative to the maximum here, before anything is rounded.
template <int kRowTiles, int kColTiles>
DEV Maximum subtracted(float (&s)[kRowTiles][kColTiles][4], float old, float row_max, float scale_log2, int i) {
#pragma unroll
  for (int j = 0; j < kColTiles; ++j) {
#pragma unroll
    for (int e = i % 2 * 2; e < i % 2 * 2 + 2; ++e) s[i / 2][j][e] -= row_max;
  }
  return {row_max, 0.f, (old - row_max) * scale_log2};
}

// row_max = max(row_max, maxima of s), alpha = 2^(old reference - new), by integers as above. One vote sees also to rows whose maximum
// is coarse: rounding it in log2 units would tell.
template <int kRowTiles, int kColTiles>
DEV void update_row_max_by_integers(float (&row_max)[2 * kRowTiles], float (&reference)[2 * kRowTiles], float (&alpha)[2 * kRowTiles],
                                    float (&s)[kRowTiles][kColTiles][4], float scale_log2, float coarse) {
  Maximum of[2 * kRowTiles];
  bool will_do = true;
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    of[i] = raised(row_max[i], quad_max(largest_positive_score(s, scale_log2, i)), scale_log2);
    will_do &= (of[i].row_max > 0.f || row_max[i] >= 0.f) && fabsf(of[i].reference) < coarse;
  }
  if (!__all_sync(~0u, will_do)) {
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      of[i] = raised(row_max[i], quad_max(largest_score(s, scale_log2, i)), scale_log2);
      if (!(fabsf(of[i].reference) < coarse)) of[i] = subtracted(s, row_max[i], of[i].row_max, scale_log2, i);
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) row_max[i] = of[i].row_max, reference[i] = of[i].reference, alpha[i] = exp2_approx(of[i].of_old);
}

// What a row's scores and its maximum are multiplied by: the scale or, for a coarse maximum, the power of two below it, of which
// products are exact. Scores that are not the largest are then so much smaller that they hardly count by either.
DEV void refer_to(float& reference, float& alpha, float& exponent_scale, float row_max, float scale_log2, float coarse) {
  const float power = __int_as_float(__float_as_int(scale_log2) & 0x7f800000);
  const float rounded = row_max * scale_log2, exact = __fmul_ru(row_max, power), old = reference;
  const bool is_fine = fabsf(rounded) < coarse;
  exponent_scale = is_fine ? scale_log2 : power;
  reference = is_fine ? rounded : exact;
  alpha = exp2_approx(-fabsf(old - reference));  // of two scales the new reference may be less
}

// update_row_max without a vote, for which the exponentials of one row would wait until the other's maximum is known.
template <int kRowTiles, int kColTiles>
DEV void update_row_max(float (&row_max)[2 * kRowTiles], float (&reference)[2 * kRowTiles], float (&alpha)[2 * kRowTiles],
                        float (&exponent_scale)[1][2 * kRowTiles], const float (&s)[kRowTiles][kColTiles][4], float scale_log2, float coarse) {
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    row_max[i] = fmaxf(row_max[i], quad_max(largest_score(s, scale_log2, i)));
    refer_to(reference[i], alpha[i], exponent_scale[0][i], row_max[i], scale_log2, coarse);
  }
}

// References of exponents where operands have scales of their own: the maxima, or 0 for a row that has seen no key.
template <int N>
struct MaximumOrZero {
  const float (&row_max)[N];
  __device__ __forceinline__ float operator[](int i) const { return exponent_reference(row_max[i]); }
};

// s = 2^(scaled s - reference + lift), row_sum = alpha row_sum + this lane's sums of s.
template <int kRowTiles, int kColTiles, class Reference, class Scale>
DEV void exponentiate(float (&s)[kRowTiles][kColTiles][4], float (&row_sum)[2 * kRowTiles], const Reference& reference,
                      const float (&alpha)[2 * kRowTiles], const Scale& scale_log2, float lift = 0.f) {
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const float lowered = reference[i] - lift;
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < kColTiles; ++j) {
#pragma unroll
      for (int e = i % 2 * 2; e < i % 2 * 2 + 2; ++e) {
        s[i / 2][j][e] = exp2_approx(__fmaf_rn(s[i / 2][j][e], scale_of(scale_log2, j * GroupsOf<Scale>::kCount / kColTiles, i), -lowered));
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
template <int kColTiles, class Reference, class Scale, int kGroups>
DEV void exponentiate_weighted(float (&s)[1][kColTiles][4], float (&row_sum)[2], const Reference& reference, const float (&alpha)[2],
                               const Scale& scale_log2, float lift, const float (&weight)[kGroups][2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = 0.f;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const float lowered = reference[i] - lift - log2_approx(weight[g][i]);
      float of_group = 0.f;
#pragma unroll
      for (int t = 0; t < kColTiles / kGroups; ++t) {
        const int j = g * kColTiles / kGroups + t;
#pragma unroll
        for (int e = i * 2; e < i * 2 + 2; ++e) {
          s[0][j][e] = exp2_approx(__fmaf_rn(s[0][j][e], scale_of(scale_log2, j * GroupsOf<Scale>::kCount / kColTiles, i), -lowered));
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

// inv_sum = top / row_sum, lse = natural log-sum-exp, both of sums that are lifted; a row that saw no key gets 0 and -inf. No row that
// did sums up to less than 2^-100, but one of e4m3 whose maximum was rounded up by more; its inverse would be infinite.
template <int N>
DEV void finish_rows(float (&inv_sum)[N], float (&lse)[N], const float (&row_max)[N], const float (&row_sum)[N], float lift = 0.f, float top = 1.f) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const bool sees_none = row_sum[i] < 0x1p-100f;
    inv_sum[i] = sees_none ? 0.f : top * __frcp_rn(row_sum[i]);
    lse[i] = sees_none ? -infinity() : (row_max[i] - lift + log2_approx(row_sum[i])) * 0.6931471805599453f;
  }
}

// finish_rows of exponents that were not taken relative to a maximum.
template <int N>
DEV void finish_rows(float (&inv_sum)[N], float (&lse)[N], const float (&row_sum)[N]) {
  const float none[N] = {};
  finish_rows(inv_sum, lse, none, row_sum);
}

// finish_rows of maxima that are scores; coarse ones are brought to natural units at once. A maximum in log2 units is rounded before it meets
// the sum: whether ptxas would contract the two hangs on the text around them, and a sequence has the bits of a dense call.
template <int N>
DEV void finish_rows_of_scores(float (&inv_sum)[N], float (&lse)[N], const float (&row_max)[N], const float (&row_sum)[N], float scale_log2,
                               float coarse, float lift = 0.f, float top = 1.f) {
  float reference[N];
#pragma unroll
  for (int i = 0; i < N; ++i) reference[i] = __fmul_rn(row_max[i], scale_log2);
  finish_rows(inv_sum, lse, reference, row_sum, lift, top);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float of_sum = (log2_approx(row_sum[i]) - lift) * 0.6931471805599453f;
    if (row_sum[i] != 0.f && !(fabsf(reference[i]) < coarse)) lse[i] = __fmaf_rz(row_max[i], scale_log2 * 0.6931471805599453f, of_sum);
  }
}

// A sink, a logit of no value, joins the sum of each row, of which lse is the logarithm: by = by times the keys' share of the new sum.
// Exponents are 0 or less, but for a sink of +inf, beside which keys vanish; where there is neither a key nor a sink nothing changes.
template <int N>
DEV void join_sink(float (&by)[N], float (&lse)[N], const float (&sink)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float largest = fminf(fmaxf(fmaxf(lse[i], sink[i]), lowest()), -lowest());
    const float of_keys = exp2_approx((lse[i] - largest) * 1.4426950408889634f);
    const float total = of_keys + exp2_approx((sink[i] - largest) * 1.4426950408889634f);
    by[i] *= total == 0.f ? 0.f : of_keys * __frcp_rn(total);
    lse[i] = largest + log2_approx(total) * 0.6931471805599453f;
  }
}
template <int N>
DEV void join_sink(float (&by)[N], float (&lse)[N], float sink) {
  float of_rows[N];
  fill(of_rows, sink);
  join_sink(by, lse, of_rows);
}
