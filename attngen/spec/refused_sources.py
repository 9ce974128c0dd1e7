"""Refusals of a source as a whole: what is no file, no text, or too large to be a spec."""

from typing import Never

from attngen.errors import Diagnostic, Location, SpecError

MAX_BYTES = 1 << 20  # of a file; no spec comes near, and a larger one was named by mistake


def refuse_source(
    message: str,
    value: str,
    location: Location | None = None,
    note: str = "",
    nearest: tuple[str, ...] = (),
) -> Never:
    """Raise the one fault of a source.

    Raises:
        SpecError: always.
    """
    raise SpecError((Diagnostic(message, "spec-file", location, value=value, note=note, nearest=nearest),))


def refuse_size(file: str) -> Never:
    """Refuse what is larger than `MAX_BYTES`.

    Raises:
        SpecError: always.
    """
    refuse_source(
        f"{file} is larger than {MAX_BYTES >> 20} MiB", file, note="a spec is a text of a few lines"
    )
