typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
typedef long long i64;
#define DEV static __device__ __forceinline__

// A value in registers from here on, not loaded where it is used.
template <class T>
DEV T in_registers(T x) {
  static_assert(sizeof(T) % 4 == 0, "made of registers");
#pragma unroll
  for (unsigned i = 0; i < sizeof(T) / 4; ++i) asm volatile("" : "+r"(((u32*)&x)[i]));
  return x;
}

// The 32-bit address of shared memory that PTX wants.
DEV u32 smem_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// PTX ISA: st.shared.
DEV void store_shared(u32 address, u32 x) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory"); }

// PTX ISA: ld.shared, .v4.
DEV uint4 load_shared_16(u32 address) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address) : "memory");
  return x;
}

// 16 bytes of device memory that nobody writes meanwhile, or zeros. volatile: loads stay where they stand, so that many are
// under way before the first is used. PTX ISA: ld.global.nc.
DEV uint4 load_global_16(const void* p, bool exists) {
  uint4 x;
  asm volatile("{\n"
               ".reg .pred p;\n"
               "setp.ne.b32 p, %5, 0;\n"
               "mov.b32 %0, 0;\n"
               "mov.b32 %1, 0;\n"
               "mov.b32 %2, 0;\n"
               "mov.b32 %3, 0;\n"
               "@p ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               "}" : "=&r"(x.x), "=&r"(x.y), "=&r"(x.z), "=&r"(x.w) : "l"(p), "r"((int)exists));
  return x;
}

// e4m3: four packed in a register.
struct E4m3 {
  // Rounded to the nearest, ends at 448. PTX ISA: cvt.rn.satfinite.e4m3x2.f32; its first source is the upper half.
  DEV u32 pack(float a, float b, float c, float d) {
    u32 r;
    asm("{\n"
        ".reg .b16 lo, hi;\n"
        "cvt.rn.satfinite.e4m3x2.f32 lo, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 hi, %4, %3;\n"
        "mov.b32 %0, {lo, hi};\n"
        "}" : "=r"(r) : "f"(a), "f"(b), "f"(c), "f"(d));
    return r;
  }
};

// -1, 0 or 1; 0 of a NaN.
template <class T>
DEV T sign(T x) { return (T)((x > 0) - (x < 0)); }

// An f16 of a tensor as f32.
DEV float f16_to_float(u16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

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

// Multiply a row by the Hadamard matrix and a factor. Lane l of a quad holds the columns 32 i + 8 l + j as row[i].x[j].
template <int kVectors>
DEV void hadamard(Eight (&row)[kVectors], float factor) {
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
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) row[i].x[j] = finite_or_nan(__fmul_rn(row[i].x[j], factor));
  }
}

// The largest of `amax` and the finite magnitudes among eight elements; fmaxf passes over NaN.
DEV float max_magnitude(float amax, const Eight& e) {
#pragma unroll
  for (int j = 0; j < 8; ++j) amax = fmaxf(amax, fabsf(finite_or_nan(e.x[j])));
  return amax;
}

// The largest of what the threads of a group of kWarps warps hold, none of it negative. All threads of the block call it.
template <int kWarps>
DEV float max_of_warps(float x) {
  __shared__ u32 found[32];
  const u32 of_warp = __reduce_max_sync(~0u, __float_as_uint(x)), warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) found[warp] = of_warp;
  __syncthreads();
  return __uint_as_float(__reduce_max_sync(~0u, found[warp / kWarps * kWarps + threadIdx.x % kWarps]));
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

// The same with the next power of two for a descale. P takes it up, which then moves P's exponent alone.
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

