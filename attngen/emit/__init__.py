"""Emission: renders a plan with Jinja into CUDA C++, and its manifest."""

from attngen.emit.kernel import emit
from attngen.emit.manifest import KernelEntry, LaunchEntry, Manifest, WorkspaceEntry, manifest, serving
from attngen.emit.quantizer import QuantizerEntries, quantizer_entries, quantizer_text

__all__ = [
    "KernelEntry",
    "LaunchEntry",
    "Manifest",
    "QuantizerEntries",
    "WorkspaceEntry",
    "emit",
    "manifest",
    "quantizer_entries",
    "quantizer_text",
    "serving",
]
