// Two bf16 of a register as f32.
struct Bf16Pair {
  DEV float low(u32 x) { return __uint_as_float(x << 16); }
  DEV float high(u32 x) { return __uint_as_float(x & 0xffff0000u); }
};

// Two f16 of a register as f32.
struct F16Pair {
  DEV float low(u32 x) { return f16_to_float((u16)x); }
  DEV float high(u32 x) { return f16_to_float((u16)(x >> 16)); }
};

// Eight elements of a row: 16 bytes of 16-bit ones.
struct Eight {
  float x[8];
};

// Eight elements as f32, from 16 packed bytes or as they are.
template <class Pair>
DEV Eight eight(uint4 packed) {
  const u32 pairs[4] = {packed.x, packed.y, packed.z, packed.w};
  Eight e;
#pragma unroll
  for (int i = 0; i < 4; ++i) e.x[2 * i] = Pair::low(pairs[i]), e.x[2 * i + 1] = Pair::high(pairs[i]);
  return e;
}
template <class Pair>
DEV Eight eight(const Eight& e) { return e; }

// Change signs of 16-bit elements: bit 15 - p of `signs` is for the lower half of register p, bit 31 - p for the upper.
DEV uint4 change_signs(uint4 packed, u32 signs) {
  packed.x ^= signs & 0x80008000u;
  packed.y ^= signs << 1 & 0x80008000u;
  packed.z ^= signs << 2 & 0x80008000u;
  packed.w ^= signs << 3 & 0x80008000u;
  return packed;
}

// A finite number itself, any other NaN.
DEV float finite_or_nan(float x) { return __fmaf_rn(0.f, x, x); }

// Their sum and their difference.
DEV void butterfly(float& a, float& b) {
  const float difference = __fsub_rn(a, b);
  a = __fadd_rn(a, b), b = difference;
}

// Multiply a row by the Hadamard matrix, entries 1 and -1. Lane l of a quad holds the columns 32 i + 8 l + j as row[i].x[j].
template <int kVectors>
DEV void hadamard(Eight (&row)[kVectors]) {
#pragma unroll
  for (int step = 1; step < 8; step *= 2) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (!(j & step)) butterfly(row[i].x[j], row[i].x[j + step]);
      }
    }
  }
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const float sign = threadIdx.x & step ? -1.f : 1.f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) row[i].x[j] = __fmaf_rn(row[i].x[j], sign, __shfl_xor_sync(~0u, row[i].x[j], step));
    }
  }
#pragma unroll
  for (int step = 1; step < kVectors; step *= 2) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (!(i & step)) butterfly(row[i].x[j], row[i + step].x[j]);
      }
    }
  }
}

// The largest finite magnitude of packed elements.
template <class Pair, int kCount>
DEV float max_magnitude(const uint4* x) {
  float amax = 0.f;
#pragma unroll
  for (int i = 0; i < 8 * kCount; ++i) amax = fmaxf(amax, fabsf(finite_or_nan(eight<Pair>(x[i / 8]).x[i % 8])));  // passes over NaN
  return amax;
}

// The largest finite magnitude of a row in f32, of which what is not finite becomes NaN.
template <int kVectors>
DEV float max_magnitude(Eight (&row)[kVectors]) {
  float amax = 0.f;
#pragma unroll
  for (int i = 0; i < 8 * kVectors; ++i) amax = max_or_nan(amax, fabsf(row[i / 8].x[i % 8]));
  if (amax < infinity()) return amax;
  amax = 0.f;
#pragma unroll
  for (int i = 0; i < 8 * kVectors; ++i) {
    float& x = row[i / 8].x[i % 8];
    x = finite_or_nan(x);
    amax = fmaxf(amax, fabsf(x));
  }
  return amax;
}

// The largest of what the threads of a group of warps hold, a power of two, none of it negative. All threads of the block
// call it.
DEV float max_of_warps(float x, int warps) {
  __shared__ u32 found[32];
  const u32 of_warp = __reduce_max_sync(~0u, __float_as_uint(x)), warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) found[warp] = of_warp;
  __syncthreads();
  return __uint_as_float(__reduce_max_sync(~0u, found[(warp & -warps) + (threadIdx.x & (warps - 1))]));
}

