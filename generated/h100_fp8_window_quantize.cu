typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
typedef long long i64;
#define DEV static __device__ __forceinline__

// Infinity, without a header.
DEV float infinity() { return __int_as_float(0x7f800000); }

// A value in registers from here on, not loaded where it is used.
template <class T>
DEV T in_registers(T x) {
  static_assert(sizeof(T) % 4 == 0, "made of registers");
#pragma unroll
  for (unsigned i = 0; i < sizeof(T) / 4; ++i) asm volatile("" : "+r"(((u32*)&x)[i]));
  return x;
}

// Start copying 16 bytes from device to shared memory; of them `bytes` (0 or 16) are read, the rest become zeros.
// PTX ISA: cp.async. `.cg` caches in L2 only.
DEV void cp_async_16(u32 dst, const void* src, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
}

// Close the group of this thread's copies started since the last commit. PTX ISA: cp.async.commit_group.
DEV void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most kPending of this thread's newest groups are in flight. PTX ISA: cp.async.wait_group.
template <int kPending>
DEV void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
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

// The larger of two; NaN where one is. PTX ISA: max.NaN.f32.
DEV float max_or_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// Wait until the kernels before this one in its stream have ended and what they wrote can be seen. A launch without the attribute
// "programmatic stream serialization" starts no earlier, and finds nothing to wait for. PTX ISA: griddepcontrol.wait.
DEV void wait_for_earlier_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Let the next kernel of the stream start where multiprocessors become free, once every block of this one has said so or ended; it
// waits itself, as above, for this one's end. To be said after one's own wait: then all before the last kernel has ended.
// PTX ISA: griddepcontrol.launch_dependents.
DEV void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

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

// ---- the maximum, where operands have scales of their own: row_max is in log2 units, rounded up, so that no exponent is positive

// ---- the maximum, where all scores share a scale: row_max is a score, of a row that has seen no key the lowest number

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

constexpr int kThreads = 256;  // a quad of lanes for each row of Q or K
constexpr int kRows = 128;  // of a tensor that a block of threads takes at a time
constexpr int kRowChunks = 16;  // of 16 bytes in a row of Q or K
constexpr int kRowVectors = 4;  // of them that a lane takes
constexpr int kThreadRows = 2;  // of Q or K of which a lane takes a part
constexpr int kColumns = 128;  // of V
constexpr int kValueUnits = 2;  // of four keys that a thread takes
constexpr int kPackedUnits = 1;  // the same of 8-bit V
constexpr int kStaged = 8;  // copies of 16 bytes that a thread has under way
constexpr float kFactor = 0.0883883476f;  // 1 / sqrt(head_dim_qk)

// Which elements of a lane change sign, by seed 0; see change_signs.
__constant__ u32 kSigns[4][1] = {{0xf63eca71u}, {0x572dd0d6u}, {0x4276e0a3u}, {0xeb3eb185u}};

// What a block of threads works on at a time: the rows from 128 `block` on of a head of tensor 0 (Q), 1 (K) or 2 (V).
struct Part {
  int tensor, batch, block, head;
  __device__ int first() const { return block * kRows; }
};

DEV int heads_of(const Params& params, int tensor) { return tensor == 0 ? params.num_heads_q : params.num_heads_kv; }
DEV int seqlen_of(const Params& params, int tensor) { return tensor == 0 ? params.seqlen_q : params.seqlen_k; }

// Parts of a head.
DEV int blocks_of(const Params& params, int tensor) {
  const int blocks = (seqlen_of(params, tensor) + kRows - 1) / kRows;
  return blocks;
}

DEV int parts_of(const Params& params, int tensor) { return params.batch * heads_of(params, tensor) * blocks_of(params, tensor); }

// A number of parts of a tensor as batches, blocks and heads. Neighbours are different heads of the same rows: these are
// neighbours in memory.
DEV Part counted(const Params& params, int tensor, int number) {
  const int heads = heads_of(params, tensor), blocks = blocks_of(params, tensor);
  return {tensor, number / heads / blocks, number / heads % blocks, number % heads};
}

DEV Part part_at(const Params& params, int index) {
  const int of_q = parts_of(params, 0), of_k = parts_of(params, 1);
  if (index < of_q) return counted(params, 0, index);
  if (index < of_q + of_k) return counted(params, 1, index - of_q);
  return counted(params, 2, index - of_q - of_k);
}

// The part so many after another, without a division. Past the last of the tensor it has too large a batch.
DEV Part after(const Params& params, Part part, const Part& step) {
  part.head += step.head, part.block += step.block, part.batch += step.batch;
  const int heads = heads_of(params, part.tensor), blocks = blocks_of(params, part.tensor);
  if (part.head >= heads) part.head -= heads, ++part.block;
  if (part.block >= blocks) part.block -= blocks, ++part.batch;
  return part;
}

// The elements of a part's head, of a batch, and how far apart its rows are.
struct Source {
  const u16* head;
  i64 stride;
};

