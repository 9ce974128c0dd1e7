"""What names stand for: the indices, the prelude, and what a spec declares.

A name of the prelude may be taken by a spec's own scalar, tensor or definition, so that the prelude can grow without
breaking specs; the prelude's own definitions go on with its own. `let` and parameters may take any name that is not
reserved.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache, cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Union

from attngen.errors import Diagnostic, InternalError
from attngen.expr.arithmetic import FUNCTIONS
from attngen.expr.declarations import Declarations, Definition, TensorType
from attngen.expr.literals import read_constant
from attngen.expr.syntax import Fragment, Locate, Report, Syntax, parse
from attngen.expr.tree import INDEX_NAMES, Expr, name

KEYWORDS = ("and", "or", "not", "if", "else", "let", "in", "true", "false", "inf", "AND", "OR", "NOT")
"""The words of the language, and those that stand in its place in others."""

RESERVED = {*INDEX_NAMES, "q_pos", "score", *FUNCTIONS, *KEYWORDS}
"""What neither a declaration nor a parameter nor a `let` may be called."""

LocateOf = Callable[[str], Locate | None]
"""Where the characters of a definition stand, by its name; None where that is not known."""

Value = Union[Expr, TensorType, "Closure", None]
"""What a name stands for; None where that has a fault, which has been told."""


@dataclass(frozen=True)
class Scope:
    """What names stand for; what many texts share is not copied for each `let` and call.

    Attributes:
        shared: of the prelude and the spec.
        bound: by `let`, as parameters, and `score`: they hide what is shared.
    """

    shared: Mapping[str, Value]
    bound: Mapping[str, Value] = field(default_factory=dict)

    def __contains__(self, word: str) -> bool:
        return word in self.bound or word in self.shared

    def __getitem__(self, word: str) -> Value:
        return self.bound[word] if word in self.bound else self.shared[word]

    def get(self, word: str) -> Value:
        """What a name stands for; None where it is unknown too."""
        return self.bound[word] if word in self.bound else self.shared.get(word)

    def items(self) -> Iterator[tuple[str, Value]]:
        """All names and what they stand for, what hides others first."""
        return chain(self.bound.items(), self.shared.items())

    def binding(self, values: Mapping[str, Value]) -> "Scope":
        """This scope with more names, which hide others."""
        return Scope(self.shared, {**self.bound, **values})

    def without(self, word: str) -> "Scope":
        """This scope without a name that is bound."""
        return Scope(self.shared, {key: value for key, value in self.bound.items() if key != word})


_MAX_COMPARED = 500  # names that an unknown one is compared with, each some ten microseconds

_PRELUDE = Path(__file__).with_name("prelude.attn")
_SIGNATURE = re.compile(r"(?P<name>\w+)(?:\((?P<parameters>[^)]*)\))? = (?P<text>.*)")


@dataclass(eq=False)
class Closure:
    """A definition in the scope it was made in.

    Attributes:
        fragment: the text its body stands in.
        scope: what its body sees beside its parameters.
        parse: gives the body, or None with its fault recorded.
        defaults: of the last parameters.
        readings: what it means for given arguments, as far as it has been asked.
    """

    name: str
    parameters: tuple[str, ...]
    fragment: Fragment
    scope: Scope
    parse: Callable[[], Syntax | None]
    defaults: tuple[Expr, ...] = ()
    readings: dict[tuple[Value, ...], Expr | None] = field(default_factory=dict)

    @cached_property
    def body(self) -> Syntax | None:
        """The syntax tree of the body."""
        return self.parse()

    @property
    def required(self) -> int:
        """How many arguments a call must give at least."""
        return len(self.parameters) - len(self.defaults)

    def __str__(self) -> str:
        defaults = ["", *(f" = {default}" for default in self.defaults)]
        parameters = [
            name + defaults[max(0, place - self.required + 1)] for place, name in enumerate(self.parameters)
        ]
        return f"{self.name}({', '.join(parameters)})" if parameters else self.name


def global_scope(declarations: Declarations, report: Report, locate_of: LocateOf | None) -> Scope:
    """What a definition sees: no score. Faults of definitions go to the report when they are read."""
    indices = {each: name(each) for each in INDEX_NAMES}
    prelude_scope: dict[str, Value] = {}
    for each in prelude().values():
        fragment = _fragment(each, report, None)
        parse_body = partial(_prelude_syntax, each.name)
        prelude_scope[each.name] = Closure(
            each.name, each.parameters, fragment, Scope(prelude_scope), parse_body, each.defaults
        )
    prelude_scope |= indices
    scope = prelude_scope.copy()
    for each in declarations.definitions.values():
        fragment = _fragment(each, report, locate_of)
        parse_body = partial(parse, fragment)
        scope[each.name] = Closure(
            each.name, each.parameters, fragment, Scope(scope), parse_body, each.defaults
        )
    scope.update(declarations.tensors)
    scope.update({key: each.expr for key, each in declarations.scalars.items()})
    scope.update(indices)
    return Scope(scope)


@cache
def prelude() -> Mapping[str, Definition]:
    """The definitions that every spec has, by name, in the order of prelude.attn."""
    lines = _PRELUDE.read_text(encoding="utf-8").splitlines()
    found = [_SIGNATURE.fullmatch(line) for line in lines if line and not line.startswith("#")]
    signatures = [each for each in found if each]
    if len(signatures) < len(found):
        raise InternalError("a line of the prelude is no definition")
    return {
        each["name"]: _definition(each["name"], each["parameters"] or "", each["text"]) for each in signatures
    }


def _definition(word: str, parameters: str, text: str) -> Definition:
    """A line of the prelude."""
    heads = [part.partition("=") for part in parameters.split(",") if part]
    defaults = (read_constant(default.strip()) for _, _, default in heads)
    names = tuple(parameter.strip() for parameter, _, _ in heads)
    return Definition(word, names, text, tuple(default for default in defaults if default))


def check_definitions(
    declarations: Declarations, locate_of: LocateOf | None = None
) -> tuple[Diagnostic, ...]:
    """The faults of definitions that no expression need meet: those of syntax, in the order of the text.

    Types and unknown names are told where a definition is called, since they are for its arguments to decide.
    """
    report = Report()
    for definition in declarations.definitions.values():
        parse(_fragment(definition, report, locate_of))
    return report.faults


def nearest_names(word: str, scope: Scope, kind: type[Closure | TensorType] | None = None) -> tuple[str, ...]:
    """The names that are spelt most like a word: of tensors, of what is called, or of all; of many the first."""
    names = (key for key, value in scope.items() if kind is None or isinstance(value, kind))
    known = {key.lower(): key for key in islice(names, _MAX_COMPARED)}
    known |= {key: key for key in (() if kind is TensorType else FUNCTIONS)}
    known |= {key: key for key in (() if kind else ("true", "false", "inf"))}
    close = get_close_matches(word.lower(), known, n=3)
    return tuple(known[key] for key in close) or (() if kind else INDEX_NAMES)


def describe(value: Value) -> str:
    """What a name stands for, in words; of a function of the language its name stands for nothing."""
    if isinstance(value, TensorType):
        return f"a tensor, {value}"
    if isinstance(value, Expr):
        return "a condition" if value.type == "bool" else "a number"
    return "a definition" if isinstance(value, Closure) else "a function"


def example(word: str, tensor: TensorType) -> str:
    """How a tensor is read, with the indices that its dimensions suggest."""
    indices = {
        "batch": "b",
        "num_heads_q": "h",
        "num_heads_kv": "h_kv",
        "seqlen_q": "q_idx",
        "seqlen_k": "kv_idx",
    }
    return f"{word}[{', '.join(indices.get(str(each), '0') for each in tensor.dims)}]"


def _fragment(definition: Definition, report: Report, locate_of: LocateOf | None) -> Fragment:
    locate = locate_of(definition.name) if locate_of else None
    return Fragment(f"definition {definition.name}", definition.text, locate, report)


@cache
def _prelude_syntax(word: str) -> Syntax | None:
    report = Report()
    syntax = parse(_fragment(prelude()[word], report, None))
    report.raise_faults()
    return syntax
