"""What every command prints with: consoles, tables, and the group that reports the user's faults."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attngen.errors import AttngenError, InternalError

GOOD, COMPARISON_FAILED, USER_FAULT = 0, 1, 2

_WIDTH_WITHOUT_TERMINAL = 200  # a pipe or a log has no width; lines are not to be folded there


class Commands(click.Group):
    """A group whose commands may raise any `AttngenError`."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a fault of the user is printed on stderr, without a traceback."""
        try:
            return super().invoke(ctx)
        except InternalError:
            raise
        except AttngenError as error:
            report(error)
            ctx.exit(USER_FAULT)


def report(error: AttngenError) -> None:
    """Print a fault as its text on stderr."""
    click.echo(str(error), err=True)


def console(*, err: bool = False) -> Console:
    """A console on what stdout or stderr is now."""
    stream = sys.stderr if err else sys.stdout
    width = None if stream.isatty() else _WIDTH_WITHOUT_TERMINAL
    return Console(file=stream, width=width, highlight=False)


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
