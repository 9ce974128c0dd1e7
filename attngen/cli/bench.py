"""`attngen bench`: this kernel and its peers in one process, interleaved; a table, JSON and a plot."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from rich.table import Table

from attngen.api import resolve_arch
from attngen.check import timing as measuring
from attngen.check.caches import drawn_descales
from attngen.check.declared_inputs import Given, declared_inputs
from attngen.check.inputs import Shape, random_like
from attngen.check.judging import draw
from attngen.cli.declared_options import declared_options, given_values
from attngen.cli.facts import SWEEP_COLUMNS, refused_facts, resources_of, sweep_facts
from attngen.cli.gradient_comparison import check_has_gradients
from attngen.cli.output import GOOD, USER_FAULT, console, report, seconds_text, table, writing
from attngen.cli.shapes import POSITIVE, GivenSizes, cut_shape, lengths_options, shape_text
from attngen.cli.variants import Sweep, Variant, arch_option, compile_all, kernel_of, specs_argument, variants
from attngen.errors import ArgumentError, SpecError, ToolchainError
from attngen.kernel import Kernel

OURS = "attngen"
FORWARD, BACKWARD = "forward", "backward"


def _words(ctx: click.Context, param: click.Parameter, text: str) -> tuple[str, ...]:
    names = tuple(word for word in text.split(",") if word)
    if unknown := set(names) - set(measuring.PEERS):
        raise click.BadParameter(f"{unknown.pop()!r} is none of {', '.join(measuring.PEERS)}")
    return names


def _seqlens(ctx: click.Context, param: click.Parameter, text: str) -> tuple[int, ...]:
    return tuple(POSITIVE.convert(word, param, ctx) for word in text.split(","))


@click.command()
@specs_argument
@arch_option
@click.option(
    "--against",
    default="flash,cudnn",
    show_default=True,
    callback=_words,
    help=f"Peers, all of them torch's: {', '.join(measuring.PEERS)}.",
)
@click.option("--seqlen", default="1024,4096,16384", show_default=True, callback=_seqlens)
@lengths_options
@click.option("--tokens", type=POSITIVE, default=measuring.TOKENS, show_default=True, help="batch x seqlen.")
@click.option("--width", type=POSITIVE, default=measuring.WIDTH, show_default=True, help="heads x head_dim.")
@click.option("--backward", is_flag=True, help="Time the backward pass too, all its kernels together.")
@click.option("--rounds", type=POSITIVE, default=7, show_default=True)
@declared_options
@click.option(
    "--source",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Time this hand-edited .cu in place of what the spec emits.",
)
@click.option(
    "-o", "out", type=click.Path(path_type=Path), help="Folder for bench.json, bench.png, bench.svg."
)
@click.pass_context
def bench(
    ctx: click.Context,
    specs: tuple[str, ...],
    sweep: Sweep,
    arch: str | None,
    against: tuple[str, ...],
    seqlen: tuple[int, ...],
    given: GivenSizes | None,
    tokens: int,
    width: int,
    backward: bool,
    rounds: int,
    tensors: dict[str, str],
    scalars: dict[str, str],
    source: Path | None,
    out: Path | None,
) -> None:
    """Time each SPEC beside torch's own attention: medians of interleaved rounds, TFLOPS.

    With --set a row a combination, with its registers, spills, shared memory and occupancy; those that no legal
    kernel has show the rule that refuses them. A peer that cannot take part has no figure, and is told with its reason.
    With --backward a row a pass: that of gradients is counted with 2.5 times the forward's FLOPs. Sequences that have
    lengths of their own are all of one length, as batch x seqlen says, or of those given; peers take the first alone.
    """
    if not torch.cuda.is_available():
        raise ToolchainError("bench times a GPU and this machine has none", "attngen explain needs no GPU")
    if backward and source is not None:
        raise click.UsageError("--source holds the kernel of a forward pass; leave out --backward")
    edited = None if source is None else _read_source(source)
    said, chosen = given_values(tensors, scalars, variants(specs, sweep))
    lowered = [(variant, _lower(variant, arch, edited, backward)) for variant in chosen]
    kernels = [kernel for _, kernel in lowered if isinstance(kernel, Kernel)]
    with console(err=True).status(f"compiling {len(kernels)} kernels"):
        for fault in filter(None, compile_all(kernels).values()):
            raise fault
    rows: list[dict[str, Any]] = []
    faults = False
    for variant, kernel in lowered:
        if isinstance(kernel, SpecError):
            rows.append({"spec": variant.label, "pass": FORWARD, "facts": _named(refused_facts(kernel))})
            if not sweep:  # there what is refused is a row
                faults = True
                report(kernel)
            continue
        try:
            for shape in _shapes(kernel, seqlen, tokens, width, given):
                for each in (FORWARD, BACKWARD) if backward else (FORWARD,):
                    facts = {"spec": variant.label, "pass": each, "facts": _facts(kernel, each)}
                    with console(err=True).status(f"timing {variant.label}, {each}, {shape_text(shape)}"):
                        found = _measure(kernel, each, shape, against, rounds, said)
                    rows.append(facts | found)
        except ToolchainError as fault:  # a kernel for another GPU hides none of the others
            faults = True
            report(fault)
    measured = [row for row in rows if "ms" in row]
    names = (OURS, *against)
    console().print(_table(rows if sweep else measured, names, with_pass=backward, with_facts=bool(sweep)))
    for line in dict.fromkeys(line for row in measured for line in row["absent"].values()):
        click.echo(line, err=True)
    if out is not None and measured:
        with writing("--out", out):
            measuring.write_json(out / "bench.json", rows)
            _plot(measured, names, out)
    ctx.exit(GOOD if measured and not faults else USER_FAULT)


def _read_source(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as failure:
        raise ArgumentError("--source", f"{path} ({failure})", "a text in UTF-8") from failure


def _named(facts: Iterable[str]) -> dict[str, str]:
    return dict(zip(SWEEP_COLUMNS, facts, strict=True))


def _facts(kernel: Kernel, of_pass: str) -> dict[str, str]:
    """What a pass takes, in lines, one a kernel of programs."""
    plans = kernel.call.gradients if of_pass == BACKWARD else (kernel.plan,)
    each = zip(*(sweep_facts(plan, resources_of(kernel, plan)) for plan in plans), strict=True)
    return _named(map("\n".join, each))


def _lower(variant: Variant, arch: str | None, edited: str | None, backward: bool) -> Kernel | SpecError:
    try:
        if backward:
            check_has_gradients(variant.spec, variant.label)
        kernel = kernel_of(variant.spec, resolve_arch(variant.spec, arch))
    except SpecError as fault:
        return fault
    return kernel if edited is None else Kernel(kernel.spec, kernel.call, source=edited)


def _shapes(
    kernel: Kernel, seqlen: Iterable[int], tokens: int, width: int, given: GivenSizes | None
) -> tuple[Shape, ...]:
    """What is timed: a shape for each length, or the sequences that are given.

    Raises:
        ArgumentError: lengths for a spec that has no use for them.
    """
    head_dim = kernel.plan.head_dim_qk
    whole = tuple(measuring.grid_shape(each, head_dim, tokens=tokens, width=width) for each in seqlen)
    if given is not None:
        return (replace(given, heads=whole[0].heads).shape(kernel.spec),)
    return tuple(
        cut_shape(
            kernel.spec, {"q": (each.seqlen_q,) * each.batch, "k": (each.seqlen_k,) * each.batch}, each, 0
        )
        for each in whole
    )


def as_dense(
    kernel: Kernel, shape: Shape, name: str, inputs: Iterable[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Tensors of sequences that all have one length, as a peer takes them: (batch, seqlen, heads, head_dim).

    Raises:
        ToolchainError: sequences of several lengths, or a mask or score that reads what a peer knows nothing of.
    """
    lengths = [{*cut.lengths} for cut in shape.cuts.values()]
    is_paged = kernel.plan.lengths.is_paged("keys")
    if kernel.plan.descales:
        cure = f"--against names the peers to measure: leave {name} out"
        raise ToolchainError(f"{name} does not take part: it takes no cache of e4m3", cure)
    if any(len(each) > 1 for each in lengths) or kernel.spec.arguments.tensors or is_paged:
        reason = "sequences of several lengths or in pages, or tensors by token, are not for it"
        cure = f"--against names the peers to measure: leave {name} out"
        raise ToolchainError(f"{name} does not take part: {reason}", cure)
    return tuple(x.view(shape.batch, -1, *x.shape[-2:]) for x in inputs)


