// A scale, FLT_MIN where it would be less: a score of -inf times it stays -inf.
DEV float normal_scale(float scale) { return fmaxf(scale, 0x1p-126f); }

// Scales of the scores of a block: those of rows times K's scale of each group of columns, which lies in shared memory. In
// log2 units they meet scores of -inf, and stay normal numbers.
template <bool kInNaturalUnits, int kGroups>
DEV void read_score_scales(float (&dst)[kGroups][2], const float (&of_rows)[1][2], u32 staged) {
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const float of_keys = __uint_as_float(load_shared(staged + 4 * g));
#pragma unroll
    for (int i = 0; i < 2; ++i) dst[g][i] = kInNaturalUnits ? of_rows[0][i] * of_keys : normal_scale(of_rows[0][i] * of_keys);
  }
}

// Multiply the scores of a block by the scale of each key, which lie in shared memory.
template <int kGroups>
DEV void scale_keys(float (&s)[1][kGroups][4], u32 staged) {
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const uint2 pair = load_shared_8(staged + 4 * (i * 8 + lane_column()));
    const float even = __uint_as_float(pair.x), odd = __uint_as_float(pair.y);
    s[0][i][0] *= even, s[0][i][1] *= odd, s[0][i][2] *= even, s[0][i][3] *= odd;
  }
}

// V's scale of each group of columns in relation to the largest of the head; e4m3 rounds P to 0 long before 2^-32.
template <int kGroups>
DEV void read_value_weights(float (&weight)[kGroups][2], const float (&top)[2], u32 staged) {
#pragma unroll
  for (int g = 0; g < kGroups; ++g) fill(weight[g], fmaxf(__fdividef(__uint_as_float(load_shared(staged + 4 * g)), top[0]), 0x1p-32f));
}

// Copy a value per row.
template <int N>
DEV void copy_rows(float (&dst)[N], const float (&src)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) dst[i] = src[i];
}
