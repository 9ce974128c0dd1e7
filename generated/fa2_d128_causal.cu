// attn_fwd_sm90a_bf16_d128_causal_fa2_90c09cd3
//
// Attention forward, fa2 schedule, for sm_90a: out = softmax(softmax_scale Q Kᵀ, masked) V and its
// log-sum-exp, inputs bf16, output bf16, softmax in f32. Mask: causal.
// Emitted by attngen 0.1.0 from spec digest 90c09cd33eb22f34. Launch: see the manifest beside this file.
//
// Notation: S = Q Kᵀ and P, the scores and probabilities of one block (acc_s, p); O, the output, unnormalised (acc_o);
// m and n, blocks of query rows and of keys; row_max in scaled log2 units.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
typedef long long i64;
#define DEV static __device__ __forceinline__

// Infinity, without a header.
DEV float infinity() { return __int_as_float(0x7f800000); }

// The lowest finite number.
DEV float lowest() { return __int_as_float(0xff7fffff); }

// Keep a value from being computed ahead of the loop it is used in: what it leads to is cheap, registers are not.
DEV u32 stay_in_loop(u32 x) {
  asm volatile("" : "+r"(x));
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

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8. PTX ISA: ldmatrix.
DEV void ldmatrix_x4(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// The same, each matrix transposed on the way. PTX ISA: ldmatrix, .trans.
DEV void ldmatrix_x4_trans(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// The 32-bit address of shared memory that PTX wants.
DEV u32 smem_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// PTX ISA: st.shared.
DEV void store_shared(u32 address, u32 x) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory"); }

// PTX ISA: st.shared, .v4.
DEV void store_shared_16(u32 address, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

// PTX ISA: ld.shared, .v4.
DEV uint4 load_shared_16(u32 address) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address) : "memory");
  return x;
}

// 2^x, at most 2 ulp off; -inf gives 0. PTX ISA: ex2.approx.ftz.
DEV float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x), absolute error at most 2^-22 near 1, else 2^-22 relative. PTX ISA: lg2.approx.ftz.
DEV float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Wait until the kernels before this one in its stream have ended and what they wrote can be seen. A launch without the attribute
// "programmatic stream serialization" starts no earlier, and finds nothing to wait for. PTX ISA: griddepcontrol.wait.
DEV void wait_for_earlier_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Let the next kernel of the stream start where multiprocessors become free, once every block of this one has said so or ended; it
// waits itself, as above, for this one's end. To be said after one's own wait: then all before the last kernel has ended.
// PTX ISA: griddepcontrol.launch_dependents.
DEV void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// bf16: two packed in a register, the matrix instruction that takes them.
struct Bf16 {
  // PTX ISA: cvt.rn.bf16x2.f32; its first source is the upper half.
  DEV u32 pack(float lo, float hi) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
  }
  // D (16x8) += A (16x16) B (16x8). PTX ISA: mma.sync.m16n8k16.
  DEV void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// A tile of 16-bit elements in shared memory, kCols wide of which kValid mean something. Rows follow one another
// without padding; 16-byte chunks of a row are exchanged so that eight rows of one column lie on different banks.
template <int kRows_, int kCols, int kValid>
struct SmemTile {
  static constexpr int kRows = kRows_, kChunks = kCols / 8, kValidChunks = kValid / 8;
  static constexpr int kRowBytes = kChunks * 16, kBytes = kRows * kRowBytes;
  static constexpr int kSpan = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : kChunks % 2 == 0 ? 2 : 1;
  // What the chunks of a row are exchanged by; the same for rows 8 apart.
  DEV u32 exchange(u32 row) { return row / (8 / kSpan) % kSpan; }
  // Byte offset of a chunk from the start of the tile.
  DEV u32 address(u32 row, u32 chunk) { return row * kRowBytes + (chunk ^ exchange(row)) * 16; }
};

// Which row of the tile element `i` of a per-row vector stands for: a warp owns 16 * kRowTiles rows, a lane two of
// every 16 (PTX ISA: fragments of mma.m16n8k16).
template <int kRowTiles>
DEV int row_in_tile(int i) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  return (warp * kRowTiles + i / 2) * 16 + i % 2 * 8 + lane / 4;
}

