"""`attngen build`: from specs to cubins, with what the compiler says of them."""

from pathlib import Path

import click
from rich.table import Table

from attngen.api import resolve_arch
from attngen.cli.output import GOOD, USER_FAULT, console, report, seconds_text, size_text, table, writing
from attngen.cli.variants import Sweep, arch_option, compile_all, kernel_of, specs_argument, variants
from attngen.errors import Diagnostic, SpecError
from attngen.kernel import Kernel
from attngen.spec import Spec


@click.command()
@specs_argument
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write NAME.json, and .cu and .cubin of every module, to this directory.",
)
@arch_option
@click.option("--lineinfo", is_flag=True, help="Keep line numbers in the cubin, for profilers.")
@click.pass_context
def build(
    ctx: click.Context,
    specs: tuple[str, ...],
    sweep: Sweep,
    output: Path | None,
    arch: str | None,
    lineinfo: bool,
) -> None:
    """Compile each SPEC and report registers, spills and shared memory. Needs no GPU."""
    kernels: list[tuple[str, Kernel]] = []
    refused = False
    for variant in variants(specs, sweep):
        try:
            kernels.append((variant.label, _kernel_to_build(variant.spec, arch, lineinfo)))
        except SpecError as fault:
            refused = True
            report(fault)
    with console(err=True).status(f"compiling {len(kernels)} kernels"):
        faults = compile_all(kernel for _, kernel in kernels)
    for error in faults.values():
        if error is not None:
            raise error
    if kernels:
        console().print(_report(kernels))
    if output is not None:
        for _, kernel in kernels:
            with writing("--output", output):
                paths = kernel.save(output)
            for path in paths:
                click.echo(f"wrote {path}")
    ctx.exit(USER_FAULT if refused else GOOD)


def _kernel_to_build(spec: Spec, arch: str | None, lineinfo: bool) -> Kernel:
    target = resolve_arch(spec, arch)
    if not target.emits:
        raise SpecError(
            (
                Diagnostic(
                    f"target = {target.name} has no code to build",
                    "target-emits",
                    None if arch else spec.locate("target"),
                    "target",
                    target.name,
                    note="its plans run on the simulator: attngen run",
                ),
            )
        )
    return kernel_of(spec, target, lineinfo=lineinfo)


def _report(kernels: list[tuple[str, Kernel]]) -> Table:
    rows = []
    for label, module in ((label, module) for label, each in kernels for module in each.modules.values()):
        of_launch = {entry.name: entry.smem_bytes for entry in module.kernels}
        for used in module.compiled.resources:
            rows.append(
                (
                    label,
                    used.name,
                    str(used.registers),
                    f"{used.spill_stores} + {used.spill_loads}",
                    str(used.stack_bytes),
                    size_text(of_launch.get(used.name, 0) + used.static_smem_bytes),
                    "cached" if module.compiled.was_cached else seconds_text(module.compiled.seconds),
                )
            )
    columns = (
        "spec",
        "kernel",
        "registers",
        "spill stores + loads [B]",
        "stack [B]",
        "shared memory",
        "compiled in",
    )
    return table(columns, rows, numbers_from=2)
