"""A rule of the schema that a value breaks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Broken:
    """A rule that a value breaks.

    Attributes:
        path: dotted path of the value.
        value: the value.
        must: what it must be.
        rule: name of the rule.
        note: the reason.
        nearest: the valid values closest to it.
        is_missing: there is no value at the path, and there must be one.
    """

    path: str
    value: object
    must: str
    rule: str
    note: str
    nearest: tuple[str, ...]
    is_missing: bool = False
