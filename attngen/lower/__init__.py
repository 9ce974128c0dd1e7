"""Lowering: Spec x Arch -> Plan. Every number is decided here and nowhere later."""

from attngen.lower.lower import build, candidates, lower

__all__ = ["build", "candidates", "lower"]
