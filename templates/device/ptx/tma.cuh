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
