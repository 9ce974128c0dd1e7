"""From a file, a text or a dict to a Spec, or to one report of everything that is wrong with it."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

from attngen.errors import Diagnostic, ExpressionError, SpecError
from attngen.expr import parse_mask, parse_score
from attngen.resources import shipped_specs, spec_path
from attngen.spec.document import Document, read_document
from attngen.spec.schema import SpecModel, legal_head_dims
from attngen.spec.source import Mark, Source
from attngen.spec.spec import Spec


def load(source: "str | Path | Mapping[str, Any] | Spec") -> Spec:
    """Read a spec.

    Args:
        source: a path, the name of a shipped spec, YAML text, a dict, or a Spec (returned as it is).

    Raises:
        SpecError: every violation, in the order of the text.
    """
    if isinstance(source, Spec):
        return source
    if isinstance(source, Mapping):
        return validate(dict(source), file="<dict>")
    if isinstance(source, Path):
        return _load_text(_read_file(source))
    if "\n" in source or ": " in source or source.rstrip().endswith(":"):
        return _load_text(Source("<text>", source))
    path = Path(source)
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return _load_text(_read_file(path))
    if (shipped := spec_path(source)) is not None:
        return _load_text(_read_file(shipped))
    return _refuse_name(source)


def validate(data: dict[str, Any], file: str) -> Spec:
    """A Spec of plain data, which has no marks.

    Raises:
        SpecError: every violation.
    """
    return _build(Document(Source(file, ""), data))


def _refuse_name(name: str) -> Spec:
    known = [path.stem for path in shipped_specs()]
    nearest = tuple(difflib.get_close_matches(name, known)) or tuple(known[:3])
    raise SpecError(
        (
            Diagnostic(
                f"{name!r} is neither a file nor a shipped spec", "spec-file", value=name, nearest=nearest
            ),
        )
    )


def _read_file(path: Path) -> Source:
    try:
        return Source(str(path), path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        message, note = f"{path} cannot be read: {error.strerror or error}", ""
    except UnicodeDecodeError as error:
        message, note = f"{path} is not a text", f"byte {error.start} is not UTF-8"
    raise SpecError((Diagnostic(message, "spec-file", value=str(path), note=note),))


def _load_text(source: Source) -> Spec:
    return _build(read_document(source))


def _build(document: Document) -> Spec:
    faults = list(document.diagnostics)
    if faults and not document.data:
        raise SpecError(tuple(faults))  # not a mapping at all: the schema would only repeat it
    data = _spread_head_dim(document)
    model = None
    try:
        model = SpecModel.model_validate(data)
    except pydantic.ValidationError as error:
        for path, details in _by_path(error).items():
            if path not in document.faulty:
                faults.append(_schema_fault(document, path, details))
    faults += _head_dim_faults(document, data) + _expression_faults(document, data)
    if faults:
        raise SpecError(tuple(sorted(faults, key=_position)))
    assert model is not None  # a spec without faults has a model
    return Spec(model, document.marks)


def _position(fault: Diagnostic) -> tuple[int, int]:
    return (fault.location.line, fault.location.column) if fault.location else (0, 0)


def _spread_head_dim(document: Document) -> dict[str, Any]:
    """The data with `head_dim: 128` written as {qk: 128, v: 128}."""
    data = dict(document.data)
    problem = data.get("problem")
    if isinstance(problem, dict) and "head_dim" in problem and not isinstance(problem["head_dim"], dict):
        data["problem"] = problem | {"head_dim": {"qk": problem["head_dim"], "v": problem["head_dim"]}}
    return data


def _by_path(error: pydantic.ValidationError) -> dict[str, list[Any]]:
    """pydantic's faults, gathered by the dotted path of the value; the arms of a union are one place."""
    found: dict[str, list[Any]] = {}
    for details in error.errors():
        path = ""
        for part in details["loc"]:
            if isinstance(part, int):
                path += f"[{part}]"
            elif part.isidentifier() and part not in ("int", "str"):
                path += f".{part}" if path else part
        found.setdefault(path, []).append(details)
    return found


