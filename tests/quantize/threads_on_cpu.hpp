// Enough of CUDA for g++ to run kernels that are sheets: the threads of a block take turns, each from one meeting of its
// warp or block to the next.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>
#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __constant__ static const
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static
using std::max;
using std::min;

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct Index { int x; };
static Index blockIdx, gridDim, threadIdx;

static ucontext_t scheduler;
static std::vector<ucontext_t> fibers;
static std::vector<char> ended;
static uint32_t posted[2][1024];
static int turn[1024];

// Those who meet at one place, a warp or the block: how many have come, and how often all have.
struct Meeting { int arrived, rounds; };
static Meeting of_warps[32], of_block;

static void meet(Meeting& at, int parties) {
  const int self = threadIdx.x, round = at.rounds;
  if (++at.arrived == parties) at.arrived = 0, ++at.rounds;
  while (at.rounds == round) swapcontext(&fibers[self], &scheduler);
}
static void __syncthreads() { meet(of_block, (int)fibers.size()); }
static void __syncwarp() {
  const int warp = threadIdx.x / 32;
  meet(of_warps[warp], min(32, (int)fibers.size() - warp * 32));
}

static uint32_t bits(float x) { uint32_t y; memcpy(&y, &x, 4); return y; }
static float __uint_as_float(uint32_t x) { float y; memcpy(&y, &x, 4); return y; }
static float __int_as_float(int x) { return __uint_as_float(x); }
static uint32_t __float_as_uint(float x) { return bits(x); }

// Post a value and wait for the warp; posts alternate, so that the next one does not overtake a reader.
static const uint32_t* post(uint32_t x) {
  const int self = threadIdx.x;
  uint32_t* of_warp = posted[turn[self]++ % 2];
  of_warp[self] = x;
  __syncwarp();
  return of_warp + self / 32 * 32;
}
static float __shfl_xor_sync(unsigned, float x, int mask) {
  const uint32_t* warp = post(bits(x));
  return __uint_as_float(warp[threadIdx.x % 32 ^ mask]);
}
static unsigned long long __shfl_xor_sync(unsigned, unsigned long long x, int mask) {
  const int from = threadIdx.x % 32 ^ mask;
  const uint64_t low = post((uint32_t)x)[from], high = post((uint32_t)(x >> 32))[from];
  return high << 32 | low;
}
template <class T>
static T __shfl_sync(unsigned, T x, int lane) { return (T)post((uint32_t)x)[lane % 32]; }
static long long __shfl_sync(unsigned, long long x, int lane) {
  const uint64_t low = post((uint32_t)x)[lane % 32], high = post((uint32_t)(x >> 32))[lane % 32];
  return (long long)(high << 32 | low);
}
template <class T>
static T __shfl_up_sync(unsigned, T x, int distance) {
  const int lane = threadIdx.x % 32;
  return (T)post((uint32_t)x)[max(lane - distance, lane < distance ? lane : 0)];
}
static uint32_t __match_any_sync(unsigned, uint32_t x) {
  const uint32_t* warp = post(x);
  uint32_t alike = 0;
  for (int lane = 0; lane < 32; ++lane) alike |= (uint32_t)(warp[lane] == x) << lane;
  return alike;
}
static uint32_t __ballot_sync(unsigned, bool x) {
  const uint32_t* warp = post(x);
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= warp[lane] << lane;
  return votes;
}
static uint32_t __reduce_max_sync(unsigned, uint32_t x) {
  const uint32_t* warp = post(x);
  return *std::max_element(warp, warp + 32);
}
static uint32_t __umulhi(uint32_t a, uint32_t b) { return (uint64_t)a * b >> 32; }
static int __clz(int x) { return x ? __builtin_clz(x) : 32; }
static int __ffs(uint32_t x) { return __builtin_ffs(x); }
static int __popc(uint32_t x) { return __builtin_popcount(x); }
static uint32_t min(uint32_t a, int b) { return std::min(a, (uint32_t)b); }
static void atomicAdd(uint32_t* p, uint32_t x) { *p += x; }
static uint32_t atomicInc(uint32_t* p, uint32_t last) {
  const uint32_t before = *p;
  *p = before >= last ? 0 : before + 1;
  return before;
}
static void atomicMax(uint32_t* p, uint32_t x) { *p = std::max(*p, x); }
static uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = (uint64_t)b << 32 | a;
  uint32_t found = 0;
  for (int i = 0; i < 4; ++i) found |= (both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return found;
}
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fdiv_rn(float a, float b) { return a / b; }
static float __frcp_rn(float x) { return 1.f / x; }
static float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
template <class T>
static T __ldg(const T* p) { return *p; }
template <class T>
static T __ldcg(const T* p) { return *p; }
static void __threadfence() {}
static int __syncthreads_or(int x) {
  static int any;
  __syncthreads();
  any = 0;
  __syncthreads();
  any |= x;
  __syncthreads();
  return any;
}
static int __syncthreads_count(int x) {
  static int count;
  __syncthreads();
  count = 0;
  __syncthreads();
  count += x != 0;
  __syncthreads();
  return count;
}

