"""`attngen schema`: what an editor needs to complete a spec."""

import json

import click

from attngen.spec import json_schema


@click.command()
def schema() -> None:
    """Print the JSON Schema of a spec file."""
    click.echo(json.dumps(json_schema(), indent=2))
