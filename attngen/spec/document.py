"""YAML to plain data with marks: `compose`, and the part of YAML that a spec is written in.

PyYAML's `safe_load` drops duplicate keys, turns `on` into True and leaves `1e-3` a string; here nothing is lost and
a scalar is what it looks like. Tags, anchors, aliases and merge keys are refused, each with its cure. Nothing here
knows the schema, except which fields hold text.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from attngen.errors import Diagnostic, Location
from attngen.spec.source import Mark, Source, scalar_offsets

TEXT_PATHS = frozenset({"name", "mask", "score"})
"""Fields read from their own text, whatever type YAML would give it."""

EXPRESSION_PATHS = frozenset({"mask", "score"})

_MAX_NESTING = 16
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,30})")
_REAL = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
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
    """

    source: Source
    data: dict[str, Any] = field(default_factory=dict)
    marks: dict[str, Mark] = field(default_factory=dict)
    diagnostics: list[Diagnostic] = field(default_factory=list)
    faulty: set[str] = field(default_factory=set)

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
        self.diagnostics.append(
            Diagnostic(message, rule, location, path, _text_at(location), note=note, nearest=nearest)
        )
        if path:
            self.faulty.add(path)


def read_document(source: Source) -> Document:
    """Read a YAML text. What is wrong with it is recorded, never raised."""
    document = Document(source)
    try:
        composer = _Composer(document)
        root = composer.get_single_node()
    except yaml.reader.ReaderError as error:
        place = source.location(error.position, error.position + 1)
        document.refuse("yaml-characters", "is not YAML", place, note="this character cannot stand in a text")
        return document
    except yaml.MarkedYAMLError as error:
        _refuse_syntax(document, error)
        return document
    except _TooDeep:
        return document
    if isinstance(root, yaml.MappingNode):
        document.data = _Reader(document, composer.refused).read_mapping(root, "")
    else:
        start = root.start_mark.index if root else 0
        message = "is not a spec" if root else "is empty"
        document.refuse(
            "spec-mapping",
            f"the spec {message}",
            source.location(start, root.end_mark.index if root else 0),
            note="a spec is a mapping of keys to values, and only problem.head_dim is required",
            nearest=("problem: {head_dim: 128}",),
        )
        document.faulty.add("problem.head_dim")
    return document


def dump_text(data: Mapping[str, Any]) -> str:
    """Plain data as YAML text, one line for each value.

    Raises:
        yaml.YAMLError: something in it has no YAML form.
    """
    return yaml.dump(dict(data), Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=float("inf"))


class _PlainDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True  # a spec has no anchors


class _TooDeep(Exception):
    """A way out of the recursion; the fault is recorded already."""


def _text_at(location: Location) -> str:
    return location.text[location.column - 1 : location.column - 1 + location.length]


def _refuse_syntax(document: Document, error: yaml.MarkedYAMLError) -> None:
    mark = error.problem_mark or error.context_mark
    start = mark.index if mark else 0
    problem = error.problem or error.context or "it has no structure"
    note = f"{error.context}" if error.problem and error.context else ""
    if "flow" in note:
        note += "; inside {} an expression must be quoted"
    document.refuse(
        "yaml-syntax", f"is not YAML: {problem}", document.source.location(start, start + 1), note=note
    )