def _schema_fault(document: Document, path: str, details: list[Any]) -> Diagnostic:
    first = details[0]
    shown = path
    if path.startswith("problem.head_dim.") and path not in document.marks:
        shown = "problem.head_dim"
    mark = document.marks.get(shown)
    value = first["input"]
    place = mark.value_location if mark else None
    if first["type"] == "extra_forbidden":
        siblings = _keys_of(path.rpartition(".")[0])
        key = path.rpartition(".")[2]
        near = difflib.get_close_matches(key, siblings, n=2) or siblings
        return Diagnostic(
            f"unknown key {path}",
            "known-keys",
            mark.key_location if mark else None,
            path,
            value,
            nearest=tuple(near),
        )
    if first["type"] == "missing":
        parent = document.marks.get(path.rpartition(".")[0])
        return Diagnostic(
            f"{path} must be given",
            "required-keys",
            parent.value_location if parent else document.source.location(0, 1) if document.marks else None,
            path,
            note="only problem.head_dim is required" if "head_dim" in path or path == "problem" else "",
            nearest=("problem: {head_dim: 128}",) if "head_dim" in path or path == "problem" else (),
        )
    expected, nearest = _expectation(details, value)
    return Diagnostic(
        f"{shown} = {_shown(value)} must be {expected}", "schema", place, shown, value, nearest=nearest
    )


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _expectation(details: list[Any], value: Any) -> tuple[str, tuple[str, ...]]:
    """What the value must be, in words, and the nearest that would do."""
    allowed: list[str] = []
    words: list[str] = []
    for fault in details:
        kind, context = fault["type"], fault.get("ctx", {})
        if kind == "literal_error":
            allowed += [
                word.strip().strip("'") for word in context["expected"].replace(" or ", ",").split(",")
            ]
        elif kind == "greater_than_equal":
            words.append(f"at least {context['ge']}")
        elif kind in ("value_error", "int_type", "int_parsing", "int_from_float"):
            words.append("an integer")
        elif kind == "string_type":
            words.append("text")
        elif kind in ("model_type", "model_attributes_type", "dict_type"):
            words.append("a mapping of keys to values")
        elif kind in ("tuple_type", "list_type"):
            words.append("a list")
        else:
            words.append(fault["msg"])
    words += [f"one of {', '.join(allowed)}" if len(allowed) > 1 else allowed[0]] if allowed else []
    near = difflib.get_close_matches(str(value), allowed, n=2, cutoff=0.3)
    if not near and any(fault["type"] == "greater_than_equal" for fault in details):
        near = [str(fault["ctx"]["ge"]) for fault in details if "ge" in fault.get("ctx", {})]
    return " or ".join(dict.fromkeys(words)), tuple(near)


def _keys_of(path: str) -> list[str]:
    """The keys that may stand under a path."""
    model: Any = SpecModel
    for part in path.split(".") if path else ():
        annotation = model.model_fields[part.partition("[")[0]].annotation
        model = annotation.__args__[0] if getattr(annotation, "__args__", None) else annotation
    return list(model.model_fields)


def _head_dim_faults(document: Document, data: dict[str, Any]) -> list[Diagnostic]:
    """Head dims that the target does not take."""
    problem = data.get("problem")
    dims = problem.get("head_dim") if isinstance(problem, dict) else None
    if not isinstance(dims, dict):
        return []
    legal = legal_head_dims(str(data.get("target", "auto")))
    faults: list[Diagnostic] = []
    for key in ("qk", "v"):
        dim = dims.get(key)
        if not isinstance(dim, int) or isinstance(dim, bool) or dim < 1 or dim in legal:
            continue
        path = f"problem.head_dim.{key}"
        if path not in document.marks and document.data["problem"]["head_dim"] == dim:
            path = "problem.head_dim"
            if faults:
                continue  # one number stands for both
        mark = document.marks.get(path)
        faults.append(
            Diagnostic(
                f"{path} = {dim} must be a multiple of {legal.step} from {legal[0]} to {legal[-1]}",
                "head-dim",
                mark.value_location if mark else None,
                path,
                dim,
                note="rows of 16 bytes, and an output that fits the registers",
                nearest=tuple(str(near) for near in sorted(_two_nearest(dim, legal))),
            )
        )
    return faults


def _two_nearest(dim: int, legal: range) -> list[int]:
    below = [value for value in legal if value < dim][-1:]
    above = [value for value in legal if value > dim][:1]
    return below + above


def _expression_faults(document: Document, data: dict[str, Any]) -> list[Diagnostic]:
    faults: list[Diagnostic] = []
    for field, parse in (("mask", parse_mask), ("score", parse_score)):
        text = data.get(field)
        if isinstance(text, str) and field not in document.faulty:
            mark: Mark | None = document.marks.get(field)
            try:
                parse(text, mark.locate) if mark else parse(text)
            except ExpressionError as error:
                faults += error.diagnostics
    return faults
