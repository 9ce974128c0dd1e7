// attn_fwd_sm90a_bf16_d128_causal_warp_specialized_26ec6be6
//
// Attention forward, warp_specialized schedule, for sm_90a: out = softmax(softmax_scale Q Kᵀ, masked) V and its
// log-sum-exp, inputs bf16, output bf16, softmax in f32. Mask: causal. Score: score + slopes[h] * f32(kv_idx + seqlen_q - q_idx - seqlen_k).
// Emitted by attngen 0.1.0 from spec digest 26ec6be6d7b87cc2. Launch: see the manifest beside this file.
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

// A value that is the same in all threads of a warp, so that the compiler knows: it keeps what follows from it in uniform
// registers, where wgmma wants its descriptors.
DEV u32 same_in_warp(u32 x) { return __reduce_max_sync(~0u, x); }

// A value in registers from here on, not loaded where it is used.
template <class T>
DEV T in_registers(T x) {
  static_assert(sizeof(T) % 4 == 0, "made of registers");
#pragma unroll
  for (unsigned i = 0; i < sizeof(T) / 4; ++i) asm volatile("" : "+r"(((u32*)&x)[i]));
  return x;
}

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8. PTX ISA: stmatrix.
DEV void stmatrix_x4(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// Two of them; the addresses of the lower sixteen lanes count.
DEV void stmatrix_x2(u32 address, u32 a, u32 b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}

// The 32-bit address of shared memory that PTX wants.
DEV u32 smem_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// PTX ISA: st.shared.
DEV void store_shared(u32 address, u32 x) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory"); }

// PTX ISA: ld.shared.
DEV u32 load_shared(u32 address) {
  u32 x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}

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

// PTX ISA: mbarrier.init.
DEV void mbarrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Let the copy engine see the barriers that this thread made. PTX ISA: fence.mbarrier_init.
DEV void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// PTX ISA: mbarrier.arrive.
DEV void mbarrier_arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }

// Arrive, and announce the bytes that must land before the phase completes. PTX ISA: mbarrier.arrive.expect_tx.
DEV void mbarrier_arrive_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Wait until the phase of that parity has completed. PTX ISA: mbarrier.try_wait, which may give up early.
DEV void mbarrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "AGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra AGAIN;\n"
      "DONE:\n"
      "}" ::"r"(barrier), "r"(parity) : "memory");
}

// The same, slower, for a whole warp, whose threads the compiler then knows to go on together.
DEV void mbarrier_wait_warp(u32 barrier, u32 parity) {
  for (u32 done = 0; !__all_sync(~0u, done);) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.b32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// Meet at a named barrier. PTX ISA: bar.sync.
DEV void named_barrier_sync(u32 id, u32 threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// Order this thread's ordinary accesses to shared memory before asynchronous ones. PTX ISA: fence.proxy.async.
DEV void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// True in one thread of the warp. PTX ISA: elect.sync.
DEV bool elect_one() {
  u32 elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}" : "=r"(elected));
  return elected != 0;
}

// Give registers back, or take them. PTX ISA: setmaxnreg.
template <int kRegisters>
DEV void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
DEV void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Wait until the kernels before this one in its stream have ended and what they wrote can be seen. A launch without the attribute
// "programmatic stream serialization" starts no earlier, and finds nothing to wait for. PTX ISA: griddepcontrol.wait.
DEV void wait_for_earlier_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Let the next kernel of the stream start where multiprocessors become free, once every block of this one has said so or ended; it
// waits itself, as above, for this one's end. To be said after one's own wait: then all before the last kernel has ended.
// PTX ISA: griddepcontrol.launch_dependents.
DEV void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// How the copy engine sees a tensor; made on the host. CUDA driver API: CUtensorMap.
struct __align__(64) TensorMap {
  u64 opaque[16];
};

// Hints for the L2 cache, as createpolicy.fractional would make them.
constexpr u64 kEvictFirst = 0x12f0000000000000ull, kEvictLast = 0x14f0000000000000ull;

// Fetch a descriptor before its first use. PTX ISA: prefetch.tensormap.
DEV void prefetch_tensor_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

// Start copying a box to shared memory; its bytes count towards the barrier. PTX ISA: cp.async.bulk.tensor.
DEV void tma_load(u32 dst, const TensorMap& map, u32 barrier, int column, int row, int head, int batch, u64 keep) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(dst),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch), "l"(keep) : "memory");
}

// Start copying a box to device memory; what lies past the tensor is dropped. PTX ISA: cp.async.bulk.tensor.
DEV void tma_store(const TensorMap& map, u32 src, int column, int row, int head, int batch) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map), "r"(src), "r"(column), "r"(row),
               "r"(head), "r"(batch) : "memory");
}

