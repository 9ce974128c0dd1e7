"""The runtime: NVRTC, the disk cache, the driver and the launch. Imports no driver until one is needed."""

from attngen.runtime.arguments import Problem, check_arguments, check_length, check_overlap
from attngen.runtime.cache import CacheWarning, CompiledKernel, DiskCache
from attngen.runtime.declared import DeclaredValues, check_declared
from attngen.runtime.launch import Launcher
from attngen.runtime.numbers import softmax_scale_of
from attngen.runtime.nvrtc import Compiled, KernelResources, compile_source, nvrtc_version
from attngen.runtime.prepared import LaunchReport, explain_launch
from attngen.runtime.quantizer import QuantizeLauncher, check_sources, check_values
from attngen.runtime.sass import disassemble
from attngen.runtime.stopping import TIMEOUT_VARIABLE, CompilerPool
from attngen.runtime.tables import TableSignature, TileTables
from attngen.runtime.tensors import check_plain
from attngen.runtime.writable import check_writable

__all__ = [
    "TIMEOUT_VARIABLE",
    "CacheWarning",
    "Compiled",
    "CompiledKernel",
    "CompilerPool",
    "DeclaredValues",
    "DiskCache",
    "KernelResources",
    "LaunchReport",
    "Launcher",
    "Problem",
    "QuantizeLauncher",
    "TableSignature",
    "TileTables",
    "check_arguments",
    "check_declared",
    "check_length",
    "check_overlap",
    "check_plain",
    "check_sources",
    "check_values",
    "check_writable",
    "compile_source",
    "disassemble",
    "explain_launch",
    "nvrtc_version",
    "softmax_scale_of",
]
