// An index of a tensor, kept within its dimension.
DEV int clamp_index(int index, int size) { return max(0, min(index, size - 1)); }
DEV int clamp_index(i64 index, int size) { return (int)max((i64)0, min(index, (i64)size - 1)); }

// The quotient rounded down.
DEV int floor_divide(int a, int b) { return a / b - ((a % b != 0) & ((a ^ b) < 0)); }
DEV i64 floor_divide(i64 a, i64 b) { return a / b - ((a % b != 0) & ((a ^ b) < 0)); }

// What floor_divide leaves; it has the sign of b.
DEV int floor_modulo(int a, int b) { return a % b + ((a % b != 0) & ((a ^ b) < 0) ? b : 0); }
DEV i64 floor_modulo(i64 a, i64 b) { return a % b + ((a % b != 0) & ((a ^ b) < 0) ? b : 0); }

// -1, 0 or 1; 0 of a NaN.
template <class T>
DEV T sign(T x) { return (T)((x > 0) - (x < 0)); }

// 1 / (1 + e^-x)
DEV float sigmoid(float x) { return __fdiv_rn(1.f, __fadd_rn(1.f, expf(-x))); }

// e^x by ex2.approx.
DEV float exp_approx(float x) { return exp2_approx(x * 1.4426950408889634f); }

// ln(x) by lg2.approx.
DEV float log_approx(float x) { return log2_approx(x) * 0.6931471805599453f; }

// 1 / (1 + e^-x) by ex2.approx and rcp.approx.
DEV float sigmoid_approx(float x) { return rcp_approx(1.f + exp_approx(-x)); }

// tanh(x) = 1 - 2 / (1 + e^2x) by ex2.approx and rcp.approx; tanh.approx, 2^-11 off, would show in the log-sum-exp.
DEV float tanh_far(float x) { return 1.f - 2.f * rcp_approx(1.f + exp2_approx(x * 2.8853900817779268f)); }

// tanh(x): up to 0.3125 by the odd polynomial of degree 5 whose relative error is least there, 2^-19.4 (Remez), which leaves the
// unit for exponentials free.
DEV float tanh_approx(float x) {
  const float y = x * x, near = x * __fmaf_rn(y, __fmaf_rn(y, 0.12577038f, -0.33306009f), 0.99999851f);
  return fabsf(x) <= 0.3125f ? near : tanh_far(x);
}

// gain tanh(multiple s); where s is no larger than `reach`, by the same polynomial with its coefficients multiplied out.
struct TanhOfMultiple {
  float multiple, gain, reach, a1, a3, a5;
  __device__ float near(float s) const {
    const float y = s * s;
    return s * __fmaf_rn(y, __fmaf_rn(y, a5, a3), a1);
  }
  __device__ float far(float s) const { return gain * tanh_far(multiple * s); }
};

// The coefficients for that. Where one overflows nothing is near; where one may vanish, as of caps that bend hardly anything,
// only what the others are enough for.
DEV TanhOfMultiple tanh_of_multiple(float multiple, float gain) {
  const float size = fabsf(multiple), square = multiple * multiple;
  const float of_1 = gain * multiple, of_3 = of_1 * square, of_5 = of_3 * square;
  const float most = fabsf(of_5) >= 0x1p-100f ? 0.3125f : fabsf(of_3) >= 0x1p-100f ? 0x1p-5f : 0x1p-12f;
  const bool holds = fabsf(of_1) < 0x1p100f && fabsf(of_3) < 0x1p100f && fabsf(of_5) < 0x1p100f;
  return {multiple, gain, holds ? fminf(most / size, 0x1p60f) : -1.f, of_1 * 0.99999851f, of_3 * -0.33306009f, of_5 * 0.12577038f};
}

