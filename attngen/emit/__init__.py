"""Emission: renders the kernels of a call with Jinja into CUDA C++."""

from attngen.emit.kernel_text import emit, emit_module
from attngen.emit.sheet_text import emit_quantizing

__all__ = ["emit", "emit_module", "emit_quantizing"]
