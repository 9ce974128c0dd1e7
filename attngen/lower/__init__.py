"""Lowering: Spec x Arch -> KernelPlan. Every number is decided here and nowhere later."""

from attngen.lower.given import candidates
from attngen.lower.lower import build, lower

__all__ = ["build", "candidates", "lower"]
