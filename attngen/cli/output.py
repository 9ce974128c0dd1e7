"""What every command prints and writes with: consoles, tables, and the group that reports the user's faults."""

import errno
import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attngen.errors import ArgumentError, AttngenError, InternalError, ToolchainError
from attngen.memory import is_out_of_memory, lack_of_memory

GOOD, COMPARISON_FAILED, USER_FAULT = 0, 1, 2

_WIDTH_WITHOUT_TERMINAL = 200  # a pipe or a log has no width; lines are not to be folded there


class Commands(click.Group):
    """A group whose commands may raise any `AttngenError`, run out of memory, and find nowhere to print to."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line; what cannot be said anywhere still ends with `USER_FAULT`."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a name of a file may hold what no encoding has
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().main(*args, **kwargs)
        except OSError:  # what is wrong with an option could not be printed
            _discard(sys.stderr)
            sys.exit(USER_FAULT)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Read the options, of which --help prints already."""
        with _faults_told():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a fault of the user is printed on stderr, without a traceback."""
        with _faults_told():
            return super().invoke(ctx)


@contextmanager
def _faults_told() -> Iterator[None]:
    """Print a fault of the user or of their machine on stderr, and leave with `USER_FAULT`."""
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, "it is closed")
        try:
            yield
        finally:
            sys.stdout.flush()  # at exit nobody could be told
    except InternalError:
        raise
    except AttngenError as error:
        _leave(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        cure = "smaller lengths, heads, batch or tiles"
        _leave(ToolchainError(f"out of memory: {lack_of_memory(error)}", cure))
    except OSError as error:
        _discard(sys.stdout)
        if error.filename is not None:
            _leave(ToolchainError(f"{error.filename}: {error.strerror}", "a path that may be used so"))
        cure = "print to a terminal, to a pipe that is read or to a disk with room"
        _leave(ToolchainError(f"standard output cannot be used: {error.strerror or error}", cure))


def _leave(error: AttngenError) -> NoReturn:
    try:
        report(error)
    except OSError:  # nobody can be told
        _discard(sys.stderr)
    sys.exit(USER_FAULT)


def _discard(stream: TextIO | None) -> None:
    """Let what a stream still holds go nowhere, so that Python does not stumble over it at exit."""
    with suppress(AttributeError, OSError):  # it is closed, or a test's
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[union-attr]


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Write to what an option names.

    Raises:
        ArgumentError: its folder cannot be made, or the file not be written.
    """
    try:
        yield
    except OSError as failure:
        raise ArgumentError(
            option, f"{path} ({failure.strerror})", "a path that can be written to"
        ) from failure


def report(error: AttngenError) -> None:
    """Print a fault as its text on stderr."""
    click.echo(str(error), err=True)


def console(*, err: bool = False) -> Console:
    """A console on what stdout or stderr is now."""
    stream = (sys.stderr if err else sys.stdout) or io.StringIO()  # stderr may be closed
    width = None if stream.isatty() else _WIDTH_WITHOUT_TERMINAL
    return _Console(file=stream, width=width, highlight=False)


class _Console(Console):
    """A console that tells of a pipe that nobody reads; rich's leaves with 1."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers_from: int = 1) -> Table:
    """A table of plain text; columns from `numbers_from` on stand to the right."""
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        drawn.add_column(
            Text(column), justify="right" if i >= numbers_from else "left", overflow="fold", no_wrap=False
        )
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))  # Text, since rich takes [brackets] in a str for markup
    return drawn


def size_text(size: int) -> str:
    """Bytes for people: exact below 1 KiB, three digits above."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{size} B" if unit == "B" else f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def seconds_text(seconds: float) -> str:
    """A duration with three digits, in the unit that suits it."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
