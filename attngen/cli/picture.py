"""Pictures that commands draw: where they may go, and figures whose bytes depend on what is drawn alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any

import click

PICTURES = (".svg", ".png")


def path_ending_in(
    *suffixes: str,
) -> Callable[[click.Context, click.Parameter, Path | None], Path | None]:
    """A callback for an option whose path ends in one of some suffixes."""

    def checked(ctx: click.Context, param: click.Parameter, given: Path | None) -> Path | None:
        if given is None or given.suffix in suffixes:
            return given
        nearest = given.with_suffix(get_close_matches(given.suffix, suffixes, 1, 0)[0])
        message = f"{str(given)!r} must end in {' or '.join(suffixes)}; nearest valid: {nearest}"
        raise click.BadParameter(message, ctx, param)

    return checked


@contextmanager
def figure_panels(
    to: Path | IO[bytes], suffix: str, rows: int, columns: int, **options: Any
) -> Iterator[Any]:
    """The axes of a figure, (rows, columns), which is written when the caller has drawn on them.

    Args:
        to: a path, whose folders are made, or a file.
        suffix: one of `PICTURES`.
        rows: of panels.
        columns: of panels.
        options: of matplotlib's `subplots`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "attngen", "svg.fonttype": "none", "text.parse_math": False}):
        figure, panels = pyplot.subplots(rows, columns, squeeze=False, layout="constrained", **options)
        yield panels
        if isinstance(to, Path):
            to.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if suffix == ".svg" else {"Software": None}
        figure.savefig(to, format=suffix[1:], dpi=120, metadata=metadata)
        pyplot.close(figure)
