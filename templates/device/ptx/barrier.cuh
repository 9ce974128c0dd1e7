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
