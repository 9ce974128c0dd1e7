"""What a program is made of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """Base of all Steps."""


Program = tuple[Step, ...]
