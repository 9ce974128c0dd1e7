"""Whole attention kernels of the schedules that every warp runs alike, by g++: fragments are laid out as PTX says.

Source: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" and "ldmatrix".
"""

import re
from functools import cache
from typing import Any
from unittest.mock import patch

import torch

from attngen.emit import emit_module
from attngen.kernel import Kernel
from attngen.runtime import Launcher
from tests.plans import no_code
from tests.quantize.on_cpu import CpuKernels

_MATRICES = """
static uint32_t matrices[32][32][6];

static float f16_at(uint32_t pair, int half) { return half_to_float((unsigned short)(pair >> 16 * half)); }

// D (16x8) += A (16x16) B (16x8), of f16.
static void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto& of_warp = matrices[warp];
  for (int i = 0; i < 4; ++i) of_warp[lane][i] = a[i];
  of_warp[lane][4] = b0, of_warp[lane][5] = b1;
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int quad = k % 8 / 2;
      const float x = f16_at(of_warp[row % 8 * 4 + quad][row / 8 + k / 8 * 2], k % 2);
      d[i] += x * f16_at(of_warp[column * 4 + quad][4 + k / 8], k % 2);
    }
  }
  __syncwarp();
}

// Four 8x8 matrices of 16 bits; lane i has the address of row i % 8 of matrix i / 8.
static void load_matrices(uint32_t (&r)[4], uint32_t address, bool is_transposed) {
  const uint32_t* rows = post(address);
  const int lane = threadIdx.x % 32, first = lane / 4, second = lane % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    uint32_t found[2];
    for (int e = 0; e < 2; ++e) {
      const int row = is_transposed ? second + e : first, column = is_transposed ? first : second + e;
      found[e] = at_shared<uint16_t>(rows[8 * i + row] + 2 * column);
    }
    r[i] = found[0] | found[1] << 16;
  }
  __syncwarp();
}

static uint32_t f16_of_code(uint32_t code) {
  static const std::vector<double> magnitudes = e4m3_magnitudes();
  const uint32_t magnitude = code & 0x7f;
  const float x = magnitude == 0x7f ? NAN : (float)magnitudes[magnitude];
  return to_f16(x) | (code & 0x80) << 8;
}
static int __float_as_int(float x) { return (int)bits(x); }
static float __fmul_ru(float a, float b) {
  const double exact = (double)a * b;
  const float rounded = (float)exact;
  return rounded < exact ? nextafterf(rounded, INFINITY) : rounded;
}
static float __fmaf_rz(float a, float b, float c) { return fmaf(a, b, c); }
static unsigned __shfl_xor_sync(unsigned, unsigned x, int mask) { return post(x)[threadIdx.x % 32 ^ mask]; }
static float __shfl_sync(unsigned, float x, int lane, int width = 32) {
  return __uint_as_float(post(bits(x))[threadIdx.x % 32 / width * width + lane % width]);
}
static bool __all_sync(unsigned, bool x) { return __ballot_sync(~0u, x) == ~0u; }
static bool __any_sync(unsigned, bool x) { return __ballot_sync(~0u, x) != 0; }
static float __fdividef(float a, float b) { return a / b; }
struct float2 { float x, y; };
"""
_IN_CPP = {
    "ldmatrix_x4": "void ldmatrix_x4(u32 (&r)[4], u32 address) { load_matrices(r, address, false); }",
    "ldmatrix_x4_trans": "void ldmatrix_x4_trans(u32 (&r)[4], u32 address) { load_matrices(r, address, true); }",
    "load_shared": "u32 load_shared(u32 address) { return at_shared<u32>(address); }",
    "load_shared_8": "uint2 load_shared_8(u32 address) { return at_shared<uint2>(address); }",
    "load_shared_floats": "float2 load_shared_floats(u32 address) { return at_shared<float2>(address); }",
    "store_shared_16": "void store_shared_16(u32 address, uint4 x) { at_shared<uint4>(address) = x; }",
    "cp_async_4": "void cp_async_4(u32 dst, const void* src, int bytes) "
    "{ at_shared<u32>(dst) = bytes ? *(const u32*)src : 0; }",
    "rcp_approx": "float rcp_approx(float x) { return 1.f / x; }",
    "f16_of_e4m3": "void f16_of_e4m3(u32& first, u32& second, u32 four) "
    "{ first = f16_of_code(four & 0xff) | f16_of_code(four >> 8 & 0xff) << 16; "
    "second = f16_of_code(four >> 16 & 0xff) | f16_of_code(four >> 24) << 16; }",
}
_MMA = re.compile(r"(struct F16 \{.*?DEV void mma\([^\n]*\{\n).*?\n  \}\n", re.DOTALL)


class _HostCounters:
    """Counters of parts, as many as a launch asks for; a kernel leaves them at 0."""

    def __init__(self) -> None:
        self.counts = torch.zeros(0, dtype=torch.int32)

    def prepare(self, device: int, count: int) -> None:
        self.counts = torch.zeros(count, dtype=torch.int32)

    def address(self, device: int, stream: int, count: int) -> int:
        return self.counts.data_ptr()


@cache
def _launcher(kernel: Kernel) -> Launcher:
    text = emit_module(kernel.call.modules[kernel.plan.module])
    text = _MMA.sub(r"\1    mma_f16(d, a, b0, b1);\n  }\n", text)
    code = CpuKernels(f"{_MATRICES}\nnamespace whole {{\n{text}\n}}\n", _IN_CPP)
    return Launcher(kernel.manifest, no_code, load=code.load, start=code.start)


def run_text(
    kernel: Kernel, *inputs: torch.Tensor, scale: float | None = None, **declared: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and lse of a call, by the emitted text."""
    counters = _HostCounters()
    with patch("attngen.runtime.launch.COUNTERS", counters):
        out, lse = _launcher(kernel).run(*inputs, scale, return_lse=True, declared=declared)
    assert lse is not None and not counters.counts.any()
    return out, lse
