"""Kernels that are sheets on the CPU: g++ compiles the emitted text, whose threads take turns.

It tells what the text says, bit by bit, but not what NVRTC or a GPU makes of it; that is for tests/gpu.
"""

import ctypes
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from attngen.arch import ARCHS

LARGEST_SMEM = ARCHS["sm_90a"].smem_bytes_per_block
_SHIM = Path(__file__).with_name("threads_on_cpu.hpp")
_KERNEL = re.compile(r'extern "C" __global__ void [^\n]*\n(\w+)\(')
_NAMESPACE = re.compile(r"^namespace (\w+) \{", re.MULTILINE)
_ASM = re.compile(r"asm( volatile)?\((?:[^()]|\([^()]*\))*\);")
_DYNAMIC = re.compile(r"extern __shared__ __align__\(\d+\) unsigned char (\w+)\[\];")
_IN_CPP = {
    "f16_to_float": "float f16_to_float(u16 x) { return half_to_float(x); }",
    "smem_address": "u32 smem_address(const void* p) { return shared_address(p); }",
    "store_shared": "void store_shared(u32 address, u32 x) { at_shared<u32>(address) = x; }",
    "store_shared_8": "void store_shared_8(u32 address, float x, float y) "
    "{ at_shared<float>(address) = x; at_shared<float>(address + 4) = y; }",
    "load_shared_16": "uint4 load_shared_16(u32 address) { return at_shared<uint4>(address); }",
    "max_or_nan": "float max_or_nan(float x, float y) { return x != x || y != y ? NAN : fmaxf(x, y); }",
    "cp_async_16": "void cp_async_16(u32 dst, const void* src, int bytes) "
    "{ at_shared<uint4>(dst) = bytes ? *(const uint4*)src : uint4{0, 0, 0, 0}; }",
    "cp_async_16_by": "void cp_async_16_by(u32 dst, const void* src, int bytes, u64) { cp_async_16(dst, src, bytes); }",
    "load_global_16": "uint4 load_global_16(const void* p, bool exists) "
    "{ return exists ? *(const uint4*)p : uint4{0, 0, 0, 0}; }",
    "load_u16": "u32 load_u16(const u16* p) { return *p; }",
    "exp2_approx": "float exp2_approx(float x) { return exp2f(x); }",
    "log2_approx": "float log2_approx(float x) { return log2f(x); }",
}
"""What the text has in PTX."""
_PACKED_IN_CPP = {
    "Bf16": "u32 pack(float lo, float hi) { return to_bf16(lo) | to_bf16(hi) << 16; }",
    "F16": "u32 pack(float lo, float hi) { return to_f16(lo) | to_f16(hi) << 16; }",
    "E4m3": "u32 pack(float a, float b, float c, float d) "
    "{ return to_e4m3(a) | to_e4m3(b) << 8 | to_e4m3(c) << 16 | to_e4m3(d) << 24; }",
}
"""What formats have in PTX."""


class CpuKernels:
    """A file's kernels in the place of a module and of the driver; tensors are on the CPU."""

    def __init__(self, source: str, more: Mapping[str, str] = MappingProxyType({})) -> None:
        """Compile a file; `more` are functions in C++ in the place of what it has in PTX, beside those above."""
        text = source
        for name, body in {**_IN_CPP, **more}.items():
            head = rf"^[^\n]*\bDEV [\w ]+\b{name}\("
            of_one_line, of_more = rf"{head}[^\n]*\}}\n", rf"{head}.*?\n *\}}\n"
            pattern = of_one_line if re.search(of_one_line, text, re.MULTILINE) else of_more
            text = re.sub(pattern, f"DEV {body}\n", text, count=1, flags=re.DOTALL | re.MULTILINE)
        for name, body in _PACKED_IN_CPP.items():
            pattern = rf"(struct {name} \{{.*?)\bDEV u32 pack\(.*?\n  \}}\n"
            text = re.sub(pattern, rf"\1DEV {body}\n", text, count=1, flags=re.DOTALL)
        text = _ASM.sub("", text)
        text = _DYNAMIC.sub(rf"alignas(1024) static unsigned char \1[{LARGEST_SMEM}];", text)
        (space,) = _NAMESPACE.findall(text)
        runs = "\n".join(
            f'extern "C" void run_{name}({space}::Params* p, int blocks, int threads)'
            f" {{ for_each_thread(blocks, threads, [=] {{ {space}::{name}(*p); }}); }}"
            for name in _KERNEL.findall(source)
        )
        with tempfile.TemporaryDirectory() as folder:
            file, library = Path(folder, "kernels.cpp"), Path(folder, "kernels.so")
            file.write_text(f"{_SHIM.read_text()}\n{text}\n{runs}\n")
            flags = ("-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-ffp-contract=off")
            subprocess.run(["g++", *flags, "-o", str(library), str(file)], check=True)
            self._library = ctypes.CDLL(str(library))

    def load(self, cubin: bytes) -> "CpuKernels":
        return self

    def function(self, name: str, smem_bytes: int, starts_early: bool) -> "CpuFunction":
        return CpuFunction(getattr(self._library, f"run_{name}"))

    def start(
        self,
        function: "CpuFunction",
        grid: int,
        threads: int,
        smem: int,
        device: int,
        stream: int,
        address: int,
    ) -> None:
        function.run(ctypes.c_void_p(ctypes.c_void_p.from_address(address).value), grid, threads)


class CpuFunction:
    """A kernel, ready on any device."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def prepare(self, device: int) -> None:
        pass
