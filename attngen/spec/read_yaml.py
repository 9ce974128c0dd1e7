"""YAML text to a document: plain data with marks, of the part of YAML that a spec is written in.

PyYAML's `safe_load` drops duplicate keys, turns `on` into True and leaves `1e-3` a string; here nothing is lost
and a scalar is what it looks like, except that some fields are texts whatever they look like. Merge keys are refused.
Nothing here knows the schema, except which fields hold text.
"""

import re
from collections.abc import Iterator
from itertools import takewhile
from typing import Any

import yaml

from attngen.spec.composer import Composer, TooMuch
from attngen.spec.document import Document
from attngen.spec.source import Mark, Source, scalar_offsets

_Pair = tuple[yaml.Node, yaml.Node]

_TEXT_PATHS = ("name", "mask", "score", "scalars.", "tensors.", "define.")
_EXPRESSION_PATHS = ("mask", "score", "tensors.", "define.")
MAX_KEY = 500  # characters: the path of a value repeats the keys above it
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,999})")
_REAL = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, bool | None] = {"true": True, "false": False, "null": None, "~": None, "": None}


def read_document(source: Source) -> Document:
    """Read a YAML text. What is wrong with it is recorded, never raised."""
    document = Document(source, is_spec=False)
    try:
        composer = Composer(document)
        root = composer.get_single_node()
    except yaml.reader.ReaderError as error:
        place = source.location(error.position, error.position + 1)
        note = f"U+{int(error.character):04X} cannot stand in a text"
        document.refuse("yaml-characters", "the spec is not YAML", place, note=note)
    except yaml.MarkedYAMLError as error:
        _refuse_syntax(document, error)
    except TooMuch:
        pass
    else:
        if isinstance(root, yaml.MappingNode):
            document.is_spec = True
            document.data = _Reader(document, composer.refused).read_mapping(root, "")
        else:
            _refuse_root(document, root)
    return document


def _refuse_root(document: Document, root: yaml.Node | None) -> None:
    start, end = (root.start_mark.index, root.end_mark.index) if root else (0, 0)
    is_empty = root is None or start == end
    document.refuse(
        "spec-mapping",
        "the spec is empty" if is_empty else "the text is not a spec",
        document.source.location(start, end),
        note="a spec is a mapping of keys to values",
        nearest=("problem: {head_dim: 128}",),
    )


def _refuse_syntax(document: Document, error: yaml.MarkedYAMLError) -> None:
    mark = error.problem_mark or error.context_mark
    start = mark.index if mark else 0
    problem, note = error.problem or "it has no structure", error.context or ""
    if "another document" in problem:
        problem, note = "a second document begins", "a file holds one spec"
    if "'\\t'" in problem:
        problem, note = "a tab cannot stand here", "indent with spaces"
    if "flow" in note:
        note += "; inside {} an expression must be quoted"
    place = document.source.location(start, start + 1)
    document.refuse("yaml-syntax", f"the spec is not YAML: {problem}", place, note=note)


