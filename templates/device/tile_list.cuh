// Rows of a sequence, start .. end - 1, as they stand in a tensor.
struct Span {
  int start, end;
};

// What a sequence has of `rows` rows that says it is from `start` on and before `stop`: the first `used`, without the first `skipped`.
// Whatever the numbers are, there are such rows.
DEV Span span_within(int rows, int start, int stop, int used, int skipped) {
  const int first = min(max(start, 0), rows), room = min(max(stop, first), rows) - first;
  const int begin = first + min(max(skipped, 0), room);
  return {begin, max(begin, first + min(max(used, 0), room))};
}

// Which of the lengths that count as alike a number of blocks is: exact below 16, an eighth of an octave from there on.
DEV int length_bucket(int blocks) {
  const int octave = max(0, 28 - __clz(blocks));
  return octave * 8 + (blocks >> octave);
}

// The sum of the numbers of this lane and of those before it.
DEV u32 sum_up_to_lane(u32 x) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const u32 before = __shfl_up_sync(~0u, x, distance);
    if (threadIdx.x % 32 >= distance) x += before;
  }
  return x;
}

// The sum of the numbers of all lanes.
DEV u64 sum_of_lanes(u64 x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

// Each of kRows times 32 counts becomes the sum of those before it; 32 warps share the rows. `of_warps` has room for 32 sums. The sum
// of all.
template <int kRows>
DEV u32 add_up_counts(u32* counts, u32* of_warps) {
  constexpr int kShare = (kRows + 31) / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 sum = 0;
  for (int row = warp * kShare; row < min((warp + 1) * kShare, kRows); ++row) {
    const u32 count = counts[row * 32 + lane], up_to = sum_up_to_lane(count);
    counts[row * 32 + lane] = sum + up_to - count;
    sum += __shfl_sync(~0u, up_to, 31);
  }
  if (lane == 0) of_warps[warp] = sum;
  __syncthreads();
  const u32 up_to = sum_up_to_lane(of_warps[lane]), before = __shfl_sync(~0u, up_to, warp) - sum;
  for (int row = warp * kShare; row < min((warp + 1) * kShare, kRows); ++row) counts[row * 32 + lane] += before;
  __syncthreads();
  return __shfl_sync(~0u, up_to, 31);
}

// How many of 32 counts that grow from lane to lane are not above `x`, which is below the last: the lane to whose share it belongs.
DEV int lane_of(u32 up_to, u32 x) {
  int lane = 0;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    if (__shfl_sync(~0u, up_to, lane + step - 1) <= x) lane += step;
  }
  return lane;
}
