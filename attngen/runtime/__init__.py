"""The runtime: NVRTC, the disk cache, the driver and the launch. Imports no driver until one is needed."""

from attngen.runtime.disk_cache import CacheWarning, CompiledKernel, DiskCache
from attngen.runtime.launch import Launcher
from attngen.runtime.nvrtc import Compiled, KernelResources, compile_source, nvrtc_version
from attngen.runtime.prepared import LaunchReport, explain_launch
from attngen.runtime.sass import disassemble
from attngen.runtime.stopping import TIMEOUT_VARIABLE, CompilerPool

__all__ = [
    "TIMEOUT_VARIABLE",
    "CacheWarning",
    "Compiled",
    "CompiledKernel",
    "CompilerPool",
    "DiskCache",
    "KernelResources",
    "LaunchReport",
    "Launcher",
    "compile_source",
    "disassemble",
    "explain_launch",
    "nvrtc_version",
]
