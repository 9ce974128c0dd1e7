"""Probes of expressions on the CPU: g++ compiles the emitted text, and stops at an integer that overflows.

It tells what C++ makes of the text, not what NVRTC or a GPU does; those are for tests/gpu/test_expressions.py.
"""

import ctypes
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from tests.language.probe import Field, struct_of

_SHIM = Path(__file__).with_name("cuda_on_cpu.hpp")
_KERNEL = re.compile(r'extern "C" __global__ void (\w+)\(')
_F16 = re.compile(r"DEV float f16_to_float\(u16 x\) \{.*?\n\}", re.DOTALL)
_ASM = re.compile(r"asm( volatile)?\((?:[^()]|\([^()]*\))*\);")
_FLAGS = ("-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-ffp-contract=off")
_CHECKS = (
    "-fsanitize=signed-integer-overflow,shift,integer-divide-by-zero",
    "-fsanitize-undefined-trap-on-error",
)


def compile_on_cpu(text: str, function: str, folder: Path) -> ctypes.CDLL:
    """CUDA functions as C++, and one of C that calls them; what they leave to PTX is left out."""
    file, library = Path(folder, "functions.cpp"), Path(folder, "functions.so")
    file.write_text(f'{_SHIM.read_text()}\n{_ASM.sub("", text)}\nextern "C" {function}\n')
    subprocess.run(["g++", *_FLAGS, "-o", str(library), str(file)], check=True)
    return ctypes.CDLL(str(library))


class CpuProbe:
    """In the place of `probe.Probe`."""

    def __init__(self, source: str, arch: str, device: str) -> None:
        self.device = torch.device("cpu")
        text = _ASM.sub("", _F16.sub("DEV float f16_to_float(u16 x) { return half_to_float(x); }", source))
        runs = "\n".join(
            f'extern "C" void run_{name}(Params* p, Samples* s, int blocks, int threads) {{'
            f" for_each_thread(blocks, threads, [=] {{ {name}(*p, *s); }}); }}"
            for name in _KERNEL.findall(source)
        )
        with tempfile.TemporaryDirectory() as folder:
            file, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
            file.write_text(f"{_SHIM.read_text()}\n{text}\n{runs}\n")
            subprocess.run(["g++", *_FLAGS, *_CHECKS, "-o", str(library), str(file)], check=True)
            self._library = ctypes.CDLL(str(library))

    def run(self, kernel: str, blocks: int, *arguments: Iterable[Field], threads: int = 128) -> None:
        """Run a kernel, thread after thread."""
        structs = [ctypes.byref(struct_of(fields)) for fields in arguments]
        getattr(self._library, f"run_{kernel}")(*structs, blocks, threads)
