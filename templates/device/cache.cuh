// Four e4m3 as four f16, exactly, neighbours packed. PTX ISA: cvt.rn.f16x2.e4m3x2.
DEV void f16_of_e4m3(u32& first, u32& second, u32 four) {
  asm("{\n"
      ".reg .b16 lo, hi;\n"
      "mov.b32 {lo, hi}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, lo;\n"
      "cvt.rn.f16x2.e4m3x2 %1, hi;\n"
      "}" : "=r"(first), "=r"(second) : "r"(four));
}

// gemm_nt_ss where B is e4m3, which becomes f16 in registers. Of every 16 columns a lane has four neighbours of B: those are columns
// 2t, 2t + 1, 2t + 8 and 2t + 9 of the instruction, and so they are of A.
template <class Element, class ATile, class BTile, bool kStartsAtZero, int kUnroll, int kRowTiles, int kColTiles>
DEV void gemm_nt_ss_8bit(float (&acc)[kRowTiles][kColTiles][4], u32 a, u32 b, u32 warp = threadIdx.x / 32) {
  const u32 lane = stay_in_loop(threadIdx.x % 32);
  const u32 a_row = warp * kRowTiles * 16 + lane / 4, a_exchange = ATile::exchange(a_row) ^ lane / 2 % 2;
  const u32 b_exchange = BTile::exchange(lane % 8);
  if (kStartsAtZero) fill(acc, 0.f);
#pragma unroll kUnroll
  for (int k = 0; k < BTile::kChunks; ++k) {
    const u32 a_column = a + a_row * ATile::kRowBytes + (2 * k ^ a_exchange) * 16 + lane % 2 * 8;
    const u32 b_column = b + lane % 8 * BTile::kRowBytes + (k ^ b_exchange) * 16;
    u32 a_fragment[kRowTiles][4];
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const uint2 x = load_shared_8(a_column + i * 8 * ATile::kRowBytes);
      a_fragment[i / 2][i % 2] = x.x, a_fragment[i / 2][i % 2 + 2] = x.y;
    }
#pragma unroll
    for (int j = 0; j < kColTiles; j += 4) {
      const u32 group = kColTiles % 4 == 0 ? j + lane / 8 : min(j + lane / 8, kColTiles - 1);
      u32 four[4];
      ldmatrix_x4(four, b_column + group * 8 * BTile::kRowBytes);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (j + i >= kColTiles) break;
        u32 b0, b1;
        f16_of_e4m3(b0, b1, four[i]);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) Element::mma(acc[r][j + i], a_fragment[r], b0, b1);
      }
    }
  }
}

// gemm_nn_rs where B is e4m3, which becomes f16 in registers. What is moved are pairs of columns: of every 16 the even ones come first.
template <class Element, class BTile, bool kStartsAtZero, int kRowTiles, int kColTiles, int kSteps>
DEV void gemm_nn_rs_8bit(float (&acc)[kRowTiles][kColTiles][4], const u32 (&a)[kRowTiles][kSteps][4], u32 b) {
  constexpr int kPairs = kColTiles / 2;
  const u32 lane = stay_in_loop(threadIdx.x % 32), row = lane % 16, exchange = BTile::exchange(row);
  if (kStartsAtZero) fill(acc, 0.f);
#pragma unroll
  for (int j = 0; j < kPairs; j += 2) {
    const u32 chunk = kPairs % 2 == 0 ? j + lane / 16 : min(j + lane / 16, kPairs - 1);
    const u32 column = b + row * BTile::kRowBytes + (chunk ^ exchange) * 16;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      u32 four[4];
      ldmatrix_x4_trans(four, column + k * 16 * BTile::kRowBytes);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (j + i >= kPairs) break;
        u32 even[2], odd[2];  // of two keys each
        f16_of_e4m3(even[0], odd[0], __byte_perm(four[2 * i], 0, 0x3120));
        f16_of_e4m3(even[1], odd[1], __byte_perm(four[2 * i + 1], 0, 0x3120));
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          Element::mma(acc[r][2 * (j + i)], a[r][k], even[0], even[1]);
          Element::mma(acc[r][2 * (j + i) + 1], a[r][k], odd[0], odd[1]);
        }
      }
    }
  }
}

// Keep one of two values and get a lane's in the place of the other: the lanes that differ in a bit of their number exchange them.
DEV void exchange_over(int bit, float& first, float& second) {
  const bool keeps_second = threadIdx.x & bit;
  const float got = __shfl_xor_sync(~0u, keeps_second ? first : second, bit);
  if (keeps_second) first = got;
  else second = got;
}