// The first of the two neighbouring columns that this lane holds of every 8.
DEV int lane_column() { return threadIdx.x % 4 * 2; }

// A key bound, kept within 0 .. end; some bounds need 64 bits.
DEV int clamp_key(int key, int end) { return max(0, min(key, end)); }
DEV int clamp_key(i64 key, int end) { return (int)max((i64)0, min(key, (i64)end)); }

// How a block's threads share the chunks of a tile: thread t copies chunks t, t + kThreads, ... Where a pass is a
// multiple of eight rows, a thread keeps its column and its exchange from pass to pass.
template <class Tile, int kThreads>
struct Passes {
  static constexpr int kCount = (Tile::kRows * Tile::kChunks + kThreads - 1) / kThreads;
  static constexpr bool kKeepsColumn = kThreads % (8 * Tile::kChunks) == 0;
  static constexpr bool kEven = Tile::kRows * Tile::kChunks % kThreads == 0;
};

// Start copying a tile: rows first_row .. of a head whose rows stand `stride` elements apart. Rows at or past
// `end_row` and columns past the head dim arrive as zeros.
template <class Tile, int kThreads>
DEV void load_tile(u32 dst, const u16* head, i64 stride, int first_row, int end_row) {
  using Pass = Passes<Tile, kThreads>;
  const u32 thread = stay_in_loop(threadIdx.x);
#pragma unroll
  for (int i = 0; i < Pass::kCount; ++i) {
    const u32 index = i * kThreads + thread, row = index / Tile::kChunks, chunk = index % Tile::kChunks;
    if (!Pass::kEven && row >= Tile::kRows) break;
    const bool valid = first_row + (int)row < end_row && (Tile::kValidChunks == Tile::kChunks || chunk < Tile::kValidChunks);
    const u16* src = valid ? head + (first_row + (i64)row) * stride + chunk * 8 : head;
    cp_async_16(dst + Tile::address(row, chunk), src, valid ? 16 : 0);
  }
}

// The same where every row is known to exist.
template <class Tile, int kThreads>
DEV void load_whole_tile(u32 dst, const u16* head, i64 stride, int first_row) {
  using Pass = Passes<Tile, kThreads>;
  const u32 thread = stay_in_loop(threadIdx.x);
  if (Pass::kKeepsColumn && Tile::kValidChunks == Tile::kChunks) {
    const u32 row = thread / Tile::kChunks, chunk = thread % Tile::kChunks;
    const u16* src = head + (first_row + (i64)row) * stride + chunk * 8;
    dst += Tile::address(row, chunk);
#pragma unroll
    for (int i = 0; i < Pass::kCount; ++i) {
      cp_async_16(dst + i * kThreads * 16, src, 16);
      src += kThreads / Tile::kChunks * stride;
    }
  } else {
    load_tile<Tile, kThreads>(dst, head, stride, first_row, first_row + Tile::kRows);
  }
}

// Flip the sign of every element of a tile.
template <class Tile, int kThreads>
DEV void negate_tile(u32 tile) {
#pragma unroll 1
  for (int index = threadIdx.x; index < Tile::kRows * Tile::kChunks; index += kThreads) {
    uint4 x = load_shared_16(tile + index * 16);
    x.x ^= 0x80008000u, x.y ^= 0x80008000u, x.z ^= 0x80008000u, x.w ^= 0x80008000u;
    store_shared_16(tile + index * 16, x);
  }
}

// Round an accumulator and write it to a tile; each warp writes its own rows.
template <class Element, class Tile, int kRowTiles, int kColTiles>
DEV void copy_tile(u32 dst, const float (&acc)[kRowTiles][kColTiles][4]) {
#pragma unroll
  for (int r = 0; r < 2 * kRowTiles; ++r) {
#pragma unroll
    for (int j = 0; j < kColTiles; ++j) {
      const u32 address = dst + Tile::address(row_in_tile<kRowTiles>(r), j) + lane_column() * 2;
      store_shared(address, Element::pack(acc[r / 2][j][r % 2 * 2], acc[r / 2][j][r % 2 * 2 + 1]));
    }
  }
}

