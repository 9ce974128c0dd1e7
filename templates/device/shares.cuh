// Where the numbers of a row stand in what a warp leaves: its maximum, what exponents refer to, and its sum, behind O, which lies as lanes
// hold it.
template <int kShareBytes, int kRowTiles>
DEV u32 numbers_of_row(u32 share, int i) { return share + kShareBytes - 256 * kRowTiles + 16 * row_in_tile<kRowTiles>(i, 0); }

// Leave in shared memory what a warp's own keys have come to.
template <int kShareBytes, int kRowTiles, int kColTiles>
DEV void leave_share(u32 share, const float (&o)[kRowTiles][kColTiles][4], const float (&total)[2 * kRowTiles], const float (&row_max)[2 * kRowTiles],
                     const float (&reference)[2 * kRowTiles]) {
#pragma unroll
  for (int t = 0; t < kRowTiles * kColTiles; ++t) {
    const float(&x)[4] = o[t / kColTiles][t % kColTiles];
    store_shared_16(share + (t * 32 + threadIdx.x % 32) * 16, uint4{__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])});
  }
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const uint4 numbers = {__float_as_uint(row_max[i]), __float_as_uint(reference[i]), __float_as_uint(total[i]), 0};
    if (threadIdx.x % 4 == 0) store_shared_16(numbers_of_row<kShareBytes, kRowTiles>(share, i), numbers);
  }
}

// leave_share of exponents that were not taken relative to a maximum.
template <int kShareBytes, int kRowTiles, int kColTiles>
DEV void leave_share(u32 share, const float (&o)[kRowTiles][kColTiles][4], const float (&total)[2 * kRowTiles]) {
  const float none[2 * kRowTiles] = {};
  leave_share<kShareBytes>(share, o, total, none, none);
}

// Of two maxima of a row, each with what exponents refer to, keep the larger.
DEV void keep_larger(float& row_max, float& reference, float other_max, float other_reference) {
  reference = other_max > row_max ? other_reference : reference;
  row_max = fmaxf(row_max, other_max);
}

// What sums under one reference are worth under that of the largest maximum: of two scales the smaller reference may be the greater.
DEV float worth(float reference, float of_largest) { return exp2_approx(-fabsf(reference - of_largest)); }

// Add up what all warps have left, under the largest maximum of each row: sums of rows, and of O the columns that are this warp's, whose
// first kOwn tiles of 8 follow those of the warp before.
template <int kWarps, int kColTiles, int kShareBytes, int kRowTiles, int kOwn>
DEV void join_shares(float (&o)[kRowTiles][kOwn][4], float (&total)[2 * kRowTiles], float (&row_max)[2 * kRowTiles], float (&reference)[2 * kRowTiles],
                     u32 shares, int warp) {
  float weight[kWarps][2 * kRowTiles];
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    uint4 numbers[kWarps];
    row_max[i] = reference[i] = lowest(), total[i] = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      numbers[w] = load_shared_16(numbers_of_row<kShareBytes, kRowTiles>(shares + w * kShareBytes, i));
      keep_larger(row_max[i], reference[i], __uint_as_float(numbers[w].x), __uint_as_float(numbers[w].y));
    }
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      weight[w][i] = worth(__uint_as_float(numbers[w].y), reference[i]);
      total[i] = __fmaf_rn(weight[w][i], __uint_as_float(numbers[w].z), total[i]);
    }
  }
  fill(o, 0.f);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int tile = warp * kOwn + j;
      if (kWarps * kOwn > kColTiles && tile >= kColTiles) continue;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const uint4 x = load_shared_16(shares + w * kShareBytes + ((r * kColTiles + tile) * 32 + threadIdx.x % 32) * 16);
        o[r][j][0] = __fmaf_rn(weight[w][2 * r], __uint_as_float(x.x), o[r][j][0]);
        o[r][j][1] = __fmaf_rn(weight[w][2 * r], __uint_as_float(x.y), o[r][j][1]);
        o[r][j][2] = __fmaf_rn(weight[w][2 * r + 1], __uint_as_float(x.z), o[r][j][2]);
        o[r][j][3] = __fmaf_rn(weight[w][2 * r + 1], __uint_as_float(x.w), o[r][j][3]);
      }
    }
  }
}

// join_shares of exponents that were not taken relative to a maximum: all count alike.
template <int kWarps, int kColTiles, int kShareBytes, int kRowTiles, int kOwn>
DEV void join_shares(float (&o)[kRowTiles][kOwn][4], float (&total)[2 * kRowTiles], u32 shares, int warp) {
  float row_max[2 * kRowTiles], reference[2 * kRowTiles];
  join_shares<kWarps, kColTiles, kShareBytes>(o, total, row_max, reference, shares, warp);
}

// Count a part of a tile, once every thread has left its own of what that has come to; whether all others had been counted. The count
// is back at 0 then. CUDA C++ Programming Guide, "Memory Fence Functions".
DEV bool count_part(u32* ticket, int parts) {
  __syncthreads();
  bool is_last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicInc(ticket, parts - 1) == parts - 1;
    __threadfence();
  }
  return __syncthreads_or(is_last);
}