def _measure(
    kernel: Kernel,
    of_pass: str,
    shape: Shape,
    against: Iterable[str],
    rounds: int,
    said: Given,
) -> dict[str, Any]:
    plan = kernel.plan
    q, k, v = draw(plan, shape, "cuda")
    passed = declared_inputs(kernel.spec.arguments, shape, q.device, given=said) | shape.arguments(q.device)
    passed |= drawn_descales(kernel.spec, shape, q.device)
    point = measuring.Point(shape, plan.head_dim_qk, plan.head_dim_v, plan.mask is measuring.CAUSAL)
    inputs: tuple[torch.Tensor, ...] = (q, k, v)
    peer: Callable[..., measuring.Run] = measuring.peer
    ours: measuring.Run = partial(kernel, q, k, v, **passed)
    flops = point.flops
    if of_pass == BACKWARD:
        out, lse = kernel(q, k, v, return_lse=True, **passed)
        dout = random_like(out)
        inputs, peer = (q, k, v, dout), measuring.backward_peer
        ours, flops = partial(kernel.backward, dout, q, k, v, out, lse, **passed), point.backward_flops
    runs: dict[str, measuring.Run] = {OURS: ours}
    absent = {}
    for name in against:
        try:
            of_peer = inputs if not (shape.cuts or plan.descales) else as_dense(kernel, shape, name, inputs)
            declared = {} if shape.cuts else passed
            runs[name] = peer(name, *of_peer, plan.mask, kernel.spec.score_expr, declared)
        except ToolchainError as fault:
            absent[name] = fault.message
    samples = measuring.measure(runs, rounds)
    return {
        "seqlen": shape.seqlen_k,
        "shape": shape_text(shape),
        "kernel": plan.name,
        "cubin": kernel.compiled.digest,
        "tflops": measuring.summary(samples, flops),
        "ms": samples,
        "absent": absent,
    }


