"""What a command passes for the scalars and tensors that specs declare: options, and values for a call."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

from attngen.check.declared_inputs import KINDS, Given
from attngen.cli.variants import Variant
from attngen.spec import Spec

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = {
    "--tensor": (
        "tensors",
        "NAME=KIND",
        f"What a declared tensor holds: {', '.join(KINDS)}, or a file of torch.save "
        "[integers sorted, as ids of documents are, others random].",
    ),
    "--scalar": ("scalars", "NAME=VALUE", "The value of a declared scalar [its default]."),
}


def declared_options(command: Command) -> Command:
    """`--tensor` and `--scalar`."""
    for option, (parameter, metavar, text) in reversed(_OPTIONS.items()):
        command = click.option(
            option, parameter, metavar=metavar, multiple=True, callback=_read_pairs, help=text
        )(command)
    return command


def given_values(
    tensors: dict[str, str], scalars: dict[str, str], chosen: Iterable[Variant]
) -> tuple[Given, list[Variant]]:
    """What the options say, held against what the specs declare, and the variants themselves.

    Raises:
        ArgumentError: a name that no spec declares.
    """
    found = list(chosen)
    given = Given(tensors, scalars)
    specs = [variant.found for variant in found if isinstance(variant.found, Spec)]
    if specs:  # where none can be read its own faults say enough
        given.check_names(spec.arguments for spec in specs)
    return given, found


def _read_pairs(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    """`doc=sorted` as a name and its value."""
    pairs: dict[str, str] = {}
    for text in given:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not name or not equals or not value:
            raise click.BadParameter(f"{text!r} is not {param.metavar}", ctx, param)
        if name in pairs:
            raise click.BadParameter(f"{name} is given twice", ctx, param)
        pairs[name] = value
    return pairs