// Write a tile to rows first_row .. of a head; rows at or past `end_row` are dropped.
template <class Tile, int kThreads>
DEV void store_tile(u16* head, i64 stride, int first_row, int end_row, u32 src) {
#pragma unroll 4
  for (int index = threadIdx.x; index < Tile::kRows * Tile::kValidChunks; index += kThreads) {
    const int row = index / Tile::kValidChunks, chunk = index % Tile::kValidChunks;
    if (first_row + row < end_row) {
      *(uint4*)(head + (first_row + row) * stride + chunk * 8) = load_shared_16(src + Tile::address(row, chunk));
    }
  }
}

// Write one value per row.
template <int kRowTiles, int kRows>
DEV void store_rows(float* head, const float (&src)[kRows], int first_row, int end_row) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = first_row + row_in_tile<kRowTiles>(r);
    if (row < end_row && threadIdx.x % 4 == 0) head[row] = src[r];
  }
}

// Fill registers.
template <int N>
DEV void fill(float (&x)[N], float value) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = value;
}

// Fill the registers of a tile.
template <int kRowTiles, int kColTiles>
DEV void fill(float (&x)[kRowTiles][kColTiles][4], float value) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int j = 0; j < kColTiles; ++j) fill(x[r][j], value);
  }
}

// acc = A Bᵀ for this warp's rows of A; both tiles row by row, contraction over their columns.
template <class Element, class ATile, class BTile, int kUnroll, int kRowTiles, int kColTiles>
DEV void score_gemm(float (&acc)[kRowTiles][kColTiles][4], u32 a, u32 b) {
  const u32 warp = threadIdx.x / 32, lane = stay_in_loop(threadIdx.x % 32);
  const u32 a_row = warp * kRowTiles * 16 + lane % 16, a_exchange = ATile::exchange(a_row) ^ lane / 16;
  const u32 b_row = lane / 16 * 8 + lane % 8, b_exchange = BTile::exchange(b_row) ^ lane / 8 % 2;
  fill(acc, 0.f);
#pragma unroll kUnroll
  for (int k = 0; k < ATile::kChunks; k += 2) {
    const u32 a_column = a + a_row * ATile::kRowBytes + (k ^ a_exchange) * 16;
    const u32 b_column = b + b_row * BTile::kRowBytes + (k ^ b_exchange) * 16;
    u32 a_fragment[kRowTiles][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) ldmatrix_x4(a_fragment[r], a_column + r * 16 * ATile::kRowBytes);
#pragma unroll
    for (int j = 0; j < kColTiles; j += 2) {
      u32 b_fragment[4];
      ldmatrix_x4(b_fragment, b_column + j * 8 * BTile::kRowBytes);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        Element::mma(acc[r][j], a_fragment[r], b_fragment[0], b_fragment[1]);
        Element::mma(acc[r][j + 1], a_fragment[r], b_fragment[2], b_fragment[3]);
      }
    }
  }
}

// acc += A B, A in registers, the rows of B contracted.
template <class Element, class BTile, int kRowTiles, int kColTiles, int kSteps>
DEV void output_gemm(float (&acc)[kRowTiles][kColTiles][4], const u32 (&a)[kRowTiles][kSteps][4], u32 b) {
  const u32 lane = stay_in_loop(threadIdx.x % 32), row = lane % 16, exchange = BTile::exchange(row) ^ lane / 16;
#pragma unroll
  for (int j = 0; j < kColTiles; j += 2) {
    const u32 column = b + row * BTile::kRowBytes + (j ^ exchange) * 16;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      u32 b_fragment[4];
      ldmatrix_x4_trans(b_fragment, column + k * 16 * BTile::kRowBytes);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        Element::mma(acc[r][j], a[r][k], b_fragment[0], b_fragment[1]);
        Element::mma(acc[r][j + 1], a[r][k], b_fragment[2], b_fragment[3]);
      }
    }
  }
}

// Round an accumulator to 16 bits: two neighbouring column tiles of D are one A operand, lane by lane.
template <class Element, int kRowTiles, int kColTiles>
DEV void convert_p(u32 (&p)[kRowTiles][kColTiles / 2][4], const float (&s)[kRowTiles][kColTiles][4]) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int j = 0; j < kColTiles; ++j) {
      p[r][j / 2][j % 2 * 2] = Element::pack(s[r][j][0], s[r][j][1]);
      p[r][j / 2][j % 2 * 2 + 1] = Element::pack(s[r][j][2], s[r][j][3]);
    }
  }
}

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

