"""Lowering: Spec x Arch -> Plan. Every number is decided here and nowhere later."""

from attngen.lower.lower import lower

__all__ = ["lower"]
