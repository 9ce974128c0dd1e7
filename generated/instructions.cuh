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

// Start copying 16 bytes from device to shared memory; of them `bytes` (0 or 16) are read, the rest become zeros.
// PTX ISA: cp.async. `.cg` caches in L2 only.
DEV void cp_async_16(u32 dst, const void* src, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
}

// The policy by which L2 gives up first what is read once. PTX ISA: createpolicy.
DEV u64 read_once() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// cp_async_16 by a policy of L2. PTX ISA: cp.async, .L2::cache_hint.
DEV void cp_async_16_by(u32 dst, const void* src, int bytes, u64 policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(dst), "l"(src), "r"(bytes), "l"(policy) : "memory");
}

// Close the group of this thread's copies started since the last commit. PTX ISA: cp.async.commit_group.
DEV void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most kPending of this thread's newest groups are in flight. PTX ISA: cp.async.wait_group.
template <int kPending>
DEV void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Start copying 4 bytes, likewise: `bytes` is 0 or 4. PTX ISA: cp.async.
DEV void cp_async_4(u32 dst, const void* src, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8. PTX ISA: ldmatrix.
DEV void ldmatrix_x4(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// Four 8x8 matrices, each transposed on the way. PTX ISA: ldmatrix, .trans.
DEV void ldmatrix_x4_trans(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8. PTX ISA: stmatrix.
DEV void stmatrix_x4(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// Two of them; the addresses of the lower sixteen lanes count.
DEV void stmatrix_x2(u32 address, u32 a, u32 b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}

// Four of them, each transposed on the way. PTX ISA: stmatrix, .trans.
DEV void stmatrix_x4_trans(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
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

// PTX ISA: ld.shared, .v2.
DEV float2 load_shared_floats(u32 address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}

// PTX ISA: ld.shared, .v2.
DEV uint2 load_shared_8(u32 address) {
  uint2 x;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(address) : "memory");
  return x;
}

// PTX ISA: st.shared, .v2.
DEV void store_shared_8(u32 address, float x, float y) { asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory"); }

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

// PTX ISA: ld.global.nc.u32; volatile, so that it stays where it is written: ahead of what it shall hide under. The whole
// line comes into L2: its neighbours are asked for next.
DEV u32 load_u32(const u16* address) {
  u32 x;
  asm volatile("ld.global.nc.L2::128B.u32 %0, [%1];" : "=r"(x) : "l"(address));
  return x;
}

// PTX ISA: ld.global.nc.u16; likewise.
DEV u32 load_u16(const u16* address) {
  u16 x;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(x) : "l"(address));
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

// A number in device memory, with all that was known to who wrote it. PTX ISA: ld.acquire.
DEV u32 load_acquire(const u32* address) {
  u32 x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(address) : "memory");
  return x;
}

// Add to a number in device memory; who then reads it as above knows all that this thread knows. PTX ISA: red.release.
DEV void add_release(u32* address, u32 x) { asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(x) : "memory"); }

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

// 1 / x, at most 1 ulp off. PTX ISA: rcp.approx.ftz.
DEV float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The square root, at most 1 ulp off. PTX ISA: sqrt.approx.ftz.
DEV float sqrt_approx(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger of two; NaN where one is. PTX ISA: max.NaN.f32.
DEV float max_or_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// PTX ISA: mbarrier.init.
DEV void mbarrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Let the copy engine see the barriers that this thread made. PTX ISA: fence.mbarrier_init.
DEV void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// PTX ISA: mbarrier.arrive.
DEV void mbarrier_arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }

// Arrive for the warp, after what all its lanes have read. The last quad's lanes do: of a warp that ptxas knows to be
// together __syncwarp leaves no instruction, and racecheck holds what several lanes read against the last of them.
DEV void mbarrier_arrive_warp(u32 barrier) {
  __syncwarp();
  if (threadIdx.x % 32 >= 28) mbarrier_arrive(barrier);
}

// Arrive, and announce the bytes that must land before the phase completes. PTX ISA: mbarrier.arrive.expect_tx.
DEV void mbarrier_arrive_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Announce bytes that must land before the phase completes, without arriving. PTX ISA: mbarrier.expect_tx.
DEV void mbarrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
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

// mbarrier_wait, slower, for a whole warp, whose threads the compiler then knows to go on together.
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

// Meet at a named barrier; whether anybody has brought true. PTX ISA: bar.red.
DEV bool named_barrier_or(u32 id, u32 threads, bool brings) {
  u32 any;
  asm volatile(
      "{\n"
      ".reg .pred p, q;\n"
      "setp.ne.u32 p, %3, 0;\n"
      "bar.red.or.pred q, %1, %2, p;\n"
      "selp.u32 %0, 1, 0, q;\n"
      "}" : "=r"(any) : "r"(id), "r"(threads), "r"((u32)brings) : "memory");
  return any != 0;
}

// Count at a named barrier without waiting. PTX ISA: bar.arrive.
DEV void named_barrier_arrive(u32 id, u32 threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// Order this thread's ordinary accesses to device memory and asynchronous ones. PTX ISA: fence.proxy.async.
DEV void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

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

// A hint for the L2 cache, as createpolicy.fractional would make it: to be dropped first.
constexpr u64 kEvictFirst = 0x12f0000000000000ull;

// A hint for the L2 cache: to be dropped last.
constexpr u64 kEvictLast = 0x14f0000000000000ull;

// A hint for the L2 cache: to be dropped as all else is.
constexpr u64 kEvictNormal = 0x1000000000000000ull;

// Fetch a descriptor before its first use. PTX ISA: prefetch.tensormap.
DEV void prefetch_tensor_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

// Start copying a box to shared memory; its bytes count towards the barrier. PTX ISA: cp.async.bulk.tensor.
DEV void tma_load(u32 dst, const TensorMap& map, u32 barrier, int column, int row, int head, int batch, u64 keep) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(dst),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch), "l"(keep) : "memory");
}

// Start copying bytes to shared memory, 16 at a time; they count towards the barrier. PTX ISA: cp.async.bulk.
DEV void bulk_load(u32 dst, const void* src, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst), "l"(src), "r"(bytes), "r"(barrier) : "memory");
}

// Start copying a box to device memory; what lies past the tensor is dropped. PTX ISA: cp.async.bulk.tensor.
DEV void tma_store(const TensorMap& map, u32 src, int column, int row, int head, int batch) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map), "r"(src), "r"(column), "r"(row),
               "r"(head), "r"(batch) : "memory");
}

// Start adding f32 to device memory, 16 bytes at a time. PTX ISA: cp.reduce.async.bulk.
DEV void bulk_add(float* dst, u32 src, u32 bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(dst), "r"(src), "r"(bytes) : "memory");
}

// Close the group of this thread's stores. PTX ISA: cp.async.bulk.commit_group.
DEV void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Wait until what this thread's stores write can be seen. PTX ISA: cp.async.bulk.wait_group.
DEV void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

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
