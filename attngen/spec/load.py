"""From a file, a text or a dict to a Spec. What makes a spec legal is in models.py and rules.py."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from attngen.errors import ArgumentError, Location, SpecError
from attngen.expr.python import Expression, check_text, joined
from attngen.resources import shipped_names, spec_path
from attngen.spec.document import Document, dump_text
from attngen.spec.plain import PlainData
from attngen.spec.read_yaml import read_document
from attngen.spec.refused_sources import MAX_BYTES, refuse_size, refuse_source
from attngen.spec.source import Mark, Source
from attngen.spec.spec import Spec
from attngen.spec.validate import validate

_MAX_DRAWN = 1 << 17  # characters of data that came from no text and is written as one, to point into
_MAX_NAME = 200
_SUFFIXES = (".yaml", ".yml")
_OF_EXPRESSIONS = ("scalars", "tensors", "define", "mask", "score")


def load(source: "str | Path | Mapping[str, Any] | Spec") -> Spec:
    """Read a spec.

    Args:
        source: a path, the name of a shipped spec, YAML text, a dict, or a Spec (returned as it is). The mask and the
            score of a dict may be `attngen.Expression`s, which bring what they declare.

    Raises:
        SpecError: every violation, in the order of the text.
        ArgumentError: the source is none of these, or a dict's mask or score is a function, a tensor or None.
    """
    if isinstance(source, Spec):
        return source
    if isinstance(source, Mapping):
        return _load_dict(source)
    if isinstance(source, Path):
        return validate(read_document(_read_file(source)))
    if isinstance(source, str):
        return validate(read_document(_find_text(source)))
    raise ArgumentError(
        "spec", type(source).__name__, "a path, the name of a shipped spec, YAML text, a dict or a Spec"
    )


def replace(spec: Spec, changes: Mapping[str, Any]) -> Spec:
    """The spec with other values at some dotted paths; what is not replaced keeps its place.

    Raises:
        SpecError: the result is no legal spec; a new value stands in a file called `<replace>`.
    """
    plain = PlainData("<replace>")
    written = {path: plain.read(value, path) for path, value in changes.items()}
    data, marks = spec.to_dict(), dict(spec.marks)
    for path, value in written.items():
        _set(data, path, value)
        marks = {key: mark for key, mark in marks.items() if not f"{key}.".startswith(f"{path}.")}
    # the other expressions have been warned of
    warns = any(path.partition(".")[0] in _OF_EXPRESSIONS for path in changes)
    return _validate_data(plain, data, marks, written, warns)


def _load_dict(source: Mapping[Any, Any]) -> Spec:
    texts = {key: source[key] for key in ("mask", "score") if key in source}
    for key, text in texts.items():
        # what YAML may have in a text's place is the schema's to refuse
        if text is None or not isinstance(text, bool | int | float | list | tuple | Mapping):
            check_text(key, text)
    plain = PlainData("<dict>")
    data = plain.read(source)
    if any(isinstance(text, Expression) for text in texts.values()):
        for key in ("scalars", "tensors"):
            if isinstance(data.get(key, {}), dict):
                data |= {key: joined(key, data.get(key), *texts.values())}
    return _validate_data(plain, data, {}, data, warns=True)


def _validate_data(
    plain: PlainData, data: dict[str, Any], marks: Mapping[str, Mark], written: Mapping[str, Any], warns: bool
) -> Spec:
    """A Spec of data that came from no text; if it is faulty, what was written becomes a text to point into."""
    try:
        return validate(Document(Source(plain.file, ""), data, dict(marks)), warns=warns)
    except SpecError as fault:
        if plain.characters > _MAX_DRAWN:
            raise
        try:
            source = Source(plain.file, dump_text(written))
        except yaml.YAMLError:
            raise fault from None  # something in it has no text to point into
    return validate(Document(source, data, {**marks, **read_document(source).marks}), warns=False)


def _set(data: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        inner = data.get(key)
        if key == "head_dim" and isinstance(inner, int):
            inner = {"qk": inner, "v": inner}
        data[key] = inner if isinstance(inner, dict) else {}
        data = data[key]
    data[last] = value


def _find_text(source: str) -> Source:
    """The text that a string is, or that the file or the shipped spec it names holds."""
    if len(source) > MAX_BYTES:
        refuse_size("<text>")
    text = Source("<text>", source.removeprefix("\ufeff"))
    if "\n" in source or not source.strip():
        return text
    path = Path(source)
    if path.suffix in _SUFFIXES or _is_file(path):
        return _read_file(path)
    if ":" in source or source.lstrip().startswith(("{", "[")):
        return text
    shipped = spec_path(source) if _is_name(source) else None
    if shipped is not None:
        return _read_file(shipped)
    known = shipped_names()
    refuse_source(
        f"{source[:_MAX_NAME]!r} is neither a file nor a shipped spec",
        source,
        nearest=tuple(get_close_matches(source, known, n=2)) or tuple(known),
    )


def _is_name(text: str) -> bool:
    return len(text) <= _MAX_NAME and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", text) is not None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long a name, or a null character in it
        return False


def _read_file(path: Path) -> Source:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        near = [sibling for sibling in _siblings(path) if get_close_matches(path.name, [sibling.name])]
        refuse_source(f"{path} cannot be read: {reason}", str(path), nearest=tuple(map(str, near[:2])))
    if len(data) > MAX_BYTES:
        refuse_size(str(path))
    try:
        return Source(str(path), data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is 0x{data[error.start]:02x}, which UTF-8 has not there"
        lines = data[: error.start].split(b"\n")
        text = data.split(b"\n")[len(lines) - 1].decode("utf-8", errors="replace").rstrip("\r")
        column = len(lines[-1].decode("utf-8", errors="replace")) + 1
        location = Location(str(path), len(lines), column, text)
        refuse_source(f"{path} is not a text", str(path), location, note=byte)


def _siblings(path: Path) -> list[Path]:
    try:
        return sorted(sibling for sibling in path.parent.iterdir() if sibling.suffix in _SUFFIXES)
    except (OSError, ValueError):
        return []
