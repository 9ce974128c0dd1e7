// Where a role stands in a ring of kStages stages: the next stage, and the parity of the phase it waits for there.
struct Cursor {
  u32 stage, phase;
};

// Go on to the next stage.
template <int kStages>
DEV void advance(Cursor& at) {
  at.stage += 1;
  if (at.stage == kStages) at.stage = 0, at.phase ^= 1;
}

// Make the barriers of a ring, by the arrivals that complete them: `full` of every stage, then `empty`.
template <int kStages>
DEV void init_ring(u32 ring, u32 fills, u32 releases) {
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    mbarrier_init(ring + 8 * i, fills);
    mbarrier_init(ring + 8 * (kStages + i), releases);
  }
}

template <int kStages>
DEV u32 full(u32 ring, Cursor at) { return ring + 8 * at.stage; }

template <int kStages>
DEV u32 empty(u32 ring, Cursor at) { return ring + 8 * (kStages + at.stage); }

// Draw from a counter for the whole warp; atomicInc wraps it to 0 after `last`.
DEV u32 draw(u32* counter, u32 last) {
  const u32 drawn = threadIdx.x % 32 == 0 ? atomicInc(counter, last) : 0;
  return __shfl_sync(~0u, drawn, 0);
}

// Draw from a counter for the whole block of threads, the number that leaves it at 0 the last. All threads meet.
DEV u32 draw_for_block(u32* counter, u32 last, u32 slot) {
  if (threadIdx.x == 0) store_shared(slot, atomicInc(counter, last));
  __syncthreads();
  return same_in_warp(load_shared(slot));
}

// Wait until a count in device memory has come to one's rank, or past it where lengths lie and sequences share counts;
// what was added before can then be added to, by the copy engine too.
DEV void take_rank(const u32* count, u32 rank) {
  while ((int)(load_acquire(count) - rank) < 0) {
  }
  fence_async_global();
}

// Count what the copy engine has written for this thread, which has waited for it: an end that is seen is a proxy fence.
DEV void pass_rank(u32* count) { add_release(count, 1); }
