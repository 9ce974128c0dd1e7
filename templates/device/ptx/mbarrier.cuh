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
