"""Every exception attngen raises, and how a fault in a spec is drawn.

One class per kind of fault. Whatever the user can mend is an `AttngenError` that says where, what value,
which rule and the nearest valid value; `InternalError` is attngen's own fault and the only one that asks for
a report. Facts are attributes as well as text, so that a program need not parse a message. Nothing here
decides what is a fault.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

MAX_TOLD = 20
"""Violations that one report tells; of the others it tells the number."""

_REPORT_WIDTH = 92  # the rule's name ends in this column, as in the documented form
_SOURCE_WIDTH = 100  # longer source lines are cut around the carets
_MOST_SHOWN = 60  # characters of a value that an argument's error repeats
_MOST_BITS = 128  # of an integer that it repeats
_SENTENCE_WIDTH = 500  # of a message, a note or nearest values: a hostile file may put anything in them
_REPLACEMENT = "\ufffd"  # stands for a control character, so that a hostile file cannot drive the terminal


@dataclass(frozen=True)
class Location:
    """A stretch of one source line.

    Attributes:
        file: path as the user gave it, or a name in angle brackets for text that came from no file.
        line: number of the line, from 1.
        column: column of the first character, from 1, counted in characters.
        text: the whole source line, without its line break.
        length: characters to underline; at least one caret is drawn.
    """

    file: str
    line: int
    column: int
    text: str
    length: int = 1

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Diagnostic:
    """One violation: where, what value, which rule, nearest valid.

    Attributes:
        message: the whole sentence, path and value included: `tile.block_n = 200 must be a multiple of 32`.
        rule: name of the rule that is broken: `wgmma-k-step`.
        location: where the value stands; None when it has no place in any text.
        path: dotted path of the value in the spec: `tile.block_n`.
        value: the value found.
        note: the reason, drawn beside the carets.
        nearest: the valid values closest to the one found.
    """

    message: str
    rule: str
    location: Location | None = None
    path: str = ""
    value: object = None
    note: str = ""
    nearest: tuple[str, ...] = ()

    def draw(self) -> str:
        """The violation as the user sees it: two to four lines without a final line break."""
        message = _shortened(self.message)
        lines = [_printable(f"{self.location}: {message}" if self.location else message)]
        if self.location:
            lines += _draw_source(self.location, _shortened(self.note))
        elif self.note:
            lines.append(f"  {_printable(_shortened(self.note))}")
        rule = f"[rule {self.rule}]"
        nearest = f"  nearest valid: {_printable(_shortened(_either(self.nearest)))}" if self.nearest else ""
        lines.append(f"{nearest}{rule:>{max(_REPORT_WIDTH - len(nearest), len(rule) + 2)}}")
        return "\n".join(lines)


def _shortened(sentence: str) -> str:
    """A sentence without the end of a value that somebody wrote too long."""
    return sentence if len(sentence) <= _SENTENCE_WIDTH else f"{sentence[:_SENTENCE_WIDTH]}…"


def _either(choices: tuple[str, ...]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    return " or ".join(part for part in (", ".join(choices[:-1]), choices[-1]) if part)


def _draw_source(location: Location, note: str) -> list[str]:
    """The source line with its number, and the carets under it with the note beside them."""
    start = min(location.column - 1, len(location.text))
    marked = max(1, min(location.length, len(location.text) - start))
    text, start = _cut(location.text, start)
    marked = max(1, min(marked, len(text) - start))
    # A tab stays a tab and a wide character counts double, or the carets would stand beside what they mean.
    indent = "".join("\t" if char == "\t" else " " * _columns(char) for char in text[:start])
    carets = "^" * max(1, sum(map(_columns, text[start : start + marked])))
    return [
        f"{location.line:>5} | {_printable(text)}".rstrip(),
        f"      | {indent}{carets} {_printable(note)}".rstrip(),
    ]


def _cut(text: str, start: int) -> tuple[str, int]:
    """The part of a long line around `start`, and where `start` falls in it."""
    if len(text) <= _SOURCE_WIDTH:
        return text, start
    first = max(0, min(start - _SOURCE_WIDTH // 3, len(text) - _SOURCE_WIDTH))
    head = "…" if first else ""
    tail = "…" if first + _SOURCE_WIDTH < len(text) else ""
    return head + text[first : first + _SOURCE_WIDTH] + tail, start - first + len(head)


def _columns(char: str) -> int:
    """Terminal columns one character takes."""
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _printable(text: str) -> str:
    return "".join(_REPLACEMENT if unicodedata.category(c) == "Cc" and c != "\t" else c for c in text)


def shown(value: object) -> str:
    """A value for a message: its repr, cut where it is long. Python writes no integer of many digits out."""
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return f"an integer of {value.bit_length():,} bits"
    try:
        text = repr(value)
    except ValueError:  # such an integer is in it
        return f"a {type(value).__name__} too long to be written out"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}… of {len(text)} characters"


class AttngenError(Exception):
    """Base of every error attngen raises on purpose."""


class SpecError(AttngenError):
    """A spec that breaks rules; its text is the report of the first violations, and the number of the others.

    Attributes:
        diagnostics: the first `MAX_TOLD` violations, in the order of the source.
        untold: how many more there are.
    """

    def __init__(self, diagnostics: tuple[Diagnostic, ...], untold: int = 0) -> None:
        self.diagnostics = diagnostics[:MAX_TOLD]
        self.untold = untold + len(diagnostics) - len(self.diagnostics)
        super().__init__(self.diagnostics, self.untold)

    def __str__(self) -> str:
        told = [diagnostic.draw() for diagnostic in self.diagnostics]
        return "\n\n".join([*told, f"and {self.untold:,} more"] if self.untold else told)


class ExpressionError(SpecError):
    """A fault inside the text of a mask or a score."""


class SpecWarning(UserWarning):
    """Something in a legal spec that is rarely meant.

    Attributes:
        diagnostic: what, and where it stands.
    """

    def __init__(self, diagnostic: Diagnostic) -> None:
        super().__init__(diagnostic)
        self.diagnostic = diagnostic

    def __str__(self) -> str:
        return self.diagnostic.draw()


class PlanError(SpecError):
    """A well-formed spec of which no legal plan can be made."""


class ArgumentError(AttngenError, ValueError):
    """An argument of a call that the kernel cannot take; nothing has been touched. It is a ValueError too.

    Attributes:
        argument: name of the argument: `q`.
        got: what it is.
        expected: what it must be.
        hint: how to mend it, where there is one way.
    """

    def __init__(self, argument: str, got: object, expected: object, hint: str | None = None) -> None:
        super().__init__(argument, got, expected, hint)
        self.argument = argument
        self.got = got
        self.expected = expected
        self.hint = hint

    def __str__(self) -> str:
        hint = f"\n  hint: {self.hint}" if self.hint else ""
        return f"argument {self.argument}: got {self.got}, expected {self.expected}{hint}"

    def renamed(self, names: Mapping[str, str]) -> "ArgumentError":
        """The fault with other words for arguments: names of a face, by those that a kernel has for them."""

        def told(text: str) -> str:
            return re.sub(r"\w+", lambda word: names.get(word[0], word[0]), text)

        own = names.get(self.argument) or told(self.argument)
        hint = None if self.hint is None else told(self.hint)
        return ArgumentError(own, self.got, told(str(self.expected)), hint)


class RefusedError(AttngenError, ValueError):
    """A call of another's function that no kernel takes; nothing has been touched, and the other may still answer.

    Attributes:
        reasons: why, as many as can be told at once.
    """

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__(self.reasons)

    def __str__(self) -> str:
        return "no kernel takes this call:\n" + "\n".join(f"  {reason}" for reason in self.reasons)


class ModelError(AttngenError, ValueError):
    """What a layer of a model asks for, and no kernel serves.

    Attributes:
        model: its type, as its config says: `llama`.
        layer: which layer, and what it is: `layer 3, LlamaAttention`.
        reason: what it asks for, what would be served, and how to get there.
    """

    def __init__(self, model: str, layer: str, reason: str) -> None:
        super().__init__(model, layer, reason)
        self.model = model
        self.layer = layer
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.model}, {self.layer}: {self.reason}"


class CompileError(AttngenError):
    """NVRTC refused the source of a kernel, as it may when a person edited it.

    Attributes:
        message: what was being compiled.
        log: the compiler's own words.
    """

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message, log)
        self.message = message
        self.log = log

    def __str__(self) -> str:
        return f"{self.message}\n{self.log.rstrip()}".rstrip()


class ToolchainError(AttngenError):
    """The machine lacks something that a step needs: NVRTC, a driver, a GPU of the right kind.

    Attributes:
        message: what is missing or refused.
        cure: what to do about it.
    """

    def __init__(self, message: str, cure: str) -> None:
        super().__init__(message, cure)
        self.message = message
        self.cure = cure

    def __str__(self) -> str:
        return f"{self.message}\n  cure: {self.cure}"


class InternalError(AttngenError):
    """attngen broke a promise to itself: no input of the user should lead here."""

    ADVICE: ClassVar[str] = "this is a fault of attngen itself; please report it with the spec and this text"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return f"{self.message}\n  {self.ADVICE}"