DEV Source source_of(const Params& params, const Part& part) {
  const i64 batch = part.batch, head = part.head;
  if (part.tensor == 0) return {params.q + batch * params.q_stride_batch + head * params.q_stride_head, params.q_stride_seqlen};
  if (part.tensor == 1) return {params.k + batch * params.k_stride_batch + head * params.k_stride_head, params.k_stride_seqlen};
  return {params.v + batch * params.v_stride_batch + head * params.v_stride_head, params.v_stride_seqlen};
}

// The first row of Q or K of which this lane takes a part.
DEV int first_row(const Part& part) { return part.first() + threadIdx.x / 4 * kThreadRows; }

DEV ValueUnit value_unit(int i) { return ValueUnit::of_warp<kColumns / 8>(threadIdx.x / 32 + i * (kThreads / 32)); }

extern __shared__ __align__(16) unsigned char smem[];

// Of shared memory the thread's own 16 bytes by this number. It alone writes and reads them.
DEV u32 staged(int number) { return smem_address(smem) + (number * kThreads + threadIdx.x) * 16; }

// A tile of packed V, behind them.
DEV u32 values_tile() { return smem_address(smem) + kStaged * kThreads * 16; }

// Start copying the thread's share of a part; what does not exist is 0.
DEV void stage(const Params& params, Part& part) {
  const Source source = source_of(params, part);
  const int seqlen = seqlen_of(params, part.tensor);
  if (part.tensor < 2) {
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      const int row = first_row(part) + r;
      const u16* from = source.head + row * source.stride + threadIdx.x % 4 * 8;
#pragma unroll
      for (int i = 0; i < kRowVectors; ++i) {
        const bool exists = row < seqlen && (4 * i + 4 <= kRowChunks || 4 * i + threadIdx.x % 4 < kRowChunks);
        cp_async_16(staged(r * kRowVectors + i), from + i * 32, exists ? 16 : 0);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4 * kValueUnits; ++i) {
      const ValueUnit unit = value_unit(i / 4);
      const int key = part.first() + unit.key(i % 4);
      cp_async_16(staged(i), source.head + key * source.stride + unit.chunk * 8, unit.chunk < kColumns / 8 && key < seqlen ? 16 : 0);
    }
  }
  cp_async_commit();
}

// Do `work` for each part of this block of threads, with the thread's share of it; the next one is under way meanwhile.
template <class Work>
DEV void for_each_part(const Params& params, const Work& work) {
  const int parts = parts_of(params, 0) + 2 * parts_of(params, 1), stride = gridDim.x;
  Part next = part_at(params, blockIdx.x), step = counted(params, next.tensor, stride);
  stage(params, next);
  for (int index = blockIdx.x; index < parts; index += stride) {
    const Part part = next;
    uint4 x[kStaged];
    cp_async_wait<0>();
#pragma unroll
    for (int i = 0; i < kStaged; ++i) x[i] = load_shared_16(staged(i));
    __syncthreads();  // nobody reads what the block shared for the part before
    if (index + stride < parts) {
      next = after(params, next, step);
      if (next.batch >= params.batch) {  // it is of another tensor
        next = part_at(params, index + stride);
        step = counted(params, next.tensor, stride);
      }
      stage(params, next);
    }
    work(part, x);
  }
}

using Held = Eight;  // a part of a row, multiplied by the Hadamard matrix

// Take the part of a row from what was staged. Returns the lane's largest finite magnitude. Every thread of a warp calls it.
template <class Pair>
DEV float take_row(Held (&row)[kRowVectors], const uint4* packed) {
#pragma unroll
  for (int i = 0; i < kRowVectors; ++i) row[i] = eight<Pair>(change_signs(packed[i], kSigns[threadIdx.x % 4][i / 4] << i % 4 * 4));
  hadamard(row);
  return __fmul_rn(max_magnitude(row), kFactor);
}

// Quantise rows of Q or K.
template <class Pair>
DEV void quantize_rows(const Params& params, const Part& part, const uint4 (&packed)[kStaged]) {
  const bool of_q = part.tensor == 0;
  const int heads = heads_of(params, part.tensor), seqlen = seqlen_of(params, part.tensor);
  unsigned char* to = of_q ? params.q8 : params.k8;
  float* descales = of_q ? params.q_descale : params.k_descale;
  Held x[kThreadRows][kRowVectors];
  float amax[kThreadRows];
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) amax[r] = take_row<Pair>(x[r], packed + r * kRowVectors);
  const int first = first_row(part);
#pragma unroll
  for (int r = 1; r < kThreadRows; ++r) amax[0] = fmaxf(amax[0], amax[r]);
  const int bits = of_q ? 6 : 7, threads = (4 << bits) / kThreadRows;  // of rows that share a scale
  const GranuleScale scale = granule_scale(max_of_warps(amax[0], threads / 32));
  if (first < seqlen && threadIdx.x % threads == 0) {
    const i64 of_head = ((i64)part.batch * heads + part.head) * ((seqlen + (1 << bits) - 1) >> bits);
    descales[of_head + (first >> bits)] = scale.descale;
  }
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    const int row = first + r;
    const bool exists = row < seqlen;
    const float factor = __fmul_rn(scale.reciprocal, kFactor);
    unsigned char* to_row = to + (((i64)part.batch * seqlen + row) * heads + part.head) * (kRowChunks * 8);
