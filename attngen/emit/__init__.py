"""Emission: renders a plan with Jinja into CUDA C++, and its manifest."""

from attngen.emit.kernel import emit
from attngen.emit.manifest import KernelEntry, LaunchEntry, Manifest, WorkspaceEntry, manifest, serving

__all__ = ["KernelEntry", "LaunchEntry", "Manifest", "WorkspaceEntry", "emit", "manifest", "serving"]
