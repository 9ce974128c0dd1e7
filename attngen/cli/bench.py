"""`attngen bench`: this kernel and its peers in one process, interleaved; a table, JSON and a plot."""

from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from attngen import bench as measuring
from attngen.api import Kernel, resolve_arch
from attngen.cli.output import console, table
from attngen.cli.variants import Sweep, arch_option, kernel_of, specs_argument, variants
from attngen.dtypes import torch_dtype
from attngen.errors import ToolchainError
from attngen.inputs import Shape, random_inputs

PEERS = ("flash", "cudnn", "efficient")


def _words(ctx: click.Context, param: click.Parameter, text: str) -> tuple[str, ...]:
    names = tuple(word for word in text.split(",") if word)
    if unknown := set(names) - set(PEERS):
        raise click.BadParameter(f"{unknown.pop()!r} is none of {', '.join(PEERS)}")
    return names


def _lengths(ctx: click.Context, param: click.Parameter, text: str) -> tuple[int, ...]:
    if not all(word.isdigit() and int(word) > 0 for word in text.split(",")):
        raise click.BadParameter(f"{text!r} is no list of lengths such as 1024,4096")
    return tuple(int(word) for word in text.split(","))


@click.command()
@specs_argument
@arch_option
@click.option(
    "--against", default="flash,cudnn", show_default=True, callback=_words, help="Peers, of torch's."
)
@click.option("--seqlen", default="1024,4096,16384", show_default=True, callback=_lengths)
@click.option("--tokens", type=click.IntRange(1), default=16384, show_default=True, help="batch x seqlen.")
@click.option("--width", type=click.IntRange(1), default=2048, show_default=True, help="heads x head_dim.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option(
    "--source",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Time this hand-edited .cu in place of what the spec emits.",
)
@click.option(
    "-o", "out", type=click.Path(path_type=Path), help="Folder for bench.json, bench.png, bench.svg."
)
def bench(
    specs: tuple[str, ...],
    sweep: Sweep,
    arch: str | None,
    against: tuple[str, ...],
    seqlen: tuple[int, ...],
    tokens: int,
    width: int,
    rounds: int,
    source: Path | None,
    out: Path | None,
) -> None:
    """Time each SPEC beside torch's own attention: medians of interleaved rounds, TFLOPS."""
    if not torch.cuda.is_available():
        raise ToolchainError("bench times a GPU and this machine has none", "attngen explain needs no GPU")
    rows: list[dict[str, Any]] = []
    for variant in variants(specs, sweep):
        kernel = kernel_of(variant.spec, resolve_arch(variant.spec, arch))
        if source is not None:
            kernel = Kernel(kernel.spec, kernel.plan, source=source.read_text(encoding="utf-8"))
        for length in seqlen:
            rows.append({"spec": variant.label, **_measure(kernel, length, against, tokens, width, rounds)})
    names = list(dict.fromkeys(name for row in rows for name in row["tflops"]))
    cells = [
        (row["spec"], str(row["seqlen"]), *(f"{row['tflops'].get(name, float('nan')):.0f}" for name in names))
        for row in rows
    ]
    console().print(table(("spec", "seqlen", *names), cells, numbers_from=1))
    if out is not None:
        measuring.write_json(out / "bench.json", rows)
        _plot(rows, names, out)


def _measure(
    kernel: Kernel, seqlen: int, against: tuple[str, ...], tokens: int, width: int, rounds: int
) -> dict[str, Any]:
    plan = kernel.plan
    heads = max(1, width // plan.head_dim_qk)
    shape = Shape(max(1, tokens // seqlen), heads, heads, seqlen, seqlen)
    causal = plan.mask_text == "causal"
    q, k, v = random_inputs(shape, plan.head_dim_qk, plan.head_dim_v, torch_dtype(plan.inputs), "cuda", 0)
    runs: dict[str, measuring.Run] = {"attngen": partial(kernel, q, k, v)}
    if plan.mask_text in ("full", "causal"):  # torch's back ends know no other mask
        runs |= measuring.peers(q, k, v, causal, against)
    samples = measuring.measure(runs, rounds)
    point = measuring.Point(shape, plan.head_dim_qk, plan.head_dim_v, causal)
    return {
        "seqlen": seqlen,
        "kernel": plan.name,
        "cubin": kernel.compiled.digest,
        "tflops": measuring.summary(samples, point.flops),
        "ms": samples,
    }


def _plot(rows: list[dict[str, Any]], names: list[str], out: Path) -> None:
    """TFLOPS over length, a line for each spec and peer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for spec in dict.fromkeys(row["spec"] for row in rows):
        for name in names:
            points = [
                (r["seqlen"], r["tflops"][name]) for r in rows if r["spec"] == spec and name in r["tflops"]
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=f"{spec}: {name}")
    axes.set(xscale="log", xlabel="seqlen", ylabel="TFLOPS")
    axes.set_xticks([row["seqlen"] for row in rows], [str(row["seqlen"]) for row in rows])
    axes.set_ylim(bottom=0)
    axes.legend()
    for suffix in ("png", "svg"):
        figure.savefig(out / f"bench.{suffix}", bbox_inches="tight", dpi=150)
