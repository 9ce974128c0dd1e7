"""Text to syntax tree by lark, and the faults of a text with their places.

Nothing here knows what a name means, and nothing knows of YAML: whoever has the text tells by `locate` where its
characters stand.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

from lark import Lark, Token, Tree, UnexpectedToken
from lark.tree import Meta

from attngen.errors import MAX_TOLD, Diagnostic, ExpressionError, Location
from attngen.expr.mistakes import name_mistake

Locate = Callable[[int], Location]
"""The place of a character of the text, by its offset; the length of the text stands for its end."""

Syntax = Tree[Token]

MAX_LENGTH = 10_000
_MAX_SHOWN = 40  # characters of the text that a message repeats

_FOREIGN = (
    "AMPERSANDS", "BARS", "POWER", "EQUALS_FIRST", "ARROW", "DIAMOND", "AMPERSAND", "BAR", "BANG", "TILDE",
    "QUESTION", "POINT", "CARET", "QUOTE", "UPPER_AND", "UPPER_OR", "UPPER_NOT", "STRAY",
)  # fmt: skip


class Report:
    """The faults of a text and of the definitions it calls."""

    def __init__(self) -> None:
        self._faults: dict[Diagnostic, None] = {}  # in the order of telling, each once
        self._places: set[tuple[str, Location | None]] = set()

    def add(self, fault: Diagnostic, *, once: bool = False) -> None:
        """Record a fault; `once` drops one whose message and place are known, though its note may differ."""
        place = fault.message, fault.location
        if not once or place not in self._places:
            self._faults[fault] = None
        self._places.add(place)

    @property
    def is_full(self) -> bool:
        """Whether there are as many faults as are told: what makes one more helpful is not worth its time."""
        return len(self._faults) >= MAX_TOLD

    @property
    def faults(self) -> tuple[Diagnostic, ...]:
        """All that has been recorded, in the order of the text."""
        return tuple(sorted(self._faults, key=_place))

    def raise_faults(self) -> None:
        """Raise what has been recorded, if anything has."""
        if self._faults:
            raise ExpressionError(self.faults)


def _place(fault: Diagnostic) -> tuple[str, int, int]:
    location = fault.location
    return (location.file, location.line, location.column) if location else ("", 0, 0)


class Fragment:
    """A text on its way to a tree, and the places its faults are drawn at.

    Attributes:
        title: what the text is: `mask`, `definition window`.
        report: where they go.
    """

    def __init__(self, title: str, text: str, locate: Locate | None, report: Report) -> None:
        self.title = title
        self.text = text
        self.report = report
        self._locate = locate or self._locate_in_text

    def fault(
        self,
        rule: str,
        message: str,
        *,
        at: Meta | Token | None = None,
        note: str = "",
        nearest: tuple[str, ...] = (),
        call: str = "",
    ) -> None:
        """Record a fault of the stretch `at`, or of the whole text; `call` says who called this definition."""
        start, end = self._stretch(at)
        fault = Diagnostic(
            message=f"{self.title} {message}",
            rule=rule,
            location=self._span(start, end),
            path=self.title,
            value=self.text[start:end],
            note="; ".join(part for part in (note, call) if part),
            nearest=nearest,
        )
        self.report.add(fault, once=bool(call))

    def quote(self, at: Meta) -> str:
        """A stretch of the text, as a message repeats it, with its place."""
        start, end = self._stretch(at)
        text = " ".join(self.text[start:end].split())
        shown = text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"
        return f"`{shown}` at {self._span(start, end)}"

    def _stretch(self, at: Meta | Token | None) -> tuple[int, int]:
        if at is not None:
            return at.start_pos or 0, at.end_pos or 0
        end = len(self.text.rstrip())
        return (len(self.text) - len(self.text.lstrip()) if end else 0), end

    def _span(self, start: int, end: int) -> Location:
        first = self._locate(min(start, len(self.text)))
        if end <= start:
            return replace(first, length=1)
        last = self._locate(end - 1)
        is_one_line = last.line == first.line
        return replace(first, length=(last.column if is_one_line else len(first.text)) - first.column + 1)

    def _locate_in_text(self, offset: int) -> Location:
        before = self.text[:offset].split("\n")
        lines = self.text.split("\n")
        return Location(f"<{self.title}>", len(before), len(before[-1]) + 1, lines[len(before) - 1])


def parse(fragment: Fragment) -> Syntax | None:
    """The syntax tree of a text, or None with its fault recorded."""
    text = fragment.text
    if not text.strip():
        fragment.fault("operand", "is empty", note="an expression must stand here", nearest=("full",))
        return None
    if len(text) > MAX_LENGTH:
        fragment.fault("expression-length", f"has {len(text)} characters; at most {MAX_LENGTH} are read")
        return None
    try:
        return parser().parse(text)
    except UnexpectedToken as error:
        _record(fragment, error)
        return None


def _record(fragment: Fragment, error: UnexpectedToken) -> None:
    mistake = name_mistake(error, parser().parse)
    token = error.token
    message = f"cannot go on with `{token}`"
    if token.type == "$END":
        end = len(fragment.text.rstrip())
        token, message = Token("$END", "", start_pos=end, end_pos=end), "ends too early"
    fragment.fault(mistake.rule, message, at=token, note=mistake.note, nearest=mistake.nearest)


@cache
def parser() -> Lark:
    """The parser of grammar.lark."""
    return Lark.open(
        str(Path(__file__).with_name("grammar.lark")),
        parser="lalr",
        lexer="basic",  # the contextual one would read `and` as a name where no operator may stand
        start="expression",
        postlex=_KeepForeign(),
        propagate_positions=True,
    )


class _KeepForeign:
    """Keeps the tokens that no rule takes in the lexer: lark would drop them."""

    always_accept = _FOREIGN

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        return stream
