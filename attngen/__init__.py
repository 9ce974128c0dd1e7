"""attngen: from a short spec to a readable, checked attention kernel.

`compile`, `attention`, `varlen_attn` and the functions of `flash_attn` are the faces; importing this package needs no
CUDA driver and no GPU.
"""

from importlib import import_module
from typing import Any

from attngen import flash_attn, hf
from attngen import op as op  # defines the operators
from attngen.api import attention, compile
from attngen.errors import (
    ArgumentError,
    AttngenError,
    CompileError,
    ExpressionError,
    InternalError,
    ModelError,
    PlanError,
    RefusedError,
    SpecError,
    SpecWarning,
    ToolchainError,
)
from attngen.expr.python import Expression, expression
from attngen.expr.traced_calls import functions, where
from attngen.kernel import Kernel
from attngen.serving import append, merge_states
from attngen.spec import Spec, load
from attngen.varlen import varlen_attn
from attngen.version import __version__

__all__ = [
    "ArgumentError",
    "AttngenError",
    "CompileError",
    "Expression",
    "ExpressionError",
    "InternalError",
    "Kernel",
    "ModelError",
    "PlanError",
    "RefusedError",
    "Spec",
    "SpecError",
    "SpecWarning",
    "ToolchainError",
    "__version__",
    "append",
    "attention",
    "compile",
    "expression",
    "flash_attn",
    "functions",
    "hf",
    "load",
    "merge_states",
    "varlen_attn",
    "where",
]


def __getattr__(name: str) -> Any:
    """`attngen.sdpa`, which loads seconds of torch that nothing else here needs."""
    if name == "sdpa":
        return import_module("attngen.sdpa")
    raise AttributeError(f"module 'attngen' has no attribute {name!r}")
