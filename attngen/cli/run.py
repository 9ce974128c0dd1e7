"""`attngen run`: build, execute, compare with the reference, and time."""

from pathlib import Path

import click
import torch

from attngen.api import resolve_arch
from attngen.check.inputs import Shape
from attngen.check.judging import Inputs
from attngen.cli.clamps import clamps
from attngen.cli.comparison import Outcome, draw_declared, draw_inputs, execute, outcomes_table, shape_of
from attngen.cli.declared_options import declared_options, given_values
from attngen.cli.errors_report import SUFFIXES, Loss, at_lengths, losses, losses_table, plot
from attngen.cli.gradient_comparison import (
    BackwardOutcome,
    check_has_gradients,
    execute_backward,
    gradients_table,
)
from attngen.cli.output import COMPARISON_FAILED, GOOD, USER_FAULT, console, report, writing
from attngen.cli.picture import path_ending_in
from attngen.cli.shapes import SEED, GivenSizes, cut_kinds, shape_options, shape_text, shapes_of
from attngen.cli.variants import (
    Sweep,
    arch_option,
    arch_without_gpu,
    kernel_of,
    specs_argument,
    stand_in_note,
    variants,
)
from attngen.errors import ArgumentError, AttngenError, InternalError, ToolchainError
from attngen.kernel import Kernel
from attngen.spec import Spec

SIMULATED = (
    "on the simulator (CPU): same tiles, order and roundings as the kernel; its time is not the kernel's"
)


@click.command()
@specs_argument
@arch_option
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="Where [cuda where there is a GPU, else cpu]."
)
@shape_options
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of random inputs.")
@click.option("--backward", is_flag=True, help="Run the backward pass too, and compare dq, dk and dv.")
@click.option(
    "--trace",
    is_flag=True,
    help="Print S, maxima, sums and O after every block of keys, with --backward dS and gradients; on the CPU.",
)
@click.option(
    "--inputs",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Take q, k and v (batch, seqlen, heads, head_dim) from this safetensors file.",
)
@declared_options
@click.option(
    "--report",
    "picture",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=path_ending_in(*SUFFIXES),
    help="Plot the errors of specs of e4m3 inputs over lengths to this .html, .png or .svg.",
)
@click.option("--lineinfo", is_flag=True, help="Keep line numbers in the cubin, for profilers.")
@click.pass_context
def run(
    ctx: click.Context,
    specs: tuple[str, ...],
    sweep: Sweep,
    arch: str | None,
    device: str | None,
    given: GivenSizes | None,
    seed: int,
    backward: bool,
    trace: bool,
    file: Path | None,
    tensors: dict[str, str],
    scalars: dict[str, str],
    picture: Path | None,
    lineinfo: bool,
) -> None:
    """Run each SPEC on its check shapes, or on the shape given, and compare with the reference in fp64.

    For e4m3 inputs also what these cost: errors against fp64 on the inputs as they were, normal and with outliers.
    With --backward also gradients, of a gradient of out from N(0, 1), for specs that have them.

    Exits with 1 if a comparison failed.
    """
    if file is not None and given is not None:
        raise click.UsageError(
            "--inputs brings its own shape; leave out --batch, --heads, --seqlen, --lengths"
        )
    if trace and device == "cuda":
        raise click.UsageError("--trace shows the simulator at work; leave out --device cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ToolchainError(
            "this machine has no CUDA GPU that torch can use", "--device cpu runs the simulator"
        )
    outcomes: dict[bool, list[Outcome]] = {True: [], False: []}  # by whether they are the simulator's
    passes: dict[bool, list[BackwardOutcome]] = {True: [], False: []}
    clamped: list[str] = []
    lost: list[Loss] = []
    over_lengths: list[Loss] = []
    refused = False
    progress = console(err=True)
    said, chosen = given_values(tensors, scalars, variants(specs, sweep))
    for variant in chosen:
        try:
            spec = variant.spec
            if backward:
                check_has_gradients(spec, variant.label)
            on = "cpu" if trace else device or _default_device(spec, arch)
            target = arch_without_gpu(spec, arch) if on == "cpu" else resolve_arch(spec, arch)
            kernel = kernel_of(spec, target, lineinfo=lineinfo)
            if on == "cpu" and (note := stand_in_note(spec, arch)):
                click.echo(f"{variant.label}: {note}")
            shapes: list[Shape] = []
            for shape, inputs in _inputs(kernel, file, given, on, seed):
                with progress.status(f"running {variant.label}"):
                    declared = draw_declared(kernel, inputs, seed, said, shape)
                    outcome = execute(kernel, inputs, variant.label, declared, shape, with_trace=trace)
                    found = clamps(spec, outcome.shape, declared)
                    clamped += [f"{variant.label}, {shape_text(outcome.shape)}: {each}" for each in found]
                    board = outcome.board
                    if backward:
                        made = execute_backward(
                            kernel, inputs, variant.label, declared, seed, shape, with_trace=trace
                        )
                        passes[on == "cpu"].append(made)
                        board += f"\n{made.board}" if trace else ""
                outcomes[on == "cpu"].append(outcome)
                shapes.append(outcome.shape)
                if board:
                    click.echo(board)
            if kernel.takes_operands:
                with progress.status(f"what e4m3 costs {variant.label}"):
                    shape = max(shapes, key=lambda each: each.pairs)
                    lost += losses(kernel, variant.label, (shape,), on, seed, said)
                    lengths = at_lengths(shape, on) if picture is not None else ()
                    over_lengths += losses(kernel, variant.label, lengths, on, seed, said)
        except InternalError:
            raise
        except AttngenError as fault:  # one that this GPU cannot run hides none of the others
            refused = True
            report(fault)
    for simulated, done in outcomes.items():
        if done:
            click.echo(SIMULATED if simulated else f"on {torch.cuda.get_device_name()}")
            console().print(outcomes_table(done, on_simulator=simulated))
        if passes[simulated]:
            console().print(gradients_table(passes[simulated], on_simulator=simulated))
    if lost:
        console().print(losses_table(lost))
    if picture is not None:
        if not over_lengths:
            raise click.UsageError("--report is for specs of e4m3 inputs, and none was run")
        with writing("--report", picture):
            plot(over_lengths, picture)
        click.echo(f"report: {picture}")
    for line in clamped:
        click.echo(f"warning: {line}", err=True)
    judged: list[Outcome | BackwardOutcome] = [
        *outcomes[True],
        *outcomes[False],
        *passes[True],
        *passes[False],
    ]
    failed = [outcome for outcome in judged if not outcome.accuracy.ok]
    for each in failed:
        click.echo(f"{each.label}, {shape_text(each.shape)}: {each.accuracy}")
    ctx.exit(USER_FAULT if refused else COMPARISON_FAILED if failed else GOOD)


