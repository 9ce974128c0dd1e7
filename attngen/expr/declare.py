"""From texts to declarations: scalars (`f32 = 30.0`), tensors (`i32[batch, seqlen_k]`), heads of definitions.

All faults are recorded; whoever has the texts tells by `locate` where they stand. What the text of a definition
means is the parser's business.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from attngen.errors import Diagnostic, Location
from attngen.expr.arithmetic import FUNCTIONS
from attngen.expr.declarations import (
    PAGE_SIZES,
    SINK,
    SIZE_NAMES,
    SORTED,
    SORTED_DIMENSIONS,
    TOKENS,
    VALUE_TYPES,
    Declarations,
    Definition,
    Scalar,
    TensorType,
)
from attngen.expr.given_blocks import GIVEN_BLOCKS
from attngen.expr.literals import (
    DEFAULTS,
    SCALAR_TYPES,
    nearest_declarations,
    nearest_defaults,
    nearest_types,
    read_constant,
    read_default,
    read_integer,
)
from attngen.expr.scope import KEYWORDS
from attngen.expr.tree import INDEX_NAMES, LARGEST_INDEX, Expr
from attngen.quantize import DESCALES

Span = tuple[int, int]

LocateSpan = Callable[[str, Span | None], Location | None]
"""Where a stretch of the text at a path stands, `("scalars.cap", (0, 3))`; with None, where its key stands."""

_CALL_ARGUMENTS = (
    "self", "q", "k", "v", "softmax_scale", "return_lse", "out", "layout", "tables", "mask",
    "scalars", "tensors", "deterministic",
)  # fmt: skip
_BACKWARD_ARGUMENTS = ("dout", "lse", "dlse", "grads", "accumulate")
_RAGGED_ARGUMENTS = (
    "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqused_q", "seqused_k", "leftpad_k",
    "work", *TOKENS,
)  # fmt: skip
_PAGED_ARGUMENTS = ("k_cache", "v_cache", "block_table", "cache_batch_idx", *PAGE_SIZES)
_NO_PARAMETERS = {
    **dict.fromkeys((*INDEX_NAMES, "q_pos", "score"), "a name of the language"),
    **dict.fromkeys(FUNCTIONS, "a function of the language"),
    **dict.fromkeys((*KEYWORDS, "AND", "OR", "NOT"), "a word of the language"),
}
_RESERVED = {
    **dict.fromkeys(SIZE_NAMES, "a size of every call"),
    **dict.fromkeys(_CALL_ARGUMENTS, "an argument of every call"),
    **dict.fromkeys(_BACKWARD_ARGUMENTS, "an argument of every backward pass"),
    **dict.fromkeys(DESCALES, "an argument of calls with e4m3 tensors"),
    **dict.fromkeys(_RAGGED_ARGUMENTS, "an argument or a size of calls with ragged lengths"),
    **dict.fromkeys(_PAGED_ARGUMENTS, "an argument or a size of calls with paged keys"),
    SINK: "an argument of calls with a learned sink",
    GIVEN_BLOCKS.name: "an argument of calls with given blocks",
    **dict.fromkeys(map(str, GIVEN_BLOCKS.dims), "a size of given blocks"),
    **_NO_PARAMETERS,
}
"""What nothing may be called that a spec declares, and why."""

_SIZE_OF_INDEX = {
    "b": "batch",
    "h": "num_heads_q",
    "h_kv": "num_heads_kv",
    "q_idx": "seqlen_q",
    "q_pos": "seqlen_k",
    "kv_idx": "seqlen_k",
}
_NAME = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")
_SCALAR = re.compile(r"\s*(\w+)\s*(?:=\s*(.*?))?\s*", re.DOTALL)
_TENSOR = re.compile(r"\s*(\w+)\s*\[(.*)\]\s*(\w+)?\s*", re.DOTALL)
_HEAD = re.compile(r"\s*([^\s(]+)\s*(?:\((.*)\))?\s*", re.DOTALL)
_MAX_SHOWN = 40  # characters of a text that a message repeats
_MAX_NAME = 100  # characters
_MAX_DECLARATION = 1_000  # characters of the text of a scalar or a tensor
_MAX_DIMENSIONS = 16
_MAX_DEFINITIONS = 100_000  # characters of the texts of all definitions: ten of the longest that are read


@dataclass
class Reading:
    """What texts declare, and what is wrong with them.

    Attributes:
        declarations: those without a fault.
        faults: in no order.
        faulty: names that have no declaration because of a fault; what reads them cannot be judged.
    """

    declarations: Declarations
    faults: list[Diagnostic] = field(default_factory=list)
    faulty: set[str] = field(default_factory=set)


def read_declarations(
    scalars: Mapping[str, str],
    tensors: Mapping[str, str],
    define: Mapping[str, str],
    locate: LocateSpan = lambda path, span: None,
) -> Reading:
    """Read the texts of all declarations.

    Args:
        scalars: `{"cap": "f32 = 30.0", "width": "i32"}`.
        tensors: `{"doc": "i32[batch, seqlen_k]"}`.
        define: `{"band(width)": "kv_idx > q_pos - width", "half": "q_pos // 2"}`.
        locate: where each of them stands; by default nowhere.
    """
    scalar_entries = [_Entry(f"scalars.{name}", name, text, locate) for name, text in scalars.items()]
    tensor_entries = [_Entry(f"tensors.{name}", name, text, locate) for name, text in tensors.items()]
    definition_entries = [
        _Entry(f"define.{head}", head.partition("(")[0].strip(), text, locate)
        for head, text in define.items()
    ]
    entries = (*scalar_entries, *tensor_entries, *definition_entries)
    owners = {entry.name: entry for entry in reversed(entries)}
    for entry in entries:
        entry.check_name(owners[entry.name])
    read_scalars = [_read_scalar(entry) for entry in scalar_entries if entry.check_length()]
    read_tensors = [_read_tensor(entry, owners) for entry in tensor_entries if entry.check_length()]
    _check_lengths(definition_entries)
    read_definitions = [_read_definition(entry) for entry in definition_entries]
    faulty = {entry.name for entry in entries if entry.faults}
    return Reading(
        Declarations(
            {scalar.name: scalar for scalar in read_scalars if scalar and scalar.name not in faulty},
            {tensor.name: tensor for tensor in read_tensors if tensor and tensor.name not in faulty},
            {each.name: each for each in read_definitions if each and each.name not in faulty},
        ),
        [fault for entry in entries for fault in entry.faults],
        faulty - _RESERVED.keys(),
    )


class _Entry:
    """One declaration on its way: a key, its text, and their faults."""

    def __init__(self, path: str, name: str, text: str, locate: LocateSpan) -> None:
        self.path = path
        self.name = name
        self.text = text
        self.faults: list[Diagnostic] = []
        self._locate = locate

    def check_name(self, first: "_Entry") -> None:
        """Refuse what is no name, has a meaning already, or is declared elsewhere first."""
        if not _NAME.fullmatch(self.name):
            self.refuse_key("must be called by a name", "declared-names", nearest=_as_name(self.name))
        elif len(self.name) > _MAX_NAME:
            note = f"it has {len(self.name):,} characters"
            must = f"must be called by a name of at most {_MAX_NAME} characters"
            self.refuse_key(must, "declared-names", note, (self.name[:_MAX_NAME],))
        elif self.name in _RESERVED:
            note = f"`{self.name}` is {_RESERVED[self.name]}"
            self.refuse_key("must be called otherwise", "reserved-names", note, (f"{self.name}_",))
        elif first is not self:
            place = self._locate(first.path, None)
            note = f"first declared in line {place.line}" if place else ""
            self.refuse_key(f"declares `{self.name}`, which is {first.path}", "unique-names", note)

    def check_length(self) -> bool:
        """Whether the text is short enough to be the declaration of a scalar or a tensor, else refuse it."""
        if len(self.text) <= _MAX_DECLARATION:
            return True
        note = f"it has {len(self.text):,} characters"
        self.refuse(f"must have at most {_MAX_DECLARATION:,} characters", "declaration-length", note=note)
        return False

    def refuse_key(self, must: str, rule: str, note: str = "", nearest: Iterable[str] = ()) -> None:
        """Record a fault of the key."""
        place = self._locate(self.path, None)
        key = self.path.partition(".")[2]
        self.faults.append(
            Diagnostic(f"{self.path} {must}", rule, place, self.path, key, note, tuple(nearest))
        )

    def refuse(
        self, must: str, rule: str, span: Span | None = None, note: str = "", nearest: Iterable[str] = ()
    ) -> None:
        """Record a fault of the text, or of a stretch of it."""
        start, end = span or _trimmed(self.text)
        shown = " ".join(self.text[:_MAX_DECLARATION].split())
        shown = shown if len(shown) <= _MAX_SHOWN else shown[:_MAX_SHOWN] + "…"
        given = f"{self.path} = {shown}" if shown else f"{self.path} is empty; it"
        place = self._locate(self.path, (start, end))
        value = self.text[start:end]
        self.faults.append(Diagnostic(f"{given} {must}", rule, place, self.path, value, note, tuple(nearest)))


def _check_lengths(entries: Iterable[_Entry]) -> None:
    """Refuse the definitions from the one on that makes all of them longer than what is read."""
    total = 0
    for entry in entries:
        total += len(entry.text)
        if total > _MAX_DEFINITIONS:
            note = f"up to here definitions have {total:,} characters"
            message = f"makes the definitions longer than {_MAX_DEFINITIONS:,} characters together"
            entry.refuse_key(message, "expression-length", note)


def _read_scalar(entry: _Entry) -> Scalar | None:
    """A type, with or without a default."""
    found = _SCALAR.fullmatch(entry.text)
    type = next((type for type in SCALAR_TYPES if found and type == found[1]), None)
    if found is None or type is None:
        must = f"must be one of {', '.join(SCALAR_TYPES)}, with or without a default"
        entry.refuse(must, "scalar-types", nearest=nearest_declarations(entry.text))
        return None
    if found[2] is None:
        return Scalar(entry.name, type)
    default = read_default(type, found[2])
    if default is None:
        nearest = (f"{type} = {near}" for near in nearest_defaults(type, found[2]))
        entry.refuse(f"must default to {DEFAULTS[type]}", "scalar-defaults", found.span(2), nearest=nearest)
    return Scalar(entry.name, type, default)


def _read_tensor(entry: _Entry, owners: Mapping[str, _Entry]) -> TensorType | None:
    """A number format, the dimensions, and whether it is sorted."""
    formats = tuple(VALUE_TYPES)
    found = _TENSOR.fullmatch(entry.text)
    if not found:
        word = entry.text.partition("[")[0].strip()
        nearest = nearest_types(word, formats)[0] if word else "f32"
        must = "must be a number format and the dimensions in brackets"
        entry.refuse(must, "tensor-types", nearest=(f"{nearest}[batch, seqlen_k]",))
        return None
    if found[1] not in formats:
        must = f"must hold one of {', '.join(formats)}"
        entry.refuse(must, "tensor-types", found.span(1), nearest=nearest_types(found[1], formats))
    if not found[2].strip():
        note = "one number for a whole call is a scalar"
        entry.refuse("must have dimensions", "tensor-dimensions", note=note, nearest=(f"{found[1]}[batch]",))
        return None
    spans = _parts(found[2], found.start(2))
    if len(spans) > _MAX_DIMENSIONS:
        entry.refuse(f"must have at most {_MAX_DIMENSIONS} dimensions", "tensor-dimensions")
        return None
    dims = [_read_dimension(entry, owners, span) for span in spans]
    if found[3] and None not in dims:
        _check_sorted(entry, found, spans[-1])
    return TensorType(entry.name, found[1], tuple(dim for dim in dims if dim is not None), bool(found[3]))


def _check_sorted(entry: _Entry, found: re.Match[str], last: Span) -> None:
    """Refuse another word than `sorted`, and a tensor that cannot be: a mask finds its integers along a sequence."""
    format, dims, word = found.groups()
    if word != SORTED:
        entry.refuse(
            f"must end with its dimensions, or with `{SORTED}`",
            "tensor-types",
            found.span(3),
            nearest=(SORTED,),
        )
    elif VALUE_TYPES.get(format, "i32") != "i32":
        must = "must hold integers where it is sorted: u8 or i32"
        entry.refuse(
            must, "sorted-tensors", found.span(1), nearest=(f"i32[{dims}] {SORTED}", f"{format}[{dims}]")
        )
    elif entry.text[slice(*last)] not in SORTED_DIMENSIONS:
        must = f"is sorted along its last dimension, which must be one of {', '.join(SORTED_DIMENSIONS)}"
        nearest = get_close_matches(entry.text[slice(*last)], SORTED_DIMENSIONS, n=2) or SORTED_DIMENSIONS[:2]
        entry.refuse(must, "sorted-tensors", last, nearest=nearest)


def _read_dimension(entry: _Entry, owners: Mapping[str, _Entry], span: Span) -> str | int | None:
    """A size of the call, a positive integer, or a name that the tensor binds."""
    word = entry.text[slice(*span)]
    note, nearest = "", tuple[str, ...]()
    number = read_integer(word)
    if number is not None:
        if 0 < number <= LARGEST_INDEX:
            return number
        nearest = (str(max(1, min(number, LARGEST_INDEX))),)
    elif word in SIZE_NAMES or word in TOKENS:
        return word
    elif word in _SIZE_OF_INDEX:
        note, nearest = f"`{word}` is an index", (_SIZE_OF_INDEX[word],)
    elif word in owners:
        note, nearest = f"`{word}` is {owners[word].path}", (f"num_{word}",)
    elif word in _RESERVED:
        note = f"`{word}` is {_RESERVED[word]}"
    elif _NAME.fullmatch(word):
        return word
    must = "has a dimension that is no size of the call, positive integer or new name"
    nearest = nearest or tuple(get_close_matches(word, SIZE_NAMES, n=2)) or SIZE_NAMES
    entry.refuse(must, "tensor-dimensions", span, note, nearest)
    return None


def _read_definition(entry: _Entry) -> Definition | None:
    """A name, perhaps with parameters, and the text that it stands for."""
    found = _HEAD.fullmatch(entry.path.partition(".")[2])
    if not found:
        entry.refuse_key("must be a name or a name(p, q)", "definition-heads", nearest=_as_name(entry.name))
        return None
    if found[2] is None:
        return Definition(entry.name, (), entry.text)
    if not found[2].strip():
        note = "what has no parameters has no brackets"
        entry.refuse_key("must have parameters", "definition-heads", note, (entry.name,))
        return None
    parameters: list[str] = []
    defaults: list[Expr] = []
    for part in found[2].split(","):
        parameter, sign, default = (each.strip() for each in part.partition("="))
        _check_parameter(entry, parameter, parameters)
        value = read_constant(default)
        if value is None and read_integer(default) is not None:
            nearest = nearest_defaults("i32", default)
            note = f"a default is {DEFAULTS['i32']}, or a number with a point"
            entry.refuse_key(f"has `{default}` for a default", "number-range", note, nearest)
        elif sign and value is None:
            note = "a default is a number, true or false"
            entry.refuse_key(f"has `{default}` for a default", "definition-heads", note)
        elif defaults and not sign:
            note = "the last parameters have defaults"
            entry.refuse_key(f"has `{parameter}` after one with a default", "definition-heads", note)
        parameters.append(parameter)
        defaults += [value] if value else []
    return Definition(entry.name, tuple(parameters), entry.text, tuple(defaults))


def _check_parameter(entry: _Entry, parameter: str, before: list[str]) -> None:
    if not _NAME.fullmatch(parameter):
        entry.refuse_key(
            f"has `{parameter}` for a parameter", "definition-heads", "it is no name", _as_name(parameter)
        )
    elif parameter in _NO_PARAMETERS:
        note = f"it is {_NO_PARAMETERS[parameter]}"
        entry.refuse_key(f"has `{parameter}` for a parameter", "reserved-names", note, (f"{parameter}_",))
    elif parameter in before:
        entry.refuse_key(f"has two parameters `{parameter}`", "definition-heads")


def _parts(text: str, start: int) -> list[Span]:
    """Where the parts of a text between its commas stand, without their blanks."""
    spans = []
    for part in text.split(","):
        first, last = _trimmed(part)
        spans.append((start + first, start + last))
        start += len(part) + 1
    return spans


def _trimmed(text: str) -> Span:
    """Where a text stands without its blanks."""
    end = len(text.rstrip())
    return min(len(text) - len(text.lstrip()), end), end


def _as_name(text: str) -> tuple[str, ...]:
    """The name that is spelt most like a text."""
    word = re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")
    word = f"_{word}" if word[:1].isdigit() else word
    return (word,) if word and word not in _RESERVED else ()