// The smallest and the largest of the values that a block of threads takes; a NaN may be anything.
template <class T>
struct Extremes {
  T lo = largest(T()), hi = smallest(T());
  DEV bool largest(bool) { return true; }
  DEV bool smallest(bool) { return false; }
  DEV int largest(int) { return 0x7fffffff; }
  DEV int smallest(int) { return 0x80000000; }
  DEV float largest(float) { return infinity(); }
  DEV float smallest(float) { return -infinity(); }
  __device__ void take(T value) {
    const bool is_number = value == value;
    lo = min_of(lo, is_number ? value : smallest(T()));
    hi = max_of(hi, is_number ? value : largest(T()));
  }
  DEV T min_of(T a, T b) { return b < a ? b : a; }
  DEV T max_of(T a, T b) { return a < b ? b : a; }
  __device__ void reduce() {
    __shared__ T los[4], his[4];
#pragma unroll
    for (int step = 16; step; step /= 2) {
      lo = min_of(lo, (T)__shfl_xor_sync(~0u, lo, step));
      hi = max_of(hi, (T)__shfl_xor_sync(~0u, hi, step));
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) los[threadIdx.x / 32] = lo, his[threadIdx.x / 32] = hi;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < 4; ++warp) lo = min_of(lo, los[warp]), hi = max_of(hi, his[warp]);
  }
};

// A bf16 of a tensor as f32.
DEV float bf16_to_float(u16 x) { return __uint_as_float((u32)x << 16); }

// An f16 of a tensor as f32.
DEV float f16_to_float(u16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

// One of two bf16 in a register as f32.
DEV float bf16_of_pair(u32 pair, int which) { return __uint_as_float(which ? pair & 0xffff0000 : pair << 16); }

// One of two f16 in a register as f32.
DEV float f16_of_pair(u32 pair, int which) { return f16_to_float(which ? pair >> 16 : pair); }

// Whether 16-bit elements of two neighbouring keys, the first even, lie in 4 bytes on a multiple of 4, in every row.
DEV bool lies_in_pairs(const u16* base, i64 to_rows, i64 to_key) { return to_key == 1 && !(to_rows & 1) && !((u64)base & 3); }

// Whether f32 elements of two such keys lie in 8 bytes on a multiple of 8, in every row.
DEV bool lies_in_pairs(const float* base, i64 to_rows, i64 to_key) { return to_key == 1 && !(to_rows & 1) && !((u64)base & 7); }

// Write the elements of two neighbouring keys, as many as exist; at once where they lie in a pair.
DEV void store_two(float* p, i64 to_key, float even, float odd, int exist, bool in_pairs) {
  if (in_pairs && exist > 1) {
    *(float2*)p = {even, odd};
  } else {
    if (exist > 0) p[0] = even;
    if (exist > 1) p[to_key] = odd;
  }
}
DEV void store_two(u16* p, i64 to_key, u32 both, int exist, bool in_pairs) {
  if (in_pairs && exist > 1) {
    *(u32*)p = both;
  } else {
    if (exist > 0) p[0] = (u16)both;
    if (exist > 1) p[to_key] = (u16)(both >> 16);
  }
}

// Elements of a row at the pairs of keys that a thread has scores of: those of rows 0 .. 7 of its tile, or of rows 8 .. 15.
template <int kColumns>
DEV void look_up_row(u32 (&found)[kColumns][4], int half, const u16* row, i64 to_key, int kv_first, int size, bool in_pairs) {
  if (in_pairs) {
#pragma unroll
    for (int i = 0; i < 2 * kColumns; ++i) found[i / 2][i % 2 * 2 + half] = load_u32(row + kv_first + 8 * i);
  } else {
#pragma unroll
    for (int i = 0; i < 2 * kColumns; ++i) {
      const int kv_idx = kv_first + 8 * i;
      const u32 even = load_u16(row + clamp_index(kv_idx, size) * to_key), odd = load_u16(row + clamp_index(kv_idx + 1, size) * to_key);
      found[i / 2][i % 2 * 2 + half] = even | odd << 16;
    }
  }
}