def _default_device(spec: Spec, arch: str | None) -> str:
    return "cuda" if torch.cuda.is_available() and (arch or spec.target) != "simulator" else "cpu"


def _inputs(
    kernel: Kernel, file: Path | None, given: GivenSizes | None, device: str, seed: int
) -> list[tuple[Shape, Inputs]]:
    """Inputs and their shapes: those of the file, or drawn."""
    if file is not None:
        if cut_kinds(kernel.spec):
            got = "a spec whose sequences have lengths of their own"
            raise ArgumentError("--inputs", got, "a spec of dense sequences", "--lengths draws tensors")
        inputs = _read_inputs(file, device)
        return [(shape_of(kernel, inputs), inputs)]
    shapes = shapes_of(kernel.spec, given)
    return [(shape, draw_inputs(kernel, shape, device, seed)) for shape in shapes]


def _read_inputs(file: Path, device: str) -> Inputs:
    from safetensors.torch import load_file

    try:
        tensors = load_file(file, device=device)
    except Exception as error:  # a stranger's header may say what the reader has no name for
        raise ArgumentError("--inputs", f"{file} ({error})", "a safetensors file") from error
    missing = [name for name in ("q", "k", "v") if name not in tensors]
    if missing:
        found = ", ".join(sorted(tensors)) or "no tensor"
        raise ArgumentError(
            "--inputs", f"{file} with {found}", f"tensors q, k and v; {', '.join(missing)} missing"
        )
    return tensors["q"], tensors["k"], tensors["v"]