#pragma unroll
    for (int i = 0; i < kRowVectors; ++i) {
      const int chunk = i * 4 + threadIdx.x % 4;
      if (exists && chunk < kRowChunks) *(uint2*)(to_row + chunk * 8) = quantized_eight(eight<Pair>(x[r][i]), factor);
    }
  }
}

// Where a block of keys of packed V goes, and how far apart its rows are.
DEV i64 values_stride(const Params& params) { return (params.seqlen_k + kRows - 1ll) / kRows * kRows; }
DEV unsigned char* values_of(const Params& params, const Part& part) {
  return params.v8 + ((i64)part.batch * params.num_heads_kv + part.head) * kColumns * values_stride(params) + part.first();
}

// Quantise 128 keys of V, and lay them out.
template <class Pair>
DEV void quantize_values(const Params& params, const Part& part, uint4 (&x)[kStaged]) {
  const GranuleScale scale = power_scale(max_of_warps(max_magnitude<Pair, 4 * kValueUnits>(x), kThreads / 32));
  const i64 of_head = ((i64)part.batch * params.num_heads_kv + part.head) * blocks_of(params, 2);
  if (threadIdx.x == 0) params.v_descale[of_head + part.block] = scale.descale;
#pragma unroll
  for (int i = 0; i < kValueUnits; ++i) {
    const ValueUnit unit = value_unit(i);
    if (unit.chunk < kColumns / 8) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // one column of the lower halves of registers, one of the upper
        const u32 pairs[4] = {in_registers((&x[4 * i + 0].x)[j]), in_registers((&x[4 * i + 1].x)[j]), in_registers((&x[4 * i + 2].x)[j]), in_registers((&x[4 * i + 3].x)[j])};
        const u32 low = quantized(Pair::low(pairs[0]), Pair::low(pairs[1]), Pair::low(pairs[2]), Pair::low(pairs[3]), scale.reciprocal);
        const u32 high = quantized(Pair::high(pairs[0]), Pair::high(pairs[1]), Pair::high(pairs[2]), Pair::high(pairs[3]), scale.reciprocal);
        store_shared(values_tile() + value_address(unit.chunk * 8 + 2 * j, unit.word), low);
        store_shared(values_tile() + value_address(unit.chunk * 8 + 2 * j + 1, unit.word), high);
      }
    }
  }
  __syncthreads();
  store_values<kThreads, kColumns>(values_of(params, part), values_stride(params), values_tile());
}

template <class Pair>
DEV void quantize(const Params& params, const Part& part, uint4 (&x)[kStaged]) {
  if (part.tensor < 2) {
    quantize_rows<Pair>(params, part, x);
  } else {
    quantize_values<Pair>(params, part, x);
  }
}

// Lay 128 keys of e4m3 V out.
DEV void pack_values(const Params& params) {
  __shared__ __align__(16) unsigned char tile[kColumns * kRows];
  const int index = blockIdx.x, head = index % params.num_heads_kv, rest = index / params.num_heads_kv;
  const int blocks = (params.seqlen_k + kRows - 1) / kRows;
  const Part part = {2, rest / blocks, rest % blocks, head};
  const unsigned char* from = (const unsigned char*)params.v + part.batch * params.v_stride_batch + part.head * params.v_stride_head + part.first() * params.v_stride_seqlen;
  uint4 x[kPackedUnits][4];
#pragma unroll
  for (int i = 0; i < kPackedUnits; ++i) {
    const ValueUnit unit = ValueUnit::of_warp<kColumns / 16>(threadIdx.x / 32 + i * (kThreads / 32));
    load_unit<kColumns / 16>(x[i], from, params.v_stride_seqlen, params.seqlen_k - part.first(), unit);
  }
#pragma unroll
  for (int i = 0; i < kPackedUnits; ++i) {
    const ValueUnit unit = ValueUnit::of_warp<kColumns / 16>(threadIdx.x / 32 + i * (kThreads / 32));
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
attn_fwd_sm90a_e4m3_d128_masked_warp_specialized_40632936_quantize_bf16(const __grid_constant__ Params params) {
  wait_for_earlier_kernels();
  let_next_kernel_start();
  for_each_part(params, [&](const Part& part, uint4 (&x)[kStaged]) { quantize<Bf16Pair>(params, part, x); });
}

extern "C" __global__ void __launch_bounds__(kThreads, 2)
attn_fwd_sm90a_e4m3_d128_masked_warp_specialized_40632936_quantize_f16(const __grid_constant__ Params params) {
  wait_for_earlier_kernels();
  let_next_kernel_start();
  for_each_part(params, [&](const Part& part, uint4 (&x)[kStaged]) { quantize<F16Pair>(params, part, x); });
}

extern "C" __global__ void __launch_bounds__(kThreads, 2)
attn_fwd_sm90a_e4m3_d128_masked_warp_specialized_40632936_pack_v(const __grid_constant__ Params params) {
  wait_for_earlier_kernels();
  let_next_kernel_start();
  pack_values(params);
}

}  // namespace quantizer