def _table(
    rows: Iterable[dict[str, Any]], names: Iterable[str], *, with_pass: bool, with_facts: bool
) -> Table:
    """A row a spec, length and pass: its facts where asked for, the time of a call, TFLOPS beside every peer's."""
    columns = ("spec", *(("pass",) if with_pass else ()), *(SWEEP_COLUMNS if with_facts else ()))
    cells = []
    for row in rows:
        of_pass = (row["pass"],) if with_pass else ()
        text = (row["spec"], *of_pass, *(row["facts"].values() if with_facts else ()))
        if "ms" in row:
            time = seconds_text(median(row["ms"][OURS]) / 1e3)
            figures = (f"{row['tflops'][name]:.0f}" if name in row["tflops"] else "-" for name in names)
            cells.append((*text, str(row["seqlen"]), time, *figures))
        else:
            cells.append((*text, "-", "-", *("-" for _ in names)))
    drawn = table((*columns, "seqlen", "time", *names), cells, numbers_from=len(columns))
    drawn.caption, drawn.caption_justify = f"time of a call of {OURS}; TFLOPS of each", "right"
    return drawn


def _plot(rows: list[dict[str, Any]], names: Iterable[str], out: Path) -> None:
    """TFLOPS over length, a line for each spec, pass and peer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for spec, of_pass in dict.fromkeys((row["spec"], row["pass"]) for row in rows):
        own = [row for row in rows if (row["spec"], row["pass"]) == (spec, of_pass)]
        for name in names:
            points = [(row["seqlen"], row["tflops"][name]) for row in own if name in row["tflops"]]
            if points:
                label = f"{spec}, {of_pass}: {name}" if of_pass == BACKWARD else f"{spec}: {name}"
                axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xscale="log", xlabel="seqlen", ylabel="TFLOPS")
    axes.set_xticks([row["seqlen"] for row in rows], [str(row["seqlen"]) for row in rows])
    axes.set_ylim(bottom=0)
    axes.legend()
    for suffix in ("png", "svg"):
        figure.savefig(out / f"bench.{suffix}", bbox_inches="tight", dpi=150)
