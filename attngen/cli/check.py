"""`attngen check`: is there a legal kernel, and with `--run`, is it right? Needs no GPU and no compiler."""

import click

from attngen.cli.comparison import Outcome, draw_declared, draw_inputs, execute, outcomes_table
from attngen.cli.declared_options import declared_options, given_values
from attngen.cli.gradient_comparison import BackwardOutcome, execute_backward, gradients_table
from attngen.cli.output import COMPARISON_FAILED, GOOD, USER_FAULT, console, report, table
from attngen.cli.shapes import SEED, shape_text, shapes_of
from attngen.cli.variants import (
    Sweep,
    arch_option,
    arch_without_gpu,
    kernel_of,
    specs_argument,
    stand_in_note,
    variants,
)
from attngen.errors import SpecError


@click.command()
@specs_argument
@arch_option
@click.option(
    "--run", is_flag=True, help="Run the check shapes on the simulator against the reference, gradients too."
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the inputs of --run.")
@declared_options
@click.pass_context
def check(
    ctx: click.Context,
    specs: tuple[str, ...],
    sweep: Sweep,
    arch: str | None,
    run: bool,
    seed: int,
    tensors: dict[str, str],
    scalars: dict[str, str],
) -> None:
    """Load each SPEC, lower it and hold its plan against every rule."""
    rows: list[tuple[str, ...]] = []
    outcomes: list[Outcome] = []
    passes: list[BackwardOutcome] = []
    notes: dict[str, None] = {}
    refused = False
    given, chosen = given_values(tensors, scalars, variants(specs, sweep))
    with console(err=True).status("checking") as status:
        for variant in chosen:
            try:
                spec = variant.spec
                kernel = kernel_of(spec, arch_without_gpu(spec, arch))
            except SpecError as fault:
                refused = True
                report(fault)
                continue
            plan = kernel.plan
            if note := stand_in_note(spec, arch):
                notes[f"{variant.label}: {note}"] = None
            tile = f"{plan.block_m}x{plan.block_n}"
            rows.append(
                (
                    variant.label,
                    plan.name,
                    plan.arch.name,
                    plan.schedule,
                    tile,
                    f"{plan.stages}",
                    f"{plan.warps}",
                )
            )
            for shape in shapes_of(spec) if run else ():
                status.update(f"simulating {variant.label}, {shape_text(shape)}")
                inputs = draw_inputs(kernel, shape, "cpu", seed)
                declared = draw_declared(kernel, inputs, seed, given, shape)
                outcomes.append(execute(kernel, inputs, variant.label, declared, shape))
                if spec.gradients:
                    passes.append(execute_backward(kernel, inputs, variant.label, declared, seed, shape))
    out = console()
    for note in notes:
        click.echo(note)
    if rows:
        columns = ("spec", "kernel", "target", "schedule", "tile", "stages", "warps")
        out.print(table(columns, rows, numbers_from=4))
        click.echo(f"{len(rows)} legal plan{'' if len(rows) == 1 else 's'}")
    if outcomes:
        out.print(outcomes_table(outcomes, on_simulator=True))
    if passes:
        out.print(gradients_table(passes, on_simulator=True))
    judged: list[Outcome | BackwardOutcome] = [*outcomes, *passes]
    failed = [outcome for outcome in judged if not outcome.accuracy.ok]
    for outcome in failed:
        click.echo(f"{outcome.label}, {shape_text(outcome.shape)}: {outcome.accuracy}")
    ctx.exit(USER_FAULT if refused else COMPARISON_FAILED if failed else GOOD)
