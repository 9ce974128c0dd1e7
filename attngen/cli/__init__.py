"""The command line: one module per command, one group that turns faults into exit codes.

0 is good, 1 a comparison that failed, 2 the user's fault, which is printed as its text and nothing else. A fault of
attngen's own (`InternalError`) keeps its traceback, since that is what a report needs.
"""

import click

from attngen.cli.bench import bench
from attngen.cli.build import build
from attngen.cli.cache import cache
from attngen.cli.check import check
from attngen.cli.explain import explain
from attngen.cli.fuzz import fuzz
from attngen.cli.output import Commands
from attngen.cli.run import run
from attngen.cli.schema import schema


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """From a short spec to a readable, checked CUDA attention kernel.

    A SPEC is a YAML file, or the bare name of a shipped spec such as fa2_d128_causal.
    """


for _command in (check, build, run, explain, fuzz, bench, schema, cache):
    main.add_command(_command)
