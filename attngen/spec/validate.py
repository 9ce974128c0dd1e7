"""From a document to a Spec, or to one report of everything that is wrong with it."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain, islice
from typing import Any, get_args

import pydantic
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from attngen.errors import MAX_TOLD, Diagnostic, ExpressionError, Location, SpecError, SpecWarning
from attngen.spec.broken import Broken
from attngen.spec.document import Document
from attngen.spec.gradient_rules import check_declared_gradients
from attngen.spec.models import Expects, SpecModel
from attngen.spec.rules import check_rules, nearest_head_dims
from attngen.spec.shape_rules import check_shapes
from attngen.spec.spec import Spec
from attngen.spec.texts import Expressions

_MAX_SHOWN = 40  # characters of a value that a message repeats; the source line has the rest
_REQUIRED = "problem.head_dim"


def validate(document: Document, *, warns: bool = True) -> Spec:
    """The Spec that a document describes.

    Args:
        document: a text, or data.
        warns: of what is legal and rarely meant, by SpecWarning.

    Raises:
        SpecError: every violation, in the order of the text; an ExpressionError where all are in expressions.
    """
    model = None
    expressions = Expressions(document)
    untold = expressions.untold
    faults = document.diagnostics + expressions.declaration_faults
    expression_faults = expressions.text_faults
    if document.is_spec:
        try:
            model = SpecModel.model_validate(document.data)
        except pydantic.ValidationError as error:
            found, others = _schema_faults(document, error)
            faults, untold = faults + found, untold + others
        faults += _rule_faults(document)
    if faults or expression_faults:
        report = tuple(sorted(faults + expression_faults, key=_place))
        raise (SpecError if faults else ExpressionError)(report, untold)
    assert model is not None  # a document without faults has a model
    spec = Spec.from_model(model, document.marks)
    written = document.data.get("gradients", ())
    if broken := tuple(_diagnostic(document, each) for each in check_declared_gradients(spec, written)):
        raise SpecError(broken)
    for doubt in expressions.doubts if warns else ():
        warnings.warn(SpecWarning(doubt), stacklevel=3)
    return spec


def _place(fault: Diagnostic) -> tuple[str, int, int]:
    location = fault.location
    return (location.file, location.line, location.column) if location else ("", 0, 0)


def _rule_faults(document: Document) -> Iterator[Diagnostic]:
    found = chain(check_rules(document.data), check_shapes(document.data))
    return (_diagnostic(document, broken) for broken in found)


def _diagnostic(document: Document, broken: Broken) -> Diagnostic:
    what = broken.path if broken.is_missing else _given(document, broken.path, broken.value)
    where = _location_without if broken.is_missing else _value_location
    return Diagnostic(
        message=f"{what} {broken.must}",
        rule=broken.rule,
        location=where(document, broken.path),
        path=broken.path,
        value=broken.value,
        note=broken.note,
        nearest=broken.nearest,
    )


@dataclass(frozen=True)
class _Place:
    """Where in the schema an error stands.

    Attributes:
        path: dotted path of the value.
        key: its own key.
        field: the field it is, or the element of a list as one; None for an unknown key.
        block: the model that the key stands in.
    """

    path: str
    key: str
    field: FieldInfo | None
    block: type[pydantic.BaseModel]


def _schema_faults(document: Document, error: pydantic.ValidationError) -> tuple[list[Diagnostic], int]:
    """pydantic's errors, one for a value: the arms of a union and both ends of a head_dim fail together.

    Told are the first in the text, with how many more there are: what is told of one takes a while to find out.
    """
    found: dict[str, tuple[_Place, ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        place = _resolve(document, details["loc"])
        if place is not None:
            found.setdefault(place.path, (place, details))
    first = sorted(found.values(), key=lambda each: document.start(each[0].path))[:MAX_TOLD]
    return [_schema_fault(document, *each) for each in first], len(found) - len(first)


def _schema_fault(document: Document, place: _Place, details: ErrorDetails) -> Diagnostic:
    if details["type"] == "extra_forbidden":
        return _unknown_key(document, place)
    if details["type"] == "missing":
        return _missing_key(document, place)
    return _wrong_value(document, place, details["input"])


def _resolve(document: Document, loc: tuple[int | str, ...]) -> _Place | None:
    """The place of an error, no deeper than the data goes: past that stand the arms of a union.

    None where a fault of the text is told already, of the value or of what holds it.
    """
    place = _Place("", "", None, SpecModel)
    data: Any = document.data
    inner: type[pydantic.BaseModel] | None = SpecModel
    for part in loc:
        if isinstance(part, int) and isinstance(data, list | tuple):
            place = _Place(f"{place.path}[{part}]", place.key, _element_of(place.field), place.block)
            data = data[part]
        elif isinstance(part, str) and isinstance(data, dict) and inner:
            field = inner.model_fields.get(part)
            if (
                field is None and part not in data
            ):  # an arm of a union: the model's own, or one that takes no mapping
                if part == inner.__name__:
                    continue
                return None
            place = _Place(f"{place.path}.{part}".lstrip("."), part, field, inner)
            data, inner = data.get(part), _model_of(field)
        elif isinstance(part, str) and isinstance(data, dict) and (field := _value_of(place.field)):
            place = _Place(f"{place.path}.{part}", part, field, place.block)
            data = data.get(part)
        else:
            break
        if place.path in document.faulty:
            return None
    return place


def _model_of(field: FieldInfo | None) -> type[pydantic.BaseModel] | None:
    """The model that a field holds, may hold, or holds a list of."""
    annotation = field.annotation if field else None
    annotation = next(iter(get_args(annotation)), annotation)
    return annotation if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel) else None


def _element_of(field: FieldInfo | None) -> FieldInfo | None:
    """What a list holds: the field that each of its elements is."""
    arguments = get_args(field.annotation) if field else ()
    return FieldInfo.from_annotation(arguments[0]) if arguments[1:] == (...,) else None


def _value_of(field: FieldInfo | None) -> FieldInfo | None:
    """What a block of names holds: the field that each of its values is."""
    arguments = get_args(field.annotation) if field else ()
    return FieldInfo.from_annotation(arguments[1]) if arguments[:1] == (str,) else None


def _wrong_value(document: Document, place: _Place, value: Any) -> Diagnostic:
    expects = _expects(place)
    return Diagnostic(
        message=f"{_given(document, place.path, value)} must be {expects.words}",
        rule=expects.rule,
        location=_value_location(document, place.path),
        path=place.path,
        value=value,
        note=_kind_of(value),
        nearest=_nearest_values(document, place.path, expects.nearest(value)),
    )


def _nearest_values(document: Document, path: str, nearest: tuple[str, ...]) -> tuple[str, ...]:
    """What the schema takes for a value, or what the rule of head dims leaves of it."""
    if not f"{path}.".startswith(f"{_REQUIRED}.") or not nearest:
        return nearest
    return nearest_head_dims(document.data, int(nearest[0]))


def _kind_of(value: Any) -> str:
    """What a collection is where something else should stand: of its text a bracket or the first line is shown."""
    if isinstance(value, dict):
        keys = ", ".join(islice(map(str, value), 3))
        return (
            f"this is a mapping, with keys {keys}{', ...' if len(value) > 3 else ''}"
            if keys
            else "this is a mapping"
        )
    return "this is a list" if isinstance(value, list | tuple) else ""


def _given(document: Document, path: str, value: Any) -> str:
    """The value as it was written, as far as it is short."""
    if value is None:
        return f"{path} is empty; it"
    if isinstance(value, dict | list | tuple):
        return path
    mark = document.marks.get(path)
    shown = mark.source.text[slice(*mark.value)] if mark and mark.offsets else str(value)
    if "\n" in shown:
        return path
    return f"{path} = {shown if len(shown) <= _MAX_SHOWN else shown[:_MAX_SHOWN] + '…'}"


def _expects(place: _Place) -> Expects:
    """What may stand there; where the schema has no words for it, a mapping of the keys it knows."""
    for marker in place.field.metadata if place.field else ():
        if isinstance(marker, Expects):
            return marker
    model = _model_of(place.field) or _model_of(place.block.model_fields.get(place.key)) or SpecModel
    return Expects("spec-mapping", f"a mapping of keys: {', '.join(model.model_fields)}")


def _missing_key(document: Document, place: _Place) -> Diagnostic:
    path = _REQUIRED if place.path == "problem" else place.path  # the block is there for its one required key
    is_head_dim = path == _REQUIRED
    return Diagnostic(
        message=f"{path} must be given",
        rule="required-keys",
        location=_location_without(document, place.path),
        path=path,
        note="the columns of Q, K and V; every other key has a default" if is_head_dim else "",
        nearest=("problem: {head_dim: 128}",) if is_head_dim else (f"{path.rpartition('.')[2]}: 128",),
    )


def _unknown_key(document: Document, place: _Place) -> Diagnostic:
    path = place.path
    # A dotted path of `replace` has a mark for itself and for none of its blocks.
    mark = document.marks.get(path) or next(
        (mark for known, mark in document.marks.items() if f"{known}.".startswith(f"{path}.")), None
    )
    return Diagnostic(
        message=f"unknown key {path or repr(path)}",
        rule="known-keys",
        location=mark.key_location if mark else None,
        path=path,
        value=place.key,
        nearest=_nearest_keys(place),
    )


def _nearest_keys(place: _Place) -> tuple[str, ...]:
    """A key of another block by this name, else one of this block that is spelt alike, else all of this block."""
    known = dict(_blocks())
    block, _, key = place.key.rpartition(".")
    if key in known.get(block, ()) and block:  # `tile.block_n: 64`, where two keys should be
        return (f"{block}: {{{key}: ...}}",)
    elsewhere = tuple(f"{block}.{place.key}" for block, keys in known.items() if place.key in keys)
    siblings = tuple(place.block.model_fields)
    return elsewhere or tuple(get_close_matches(place.key, siblings, n=2)) or siblings


def _blocks() -> Iterator[tuple[str, tuple[str, ...]]]:
    """The blocks of a spec with the keys of each."""
    for name, field in SpecModel.model_fields.items():
        if model := _model_of(field):
            yield name, tuple(model.model_fields)


def _location_without(document: Document, path: str) -> Location | None:
    """Where a value should stand that is missing: at the block that lacks it, or in the first line."""
    parent = document.marks.get(path.rpartition(".")[0])
    start = document.source.location(0, 1) if document.marks else None
    return parent.key_location if parent else start


def _value_location(document: Document, path: str) -> Location | None:
    mark = document.marks.get(path)
    return mark.value_location if mark else None