// Four keys that follow one another in packed V, and 16 bytes of each: what a lane loads of 128 keys. Eight lanes take
// consecutive chunks of a key, the others of the warp the other keys of 16.
struct ValueUnit {
  int chunk, word;
  DEV ValueUnit of_warp(int number) {
    return {number / 8 * 8 + (int)threadIdx.x % 8, number % 8 * 4 + (int)threadIdx.x % 32 / 8};
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

// ---- quantisation: Q, K and V to e4m3, scales per_block, Q and K in the Hadamard basis ----
//
// A real value is an e4m3 value times the descale of what shares it: its largest finite magnitude / 448, for V the next power of two.
// V is transposed, its keys in the order in which a lane holds P.
namespace quantizer {

struct Params {
  const u16* q;
  const u16* k;
  const u16* v;
  unsigned char* q8;
  unsigned char* k8;
  unsigned char* v8;
  float* q_descale;
  float* k_descale;
  float* v_descale;
  i64 q_stride_batch;
  i64 q_stride_seqlen;
  i64 q_stride_head;
  i64 k_stride_batch;
  i64 k_stride_seqlen;
  i64 k_stride_head;
  i64 v_stride_batch;
  i64 v_stride_seqlen;
  i64 v_stride_head;
  int batch;
  int seqlen_q;
  int seqlen_k;
  int num_heads_q;
  int num_heads_kv;
  int group;
};

constexpr int kThreads = 512;  // a quad of lanes for each row of Q or K
constexpr int kRows = 128;  // of Q or K that a block of threads takes
constexpr int kRowChunks = 16;  // of 16 bytes in a row of Q or K
constexpr int kRowVectors = 4;  // of them that a lane takes
constexpr int kKeys = 128;  // of V that a block of threads takes
constexpr int kColumns = 128;  // of V
constexpr int kValueUnits = 1;  // of four keys that a thread loads
constexpr int kPackedUnits = 1;  // the same of 8-bit V
constexpr float kFactor = 0.0883883476f;  // 1 / sqrt(head_dim_qk)

// Which elements of a lane change sign, by seed 0; see change_signs.
__constant__ u32 kSigns[4][1] = {{0xf63eca71u}, {0x572dd0d6u}, {0x4276e0a3u}, {0xeb3eb185u}};

// What a block of threads works on: rows from `first` on of a head of tensor 0 (Q), 1 (K) or 2 (V).
struct Part {
  int tensor, batch, head, kv_head, first;
};

// Blocks of rows of a head.
DEV int blocks_of(int seqlen, int rows) { return (seqlen + rows - 1) / rows; }

// Neighbours work on different heads of the same rows: these are neighbours in memory.
DEV Part this_part(const Params& params) {
  const int of_q = params.batch * params.num_heads_q * blocks_of(params.seqlen_q, kRows);
  const int of_k = params.batch * params.num_heads_kv * blocks_of(params.seqlen_k, kRows);
  const int index = blockIdx.x, tensor = index < of_q ? 0 : index < of_q + of_k ? 1 : 2;
  const int rest = index - (tensor == 0 ? 0 : tensor == 1 ? of_q : of_q + of_k), rows = tensor == 2 ? kKeys : kRows;
  const int heads = tensor == 0 ? params.num_heads_q : params.num_heads_kv, head = rest % heads;
  const int blocks = blocks_of(tensor == 0 ? params.seqlen_q : params.seqlen_k, rows);
  return {tensor, rest / heads / blocks, head, tensor == 0 ? head / params.group : head, rest / heads % blocks * rows};
}

// Where a head's elements are.
struct Source {
  const u16* head;
  i64 stride;
  int seqlen;
};

DEV Source source_of(const Params& params, const Part& part) {
  const i64 batch = part.batch, head = part.head;
  if (part.tensor == 0) return {params.q + batch * params.q_stride_batch + head * params.q_stride_head, params.q_stride_seqlen, params.seqlen_q};
  if (part.tensor == 1) return {params.k + batch * params.k_stride_batch + head * params.k_stride_head, params.k_stride_seqlen, params.seqlen_k};
  return {params.v + batch * params.v_stride_batch + head * params.v_stride_head, params.v_stride_seqlen, params.seqlen_k};
}

using Held = Eight;  // a part of a row, multiplied by the Hadamard matrix

// Load the lane's part of its row; one that does not exist is 0. Every thread of a warp calls it.
template <class Pair>
DEV void load_row(Held (&x)[kRowVectors], const Source& source, int row) {
  const u16* from = source.head + row * source.stride;
  const int lane = threadIdx.x % 4;
  uint4 packed[kRowVectors];
#pragma unroll
  for (int i = 0; i < kRowVectors; ++i) packed[i] = load_global_16(from + (i * 4 + lane) * 8, row < source.seqlen);
#pragma unroll
  for (int i = 0; i < kRowVectors; ++i) x[i] = eight<Pair>(change_signs(packed[i], kSigns[lane][i / 4] << i % 4 * 4));
  hadamard(x, kFactor);
}

// Load this thread's part of 128 keys of V.
DEV void load_values(uint4 (&x)[kValueUnits][4], const Source& source, int first) {
#pragma unroll
  for (int i = 0; i < kValueUnits; ++i) {
    const ValueUnit unit = ValueUnit::of_warp(threadIdx.x / 32 + i * (kThreads / 32));
    load_unit<kColumns / 8>(x[i], (const unsigned char*)(source.head + first * source.stride), source.stride * 2, source.seqlen - first, unit);
  }
}

template <class Pair>
DEV float max_of_row(const Held (&x)[kRowVectors]) {
  float amax = 0.f;
#pragma unroll
  for (int i = 0; i < kRowVectors; ++i) amax = max_magnitude(amax, eight<Pair>(x[i]));
  return amax;
}

template <class Pair>
DEV float max_of_values(const uint4 (&x)[kValueUnits][4]) {
  float amax = 0.f;
#pragma unroll
  for (int i = 0; i < 4 * kValueUnits; ++i) amax = max_magnitude(amax, eight<Pair>(x[i / 4][i % 4]));
  return amax;
}

// Quantise rows of Q or K of `heads` heads, of which kGranule share a scale per block.
template <class Pair, int kGranule>
DEV void quantize_rows(const Params& params, const Part& part, int heads, unsigned char* to, float* descales) {
  const Source source = source_of(params, part);
  const int row = part.first + threadIdx.x / 4;
  const bool exists = row < source.seqlen;
  Held x[kRowVectors];
  load_row<Pair>(x, source, row);
  const GranuleScale scale = granule_scale(max_of_warps<kGranule * 4 / 32>(max_of_row<Pair>(x)));
  const i64 of_head = ((i64)part.batch * heads + part.head) * blocks_of(source.seqlen, kGranule);
  if (exists && threadIdx.x % (kGranule * 4) == 0) descales[of_head + row / kGranule] = scale.descale;
  to += (((i64)part.batch * source.seqlen + row) * heads + part.head) * (kRowChunks * 8);
#pragma unroll
  for (int i = 0; i < kRowVectors; ++i) {
    const int chunk = i * 4 + threadIdx.x % 4;
    if (exists && chunk < kRowChunks) *(uint2*)(to + chunk * 8) = quantized_eight(eight<Pair>(x[i]), scale.reciprocal);
  }
}

// Where a block of keys of packed V goes, and how far apart its rows are.
DEV i64 values_stride(const Params& params) { return (params.seqlen_k + kKeys - 1ll) / kKeys * kKeys; }
DEV unsigned char* values_of(const Params& params, const Part& part) {
  return params.v8 + ((i64)part.batch * params.num_heads_kv + part.head) * kColumns * values_stride(params) + part.first;
}

// Quantise 128 keys of V, and lay them out.
template <class Pair>
DEV void quantize_values(const Params& params, const Part& part) {
  __shared__ __align__(16) unsigned char tile[kColumns * kKeys];
  const Source source = source_of(params, part);
  uint4 x[kValueUnits][4];
  load_values(x, source, part.first);
  const GranuleScale scale = power_scale(max_of_warps<kThreads / 32>(max_of_values<Pair>(x)));
  const i64 of_head = ((i64)part.batch * params.num_heads_kv + part.head) * blocks_of(source.seqlen, kKeys);
  if (threadIdx.x == 0) params.v_descale[of_head + part.first / kKeys] = scale.descale;
#pragma unroll
  for (int i = 0; i < kValueUnits; ++i) {
    const ValueUnit unit = ValueUnit::of_warp(threadIdx.x / 32 + i * (kThreads / 32));
    if (unit.chunk < kColumns / 8) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // one column of the lower halves of registers, one of the upper
        const u32 pairs[4] = {in_registers((&x[i][0].x)[j]), in_registers((&x[i][1].x)[j]), in_registers((&x[i][2].x)[j]), in_registers((&x[i][3].x)[j])};
        const u32 low = quantized(Pair::low(pairs[0]), Pair::low(pairs[1]), Pair::low(pairs[2]), Pair::low(pairs[3]), scale.reciprocal);
        const u32 high = quantized(Pair::high(pairs[0]), Pair::high(pairs[1]), Pair::high(pairs[2]), Pair::high(pairs[3]), scale.reciprocal);
        store_shared(smem_address(tile) + value_address(unit.chunk * 8 + 2 * j, unit.word), low);
        store_shared(smem_address(tile) + value_address(unit.chunk * 8 + 2 * j + 1, unit.word), high);
      }
    }
  }
  __syncthreads();
  store_values<kThreads, kColumns>(values_of(params, part), values_stride(params), smem_address(tile));
}

template <class Pair>
DEV void quantize(const Params& params) {
  const Part part = this_part(params);
  if (part.tensor == 0) {
    quantize_rows<Pair, 64>(params, part, params.num_heads_q, params.q8, params.q_descale);
  } else if (part.tensor == 1) {
    quantize_rows<Pair, kKeys>(params, part, params.num_heads_kv, params.k8, params.k_descale);
  } else {
    quantize_values<Pair>(params, part);
  }
}

// Lay 128 keys of e4m3 V out.
DEV void pack_values(const Params& params) {
  __shared__ __align__(16) unsigned char tile[kColumns * kKeys];
  const int index = blockIdx.x, head = index % params.num_heads_kv, rest = index / params.num_heads_kv;
  const int blocks = (params.seqlen_k + kKeys - 1) / kKeys, first = rest % blocks * kKeys;
  const Part part = {2, rest / blocks, head, head, first};
  const unsigned char* from = (const unsigned char*)params.v + part.batch * params.v_stride_batch + part.head * params.v_stride_head + first * params.v_stride_seqlen;
  uint4 x[kPackedUnits][4];
#pragma unroll
  for (int i = 0; i < kPackedUnits; ++i) {
    const ValueUnit unit = ValueUnit::of_warp(threadIdx.x / 32 + i * (kThreads / 32));
    load_unit<kColumns / 16>(x[i], from, params.v_stride_seqlen, params.seqlen_k - first, unit);
  }
#pragma unroll
  for (int i = 0; i < kPackedUnits; ++i) {
    const ValueUnit unit = ValueUnit::of_warp(threadIdx.x / 32 + i * (kThreads / 32));
    if (unit.chunk < kColumns / 16) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        u32 words[4];
#pragma unroll
        for (int key = 0; key < 4; ++key) words[key] = (&x[i][key].x)[j];
        transpose_bytes(words);
#pragma unroll
        for (int byte = 0; byte < 4; ++byte) store_shared(smem_address(tile) + value_address(unit.chunk * 16 + j * 4 + byte, unit.word), words[byte]);
      }
    }
  }
  __syncthreads();
  store_values<kThreads, kColumns>(values_of(params, part), values_stride(params), smem_address(tile));
}

extern "C" __global__ void __launch_bounds__(kThreads, 2)
attn_fwd_sm90a_e4m3_d128_masked_warp_specialized_40632936_quantize_bf16(const __grid_constant__ Params params) { quantize<Bf16Pair>(params); }

extern "C" __global__ void __launch_bounds__(kThreads, 2)
attn_fwd_sm90a_e4m3_d128_masked_warp_specialized_40632936_quantize_f16(const __grid_constant__ Params params) { quantize<F16Pair>(params); }

extern "C" __global__ void __launch_bounds__(kThreads, 2)
attn_fwd_sm90a_e4m3_d128_masked_warp_specialized_40632936_pack_v(const __grid_constant__ Params params) { pack_values(params); }

}  // namespace quantizer
