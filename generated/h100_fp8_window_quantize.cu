#include "instructions.cuh"

#include "functions.cuh"

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