// What elements are multiplied by, and what undoes it.
struct GranuleScale {
  float reciprocal, descale;
};

// The scale of elements whose largest magnitude is amax: that becomes 448. 448 * 2^-126 keeps both factors normal.
DEV GranuleScale granule_scale(float amax) {
  amax = amax == 0.f ? 448.f : fmaxf(amax, 0x1.cp-118f);
  return {__fdiv_rn(448.f, amax), __fdiv_rn(amax, 448.f)};
}

// The scale of elements whose largest magnitude is amax, with a power of two for a descale. P takes it up, which then moves P's exponent alone.
DEV GranuleScale power_scale(float amax) {
  const float descale = __uint_as_float(__float_as_uint(granule_scale(amax).descale) + 0x7fffffu & 0x7f800000u);
  return {__fdiv_rn(1.f, descale), descale};
}

// Four elements as e4m3.
DEV u32 quantized(float a, float b, float c, float d, float reciprocal) {
  return E4m3::pack(__fmul_rn(a, reciprocal), __fmul_rn(b, reciprocal), __fmul_rn(c, reciprocal), __fmul_rn(d, reciprocal));
}

// Eight elements as e4m3.
DEV uint2 quantized_eight(const Eight& e, float reciprocal) {
  return {quantized(e.x[0], e.x[1], e.x[2], e.x[3], reciprocal), quantized(e.x[4], e.x[5], e.x[6], e.x[7], reciprocal)};
}

// Four keys that follow one another in packed V, and 16 bytes of each: what a lane loads of 128 keys. Eight lanes, or four
// where a key has no more chunks, take consecutive chunks of a key, the others of the warp other keys.
struct ValueUnit {
  int chunk, word;
  template <int kChunks>
  DEV ValueUnit of_warp(int number) {
    constexpr int kLanes = kChunks > 4 ? 8 : 4;
    const int lane = threadIdx.x % 32;
    return {number / kLanes * kLanes + lane % kLanes, number % kLanes * (32 / kLanes) + lane / kLanes};
  }
  // The i-th of the keys: the accumulator of a score GEMM gives a lane keys in this order.
  __device__ int key(int i) const { return word / 4 * 16 + i / 2 * 8 + word % 4 * 2 + i % 2; }
};

// Start the loads of a unit: from the first of 128 keys, of which `keys` exist, each `stride` bytes after the other.
template <int kChunks>
DEV void load_unit(uint4 (&x)[4], const unsigned char* first, i64 stride, int keys, const ValueUnit& unit) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = load_global_16(first + unit.key(i) * stride + unit.chunk * 16, unit.chunk < kChunks && unit.key(i) < keys);
  }
}

// Where a word of four keys stands in a tile of packed V, 128 bytes a column: the eight chunks of 16 bytes are exchanged so
// that neither eight lanes' columns nor a column's chunks meet in a bank.
DEV u32 value_address(int column, int word) { return column * 128 + ((word / 4 ^ column / 8 ^ column / 64) % 8) * 16 + word % 4 * 4; }

// Write a tile of packed V to 128 bytes of each of its rows.
template <int kThreads, int kColumns>
DEV void store_values(unsigned char* to, i64 stride, u32 tile) {
#pragma unroll
  for (int i = 0; i < (kColumns * 8 + kThreads - 1) / kThreads; ++i) {
    const int column = (i * kThreads + threadIdx.x) / 8, chunk = threadIdx.x % 8;
    if (column < kColumns) *(uint4*)(to + column * stride + chunk * 16) = load_shared_16(tile + value_address(column, chunk * 4));
  }
}

// Byte i of the four words becomes word i.
DEV void transpose_bytes(u32 (&x)[4]) {
  const u32 a = __byte_perm(x[0], x[1], 0x5140), b = __byte_perm(x[2], x[3], 0x5140);
  const u32 c = __byte_perm(x[0], x[1], 0x7362), d = __byte_perm(x[2], x[3], 0x7362);
  x[0] = __byte_perm(a, b, 0x5410), x[1] = __byte_perm(a, b, 0x7632);
  x[2] = __byte_perm(c, d, 0x5410), x[3] = __byte_perm(c, d, 0x7632);
}