// count_part by the kThreads threads that have rows of a tile, who meet at a named barrier.
template <int kBarrier, int kThreads>
DEV bool count_part_at(u32* ticket, int parts) {
  named_barrier_sync(kBarrier, kThreads);
  bool is_last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicInc(ticket, parts - 1) == parts - 1;
    __threadfence();
  }
  return named_barrier_or(kBarrier, kThreads, is_last);
}

// What the parts of a tile have left: where that of the first begins, f32 from one to the next for a number a row, and how many there are.
// Without maxima all count alike.
struct PartsOfTile {
  const float *out, *sums, *maxima, *references;
  i64 step;
  int parts;
};

// Which of kLanes lanes that have a row has the largest number, of equal ones the first. None is NaN.
template <int kLanes>
DEV int lane_of_largest(float x) {
  const u32 bits = __float_as_uint(x), ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  u32 largest = ordered;
  if (kLanes == 32) largest = __reduce_max_sync(~0u, ordered);
#pragma unroll
  for (int distance = kLanes == 32 ? 0 : kLanes / 2; distance > 0; distance /= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, distance));
  return __ffs(__ballot_sync(~0u, ordered == largest) >> (threadIdx.x % 32 / kLanes * kLanes)) - 1;
}

// Add up what all parts have left of a row, in their order, under the largest maximum. kLanes lanes have a row, four columns of every
// 4 * kLanes each. It comes from L2: others have written it while this kernel ran. Of the first parts all is asked for before anything
// is needed.
template <int kCols, int kLanes, int kVectors>
DEV void merge_row(float4 (&o)[kVectors], float& total, float& row_max, const PartsOfTile& of, int row) {
  constexpr int kBatch = kVectors <= 2 ? 8 : kVectors <= 4 ? 4 : 2;  // of which kLanes are a multiple
  const int lane = threadIdx.x % kLanes;
  row_max = lowest(), total = 0.f;
  float reference = 0.f, own_sum, own_reference;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) o[v] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
  for (int first = 0; first < of.parts; first += kBatch) {
    float4 x[kBatch][kVectors];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float4* from = (const float4*)(of.out + (min(first + i, of.parts - 1) * of.step + row) * kCols) + lane;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) x[i][v] = (v * kLanes + lane) * 4 < kCols ? __ldcg(from + v * kLanes) : float4{0.f, 0.f, 0.f, 0.f};
    }
    if (first % kLanes == 0) {  // each lane keeps the numbers of one of the next parts
      const bool has_own = first + lane < of.parts;
      const i64 own = (first + lane) * of.step + row;
      own_sum = has_own ? __ldcg(of.sums + own) : 0.f;
      own_reference = has_own && of.maxima ? __ldcg(of.references + own) : 0.f;
    }
    if (first == 0 && of.maxima) {
#pragma unroll 1
      for (int part = lane; part < of.parts; part += kLanes) {
        keep_larger(row_max, reference, __ldcg(of.maxima + part * of.step + row), __ldcg(of.references + part * of.step + row));
      }
      const int largest = lane_of_largest<kLanes>(row_max);
      row_max = __shfl_sync(~0u, row_max, largest, kLanes), reference = __shfl_sync(~0u, reference, largest, kLanes);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float its_sum = __shfl_sync(~0u, own_sum, first + i, kLanes), its_reference = __shfl_sync(~0u, own_reference, first + i, kLanes);
      const float weight = first + i < of.parts ? worth(its_reference, reference) : 0.f;
      total = __fmaf_rn(weight, its_sum, total);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        o[v].x = __fmaf_rn(weight, x[i][v].x, o[v].x), o[v].y = __fmaf_rn(weight, x[i][v].y, o[v].y);
        o[v].z = __fmaf_rn(weight, x[i][v].z, o[v].z), o[v].w = __fmaf_rn(weight, x[i][v].w, o[v].w);
      }
    }
  }
}

// Write two neighbouring columns, rounded.
template <class Element>
DEV void store_pair(u16* at, float x, float y) { *(u32*)at = Element::pack(x, y); }
template <class Element>
DEV void store_pair(float* at, float x, float y) { *(float2*)at = {x, y}; }

// Write a row that kLanes lanes have merged, times a factor.
template <class Element, int kCols, int kLanes, class Number, int kVectors>
DEV void store_merged(Number* row, const float4 (&o)[kVectors], float by) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = (v * kLanes + threadIdx.x % kLanes) * 4;
    if (column >= kCols) continue;
    store_pair<Element>(row + column, by * o[v].x, by * o[v].y);
    store_pair<Element>(row + column + 2, by * o[v].z, by * o[v].w);
  }
}

// Write this warp's columns of an accumulator to rows first_row .. , of which those at or past `end_row` are dropped.
template <class Element, int kCols, class Number, class Stride, int kRowTiles, int kOwn>
DEV void store_columns(Number* head, const float (&o)[kRowTiles][kOwn][4], int first_row, int end_row, Stride stride, int warp) {
#pragma unroll
  for (int r = 0; r < 2 * kRowTiles; ++r) {
    const int row = first_row + row_in_tile<kRowTiles>(r, 0);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int column = (warp * kOwn + j) * 8;
      if (row < end_row && column < kCols) {
        store_pair<Element>(head + row_offset(stride, row) + column + lane_column(), o[r / 2][j][r % 2 * 2], o[r / 2][j][r % 2 * 2 + 1]);
      }
    }
  }
}
