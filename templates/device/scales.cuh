// Scales of the scores of a block: those of rows times K's scale of each group of columns, which lies in shared memory.
template <int kGroups>
DEV void read_score_scales(float (&dst)[kGroups][2], const float (&of_rows)[1][2], u32 staged) {
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const float of_keys = __uint_as_float(load_shared(staged + 4 * g));
    dst[g][0] = of_rows[0][0] * of_keys, dst[g][1] = of_rows[0][1] * of_keys;
  }
}

// V's scale of each group of columns, which lies after K's, in relation to the largest of the head; e4m3 rounds P to 0 long
// before 2^-32.
template <int kGroups>
DEV void read_value_weights(float (&weight)[kGroups][2], const float (&top)[2], u32 staged) {
#pragma unroll
  for (int g = 0; g < kGroups; ++g) fill(weight[g], fmaxf(__fdividef(__uint_as_float(load_shared(staged + 4 * (kGroups + g))), top[0]), 0x1p-32f));
}

// Copy a value per row.
template <int N>
DEV void copy_rows(float (&dst)[N], const float (&src)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) dst[i] = src[i];
}