// The columns of an accumulator that gemm_nn_rs_8bit has left where all others have them: of every 16 a lane holds four neighbours, and is
// to hold two of each eight.
template <int kRowTiles, int kColTiles>
DEV void order_columns(float (&o)[kRowTiles][kColTiles][4]) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int j = 0; j < kColTiles; j += 2) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        float x0 = o[r][j][e], x1 = o[r][j + 1][e], x2 = o[r][j][e + 1], x3 = o[r][j + 1][e + 1];
        exchange_over(1, x0, x2), exchange_over(1, x1, x3);
        exchange_over(2, x0, x2), exchange_over(2, x1, x3);
        o[r][j][e] = x0, o[r][j][e + 1] = x1, o[r][j + 1][e] = x2, o[r][j + 1][e + 1] = x3;
      }
    }
  }
}

// The larger of two numbers of bf16 that are packed and another, by their magnitudes as bits.
DEV u32 larger_bits(u32 top, u32 pair) { return max(top, max(pair & 0x7fff, pair >> 16 & 0x7fff)); }

// Two numbers of bf16 that are packed, times a factor, as f16.
DEV u32 f16_of_bf16(u32 pair, float factor) { return F16::pack(__uint_as_float(pair << 16) * factor, __uint_as_float(pair & 0xffff0000) * factor); }

// The powers of two that bring the largest number of each row of a tile of bf16 to 2^14 or above, 2^126 at most; and scale is divided
// by it, which is 1 where it has not been written. A quad of lanes takes the rows whose scales it holds.
template <class Tile, int kRowTiles, bool kIsFirst>
DEV void find_powers(u32 tile, float (&powers)[2 * kRowTiles], float (&scale)[2 * kRowTiles], int warp) {
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const u32 row = row_in_tile<kRowTiles>(i, warp);
    u32 top = 0;
    for (u32 chunk = threadIdx.x % 4; chunk < Tile::kChunks; chunk += 4) {
      const uint4 x = load_shared_16(tile + Tile::address(row, chunk));
      top = larger_bits(larger_bits(larger_bits(larger_bits(top, x.x), x.y), x.z), x.w);
    }
    top = max(top, __shfl_xor_sync(~0u, top, 1));
    top = max(top, __shfl_xor_sync(~0u, top, 2));
    const int power = min(126, 141 - (int)(top >> 7));
    powers[i] = __int_as_float((127 + power) << 23);
    const float inverse = __int_as_float((127 - power) << 23);
    scale[i] = kIsFirst ? inverse : scale[i] * inverse;
  }
}

// Make the rows of a tile of bf16 f16, each times its power of two.
template <class Tile, int kRowTiles>
DEV void fit_rows(u32 tile, const float (&powers)[2 * kRowTiles], int warp) {
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const u32 row = row_in_tile<kRowTiles>(i, warp);
    for (u32 chunk = threadIdx.x % 4; chunk < Tile::kChunks; chunk += 4) {
      const u32 address = tile + Tile::address(row, chunk);
      const uint4 x = load_shared_16(address);
      store_shared_16(address, uint4{f16_of_bf16(x.x, powers[i]), f16_of_bf16(x.y, powers[i]), f16_of_bf16(x.z, powers[i]), f16_of_bf16(x.w, powers[i])});
    }
  }
}

// Start copying the descale of each of some keys, which `of` gives the address of, or 0 for none; kThreads share them. Those of none, and at
// or past `end`, arrive as zeros.
template <int kThreads, class Of>
DEV void load_descales(u32 dst, const float* descales, int keys, int first_key, int end, Of of) {
#pragma unroll 1
  for (int i = stay_in_loop(thread_of<kThreads>()); i < keys; i += kThreads) {
    const float* src = first_key + i < end ? of(first_key + i) : 0;
    cp_async_4(dst + 4 * i, src ? src : descales, src ? 4 : 0);
  }
}

// Multiply the columns of a tile by numbers in shared memory, times a factor.
template <int kRowTiles, int kColTiles>
DEV void scale_columns(float (&s)[kRowTiles][kColTiles][4], u32 by, float factor) {
#pragma unroll
  for (int j = 0; j < kColTiles; ++j) {
    const float2 pair = load_shared_floats(by + 4 * (8 * j + lane_column()));
    const float even = pair.x * factor, odd = pair.y * factor;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) s[r][j][0] *= even, s[r][j][1] *= odd, s[r][j][2] *= even, s[r][j][3] *= odd;
  }
}

// Let a reference, the same in all rows, be a power of two that none of some numbers in shared memory passes, nor one before; and factor what
// the one before is of it. Numbers that are not negative are ordered as their bits.
template <int kRows>
DEV void raise_reference(float (&reference)[kRows], float (&factor)[kRows], u32 numbers, int count) {
  u32 top = __float_as_uint(0x1p-126f);
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < count; i += 32) top = max(top, load_shared(numbers + 4 * i));
  top = min(__reduce_max_sync(~0u, top), __float_as_uint(0x1p126f));
  const float raised = fmaxf(reference[0], __uint_as_float(top + 0x7fffff & 0x7f800000));
  fill(factor, reference[0] / raised);
  fill(reference, raised);
}
