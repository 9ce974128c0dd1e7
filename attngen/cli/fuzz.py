"""`attngen fuzz`: search for a case that breaks a property, and make it small."""

import math
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from attngen.cli.gradient_comparison import check_has_gradients
from attngen.cli.output import COMPARISON_FAILED, GOOD, console
from attngen.cli.shapes import POSITIVE, SEED
from attngen.cli.variants import read_value
from attngen.errors import ArgumentError
from attngen.fuzz.case import EXAMPLES, Case
from attngen.fuzz.properties import RULES
from attngen.spec import Spec, load


def _finite(ctx: click.Context, param: click.Parameter, given: float | None) -> float | None:
    if given is not None and math.isnan(given):
        raise click.BadParameter("nan is no number of minutes", ctx, param)
    return given


@click.command()
@click.argument("spec", required=False)
@click.option("--examples", type=POSITIVE, help=f"Cases to try; {EXAMPLES} unless --minutes is given.")
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    callback=_finite,
    help="Try cases for so long.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--arch", help="Target in place of the spec's; without SPEC, of the specs that are drawn.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change a value of SPEC.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of everything that is drawn.")
@click.option("--backward", is_flag=True, help="Draw only specs with gradients, or take only such a SPEC.")
@click.option(
    "--ragged",
    is_flag=True,
    help="Draw only specs whose sequences have lengths of their own, ragged or padded.",
)
@click.option("--property", "rules", multiple=True, type=click.Choice(list(RULES)), help="Only these.")
@click.option("--repro", metavar="CASE", help="Try this one case, as a failing run printed it.")
@click.pass_context
def fuzz(
    ctx: click.Context,
    spec: str | None,
    examples: int | None,
    minutes: float | None,
    device: str,
    arch: str | None,
    changes: tuple[str, ...],
    seed: int,
    backward: bool,
    ragged: bool,
    rules: tuple[str, ...],
    repro: str | None,
) -> None:
    """Search for a case that breaks a property of attention, and make it small.

    Draws problems for SPEC, or specs too where none is given: lengths beside the tiles' edges, GQA, strides, scales,
    masks. On cpu the simulator runs, on cuda the cubin. Gradients are judged where a spec has them, as one in four that
    are drawn. Prints what was met, and for a failure one line that shows it again. Exit code 1 where a property does
    not hold.
    """
    from attngen.fuzz import search_faults  # and with it Hypothesis, which no other command needs

    out = console()
    out.soft_wrap = True
    if repro is not None:
        ctx.exit(_repeat_case(out, repro, device))
    chosen = None if spec is None else _changed(load(spec), arch, changes)
    if backward and chosen is not None:
        check_has_gradients(chosen, chosen.name or str(spec))
    if ragged and chosen is not None and chosen.problem.queries == chosen.problem.keys == "dense":
        must = "a spec of ragged or padded sequences, or none, beside --ragged"
        raise ArgumentError("SPEC", f"{chosen.name or spec}, whose sequences are of one length", must)
    columns = (TextColumn("fuzzing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    total = examples or (EXAMPLES if minutes is None else None)
    with Progress(*columns, console=console(err=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        report = search_faults.fuzz(
            chosen,
            examples=examples,
            minutes=minutes,
            device=device,
            seed=seed,
            targets=search_faults.targets_for(device, arch) if chosen is None else None,
            rules=rules or tuple(RULES),
            backward=backward,
            is_cut=ragged,
            progress=lambda cases: bar.update(task, completed=cases),
        )
    out.print(report)
    ctx.exit(GOOD if report.ok else COMPARISON_FAILED)


def _repeat_case(out: Console, text: str, device: str) -> int:
    from attngen.fuzz.search_faults import reproduce

    try:
        case = Case.from_json(text)
    except ValueError as error:
        raise ArgumentError("--repro", error, "a case as a failing run printed it") from None
    failure = reproduce(case, device)
    out.print("ok: the case holds" if failure is None else f"FAILED {failure}", markup=False, highlight=False)
    return GOOD if failure is None else COMPARISON_FAILED


def _changed(spec: Spec, arch: str | None, changes: tuple[str, ...]) -> Spec:
    values: dict[str, Any] = {} if arch is None else {"target": arch}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise click.BadParameter(f"{change} is not KEY=VALUE", param_hint="--set")
        values[key] = read_value(value)
    return spec.replace(values) if values else spec