// ---- the maximum, where all scores share a scale: row_max is a score, of a row that has seen no key the lowest number

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

// The same without a vote, for which the exponentials of one row would wait until the other's maximum is known.
template <int kRowTiles, int kColTiles>
DEV void update_row_max(float (&row_max)[2 * kRowTiles], float (&reference)[2 * kRowTiles], float (&alpha)[2 * kRowTiles],
                        float (&exponent_scale)[1][2 * kRowTiles], const float (&s)[kRowTiles][kColTiles][4], float scale_log2, float coarse) {
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    row_max[i] = fmaxf(row_max[i], quad_max(largest_score(s, scale_log2, i)));
    refer_to(reference[i], alpha[i], exponent_scale[0][i], row_max[i], scale_log2, coarse);
  }
}

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

// The same of exponents that were not taken relative to a maximum.
template <int N>
DEV void finish_rows(float (&inv_sum)[N], float (&lse)[N], const float (&row_sum)[N]) {
  const float none[N] = {};
  finish_rows(inv_sum, lse, none, row_sum);
}

// The same of maxima that are scores; coarse ones are brought to natural units at once.
template <int N>
DEV void finish_rows_of_scores(float (&inv_sum)[N], float (&lse)[N], const float (&row_max)[N], const float (&row_sum)[N], float scale_log2,
                               float coarse, float lift = 0.f, float top = 1.f) {
  float reference[N];
#pragma unroll
  for (int i = 0; i < N; ++i) reference[i] = row_max[i] * scale_log2;
  finish_rows(inv_sum, lse, reference, row_sum, lift, top);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float of_sum = (log2_approx(row_sum[i]) - lift) * 0.6931471805599453f;
    if (row_sum[i] != 0.f && !(fabsf(reference[i]) < coarse)) lse[i] = __fmaf_rz(row_max[i], scale_log2 * 0.6931471805599453f, of_sum);
  }
}

// ---- this kernel -----------------------------------------------------------------------------------------------------

using Input = Bf16;
using Output = Bf16;
constexpr int kBlockM = 128;  // tile.block_m: query rows of a block
constexpr int kBlockN = 64;  // tile.block_n: keys of a block
constexpr int kHeadDimQk = 128;  // problem.head_dim.qk
constexpr int kHeadDimV = 128;  // problem.head_dim.v
constexpr int kQkCols = 128;  // padded to 16, the k of mma.sync
constexpr int kVCols = 128;  // padded likewise
constexpr int kStages = 1;  // schedule.stages: K and V blocks in shared memory
constexpr int kThreads = 128;  // schedule.warps = 4
constexpr int kRowTiles = 2;  // 16-row tiles that each warp owns
using QTile = SmemTile<kBlockM, kQkCols, kHeadDimQk>;
using KTile = SmemTile<kBlockN, kQkCols, kHeadDimQk>;
using VTile = SmemTile<kBlockN, kVCols, kHeadDimV>;
using OutTile = SmemTile<kBlockM, kVCols, kHeadDimV>;

struct Params {
  u16* q;
  u16* k;
  u16* v;
  u16* out;
  float* lse;
  i64 q_stride_batch;
  i64 q_stride_seqlen;
  i64 q_stride_head;
  i64 k_stride_batch;
  i64 k_stride_seqlen;
  i64 k_stride_head;
  i64 v_stride_batch;
  i64 v_stride_seqlen;
  i64 v_stride_head;
  i64 out_stride_batch;
  i64 out_stride_seqlen;
  i64 out_stride_head;
  int seqlen_q;
  int seqlen_k;
  int num_heads_q;
  int group;
  int scale_is_negative;
  float softmax_scale_log2;
};

// What this block works on. seqlen_q and seqlen_k are this sequence's own.
struct Tile {
  int m_block, head, batch, kv_head, seqlen_q, seqlen_k;
};