class _Composer(yaml.SafeLoader):
    """Composes nodes, and refuses what a spec is not written in: anchors, aliases, tags, endless nesting."""

    def __init__(self, document: Document) -> None:
        super().__init__(document.source.text)
        self.refused: list[yaml.Node] = []  # each stands for an alias
        self._document = document
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        start = event.start_mark.index
        if isinstance(event, yaml.AliasEvent):
            self.get_event()  # type: ignore[no-untyped-call]
            self._refuse(start, f"*{event.anchor}", "is an alias", "write the value out here")
            node = yaml.ScalarNode("", "", event.start_mark, event.end_mark)  # type: ignore[arg-type]
            self.refused.append(node)
            return node
        if event.anchor is not None:
            self._refuse(start, f"&{event.anchor}", "is an anchor", "leave it away; a spec has no aliases")
            event.anchor = None
        if event.tag is not None:
            self._refuse(start, "!", "is a tag", "leave it away; the schema knows every type")
            event.tag = None
            if isinstance(event, yaml.ScalarEvent):
                event.implicit = (event.style is None, event.style is not None)
        self._depth += 1
        if self._depth > _MAX_NESTING:
            place = self._document.source.location(start, start + 1)
            self._document.refuse("yaml-nesting", f"is nested more than {_MAX_NESTING} deep", place)
            raise _TooDeep
        node = super().compose_node(parent, index)  # type: ignore[assignment]
        self._depth -= 1
        return node

    def _refuse(self, start: int, word: str, message: str, note: str) -> None:
        text = self._document.source.text
        start = text.index(word, start)
        found = re.compile(r"\S*?(?=[\s,\]}]|$)").match(text, start)
        end = found.end() if found else start + 1
        self._document.refuse(
            "yaml-plain",
            f"`{text[start:end]}` {message}",
            self._document.source.location(start, end),
            note=note,
        )


class _Reader:
    """Nodes to data and marks."""

    def __init__(self, document: Document, refused: list[yaml.Node]) -> None:
        self._document = document
        self._refused = refused

    def read_mapping(self, node: yaml.MappingNode, path: str) -> dict[str, Any]:
        """The mapping without what had to be refused."""
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            span = (key_node.start_mark.index, key_node.end_mark.index)
            place = self._document.source.location(*span)
            if not isinstance(key_node, yaml.ScalarNode) or key_node in self._refused:
                self._document.refuse("yaml-keys", "a key must be a word", place)
                continue
            key = key_node.value
            here = f"{path}.{key}" if path else key
            if key == "<<" and key_node.style is None:
                note = "write the merged keys out here"
                self._document.refuse("yaml-plain", "`<<` is a merge key", place, note=note)
            elif here in self._document.marks:
                first = self._document.marks[here].key_location
                note = f"first given in line {first.line}"
                self._document.refuse("unique-keys", f"duplicate key {here}", place, path=here, note=note)
            else:
                self._document.marks[here] = self._mark(span, value_node)
                if self._may_stand(value_node, here, in_flow=bool(node.flow_style)):
                    data[key] = self._read(value_node, here)
        return data

    def _read(self, node: yaml.Node, path: str) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self.read_mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            items = []
            for index, item in enumerate(node.value):
                here = f"{path}[{index}]"
                mark = self._mark((item.start_mark.index, item.end_mark.index), item)
                self._document.marks[here] = mark
                if self._may_stand(item, here, in_flow=False):
                    items.append(self._read(item, here))
            return items
        if node.style is not None or path in TEXT_PATHS:  # type: ignore[attr-defined]
            return node.value
        return _plain_value(node.value)

    def _mark(self, key: tuple[int, int], node: yaml.Node) -> Mark:
        source = self._document.source
        offsets = scalar_offsets(source, node) if isinstance(node, yaml.ScalarNode) else ()
        return Mark(source, key, (node.start_mark.index, node.end_mark.index), offsets)

    def _may_stand(self, node: yaml.Node, path: str, in_flow: bool) -> bool:
        """Whether a value is there to be read; records why not."""
        if node in self._refused:
            self._document.faulty.add(path)
            return False
        is_plain = isinstance(node, yaml.ScalarNode) and node.style is None
        if path in EXPRESSION_PATHS and in_flow and is_plain and not re.fullmatch(r"\w*", node.value):
            self._document.refuse(
                "quoted-expressions",
                f"{path} must be quoted inside {{}}",
                self._document.marks[path].value_location,
                path,
                note="a comma or a bracket would end it",
                nearest=(f'{path}: "{node.value}"',),
            )
            return False
        return True


def _plain_value(text: str) -> Any:
    """What an unquoted scalar is: a number is decimal, a truth value is true or false, all else is a text."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _REAL.fullmatch(text) else text
