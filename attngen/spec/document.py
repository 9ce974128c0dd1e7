"""YAML to plain data with marks: `compose`, and the part of YAML that a spec is written in.

PyYAML's `safe_load` drops duplicate keys, turns `on` into True and leaves `1e-3` a string; here nothing is lost
and a scalar is what it looks like, except that some fields are texts whatever they look like. Tags, anchors, aliases
and merge keys are refused, each with its cure. Nothing here knows the schema, except which fields hold text.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import yaml

from attngen.errors import Diagnostic, Location
from attngen.spec.source import Mark, Source, scalar_offsets

_TEXT_PATHS = ("name", "mask", "score", "scalars.", "tensors.", "define.")
_EXPRESSION_PATHS = ("mask", "score", "tensors.", "define.")
MAX_NESTING = 16
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,999})")
_REAL = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_WORD_END = re.compile(r"[\s,\]}]")
_WORDS: dict[str, bool | None] = {"true": True, "false": False, "null": None, "~": None, "": None}


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

    def locate(self, path: str, span: tuple[int, int] | None) -> Location | None:
        """Where a stretch of the text at a path stands, or its key; None where neither was written."""
        mark = self.marks.get(path)
        if mark is None:
            return None
        return mark.key_location if span is None else mark.locate_span(*span)


def read_document(source: Source) -> Document:
    """Read a YAML text. What is wrong with it is recorded, never raised."""
    document = Document(source, is_spec=False)
    try:
        composer = _Composer(document)
        root = composer.get_single_node()
    except yaml.reader.ReaderError as error:
        place = source.location(error.position, error.position + 1)
        note = f"U+{int(error.character):04X} cannot stand in a text"
        document.refuse("yaml-characters", "the spec is not YAML", place, note=note)
    except yaml.MarkedYAMLError as error:
        _refuse_syntax(document, error)
    except _TooDeep:
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


class _TooDeep(Exception):
    """A way out of the recursion; the fault is recorded already."""


def _refuse_syntax(document: Document, error: yaml.MarkedYAMLError) -> None:
    mark = error.problem_mark or error.context_mark
    start = mark.index if mark else 0
    problem, note = error.problem or "it has no structure", error.context or ""
    if "another document" in problem:
        problem, note = "a second document begins", "a file holds one spec"
    if "flow" in note:
        note += "; inside {} an expression must be quoted"
    place = document.source.location(start, start + 1)
    document.refuse("yaml-syntax", f"the spec is not YAML: {problem}", place, note=note)


class _Composer(yaml.SafeLoader):
    """Composes nodes, and refuses what a spec is not written in: anchors, aliases, tags, endless nesting."""

    def __init__(self, document: Document) -> None:
        super().__init__(document.source.text)
        self.refused: list[yaml.Node] = []  # each stands for an alias
        self._document = document
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        start = event.start_mark.index
        if isinstance(event, yaml.AliasEvent):
            self.get_event()  # type: ignore[no-untyped-call]
            self._refuse(start, f"*{event.anchor}", "is an alias", "write the value out here")
            start_mark: Any = event.start_mark
            self.refused.append(yaml.ScalarNode("", "", start_mark, start_mark))
            return self.refused[-1]
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
            place = self._document.source.location(start, start + 1)
            self._document.refuse("yaml-nesting", f"the spec is nested more than {MAX_NESTING} deep", place)
            raise _TooDeep
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def _refuse(self, start: int, word: str, message: str, note: str) -> None:
        text = self._document.source.text
        start = text.index(word, start)  # an anchor and a tag of one node may stand in either order
        found = _WORD_END.search(text, start + 1)
        end = found.start() if found else len(text)
        place = self._document.source.location(start, end)
        self._document.refuse("yaml-plain", f"`{text[start:end]}` {message}", place, note=note)


class _Reader:
    """Nodes to data and marks."""

    def __init__(self, document: Document, refused: list[yaml.Node]) -> None:
        self._document = document
        self._refused = refused
        self._torn: list[yaml.Node] = []  # keys that are the rest of an unquoted expression

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
                self._refuse_unquoted(here, value_node, node.value[index + 1 :])
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
        here = f"{path}.{key}" if path else key
        if here in self._document.marks:
            note = f"first given in line {self._document.marks[here].key_location.line}"
            self._document.refuse("unique-keys", f"duplicate key {here}", place, here, note)
            return None
        return key

    def _refuse_unquoted(self, path: str, node: yaml.Node, rest: list[tuple[yaml.Node, yaml.Node]]) -> None:
        """Refuse an unquoted expression inside {}; what YAML tore off it at a comma follows as empty keys."""
        torn = [key for key, _ in takewhile(lambda pair: _is_missing(pair[1]), rest)]
        source, start, end = self._document.source, node.start_mark.index, [node, *torn][-1].end_mark.index
        self._torn += torn
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
        keys = [key for key, _ in node.value[index:]]
        heads = [key.value if isinstance(key, yaml.ScalarNode) and key.style is None else ")" for key in keys]
        if path != "define" or not node.flow_style or "(" not in heads[0] or ")" in heads[0]:
            return False
        last = next((place for place, head in enumerate(heads) if ")" in head), 0)
        source, start, end = self._document.source, keys[0].start_mark.index, keys[last].end_mark.index
        self._torn += keys[1 : last + 1]
        self._document.refuse(
            "quoted-expressions",
            "the name of a definition with parameters must be quoted inside {}",
            source.location(start, end),
            path,
            note="YAML ends it at a comma",
            nearest=(f'"{source.text[start:end]}": ...',),
        )
        return True

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