// Close the group of this thread's stores. PTX ISA: cp.async.bulk.commit_group.
DEV void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Wait until this thread's stores have read shared memory. PTX ISA: cp.async.bulk.wait_group.read.
DEV void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Order registers and shared memory before the next wgmma. PTX ISA: wgmma.fence.
DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Close the group of wgmmas started since the last commit. PTX ISA: wgmma.commit_group.
DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most kPending of the newest groups are in flight. PTX ISA: wgmma.wait_group.
template <int kPending>
DEV void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// D (64x128) = A (64x16) Bᵀ, both rows of 16 in shared memory; + D where `keep`. PTX ISA: wgmma.mma_async.
DEV void wgmma(float (&d)[1][16][4], u64 a, u64 b, bool keep) {
  asm volatile(
      "{\n"
      ".reg .pred keep;\n"
      "setp.ne.b32 keep, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, keep, 1, 1, 0, 0;\n"
      "}"
      : "+f"(d[0][0][0]), "+f"(d[0][0][1]), "+f"(d[0][0][2]), "+f"(d[0][0][3]), "+f"(d[0][1][0]), "+f"(d[0][1][1]), "+f"(d[0][1][2]), "+f"(d[0][1][3]), "+f"(d[0][2][0]), "+f"(d[0][2][1]), "+f"(d[0][2][2]), "+f"(d[0][2][3]), "+f"(d[0][3][0]), "+f"(d[0][3][1]), "+f"(d[0][3][2]), "+f"(d[0][3][3]), "+f"(d[0][4][0]), "+f"(d[0][4][1]), "+f"(d[0][4][2]), "+f"(d[0][4][3]), "+f"(d[0][5][0]), "+f"(d[0][5][1]), "+f"(d[0][5][2]), "+f"(d[0][5][3]), "+f"(d[0][6][0]), "+f"(d[0][6][1]), "+f"(d[0][6][2]), "+f"(d[0][6][3]), "+f"(d[0][7][0]), "+f"(d[0][7][1]), "+f"(d[0][7][2]), "+f"(d[0][7][3]), "+f"(d[0][8][0]), "+f"(d[0][8][1]), "+f"(d[0][8][2]), "+f"(d[0][8][3]), "+f"(d[0][9][0]), "+f"(d[0][9][1]), "+f"(d[0][9][2]), "+f"(d[0][9][3]), "+f"(d[0][10][0]), "+f"(d[0][10][1]), "+f"(d[0][10][2]), "+f"(d[0][10][3]), "+f"(d[0][11][0]), "+f"(d[0][11][1]), "+f"(d[0][11][2]), "+f"(d[0][11][3]), "+f"(d[0][12][0]), "+f"(d[0][12][1]), "+f"(d[0][12][2]), "+f"(d[0][12][3]), "+f"(d[0][13][0]), "+f"(d[0][13][1]), "+f"(d[0][13][2]), "+f"(d[0][13][3]), "+f"(d[0][14][0]), "+f"(d[0][14][1]), "+f"(d[0][14][2]), "+f"(d[0][14][3]), "+f"(d[0][15][0]), "+f"(d[0][15][1]), "+f"(d[0][15][2]), "+f"(d[0][15][3])
      : "l"(a), "l"(b), "r"((u32)keep));
}