class _Reader:
    """Nodes to data and marks."""

    def __init__(self, document: Document, refused: set[yaml.Node]) -> None:
        self._document = document
        self._refused = refused
        self._torn: set[yaml.Node] = set()  # keys that are the rest of an unquoted expression

    def read_mapping(self, node: yaml.MappingNode, path: str) -> dict[str, Any]:
        """The mapping without what had to be refused."""
        data: dict[str, Any] = {}
        for index, (key_node, value_node) in enumerate(node.value):
            if key_node in self._torn or self._refuse_torn_head(path, node, index):
                continue
            span = (key_node.start_mark.index, key_node.end_mark.index)
            key = self._read_key(key_node, span, path)
            if key is None:
                continue
            here = f"{path}.{key}" if path else key
            self._document.marks[here] = self._mark(span, value_node)
            if _is_one_of(here, _EXPRESSION_PATHS) and node.flow_style and _needs_quotes(value_node):
                self._refuse_unquoted(here, value_node, _from(node, index + 1))
            elif self._may_stand(value_node, here):
                data[key] = self._read(value_node, here)
        return data

    def _read_key(self, node: yaml.Node, span: tuple[int, int], path: str) -> str | None:
        """The key, or None where it was refused."""
        place = self._document.source.location(*span)
        if not isinstance(node, yaml.ScalarNode) or node in self._refused:
            self._document.refuse("yaml-keys", "a key must be a word", place)
            return None
        if node.value == "<<" and node.style is None:
            note = "write the merged keys out here"
            self._document.refuse("yaml-plain", "`<<` is a merge key", place, path, note)
            return None
        key: str = node.value
        if len(key) > MAX_KEY:
            note = f"it has {len(key):,} characters; at most {MAX_KEY} are read"
            self._document.refuse("yaml-keys", "a key must be a word", place, path, note)
            return None
        here = f"{path}.{key}" if path else key
        if here in self._document.marks:
            note = f"first given in line {self._document.marks[here].key_location.line}"
            self._document.refuse("unique-keys", f"duplicate key {here}", place, here, note)
            return None
        return key

    def _refuse_unquoted(self, path: str, node: yaml.Node, rest: Iterator[_Pair]) -> None:
        """Refuse an unquoted expression inside {}; what YAML tore off it at a comma follows as empty keys."""
        torn = [key for key, _ in takewhile(lambda pair: _is_missing(pair[1]), rest)]
        source, start, end = self._document.source, node.start_mark.index, [node, *torn][-1].end_mark.index
        self._torn.update(torn)
        self._document.faulty.add(path)
        self._document.refuse(
            "quoted-expressions",
            f"{path} must be quoted inside {{}}",
            source.location(start, end),
            path,
            note="YAML ends it at a comma or a bracket",
            nearest=(f'{path}: "{source.text[start:end]}"',),
        )

    def _refuse_torn_head(self, path: str, node: yaml.MappingNode, index: int) -> bool:
        """Refuse an unquoted `band(p, q):` inside {}, which YAML tore at the comma."""
        if path != "define" or not node.flow_style or not _opens(node.value[index][0]):
            return False
        first, *torn = self._torn_head(node, index)
        source, start, end = self._document.source, first.start_mark.index, [first, *torn][-1].end_mark.index
        self._torn.update(torn)
        self._document.refuse(
            "quoted-expressions",
            "the name of a definition with parameters must be quoted inside {}",
            source.location(start, end),
            path,
            note="YAML ends it at a comma",
            nearest=(f'"{source.text[start:end]}": ...',),
        )
        return True

    def _torn_head(self, node: yaml.MappingNode, index: int) -> list[yaml.Node]:
        """The keys that are one head, up to the one that closes it; only the first where none does."""
        keys = [node.value[index][0]]
        for key, _ in _from(node, index + 1):
            if _opens(key):
                break
            keys.append(key)
            if not isinstance(key, yaml.ScalarNode) or key.style is not None or ")" in key.value:
                return keys
        return keys[:1]

    def _read(self, node: Any, path: str) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self.read_mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._read_item(item, f"{path}[{index}]") for index, item in enumerate(node.value)]
        if node.style is not None or _is_one_of(path, _TEXT_PATHS):
            return node.value
        return _plain_value(node.value)

    def _read_item(self, node: yaml.Node, path: str) -> Any:
        span = (node.start_mark.index, node.end_mark.index)
        self._document.marks[path] = self._mark(span, node)
        return self._read(node, path) if self._may_stand(node, path) else None

    def _mark(self, key: tuple[int, int], node: yaml.Node) -> Mark:
        source = self._document.source
        offsets = scalar_offsets(source, node) if isinstance(node, yaml.ScalarNode) else ()
        return Mark(source, key, (node.start_mark.index, node.end_mark.index), offsets)

    def _may_stand(self, node: yaml.Node, path: str) -> bool:
        """Whether a value is there to be read, and not an alias that was refused."""
        if node in self._refused:
            self._document.faulty.add(path)
        return node not in self._refused


def _is_one_of(path: str, fields: tuple[str, ...]) -> bool:
    """Whether a path is one of the fields, or in one of the blocks, whose names end in a dot."""
    return path in fields or f"{path.partition('.')[0]}." in fields and "." in path


def _from(node: yaml.MappingNode, index: int) -> Iterator[_Pair]:
    """The pairs of a mapping from one on, without a copy of the rest for each."""
    return (node.value[place] for place in range(index, len(node.value)))


def _opens(key: yaml.Node) -> bool:
    """Whether an unquoted key opens a bracket that it does not close."""
    return (
        isinstance(key, yaml.ScalarNode) and key.style is None and "(" in key.value and ")" not in key.value
    )


def _is_missing(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and not node.value


def _needs_quotes(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and not re.fullmatch(r"\w*", node.value)


def _plain_value(text: str) -> Any:
    """What an unquoted scalar is: a number is decimal, a truth value is true or false, all else is a text."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _REAL.fullmatch(text) else text
