"""YAML to nodes by PyYAML, without what a spec is not written in, and no more of them than a spec has.

Tags, anchors and aliases are refused, each with its cure; where there is too much, composing stops.
"""

import re
from typing import Any, Never

import yaml

from attngen.spec.document import Document

MAX_NESTING = 16
MAX_VALUES = 10_000  # keys and values of a spec, collections included; no spec comes near
MAX_REFUSED = 5_000  # anchors, aliases and tags, each of which becomes a fault with its place
_LINE_CHANGES = re.compile("[\n\r\x85\u2028\u2029\ufeff]")  # what counts otherwise than as a column more
_WORD_END = re.compile(r"[\s,\]}]")


class TooMuch(Exception):
    """A way out of the recursion; the fault is recorded already."""


class Composer(yaml.SafeLoader):
    """Composes nodes, and refuses what a spec is not written in: anchors, aliases, tags, endless nesting and lists."""

    def __init__(self, document: Document) -> None:
        super().__init__(document.source.text)
        self.refused: set[yaml.Node] = set()  # each stands for an alias
        self._document = document
        self._depth = 0
        self._count = 0
        self._refused_words = 0

    def scan_to_next_token(self) -> None:
        """Pass over what is blank: tabs as well inside {} and [], as JSON has them."""
        super().scan_to_next_token()
        while self.flow_level and self.peek() == "\t":
            self.forward()
            super().scan_to_next_token()

    def forward(self, length: int = 1) -> None:
        """Pass over characters: a stretch within a line at once, where PyYAML goes one by one."""
        end = self.pointer + length
        if end >= len(self.buffer) or _LINE_CHANGES.search(self.buffer, self.pointer, end):
            super().forward(length)
        else:
            self.pointer, self.index, self.column = end, self.index + length, self.column + length

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node; raises `TooMuch` where there are too many or they are too deep."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        start = event.start_mark.index
        self._count += 1
        if self._count > MAX_VALUES:
            self._stop(start, "yaml-size", f"the spec holds more than {MAX_VALUES:,} keys and values")
        if isinstance(event, yaml.AliasEvent):
            self.get_event()  # type: ignore[no-untyped-call]
            self._refuse(start, f"*{event.anchor}", "is an alias", "write the value out here")
            start_mark: Any = event.start_mark
            alias = yaml.ScalarNode("", "", start_mark, start_mark)
            self.refused.add(alias)
            return alias
        if event.anchor is not None:
            self._refuse(start, f"&{event.anchor}", "is an anchor", "leave it away; a spec has no aliases")
            event.anchor = None
        if event.tag is not None:
            self._refuse(start, "!", "is a tag", "leave it away; the schema knows every type")
            event.tag = None
            if isinstance(event, yaml.ScalarEvent):
                event.implicit = (event.style is None, event.style is not None)
        self._depth += 1
        if self._depth > MAX_NESTING:
            self._stop(start, "yaml-nesting", f"the spec is nested more than {MAX_NESTING} deep")
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def _stop(self, start: int, rule: str, message: str) -> Never:
        self._document.refuse(rule, message, self._document.source.location(start, start + 1))
        raise TooMuch

    def _refuse(self, start: int, word: str, message: str, note: str) -> None:
        self._refused_words += 1
        if self._refused_words > MAX_REFUSED:
            self._stop(
                start, "yaml-size", f"the spec holds more than {MAX_REFUSED:,} anchors, aliases and tags"
            )
        text = self._document.source.text
        start = text.index(word, start)  # an anchor and a tag of one node may stand in either order
        found = _WORD_END.search(text, start + 1)
        end = found.start() if found else len(text)
        place = self._document.source.location(start, end)
        self._document.refuse("yaml-plain", f"`{text[start:end]}` {message}", place, note=note)
