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
