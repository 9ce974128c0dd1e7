"""`attngen explain`: what was decided and what it costs, of one kernel or several side by side."""

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import click
import torch

from attngen.check.declared_inputs import Given, declared_inputs
from attngen.check.inputs import Shape
from attngen.cli.call_curves import CURVES, shapes_to_draw, write_curves
from attngen.cli.calls import Way, call_table, notes, ways_of
from attngen.cli.declared_options import declared_options, given_values
from attngen.cli.facts import (
    SWEEP_COLUMNS,
    attention_resources,
    facts,
    refused_facts,
    resources_of,
    role_text,
    sweep_facts,
)
from attngen.cli.gradient_facts import gradient_facts
from attngen.cli.output import GOOD, USER_FAULT, console, report, table, writing
from attngen.cli.picture import PICTURES, path_ending_in
from attngen.cli.shapes import GivenSizes, shape_options, shape_text, shapes_of
from attngen.cli.tiles import check_passed, check_tiles, draw_tiles, tile_map, tiles_to_draw
from attngen.cli.timeline import (
    TIMELINES,
    backward_line,
    check_length,
    draw,
    prediction_line,
    resident_blocks,
    shape_to_draw,
)
from attngen.cli.timeline_text import write_text
from attngen.cli.variants import (
    Sweep,
    Variant,
    arch_option,
    arch_without_gpu,
    compile_all,
    kernel_of,
    specs_argument,
    stand_in_note,
    variants,
)
from attngen.errors import SpecError
from attngen.kernel import Kernel
from attngen.plan import listing
from attngen.runtime import KernelResources
from attngen.simulate import predict, timeline

Lowered = tuple[Variant, Kernel | SpecError]


@click.command()
@specs_argument
@arch_option
@click.option("--program", is_flag=True, help="Print each role's schedule, one line a step.")
@click.option(
    "--timeline",
    "picture",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=path_ending_in(*TIMELINES),
    help="Draw who uses which unit of an SM when, to this .svg, .png or .txt, and predict the time of a call.",
)
@click.option(
    "--tiles",
    "tiles_picture",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=path_ending_in(*PICTURES),
    help="Draw which tiles a call skips, masks and takes whole, to this .svg or .png.",
)
@click.option(
    "--calls", is_flag=True, help="Measure who would take the call: attngen, eager attention, torch's own."
)
@click.option(
    "--curves",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=path_ending_in(*CURVES),
    help="Draw what --calls measures over lengths that double, to this .svg or .png, or write it to this .json.",
)
@declared_options
@shape_options
@click.pass_context
def explain(
    ctx: click.Context,
    specs: tuple[str, ...],
    sweep: Sweep,
    arch: str | None,
    program: bool,
    picture: Path | None,
    tiles_picture: Path | None,
    calls: bool,
    curves: Path | None,
    tensors: dict[str, str],
    scalars: dict[str, str],
    given: GivenSizes | None,
) -> None:
    """Show tiles, memory map, registers, occupancy, rules and traffic of each SPEC, side by side.

    Of specs with gradients the kernels of the backward pass too.

    FLOPs, bytes and tiles are those of the first check shape, or of the shape given. With --set a table, one row a
    combination; those that no legal kernel has show the rule that refuses them.
    """
    lowered: list[Lowered] = []
    said, chosen = given_values(tensors, scalars, variants(specs, sweep))
    for variant in chosen:
        try:
            spec = variant.spec
            lowered.append((variant, kernel_of(spec, arch_without_gpu(spec, arch))))
        except SpecError as fault:
            lowered.append((variant, fault))
            continue
        if note := stand_in_note(spec, arch):
            click.echo(f"{variant.label}: {note}")
    kernels = [kernel for _, kernel in lowered if isinstance(kernel, Kernel)]
    with console(err=True).status(f"compiling {len(kernels)} kernels"):
        faults = compile_all(kernels)
    for text in dict.fromkeys(str(error) for error in faults.values() if error is not None):
        click.echo(f"registers are unknown: {text}", err=True)
    used = {kernel: attention_resources(kernel) for kernel, error in faults.items() if error is None}
    if sweep:
        _print_sweep(lowered, used)
    else:
        for _, refused in lowered:
            if isinstance(refused, SpecError):
                report(refused)
        _print_facts(lowered, used, given, said)
    for kernel in kernels if program else ():
        _print_program(kernel)
    if picture is not None and kernels:
        _draw_timelines(lowered, used, given, said, picture)
    if tiles_picture is not None and kernels:
        _draw_tiles(lowered, given, said, tiles_picture)
    if calls or curves is not None:
        _measure_calls(lowered, given, said, calls, curves)
    # A sweep is there to find what is refused; specs that are named are there to be good.
    is_good = bool(kernels) if sweep else len(kernels) == len(lowered)
    ctx.exit(GOOD if is_good else USER_FAULT)