// D (64x128) = A (64x16, registers) B (16 rows in shared memory); + D where `keep`. PTX ISA: wgmma.mma_async, B transposed.
DEV void wgmma(float (&d)[1][16][4], const u32 (&a)[4], u64 b, bool keep) {
  asm volatile(
      "{\n"
      ".reg .pred keep;\n"
      "setp.ne.b32 keep, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, keep, 1, 1, 1;\n"
      "}"
      : "+f"(d[0][0][0]), "+f"(d[0][0][1]), "+f"(d[0][0][2]), "+f"(d[0][0][3]), "+f"(d[0][1][0]), "+f"(d[0][1][1]), "+f"(d[0][1][2]), "+f"(d[0][1][3]), "+f"(d[0][2][0]), "+f"(d[0][2][1]), "+f"(d[0][2][2]), "+f"(d[0][2][3]), "+f"(d[0][3][0]), "+f"(d[0][3][1]), "+f"(d[0][3][2]), "+f"(d[0][3][3]), "+f"(d[0][4][0]), "+f"(d[0][4][1]), "+f"(d[0][4][2]), "+f"(d[0][4][3]), "+f"(d[0][5][0]), "+f"(d[0][5][1]), "+f"(d[0][5][2]), "+f"(d[0][5][3]), "+f"(d[0][6][0]), "+f"(d[0][6][1]), "+f"(d[0][6][2]), "+f"(d[0][6][3]), "+f"(d[0][7][0]), "+f"(d[0][7][1]), "+f"(d[0][7][2]), "+f"(d[0][7][3]), "+f"(d[0][8][0]), "+f"(d[0][8][1]), "+f"(d[0][8][2]), "+f"(d[0][8][3]), "+f"(d[0][9][0]), "+f"(d[0][9][1]), "+f"(d[0][9][2]), "+f"(d[0][9][3]), "+f"(d[0][10][0]), "+f"(d[0][10][1]), "+f"(d[0][10][2]), "+f"(d[0][10][3]), "+f"(d[0][11][0]), "+f"(d[0][11][1]), "+f"(d[0][11][2]), "+f"(d[0][11][3]), "+f"(d[0][12][0]), "+f"(d[0][12][1]), "+f"(d[0][12][2]), "+f"(d[0][12][3]), "+f"(d[0][13][0]), "+f"(d[0][13][1]), "+f"(d[0][13][2]), "+f"(d[0][13][3]), "+f"(d[0][14][0]), "+f"(d[0][14][1]), "+f"(d[0][14][2]), "+f"(d[0][14][3]), "+f"(d[0][15][0]), "+f"(d[0][15][1]), "+f"(d[0][15][2]), "+f"(d[0][15][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((u32)keep));
}

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

// A tile in panels of 128 bytes, as the copy engine writes and wgmma reads them: the 16-byte chunks of a row are exchanged
// with the row's number, and the pattern repeats every eight rows (1024 bytes).
template <int kRows_, int kCols, int kElementBytes = 2>
struct PanelTile {
  static constexpr int kRows = kRows_, kPanelCols = 128 / kElementBytes, kPanels = (kCols + kPanelCols - 1) / kPanelCols;
  static constexpr int kPanelBytes = kRows * 128, kBytes = kPanels * kPanelBytes, kStepCols = 32 / kElementBytes;
  static constexpr u32 kSignBits = kElementBytes == 2 ? 0x80008000u : 0x80808080u;
  // Byte offset of the panel that column `column` begins, or of the row of that number of a tile that is transposed.
  DEV constexpr u32 columns_at(int column) { return kElementBytes == 1 ? column * 128 : column / kPanelCols * kPanelBytes; }
  // Byte offset of a chunk from the start of the tile.
  DEV u32 address(u32 row, u32 chunk) { return chunk / 8 * kPanelBytes + row * 128 + (chunk % 8 ^ row % 8) * 16; }
};

// Start filling a tile with what lies at first_column, first_row of a head; `full` completes when it has landed.
template <class Tile>
DEV void load_panels(u32 dst, const TensorMap& map, u32 full, int first_column, int first_row, int head, int batch, u64 keep) {
  mbarrier_arrive_expect(full, Tile::kBytes);
#pragma unroll
  for (int i = 0; i < Tile::kPanels; ++i) tma_load(dst + i * Tile::kPanelBytes, map, full, first_column + i * Tile::kPanelCols, first_row, head, batch, keep);
}

// Round an accumulator and write it to this warpgroup's 64 rows of a tile, each warp its sixteen.
template <class Element, class Tile, int kColTiles>
DEV void stage_tile(u32 dst, const float (&acc)[1][kColTiles][4]) {
  const u32 row = threadIdx.x / 32 * 16 + threadIdx.x % 16, half = threadIdx.x / 16 % 2;
#pragma unroll
  for (int j = 0; j < kColTiles; j += 2) {
    const float(&x)[4] = acc[0][j];
    if (j + 1 < kColTiles) {
      const float(&y)[4] = acc[0][j + 1 < kColTiles ? j + 1 : j];
      stmatrix_x4(dst + Tile::address(row, j + half), Element::pack(x[0], x[1]), Element::pack(x[2], x[3]), Element::pack(y[0], y[1]), Element::pack(y[2], y[3]));
    } else {
      stmatrix_x2(dst + Tile::address(row, j), Element::pack(x[0], x[1]), Element::pack(x[2], x[3]));
    }
  }
}

// Start writing this warpgroup's 64 rows of a tile to device memory.
template <class Tile>
DEV void store_panels(const TensorMap& map, u32 src, int warpgroup, int first_row, int head, int batch) {
#pragma unroll
  for (int i = 0; i < Tile::kPanels; ++i) tma_store(map, src + i * Tile::kPanelBytes + warpgroup * 64 * 128, i * Tile::kPanelCols, first_row + warpgroup * 64, head, batch);
  tma_store_commit();
}

// Flip the sign of this warpgroup's 64 rows of a tile.
template <class Tile>
DEV void negate_own_rows(u32 tile, int warpgroup) {
#pragma unroll 1
  for (int index = threadIdx.x % 128; index < Tile::kPanels * 512; index += 128) {
    const u32 address = tile + index / 512 * Tile::kPanelBytes + warpgroup * 64 * 128 + index % 512 * 16;
    uint4 x = load_shared_16(address);
    x.x ^= Tile::kSignBits, x.y ^= Tile::kSignBits, x.z ^= Tile::kSignBits, x.w ^= Tile::kSignBits;
    store_shared_16(address, x);
  }
}

// Where a role stands in a ring of kStages stages: the next stage, and the parity of the phase it waits for there.
struct Cursor {
  u32 stage, phase;
};

// Go on to the next stage.
template <int kStages>
DEV void advance(Cursor& at) {
  at.stage += 1;
  if (at.stage == kStages) at.stage = 0, at.phase ^= 1;
}

// Make the barriers of a ring, by the arrivals that complete them: `full` of every stage, then `empty`.
template <int kStages>
DEV void init_ring(u32 ring, u32 fills, u32 releases) {
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    mbarrier_init(ring + 8 * i, fills);
    mbarrier_init(ring + 8 * (kStages + i), releases);
  }
}

template <int kStages>
DEV u32 full(u32 ring, Cursor at) { return ring + 8 * at.stage; }

template <int kStages>
DEV u32 empty(u32 ring, Cursor at) { return ring + 8 * (kStages + at.stage); }

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

// Keep the compiler from moving or copying registers that wgmma reads or writes behind its back.
template <int kRowTiles, int kColTiles>
DEV void pin(float (&x)[kRowTiles][kColTiles][4]) {
#pragma unroll
  for (int i = 0; i < kRowTiles * kColTiles * 4; ++i) asm volatile("" : "+f"(x[i / 4 / kColTiles][i / 4 % kColTiles][i % 4])::"memory");
}

template <int kRowTiles, int kColTiles>
DEV void pin(u32 (&x)[kRowTiles][kColTiles][4]) {
#pragma unroll
  for (int i = 0; i < kRowTiles * kColTiles * 4; ++i) asm volatile("" : "+r"(x[i / 4 / kColTiles][i / 4 % kColTiles][i % 4])::"memory");
}

// What wgmma takes for a matrix in panels whose rows are contracted over (K-major): eight rows 1024 bytes apart.
// PTX ISA: matrix descriptor of wgmma, 128-byte swizzle.
DEV u64 k_major(u32 address) { return 1ull << 62 | 64ull << 32 | 1ull << 16 | (u64)((address & 0x3ffff) >> 4); }

// The same where columns are not contracted over (MN-major): panels kPanelBytes apart, eight rows 1024 bytes.
template <u32 kPanelBytes>
DEV u64 mn_major(u32 address) { return 1ull << 62 | 64ull << 32 | (u64)(kPanelBytes >> 4) << 16 | (u64)((address & 0x3ffff) >> 4); }

// Start acc = A Bᵀ for this warpgroup's 64 rows of A, + acc unless that is to start at zero; kDepth columns contracted.
template <class ATile, class BTile, int kDepth, bool kStartsAtZero, int kColTiles>
DEV void issue_score_gemm(float (&acc)[1][kColTiles][4], u32 a, u32 b, int warpgroup) {
  pin(acc);
  wgmma_fence();
  const u64 a_matrix = k_major(a + warpgroup * 64 * 128), b_matrix = k_major(b);
#pragma unroll
  for (int k = 0; k < kDepth / ATile::kStepCols; ++k) {  // a step is 32 bytes, 4 times to a panel; addresses are in 16 bytes
    wgmma(acc, a_matrix + (k / 4 * ATile::kPanelBytes + k % 4 * 32) / 16, b_matrix + (k / 4 * BTile::kPanelBytes + k % 4 * 32) / 16, k > 0 || !kStartsAtZero);
  }
  wgmma_commit();
  pin(acc);
}

// Start acc = A B, A in registers, + acc unless that is to start at zero: rows of B contracted.
template <class BTile, bool kStartsAtZero, int kColTiles, int kSteps>
DEV void issue_output_gemm(float (&acc)[1][kColTiles][4], u32 (&a)[1][kSteps][4], u32 b) {
  pin(acc);
  pin(a);
  wgmma_fence();
  const u64 b_matrix = mn_major<BTile::kPanelBytes>(b);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) wgmma(acc, a[0][k], b_matrix + k * 16 * 128 / 16, k > 0 || !kStartsAtZero);
  wgmma_commit();
  pin(acc);
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
constexpr int kBlockN = 128;  // tile.block_n: keys of a block
constexpr int kHeadDimQk = 128;  // problem.head_dim.qk
constexpr int kHeadDimV = 128;  // problem.head_dim.v
constexpr int kQkCols = 128;  // padded to 16, the k of wgmma
constexpr int kVCols = 128;  // columns of O
constexpr int kStages = 2;  // schedule.stages: K and V blocks in shared memory
constexpr int kThreads = 384;  // 2 consumer warpgroups of 128, and the producer's 4 warps
constexpr int kRowTiles = 1;  // 16-row tiles that each warp owns
using QTile = PanelTile<kBlockM, kQkCols>;
using KTile = PanelTile<kBlockN, kQkCols>;
using VTile = PanelTile<kBlockN, kVCols>;
using OutTile = PanelTile<kBlockM, kVCols>;

struct Params {
  TensorMap q_map;
  TensorMap k_map;
  TensorMap v_map;
  TensorMap out_map;
  float* lse;
  u32* tile_counter;
  int batch;
  int seqlen_q;
  int seqlen_k;
  int num_heads_q;
  int group;
  int scale_is_negative;
  float softmax_scale_log2;
  float softmax_scale_inverse;
  float* arg_slopes;
  i64 stride_0_of_slopes;
};

// What this block works on. seqlen_q and seqlen_k are this sequence's own.
struct Tile {
  int m_block, head, batch, kv_head, seqlen_q, seqlen_k;
  int index;
  bool exists;
};

// Where a head starts in a dense f32 array (batch, num_heads_q, seqlen_q, cols).
DEV float* dense_head(float* base, const Params& params, const Tile& tile, int cols = 1) {
  return base + ((i64)stay_in_loop(tile.batch) * params.num_heads_q + stay_in_loop(tile.head)) * params.seqlen_q * cols;
}

// Blocks of rows of all heads; a block of threads works on its own number first, then on those it draws.
DEV int num_tiles(const Params& params) { return (params.seqlen_q + kBlockM - 1) / kBlockM * params.batch * params.num_heads_q; }

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
  tile.index = index;
  tile.exists = index < num_tiles(params);
  return tile;
}

