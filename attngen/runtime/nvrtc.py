"""CUDA C++ text -> cubin with NVRTC, and what ptxas says of it. Needs no GPU; caches nothing."""

import ctypes
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from attngen.errors import CompileError, ToolchainError
from attngen.runtime.stopping import run_stoppable

FLAGS = ("--std=c++17", "-default-device", "--ptxas-options=-v", "--ptxas-options=--warn-on-spills")
"""Flags of every compilation; ptxas options are given one by one, since NVRTC refuses a list."""

_FLOW_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
_SERIALIZED = re.compile(r"C75\d\d")


@dataclass(frozen=True)
class KernelResources:
    """What one kernel costs a thread, as ptxas reports it; memory in bytes."""

    name: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack_bytes: int
    static_smem_bytes: int


@dataclass(frozen=True)
class Compiled:
    """A cubin and its report.

    Attributes:
        warnings: lines of the log about serialised wgmma or ignored setmaxnreg (C75xx).
        seconds: wall time of the compilation.
    """

    cubin: bytes
    log: str
    resources: tuple[KernelResources, ...]
    warnings: tuple[str, ...]
    seconds: float
    nvrtc_version: str


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise ToolchainError(
            f"NVRTC cannot be loaded: {error}",
            "pip install 'cuda-python>=13.0.3,<14' 'nvidia-cuda-nvrtc>=13.0,<14' (Linux or Windows); "
            "check, explain and run on the CPU work without it",
        ) from error
    return nvrtc


def _call(nvrtc: Any, result: tuple[Any, ...]) -> Any:
    code, *values = result
    if int(code) != 0:
        raise ToolchainError(f"NVRTC failed: {code.name}", "check that nvidia-cuda-nvrtc fits cuda-python")
    return values[0] if len(values) == 1 else tuple(values)


@cache
def nvrtc_version() -> str:
    """The version of NVRTC, such as "13.0".

    Raises:
        ToolchainError: NVRTC is missing.
    """
    nvrtc = _nvrtc()
    try:
        major, minor = _call(nvrtc, nvrtc.nvrtcVersion())
    except RuntimeError as error:  # cuda.bindings finds no library to load
        raise ToolchainError(
            f"NVRTC cannot be loaded: {error}", "pip install 'nvidia-cuda-nvrtc>=13.0,<14'"
        ) from error
    return f"{major}.{minor}"


def compile_source(source: str, arch: str, *, lineinfo: bool = False) -> Compiled:
    """Compile a file without includes.

    Args:
        source: CUDA C++.
        arch: a real architecture, `sm_90a`.
        lineinfo: keep line numbers for profilers.

    Raises:
        CompileError: NVRTC refused the text, whose log is in the error, or was stopped, by Ctrl-C or since
            it took longer than $ATTNGEN_COMPILE_TIMEOUT.
        ToolchainError: NVRTC is missing or broken.
        ArgumentError: $ATTNGEN_COMPILE_TIMEOUT is no time.
    """
    return run_stoppable(lambda is_stopped: _compile(source, arch, lineinfo, is_stopped))


def _compile(source: str, arch: str, lineinfo: bool, is_stopped: Callable[[], bool]) -> Compiled:
    """Compile in this thread; NVRTC gives up when it next asks whether it is stopped."""
    version = nvrtc_version()
    nvrtc = _nvrtc()
    program = _call(nvrtc, nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []))
    # NVRTC calls it some sixty times, seconds apart at worst.
    asks = _FLOW_CALLBACK(lambda payload, reserved: int(is_stopped()))
    try:
        _call(
            nvrtc, (*nvrtc.nvrtcSetFlowCallback(program, ctypes.cast(asks, ctypes.c_void_p).value, 0), None)
        )
        options = [flag.encode() for flag in flags(arch, lineinfo)]
        start = time.perf_counter()
        (code,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        seconds = time.perf_counter() - start
        log = _bytes(nvrtc, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
        text = log.rstrip(b"\0").decode(errors="replace")
        if int(code) != 0:
            raise CompileError(f"NVRTC {version} refused the kernel for {arch} ({code.name})", text)
        cubin = _bytes(nvrtc, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    warnings = tuple(line for line in text.splitlines() if _SERIALIZED.search(line))
    return Compiled(cubin, text, parse_resources(text), warnings, seconds, version)


def flags(arch: str, lineinfo: bool) -> tuple[str, ...]:
    """Every flag of a compilation, which is also what a cache must tell apart."""
    return (f"--gpu-architecture={arch}", *FLAGS, *(("-lineinfo",) if lineinfo else ()))


def _bytes(nvrtc: Any, size: Any, fill: Any, program: Any) -> bytes:
    data = bytearray(_call(nvrtc, size(program)))
    buffer = bytes(data)
    _call(nvrtc, (*fill(program, buffer), None))
    return buffer


def parse_resources(log: str) -> tuple[KernelResources, ...]:
    """The report of `--ptxas-options=-v`, one entry a kernel."""
    found = []
    for part in re.split(r"(?=Compiling entry function)", log):
        entry, frame, used = _ENTRY.search(part), _FRAME.search(part), _USED.search(part)
        if entry and frame and used:
            stack, stores, loads = (int(number) for number in frame.groups())
            found.append(
                KernelResources(
                    entry[1], int(used[1]), stores, loads, stack, static_smem_bytes=int(used[2] or 0)
                )
            )
    return tuple(found)
