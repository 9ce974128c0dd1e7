// Order registers and shared memory before the next wgmma. PTX ISA: wgmma.fence.
DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Close the group of wgmmas started since the last commit. PTX ISA: wgmma.commit_group.
DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most kPending of the newest groups are in flight. PTX ISA: wgmma.wait_group.
template <int kPending>
DEV void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