// slopes: f32[num_heads_q]
DEV float read_arg_slopes(const Params& params, int i0) {
  return __ldg(params.arg_slopes + i0 * params.stride_0_of_slopes);
}

// Blocks of keys that a block of rows visits, n_min .. n_max - 1; from n_full_begin to n_full_end - 1 no key is masked.
struct KeyBlocks {
  int n_min, n_full_begin, n_full_end, n_max;
};

// Which blocks of keys block m of rows visits, and which of them no row masks. The last is peeled off and masked anyway.
DEV KeyBlocks key_blocks(const Params& params, const Tile& tile, int m) {
  KeyBlocks seen;
  const int q_first = m * kBlockM, q_last = min(q_first + kBlockM, tile.seqlen_q) - 1;
  const int end_any = max(min(q_last + tile.seqlen_k - tile.seqlen_q + 1, tile.seqlen_k), 0);
  seen.n_max = (end_any + kBlockN - 1) / kBlockN;
  seen.n_min = min(0, seen.n_max);
  const int n_last = max(seen.n_max - 1, seen.n_min);
  seen.n_full_begin = seen.n_min;
  const int end_all = max(min(q_first + tile.seqlen_k - tile.seqlen_q + 1, tile.seqlen_k), 0);
  seen.n_full_end = max(min(end_all / kBlockN, n_last), seen.n_full_begin);
  return seen;
}