// Where a head starts. Computed where it is used, not ahead of the loops: registers are scarce there.
DEV u16* head_of(u16* base, int batch, i64 stride_batch, int head, i64 stride_head) {
  return base + stay_in_loop(batch) * stride_batch + stay_in_loop(head) * stride_head;
}

// Where a head starts in a dense f32 array (batch, num_heads_q, seqlen_q, cols).
DEV float* dense_head(float* base, const Params& params, const Tile& tile, int cols = 1) {
  return base + ((i64)stay_in_loop(tile.batch) * params.num_heads_q + stay_in_loop(tile.head)) * params.seqlen_q * cols;
}

// One block of rows of one head. Heads are fastest; the rows that see the most keys start first.
DEV Tile decode_tile(const Params& params, int index) {
  Tile tile;
  const int m_max = (params.seqlen_q + kBlockM - 1) / kBlockM;
  const int row = index / params.num_heads_q;
  tile.m_block = m_max - (row % m_max) - 1;
  tile.head = index % params.num_heads_q;
  tile.batch = row / m_max;
  tile.kv_head = tile.head / params.group;
  tile.seqlen_q = params.seqlen_q;
  tile.seqlen_k = params.seqlen_k;
  return tile;
}

// Blocks of keys that a block of rows visits, n_min .. n_max - 1; from n_full_begin to n_full_end - 1 no key is masked.
struct KeyBlocks {
  int n_min, n_full_begin, n_full_end, n_max;
};

// Which blocks of keys block m of rows visits, and which of them no row masks.
DEV KeyBlocks key_blocks(const Params& params, const Tile& tile, int m) {
  KeyBlocks seen;
  const int q_first = m * kBlockM, q_last = min(q_first + kBlockM, tile.seqlen_q) - 1;
  const int end_any = max(min(q_last + tile.seqlen_k - tile.seqlen_q + 1, tile.seqlen_k), 0);
  seen.n_max = (end_any + kBlockN - 1) / kBlockN;
  seen.n_min = min(0, seen.n_max);
  seen.n_full_begin = seen.n_min;
  const int end_all = max(min(q_first + tile.seqlen_k - tile.seqlen_q + 1, tile.seqlen_k), 0);
  seen.n_full_end = max(min(end_all / kBlockN, seen.n_max), seen.n_full_begin);
  return seen;
}

