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
