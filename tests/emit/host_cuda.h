// CUDA as far as the kernels that list tiles use it, on the host: a block of threads is as many coroutines, and what a warp or a block
// does together waits until all its threads have come.
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __noinline__
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define __align__(x) alignas(x)

struct int4 {
  int x, y, z, w;
};
struct Place {
  int x;
};

constexpr int kHostThreads = 1024;
static Place threadIdx, blockIdx;
static ucontext_t host, threads[kHostThreads];
static bool has_ended[kHostThreads];

// Those who wait for one another, and what each brings.
struct Meeting {
  int arrived = 0, round = 0;
  unsigned brought[kHostThreads];
};
static Meeting warps[kHostThreads / 32], block;

static void others() {
  const int me = threadIdx.x;
  swapcontext(&threads[me], &host);
  threadIdx.x = me;
}

static void meet(Meeting& at, int parties) {
  const int round = at.round;
  if (++at.arrived == parties) {
    at.arrived = 0, ++at.round;
  } else {
    while (at.round == round) others();
  }
}

template <class Result>
static Result together(unsigned brought, Result result) {
  Meeting& warp = warps[threadIdx.x / 32];
  warp.brought[threadIdx.x % 32] = brought;
  meet(warp, 32);
  result.take(warp.brought, threadIdx.x % 32);
  meet(warp, 32);
  return result;
}

struct OfLane {
  int lane;
  unsigned value = 0;
  void take(const unsigned* brought, int) { value = brought[lane & 31]; }
};
struct Largest {
  unsigned value = 0;
  void take(const unsigned* brought, int) { value = *std::max_element(brought, brought + 32); }
};
struct Votes {
  unsigned value = 0;
  void take(const unsigned* brought, int) {
    for (int lane = 0; lane < 32; ++lane) value |= (unsigned)(brought[lane] != 0) << lane;
  }
};
struct Alike {
  unsigned value = 0;
  void take(const unsigned* brought, int me) {
    for (int lane = 0; lane < 32; ++lane) value |= (unsigned)(brought[lane] == brought[me]) << lane;
  }
};

template <class T>
static T __shfl_sync(unsigned, T x, int lane) {
  return (T)together((unsigned)x, OfLane{lane}).value;
}
template <class T>
static T __shfl_up_sync(unsigned, T x, int distance) {
  const int lane = threadIdx.x % 32;
  return (T)together((unsigned)x, OfLane{lane >= distance ? lane - distance : lane}).value;
}
static unsigned __match_any_sync(unsigned, unsigned x) { return together(x, Alike{}).value; }
static unsigned __reduce_max_sync(unsigned, unsigned x) { return together(x, Largest{}).value; }
static unsigned __ballot_sync(unsigned, bool x) { return together(x, Votes{}).value; }
static void __syncwarp() { meet(warps[threadIdx.x / 32], 32); }
static void __syncthreads() { meet(block, kHostThreads); }

template <class T>
static T __ldg(const T* p) {
  return *p;
}
static int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static int __popc(unsigned x) { return __builtin_popcount(x); }
using std::max;
using std::min;
static unsigned min(unsigned a, int b) { return std::min(a, (unsigned)b); }

static void wait_for_earlier_kernels() {}
static void let_next_kernel_start() {}

static void (*work)();

static void run_thread() {
  const int me = threadIdx.x;
  work();
  has_ended[me] = true;
  setcontext(&host);
}

// Run a kernel's body in every thread of one block.
static void run_block(void (*body)()) {
  work = body;
  std::vector<std::vector<char>> stacks(kHostThreads, std::vector<char>(1 << 16));
  for (int i = 0; i < kHostThreads; ++i) {
    getcontext(&threads[i]);
    threads[i].uc_stack.ss_sp = stacks[i].data(), threads[i].uc_stack.ss_size = stacks[i].size();
    makecontext(&threads[i], run_thread, 0);
  }
  for (bool all = false; !all;) {
    all = true;
    for (int i = 0; i < kHostThreads; ++i) {
      if (has_ended[i]) continue;
      all = false, threadIdx.x = i;
      swapcontext(&host, &threads[i]);
    }
  }
}