static float half_to_float(unsigned short x) {
  _Float16 y;
  memcpy(&y, &x, 2);
  return (float)y;
}

static uint32_t to_f16(float x) {
  const _Float16 rounded = (_Float16)x;
  uint16_t y;
  memcpy(&y, &rounded, 2);
  return y;
}
static uint32_t to_bf16(float x) { return x != x ? 0x7fff : bits(x) + 0x7fff + (bits(x) >> 16 & 1) >> 16; }

// The magnitudes of e4m3, by their codes.
static std::vector<double> e4m3_magnitudes() {
  std::vector<double> found;
  for (int c = 0; c < 0x7f; ++c) found.push_back(c < 8 ? ldexp(c, -9) : ldexp(8 + c % 8, c / 8 - 10));
  return found;
}

// cvt.rn.satfinite.e4m3x2.f32 of one number: the nearest of all 127 magnitudes, the even one of two.
static unsigned to_e4m3(float x) {
  static const std::vector<double> magnitudes = e4m3_magnitudes();
  if (x != x) return 0x7f;
  unsigned best = 0;
  for (unsigned code = 0; code < 0x7f; ++code) {
    const double off = fabs(magnitudes[code] - fabs((double)x)), least = fabs(magnitudes[best] - fabs((double)x));
    if (off < least || (off == least && code % 2 == 0)) best = code;
  }
  return best | (std::signbit(x) ? 0x80 : 0);
}

// Shared memory has 32-bit addresses: here, from some object with static storage.
static char origin;
static uint32_t shared_address(const void* p) { return (uint32_t)((const char*)p - &origin); }
template <class T>
static T& at_shared(uint32_t address) { return *(T*)(&origin + (int32_t)address); }

static std::function<void()> body;
static void run_fiber() {
  body();
  ended[threadIdx.x] = 1;
  swapcontext(&fibers[threadIdx.x], &scheduler);
}

static void for_each_thread(int blocks, int threads, std::function<void()> kernel) {
  static const std::unique_ptr<char[]> stacks(new char[1024 * 65536]);  // what no thread reaches takes no memory
  body = kernel, gridDim.x = blocks;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    fibers.assign(threads, {}), ended.assign(threads, 0);
    std::fill(turn, turn + 1024, 0);
    std::fill(of_warps, of_warps + 32, Meeting{}), of_block = {};
    for (int t = 0; t < threads; ++t) {
      getcontext(&fibers[t]);
      fibers[t].uc_stack.ss_sp = &stacks[t * 65536], fibers[t].uc_stack.ss_size = 65536;
      makecontext(&fibers[t], run_fiber, 0);
    }
    for (bool any = true; any;) {
      any = false;
      for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) {
        if (!ended[threadIdx.x]) swapcontext(&scheduler, &fibers[threadIdx.x]), any = true;
      }
    }
  }
}
