"""Data of a program to what a text would give: texts for keys, plain numbers, and no more than a text may hold."""

from collections.abc import Iterable, Mapping
from typing import Any

from attngen.spec.composer import MAX_VALUES
from attngen.spec.read_yaml import MAX_KEY
from attngen.spec.refused_sources import MAX_BYTES, refuse_size, refuse_source

_MAX_FOLLOWED = 4
"""One level more than the schema has: what lies deeper is no part of a spec, and may hold itself."""
_MAX_BITS = 3322  # of an integer: a thousand digits, as in a text


class PlainData:
    """Data on its way to a document.

    Attributes:
        file: what the data is called in a report.
        characters: of all keys and texts that have been read.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self.characters = 0
        self._values = 0

    def read(self, value: Any, path: str = "", depth: int = 1) -> Any:
        """The data that stands at a path, `depth` deep.

        Raises:
            SpecError: there is more of it than a spec has, or a larger number.
        """
        value = _without_array(value)
        self._count(len(value) if isinstance(value, str) else 0)
        if isinstance(value, Mapping | list | tuple) and depth > _MAX_FOLLOWED:
            return None
        if isinstance(value, Mapping):
            keys = {self._key(key, path): inner for key, inner in value.items()}
            head = f"{path}." if path else ""
            return {key: self.read(inner, f"{head}{key}", depth + 1) for key, inner in keys.items()}
        if isinstance(value, list | tuple):
            return [self.read(inner, f"{path}[{index}]", depth + 1) for index, inner in enumerate(value)]
        if isinstance(value, str):
            return str(value)  # an attngen.Expression is more than text
        if isinstance(value, Iterable) and not hasattr(value, "shape"):  # of any size, perhaps without an end
            what = f"{path or self.file} is of type {type(value).__name__}"
            refuse_source(what, path, note="a spec holds mappings, lists, texts, numbers and truth values")
        return _small(value, path)

    def _key(self, key: Any, path: str) -> str:
        text = str(_small(key, f"a key in {path or self.file}"))
        if len(text) > MAX_KEY:
            refuse_source(f"{self.file} has a key of more than {MAX_KEY} characters", text)
        self._count(len(text))
        return text

    def _count(self, characters: int) -> None:
        self._values += 1
        self.characters += characters
        if self._values > MAX_VALUES:
            refuse_source(f"{self.file} holds more than {MAX_VALUES:,} keys and values", self.file)
        if self.characters > MAX_BYTES:
            refuse_size(self.file)


def _small(value: Any, path: str) -> Any:
    """A value, unless it is an integer that no text would give."""
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        bits = f"{path} is an integer of {value.bit_length():,} bits"
        refuse_source(bits, path, note="an integer has at most 1,000 digits")
    return value


def _without_array(value: Any) -> Any:
    """The number in a numpy scalar or in a tensor without dimensions; whatever else as it is."""
    if getattr(value, "shape", None) != () or not callable(getattr(value, "item", None)):
        return value
    try:
        return value.item()
    except (RuntimeError, TypeError, ValueError):  # a tensor without data has no number
        return value
