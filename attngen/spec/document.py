"""What a YAML text says, with the place of every value and what is wrong with it; and plain data as YAML text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from attngen.errors import Diagnostic, Location
from attngen.spec.source import Mark, Source


@dataclass
class Document:
    """What a text says, before anyone asks whether it is a legal spec.

    Attributes:
        source: the text.
        data: dicts, lists and scalars.
        marks: where each value stands, by its dotted path; `check[0].batch` in a list.
        diagnostics: what is wrong with the text as YAML.
        faulty: paths of values that were refused, and so are missing from `data`.
        is_spec: whether the text is a mapping at all, so that it is worth asking for more.
    """

    source: Source
    data: dict[str, Any] = field(default_factory=dict)
    marks: dict[str, Mark] = field(default_factory=dict)
    diagnostics: list[Diagnostic] = field(default_factory=list)
    faulty: set[str] = field(default_factory=set)
    is_spec: bool = True

    def refuse(
        self,
        rule: str,
        message: str,
        location: Location,
        path: str = "",
        note: str = "",
        nearest: tuple[str, ...] = (),
    ) -> None:
        """Record a fault."""
        value = location.text[location.column - 1 :][: location.length]
        self.diagnostics.append(Diagnostic(message, rule, location, path, value, note, nearest))

    def start(self, path: str) -> int:
        """Where the key at a path stands, by its offset; before everything where it was not written."""
        mark = self.marks.get(path)
        return mark.key[0] if mark else -1

    def locate(self, path: str, span: tuple[int, int] | None) -> Location | None:
        """Where a stretch of the text at a path stands, or its key; None where neither was written."""
        mark = self.marks.get(path)
        if mark is None:
            return None
        return mark.key_location if span is None else mark.locate_span(*span)


def dump_text(data: Mapping[str, Any]) -> str:
    """Plain data as YAML text, one line for each value that is no collection.

    Raises:
        yaml.YAMLError: something in it has no YAML form.
    """
    return yaml.dump(dict(data), Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=float("inf"))


class _PlainDumper(yaml.SafeDumper):
    """Writes what occurs twice twice, for a spec has no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
