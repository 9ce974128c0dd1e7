// PTX ISA: ld.global.nc.u32; volatile, so that it stays where it is written: ahead of what it shall hide under.
DEV u32 load_u32(const u16* address) {
  u32 x;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(x) : "l"(address));
  return x;
}

// PTX ISA: ld.global.nc.u16; likewise.
DEV u32 load_u16(const u16* address) {
  u16 x;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(x) : "l"(address));
  return x;
}
