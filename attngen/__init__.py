"""attngen: from a short spec to a readable, checked attention kernel.

`compile`, `attention` and `varlen_attn` are the faces; importing this package needs no CUDA driver and no GPU.
"""

from attngen import hf
from attngen.api import attention, compile
from attngen.errors import (
    ArgumentError,
    AttngenError,
    CompileError,
    ExpressionError,
    InternalError,
    ModelError,
    PlanError,
    SpecError,
    SpecWarning,
    ToolchainError,
)
from attngen.expr.python import Expression, expression
from attngen.expr.traced_calls import functions, where
from attngen.kernel import Kernel
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
    "Spec",
    "SpecError",
    "SpecWarning",
    "ToolchainError",
    "__version__",
    "attention",
    "compile",
    "expression",
    "functions",
    "hf",
    "load",
    "varlen_attn",
    "where",
]
