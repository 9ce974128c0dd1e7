"""`attngen cache`: where compiled kernels lie, how much, and away with them."""

import click

from attngen.cli.output import size_text
from attngen.runtime import DiskCache


@click.group()
def cache() -> None:
    """Look at the disk cache of compiled kernels, or empty it."""


@cache.command()
def path() -> None:
    """Print the directory."""
    click.echo(DiskCache().path)


@cache.command()
def size() -> None:
    """Print how many kernels there are and what they take."""
    disk = DiskCache()
    entries = len(disk.entries())
    click.echo(
        f"{entries} kernel{'' if entries == 1 else 's'}, {size_text(disk.size_bytes() if entries else 0)}"
    )


@cache.command()
def clear() -> None:
    """Remove every kernel."""
    disk = DiskCache()
    removed = disk.clear()
    click.echo(f"removed {removed} kernel{'' if removed == 1 else 's'} from {disk.path}")
