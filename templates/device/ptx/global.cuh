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
