"""A text and the places in it: from an offset to line and column, and from a YAML value to its characters.

Nothing here knows what a value means.
"""

import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

import yaml

from attngen.errors import Location

_LINE_BREAK = re.compile(r"\r\n|\r|\n")
_ESCAPE = re.compile(r"\\(x..|u.{4}|U.{8}|\r\n|.)", re.DOTALL)  # YAML 1.1, section 5.7: escape sequences


@dataclass(frozen=True)
class Source:
    """A text with its name.

    Attributes:
        file: path as the user gave it, or a name in angle brackets.
        text: the whole text, without a byte order mark.
    """

    file: str
    text: str

    @cached_property
    def _line_starts(self) -> tuple[int, ...]:
        return (0, *(found.end() for found in _LINE_BREAK.finditer(self.text)))

    @cached_property
    def _lines(self) -> list[str]:
        """The lines without their breaks: all places in one line share its text, however long it is."""
        return _LINE_BREAK.split(self.text)

    def location(self, start: int, end: int) -> Location:
        """The stretch from offset `start` to before `end`, cut at the end of its first line."""
        line = bisect_right(self._line_starts, start) - 1
        first, text = self._line_starts[line], self._lines[line]
        length = max(1, min(end - start, len(text) - (start - first)))
        return Location(self.file, line + 1, start - first + 1, text, length)


@dataclass(frozen=True)
class Mark:
    """Where a key and its value stand.

    Attributes:
        source: the text both stand in.
        key: start and end of the key.
        value: start and end of the value, its quotes included.
        offsets: for each character of a scalar, and for its end, the offset in the text; empty for a collection.
    """

    source: Source
    key: tuple[int, int]
    value: tuple[int, int]
    offsets: tuple[int, ...] = ()

    @property
    def key_location(self) -> Location:
        """The place of the key."""
        return self.source.location(*self.key)

    @property
    def value_location(self) -> Location:
        """The place of the value; of a block scalar, its first line of content."""
        start, end = self.value
        if self.source.text[start : start + 1] in ("|", ">") and self.offsets:
            start = self.offsets[0]
        return self.source.location(start, end)

    def locate(self, offset: int) -> Location:
        """The place of one character of a scalar; its length stands for its end."""
        return self.locate_span(offset, offset + 1)

    def locate_span(self, start: int, end: int) -> Location:
        """The place of a stretch of a scalar, as far as it stands in one line."""
        first = self.offsets[start]
        last = self.offsets[end - 1] if end > start else first
        return self.source.location(first, last + 1)


def scalar_offsets(source: Source, node: yaml.ScalarNode) -> tuple[int, ...]:
    """For each character of a scalar's value, and for its end, its offset in the text.

    Whatever its style, a scalar keeps its characters in order and only blanks are folded: so each character that is
    no blank is looked for in the raw text, and a blank stands just after the character before it.
    """
    text = source.text
    place, end = node.start_mark.index, node.end_mark.index
    if node.style in ("|", ">"):
        line_break = _LINE_BREAK.search(text, place, end)  # the header holds an indicator, perhaps a comment
        place = line_break.end() if line_break else end
    elif node.style is not None:
        place, end = place + 1, end - 1  # between the quotes
    if text[place:end] == node.value:  # as most are: nothing is folded or escaped
        return tuple(range(place, end + 1))
    offsets = []
    last_end = place
    for char in node.value:
        start = last_end
        if not char.isspace():
            start, last_end = _find(text, char, last_end, end, node.style)
        offsets.append(start)
    return (*offsets, last_end)


def _find(text: str, char: str, place: int, end: int, style: str | None) -> tuple[int, int]:
    """Start and end of the next raw character or escape sequence that stands for `char`."""
    while place < end:
        escape = _ESCAPE.match(text, place, end) if style == '"' else None
        if escape:
            if _escaped(escape.group()) == char:
                return place, escape.end()
            place = escape.end()
        elif text[place] == char:
            return place, place + (2 if style == "'" and char == "'" else 1)
        else:
            place += 1
    return end, end


def _escaped(sequence: str) -> str:
    """The character an escape sequence of a double-quoted scalar stands for; a blank for a folded line."""
    if sequence[1] in "xuU":
        return chr(int(sequence[2:], 16))
    return yaml.scanner.Scanner.ESCAPE_REPLACEMENTS.get(sequence[1], " ")