// The keys that row q_idx sees are first_key .. end_key - 1.
DEV int end_key(const Params& params, const Tile& tile, int q_idx) {
  int end = tile.seqlen_k;
  end = clamp_key(q_idx + tile.seqlen_k - tile.seqlen_q + 1, end);
  return end;
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
attn_fwd_sm90a_bf16_d128_causal_fa2_90c09cd3(const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) unsigned char smem[];
  const u32 q_smem = smem_address(smem) + 0;
  const u32 k_smem = smem_address(smem) + 32768;
  const u32 v_smem = smem_address(smem) + 49152;
  const u32 out_smem = smem_address(smem) + 0;  // over q, once that is no longer needed
  wait_for_earlier_kernels();
  let_next_kernel_start();
  float acc_s[kRowTiles][8][4];
  u32 p[kRowTiles][4][4];
  float acc_o[kRowTiles][16][4];
  float row_max[2 * kRowTiles];
  float alpha[2 * kRowTiles];
  float reference[2 * kRowTiles];
  float exponent_scale[1][2 * kRowTiles];
  float row_sum[2 * kRowTiles];
  float total[2 * kRowTiles];
  float inv_sum[2 * kRowTiles];
  float row_lse[2 * kRowTiles];

  Tile tile = decode_tile(params, blockIdx.x);
  const KeyBlocks seen = key_blocks(params, tile, tile.m_block);
  fill(acc_o, 0.f);
  fill(row_max, lowest());
  fill(reference, lowest());
  fill(row_sum, 0.f);
  if (seen.n_max > seen.n_min) {
    load_tile<QTile, kThreads>(q_smem, head_of(params.q, tile.batch, params.q_stride_batch, tile.head, params.q_stride_head), params.q_stride_seqlen, tile.m_block * kBlockM, tile.seqlen_q);
    load_tile<KTile, kThreads>(k_smem, head_of(params.k, tile.batch, params.k_stride_batch, tile.kv_head, params.k_stride_head), params.k_stride_seqlen, (seen.n_max - 1) * kBlockN, tile.seqlen_k);
    cp_async_commit();
    if (params.scale_is_negative) {
      cp_async_wait<0>();
      __syncthreads();
      negate_tile<QTile, kThreads>(q_smem);
    }
    #pragma unroll 1
    for (int n = seen.n_max - 1; n >= seen.n_full_end; --n) {  // partial tiles
      cp_async_wait<0>();
      __syncthreads();
      load_tile<VTile, kThreads>(v_smem, head_of(params.v, tile.batch, params.v_stride_batch, tile.kv_head, params.v_stride_head), params.v_stride_seqlen, n * kBlockN, tile.seqlen_k);
      cp_async_commit();
      // S = Q Kᵀ
      score_gemm<Input, QTile, KTile, 4>(acc_s, q_smem, k_smem);
      {
        int end[2 * kRowTiles];  // of the keys each row sees, counted from this lane's first column
      #pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i) {
          const int q_idx = tile.m_block * kBlockM + row_in_tile<kRowTiles>(i), column = n * kBlockN + lane_column();
          end[i] = end_key(params, tile, q_idx) - column;
        }
        mask_scores(acc_s, end);
      }
      cp_async_wait<0>();
      __syncthreads();
      if (n - 1 >= seen.n_min) {
        load_whole_tile<KTile, kThreads>(k_smem, head_of(params.k, tile.batch, params.k_stride_batch, tile.kv_head, params.k_stride_head), params.k_stride_seqlen, (n - 1) * kBlockN);
      }
      cp_async_commit();
      // online softmax
      update_row_max(row_max, reference, alpha, exponent_scale, acc_s, params.softmax_scale_log2, 1073741824.0f);
      exponentiate(acc_s, row_sum, reference, alpha, exponent_scale);
      scale_rows(acc_o, alpha);
      convert_p<Input>(p, acc_s);
      // O += P V
      output_gemm<Input, VTile>(acc_o, p, v_smem);
    }
    #pragma unroll 1
    for (int n = seen.n_full_end - 1; n >= seen.n_full_begin; --n) {  // full tiles
      cp_async_wait<0>();
      __syncthreads();
      load_whole_tile<VTile, kThreads>(v_smem, head_of(params.v, tile.batch, params.v_stride_batch, tile.kv_head, params.v_stride_head), params.v_stride_seqlen, n * kBlockN);
      cp_async_commit();
      // S = Q Kᵀ
      score_gemm<Input, QTile, KTile, 4>(acc_s, q_smem, k_smem);
      cp_async_wait<0>();
      __syncthreads();
      if (n - 1 >= seen.n_min) {
        load_whole_tile<KTile, kThreads>(k_smem, head_of(params.k, tile.batch, params.k_stride_batch, tile.kv_head, params.k_stride_head), params.k_stride_seqlen, (n - 1) * kBlockN);
      }
      cp_async_commit();
      // online softmax
      update_row_max(row_max, reference, alpha, exponent_scale, acc_s, params.softmax_scale_log2, 1073741824.0f);
      exponentiate(acc_s, row_sum, reference, alpha, exponent_scale);
      scale_rows(acc_o, alpha);
      convert_p<Input>(p, acc_s);
      // O += P V
      output_gemm<Input, VTile>(acc_o, p, v_smem);
    }
  }
  // normalise once, at the end
  tile = decode_tile(params, stay_in_loop(blockIdx.x));
  reduce_rows(total, row_sum);
  finish_rows_of_scores(inv_sum, row_lse, row_max, total, params.softmax_scale_log2, 1073741824.0f);
  scale_rows(acc_o, inv_sum);
  if (params.lse != 0) store_rows<kRowTiles>(dense_head(params.lse, params, tile), row_lse, tile.m_block * kBlockM, tile.seqlen_q);
  __syncthreads();
  copy_tile<Output, OutTile>(out_smem, acc_o);
  __syncthreads();
  store_tile<OutTile, kThreads>(head_of(params.out, tile.batch, params.out_stride_batch, tile.head, params.out_stride_head), params.out_stride_seqlen, tile.m_block * kBlockM, tile.seqlen_q, out_smem);
}