def _print_facts(
    lowered: list[Lowered],
    resources: Mapping[Kernel, KernelResources | None],
    given: GivenSizes | None,
    said: Given,
) -> None:
    columns = []
    for variant, kernel in lowered:
        if isinstance(kernel, Kernel):
            shape = shapes_of(kernel.spec, given)[0]
            check_tiles(kernel.plan, shape)
            passed, tiles = shape.arguments(), None
            if _is_known(kernel, said):
                passed |= declared_inputs(kernel.spec.arguments, shape, given=said)
                tiles = tile_map(kernel, shape, passed)
            told = facts(kernel, resources.get(kernel), shape, passed, tiles)
            told |= gradient_facts(kernel, kernel in resources, shape, passed)
            columns.append((variant.label, told))
    names = dict.fromkeys(name for _, column in columns for name in column)
    rows = [(name, *(column.get(name, "-") for _, column in columns)) for name in names]
    if columns:
        header = ("", *(label for label, _ in columns))
        console().print(table(header, rows, numbers_from=len(header)))


def _print_sweep(lowered: list[Lowered], resources: Mapping[Kernel, KernelResources | None]) -> None:
    rows = []
    for variant, kernel in lowered:
        if isinstance(kernel, Kernel):
            rows.append((variant.label, *sweep_facts(kernel.plan, resources.get(kernel))))
        else:
            rows.append((variant.label, *refused_facts(kernel)))
    columns = ("spec", *SWEEP_COLUMNS)
    console().print(table(columns, rows, numbers_from=len(columns)))


def _is_known(kernel: Kernel, said: Given) -> bool:
    """Whether every scalar has a value."""
    scalars = kernel.spec.declarations.scalars.values()
    return all(scalar.default is not None or scalar.name in said.scalars for scalar in scalars)


def _draw_tiles(lowered: list[Lowered], given: GivenSizes | None, said: Given, path: Path) -> None:
    """One panel a kernel, and one line of figures."""
    shapes = {
        variant.label: (kernel, tiles_to_draw(kernel.spec, given))
        for variant, kernel in lowered
        if isinstance(kernel, Kernel)
    }
    for kernel, shape in shapes.values():
        check_tiles(kernel.plan, shape)
    maps = {
        label: tile_map(kernel, shape, _passed(kernel, shape, said))
        for label, (kernel, shape) in shapes.items()
    }
    for label, tiles in maps.items():
        click.echo(f"{label}, {shape_text(tiles.shape)}: {tiles}")
    with writing("--tiles", path):
        draw_tiles(maps, path)
    click.echo(f"tiles: {path}")


def _passed(kernel: Kernel, shape: Shape, said: Given) -> dict[str, Any]:
    """What a call of a shape passes by name."""
    return declared_inputs(kernel.spec.arguments, shape, given=said) | shape.arguments()


def _draw_timelines(
    lowered: list[Lowered],
    is_compiled: Container[Kernel],
    given: GivenSizes | None,
    said: Given,
    path: Path,
) -> None:
    """One panel a kernel, and one line of figures; of a backward pass one more for all of its kernels."""
    timelines = {}
    for variant, kernel in lowered:
        if not isinstance(kernel, Kernel):
            continue
        shape = shape_to_draw(kernel, given)
        check_tiles(kernel.plan, shape)
        sizes = (shape.seqlen_q, shape.seqlen_k, shape.batch, shape.heads, shape.heads_kv)
        passed = _passed(kernel, shape, said)
        check_passed(kernel, shape, passed)
        about: dict[str, Any] = {"declared": passed, "tokens": shape.tokens}
        of_gradients = []
        for plan in (kernel.plan, *kernel.call.gradients):
            check_length(plan, shape)
            slots = resident_blocks(plan, resources_of(kernel, plan) if kernel in is_compiled else None)
            label = variant.label if plan is kernel.plan else f"{variant.label}, {plan.schedule}"
            timelines[label] = timeline(plan, *sizes, **about, slots=slots)
            prediction = predict(plan, *sizes, **about, slots=slots)
            click.echo(f"{label}: {prediction_line(plan, shape, timelines[label], prediction)}")
            of_gradients += [prediction] if plan.direction == "backward" else []
        if of_gradients:
            click.echo(f"{variant.label}: {backward_line(kernel.plan, shape, of_gradients)}")
    with writing("--timeline", path):
        (write_text if path.suffix == ".txt" else draw)(timelines, path)
    click.echo(f"timeline: {path}")


def _measure_calls(
    lowered: list[Lowered], given: GivenSizes | None, said: Given, prints: bool, path: Path | None
) -> None:
    """A table for each kernel of the shape that is given, and one picture of all over their lengths."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    curves: dict[str, dict[int, list[Way]]] = {}
    for variant, kernel in lowered:
        if not isinstance(kernel, Kernel):
            continue
        shape = shapes_of(kernel.spec, given)[0]
        of_length = curves[variant.label] = {}
        for each in [shape] if path is None else shapes_to_draw(shape):
            with console(err=True).status(f"measuring {variant.label}, {shape_text(each)}"):
                of_length[each.seqlen_k] = ways_of(kernel, each, said, device)
        if prints:
            click.echo(f"{variant.label}, {shape_text(shape)}, {kernel.plan.inputs.name}:")
            console().print(call_table(of_length[shape.seqlen_k]))
            for line in notes(kernel, device):
                click.echo(line)
    if path is not None and curves:
        with writing("--curves", path):
            write_curves(curves, device, path)
        click.echo(f"curves: {path}")


def _print_program(kernel: Kernel) -> None:
    for plan in (kernel.plan, *kernel.call.gradients):
        for role in plan.roles:
            click.echo(f"{plan.name}, role {role_text(role)}:")
            click.echo(listing(role.program, indent=1))
            click.echo()