// What the scores of a tile share: looked up before its loop, and kept.
struct ScoreTerms {
  float term0_slopes;
};

DEV ScoreTerms score_terms(const Params& params, const Tile& tile) {
  return { read_arg_slopes(params, tile.head) };
}

// What is added to the product of the query in row q_idx and key kv_first + kv_step, of which the compiler knows kv_step.
DEV float score_seed(const Params& params, const Tile& tile, const ScoreTerms& terms, int q_idx, int kv_first, int kv_step) {
  return __fmaf_rn(terms.term0_slopes * params.softmax_scale_inverse, (float)(kv_step), terms.term0_slopes * params.softmax_scale_inverse * (float)(kv_first + tile.seqlen_q - q_idx - tile.seqlen_k));
}

// The keys that row q_idx sees are first_key .. end_key - 1.
DEV int end_key(const Params& params, const Tile& tile, int q_idx) {
  int end = tile.seqlen_k;
  end = clamp_key(q_idx + tile.seqlen_k - tile.seqlen_q + 1, end);
  return end;
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
attn_fwd_sm90a_bf16_d128_causal_warp_specialized_26ec6be6(const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) unsigned char smem[];
  const u32 q_smem = smem_address(smem) + 0;
  const u32 k_smem = smem_address(smem) + 32768;
  const u32 v_smem = smem_address(smem) + 98304;
  const u32 out_smem = smem_address(smem) + 163840;
  const u32 q_ring = smem_address(smem) + 196608;  // 1 times full, then empty
  const u32 k_ring = smem_address(smem) + 196624;  // 2 times full, then empty
  const u32 v_ring = smem_address(smem) + 196656;  // 2 times full, then empty
  const u32 tile_ring = smem_address(smem) + 196688;  // 1 times full, then empty
  const u32 tile_slot = smem_address(smem) + 196704;
  const int warpgroup = same_in_warp(threadIdx.x / 128);
  if (threadIdx.x == 0) {
    init_ring<1>(q_ring, 1, 2);
    init_ring<2>(k_ring, 1, 2);
    init_ring<2>(v_ring, 1, 2);
    init_ring<1>(tile_ring, 1, 2);
    fence_mbarrier_init();
    prefetch_tensor_map(params.q_map);
    prefetch_tensor_map(params.k_map);
    prefetch_tensor_map(params.v_map);
    prefetch_tensor_map(params.out_map);
  }
  __syncthreads();
  wait_for_earlier_kernels();
  let_next_kernel_start();
  if (warpgroup == 2) {  // producer
    keep_registers<24>();
    if (threadIdx.x % 128 < 32 && elect_one()) {
      Cursor q_at = {0, 1};
      Cursor k_at = {0, 1};
      Cursor v_at = {0, 1};
      Cursor tile_at = {0, 1};

      for (Tile tile = decode_tile(params, blockIdx.x); tile.exists;) {
        const KeyBlocks seen = key_blocks(params, tile, tile.m_block);
        if (seen.n_max > seen.n_min) {
          mbarrier_wait(empty<2>(k_ring, k_at), k_at.phase);
          load_panels<KTile>(k_smem + k_at.stage * KTile::kBytes, params.k_map, full<2>(k_ring, k_at), 0, (seen.n_max - 1) * kBlockN, tile.kv_head, tile.batch, kEvictLast);
          advance<2>(k_at);
        }
        mbarrier_wait(empty<1>(q_ring, q_at), q_at.phase);
        load_panels<QTile>(q_smem, params.q_map, full<1>(q_ring, q_at), 0, tile.m_block * kBlockM, tile.head, tile.batch, kEvictFirst);
        advance<1>(q_at);
        if (seen.n_max > seen.n_min) {
          #pragma unroll 1
          for (int n = seen.n_max - 2; n >= seen.n_min; --n) {  // any tiles
            mbarrier_wait(empty<2>(k_ring, k_at), k_at.phase);
            load_panels<KTile>(k_smem + k_at.stage * KTile::kBytes, params.k_map, full<2>(k_ring, k_at), 0, n * kBlockN, tile.kv_head, tile.batch, kEvictLast);
            advance<2>(k_at);
            mbarrier_wait(empty<2>(v_ring, v_at), v_at.phase);
            load_panels<VTile>(v_smem + v_at.stage * VTile::kBytes, params.v_map, full<2>(v_ring, v_at), 0, (n + 1) * kBlockN, tile.kv_head, tile.batch, kEvictLast);
            advance<2>(v_at);
          }
          mbarrier_wait(empty<2>(v_ring, v_at), v_at.phase);
          load_panels<VTile>(v_smem + v_at.stage * VTile::kBytes, params.v_map, full<2>(v_ring, v_at), 0, seen.n_min * kBlockN, tile.kv_head, tile.batch, kEvictLast);
          advance<2>(v_at);
        }
        mbarrier_wait(empty<1>(tile_ring, tile_at), tile_at.phase);
        tile = decode_tile(params, gridDim.x + atomicInc(params.tile_counter, num_tiles(params) - 1));  // back to 0 after the last
        store_shared(tile_slot, tile.index);
        mbarrier_arrive(full<1>(tile_ring, tile_at));
        advance<1>(tile_at);
      }
    }
  } else {  // consumer
    take_registers<240>();
    const bool is_first_thread = threadIdx.x % 128 == 0;
    Cursor q_at = {0, 0};
    Cursor k_at = {0, 0};
    Cursor v_at = {0, 0};
    Cursor tile_at = {0, 0};
    float acc_s[kRowTiles][16][4];
    u32 p[kRowTiles][8][4];
    float acc_o[kRowTiles][16][4];
    float row_max[2 * kRowTiles];
    float alpha[2 * kRowTiles];
    float reference[2 * kRowTiles];
    float exponent_scale[1][2 * kRowTiles];
    float row_sum[2 * kRowTiles];
    float total[2 * kRowTiles];
    float inv_sum[2 * kRowTiles];
    float row_lse[2 * kRowTiles];

    for (Tile tile = decode_tile(params, blockIdx.x); tile.exists;) {
      const KeyBlocks seen = key_blocks(params, tile, tile.m_block);
      const ScoreTerms terms = in_registers(score_terms(params, tile));
      fill(acc_o, 0.f);
      fill(row_max, lowest());
      fill(reference, lowest());
      fill(row_sum, 0.f);
      mbarrier_wait_warp(full<1>(q_ring, q_at), q_at.phase);
      if (params.scale_is_negative) {
        negate_own_rows<QTile>(q_smem, warpgroup);
        fence_async();
        named_barrier_sync(3 + warpgroup, 128);
      }
      if (seen.n_max > seen.n_min) {
        // the last block of keys: scores only, O follows one block behind
        {
          const int kv_first = (seen.n_max - 1) * kBlockN + lane_column();
          int rows[2 * kRowTiles];
        #pragma unroll
          for (int r = 0; r < 2 * kRowTiles; ++r) rows[r] = stay_in_loop(tile.m_block * kBlockM + row_in_tile<kRowTiles>(r));
          #pragma unroll
          for (int i = 0; i < kBlockN / 4; ++i) {
          #pragma unroll
            for (int r = 0; r < 2 * kRowTiles; ++r) {
              float& s = acc_s[r / 2][i / 2][r % 2 * 2 + i % 2];
              s = score_seed(params, tile, terms, rows[r], kv_first, i / 2 * 8 + i % 2);
            }
          }
        }
        mbarrier_wait(full<2>(k_ring, k_at), k_at.phase);
        issue_score_gemm<QTile, KTile, kQkCols, false>(acc_s, q_smem, k_smem + k_at.stage * KTile::kBytes, warpgroup);
        wgmma_wait<0>();
        pin(acc_s);
        if (is_first_thread) mbarrier_arrive(empty<2>(k_ring, k_at));
        advance<2>(k_at);
        {
          int end[2 * kRowTiles];  // of the keys each row sees, counted from this lane's first column
        #pragma unroll
          for (int i = 0; i < 2 * kRowTiles; ++i) {
            const int q_idx = tile.m_block * kBlockM + row_in_tile<kRowTiles>(i), column = (seen.n_max - 1) * kBlockN + lane_column();
            end[i] = end_key(params, tile, q_idx) - column;
          }
          mask_scores(acc_s, end);
        }
        update_row_max(row_max, reference, alpha, exponent_scale, acc_s, params.softmax_scale_log2, 1073741824.0f);
        exponentiate(acc_s, row_sum, reference, alpha, exponent_scale);
        convert_p<Input>(p, acc_s);
        #pragma unroll 1
        for (int n = seen.n_max - 2; n >= seen.n_full_end; --n) {  // partial tiles
          {
            const int kv_first = n * kBlockN + lane_column();
            int rows[2 * kRowTiles];
          #pragma unroll
            for (int r = 0; r < 2 * kRowTiles; ++r) rows[r] = stay_in_loop(tile.m_block * kBlockM + row_in_tile<kRowTiles>(r));
            #pragma unroll
            for (int i = 0; i < kBlockN / 4; ++i) {
            #pragma unroll
              for (int r = 0; r < 2 * kRowTiles; ++r) {
                float& s = acc_s[r / 2][i / 2][r % 2 * 2 + i % 2];
                s = score_seed(params, tile, terms, rows[r], kv_first, i / 2 * 8 + i % 2);
              }
            }
          }
          mbarrier_wait(full<2>(k_ring, k_at), k_at.phase);
          // S = Q K[n]ᵀ, and behind it O += P V[n + 1]
          issue_score_gemm<QTile, KTile, kQkCols, false>(acc_s, q_smem, k_smem + k_at.stage * KTile::kBytes, warpgroup);
          mbarrier_wait(full<2>(v_ring, v_at), v_at.phase);
          issue_output_gemm<VTile, false>(acc_o, p, v_smem + v_at.stage * VTile::kBytes);
          wgmma_wait<1>();
          pin(acc_s);
          if (is_first_thread) mbarrier_arrive(empty<2>(k_ring, k_at));
          advance<2>(k_at);
          // online softmax of block n
          {
            int end[2 * kRowTiles];  // of the keys each row sees, counted from this lane's first column
          #pragma unroll
            for (int i = 0; i < 2 * kRowTiles; ++i) {
              const int q_idx = tile.m_block * kBlockM + row_in_tile<kRowTiles>(i), column = n * kBlockN + lane_column();
              end[i] = end_key(params, tile, q_idx) - column;
            }
            mask_scores(acc_s, end);
          }
          update_row_max(row_max, reference, alpha, exponent_scale, acc_s, params.softmax_scale_log2, 1073741824.0f);
          wgmma_wait<0>();
          pin(acc_o);
          pin(p);
          if (is_first_thread) mbarrier_arrive(empty<2>(v_ring, v_at));
          advance<2>(v_at);
          scale_rows(acc_o, alpha);
          exponentiate(acc_s, row_sum, reference, alpha, exponent_scale);
          convert_p<Input>(p, acc_s);
        }
        #pragma unroll 1
        for (int n = seen.n_full_end - 1; n >= seen.n_full_begin; --n) {  // full tiles
          {
            const int kv_first = n * kBlockN + lane_column();
            int rows[2 * kRowTiles];
          #pragma unroll
            for (int r = 0; r < 2 * kRowTiles; ++r) rows[r] = stay_in_loop(tile.m_block * kBlockM + row_in_tile<kRowTiles>(r));
            #pragma unroll
            for (int i = 0; i < kBlockN / 4; ++i) {
            #pragma unroll
              for (int r = 0; r < 2 * kRowTiles; ++r) {
                float& s = acc_s[r / 2][i / 2][r % 2 * 2 + i % 2];
                s = score_seed(params, tile, terms, rows[r], kv_first, i / 2 * 8 + i % 2);
              }
            }
          }
          mbarrier_wait(full<2>(k_ring, k_at), k_at.phase);
          // S = Q K[n]ᵀ, and behind it O += P V[n + 1]
          issue_score_gemm<QTile, KTile, kQkCols, false>(acc_s, q_smem, k_smem + k_at.stage * KTile::kBytes, warpgroup);
          mbarrier_wait(full<2>(v_ring, v_at), v_at.phase);
          issue_output_gemm<VTile, false>(acc_o, p, v_smem + v_at.stage * VTile::kBytes);
          wgmma_wait<1>();
          pin(acc_s);
          if (is_first_thread) mbarrier_arrive(empty<2>(k_ring, k_at));
          advance<2>(k_at);
          // online softmax of block n
          update_row_max(row_max, reference, alpha, exponent_scale, acc_s, params.softmax_scale_log2, 1073741824.0f);
          wgmma_wait<0>();
          pin(acc_o);
          pin(p);
          if (is_first_thread) mbarrier_arrive(empty<2>(v_ring, v_at));
          advance<2>(v_at);
          scale_rows(acc_o, alpha);
          exponentiate(acc_s, row_sum, reference, alpha, exponent_scale);
          convert_p<Input>(p, acc_s);
        }
      }
      named_barrier_sync(3 + warpgroup, 128);
      if (is_first_thread) mbarrier_arrive(empty<1>(q_ring, q_at));
      advance<1>(q_at);
      if (seen.n_max > seen.n_min) {
        // O of the first block of keys
        mbarrier_wait(full<2>(v_ring, v_at), v_at.phase);
        issue_output_gemm<VTile, false>(acc_o, p, v_smem + v_at.stage * VTile::kBytes);
        wgmma_wait<0>();
        pin(acc_o);
        pin(p);
        if (is_first_thread) mbarrier_arrive(empty<2>(v_ring, v_at));
        advance<2>(v_at);
      }
      // normalise once, at the end
      reduce_rows(total, row_sum);
      finish_rows_of_scores(inv_sum, row_lse, row_max, total, params.softmax_scale_log2, 1073741824.0f);
      scale_rows(acc_o, inv_sum);
      if (params.lse != 0) store_rows<kRowTiles>(dense_head(params.lse, params, tile), row_lse, tile.m_block * kBlockM, tile.seqlen_q);
      if (is_first_thread) tma_store_wait_read();
      named_barrier_sync(3 + warpgroup, 128);
      stage_tile<Output, OutTile>(out_smem, acc_o);
      fence_async();
      named_barrier_sync(3 + warpgroup, 128);
      if (is_first_thread) store_panels<OutTile>(params.out_map, out_smem, warpgroup, tile.m_block * kBlockM, tile.head, tile.batch);
      mbarrier_wait_warp(full<1>(tile_ring, tile_at), tile_at.phase);
      tile = decode_tile(params, same_in_warp(load_shared(tile_slot)));
      named_barrier_sync(3 + warpgroup, 128);
      if (is_first_thread) mbarrier_arrive(empty<1>(tile_ring, tile_at));
      advance<1>(tile_at);
    }
    if (is_first_thread) tma_store_wait_read();
  }
}
