"""Lowering: Spec x Arch -> KernelPlan. Every number is decided here and nowhere later."""

from attngen.lower.features import Features
from attngen.lower.lower import build, lower
from attngen.lower.search import candidates

__all__ = ["Features", "build", "candidates", "lower"]
