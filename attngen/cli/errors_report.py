"""What e4m3 inputs cost, beside the time of `attngen run`: a table, and a plot over lengths."""

import html
import io
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from attngen.check.declared_inputs import Given
from attngen.check.inputs import Kind, Shape
from attngen.cli.comparison import draw_declared, draw_inputs
from attngen.cli.losses import beside, rmse_of
from attngen.cli.output import table
from attngen.cli.picture import PICTURES, figure_panels
from attngen.cli.shapes import shape_text
from attngen.kernel import Kernel

SUFFIXES = (".html", *PICTURES)
KINDS: dict[Kind, str] = {"randn": "normal", "outliers": "normal, 0.1 % of it with outliers of deviation 10"}
"""Inputs that are drawn, and how people call them."""
LENGTHS = {"cpu": (64, 128, 256), "cuda": (512, 1024, 2048, 4096, 8192)}
"""Keys and queries of the plot: what each device does in seconds, the fp64 reference of sampled rows included."""


@dataclass(frozen=True)
class Loss:
    """RMSE of some kernels on one input, against fp64 on it.

    Attributes:
        label: of the spec.
        rmse: by the kernels' names; the spec's own kernel first.
    """

    label: str
    kind: Kind
    shape: Shape
    rmse: dict[str, float]


def losses(
    kernel: Kernel, label: str, shapes: Iterable[Shape], device: str, seed: int, given: Given
) -> list[Loss]:
    """What the kernel, one with a scale per tensor and bf16's lose, on each kind of input."""
    kernels = beside(kernel)
    found = []
    for shape in shapes:
        for kind in KINDS:
            inputs = draw_inputs(kernel, shape, device, seed, kind)
            declared = draw_declared(kernel, inputs, seed, given)
            found.append(Loss(label, kind, shape, rmse_of(kernels, inputs, declared)))
    return found


def at_lengths(shape: Shape, device: str) -> tuple[Shape, ...]:
    """The shapes of the plot: the heads of one that was run, one batch, and the device's lengths."""
    return tuple(replace(shape, batch=1, seqlen_q=length, seqlen_k=length) for length in LENGTHS[device])


def losses_table(found: Iterable[Loss]) -> Table:
    """A row for each input: this kernel, a scale per tensor, bf16."""
    rows = [
        (
            loss.label,
            shape_text(loss.shape),
            "normal" if loss.kind == "randn" else loss.kind,
            next(iter(loss.rmse)),
            f"{next(iter(loss.rmse.values())):.2e}",
            *(f"{loss.rmse[name]:.2e}" if name in loss.rmse else "-" for name in ("per_tensor", "bf16")),
        )
        for loss in found
    ]
    drawn = table(
        ("spec", "shape", "inputs", "scales", "rmse", "per_tensor", "bf16"),
        rows,
        numbers_from=4,
    )
    drawn.caption, drawn.caption_justify = (
        "rmse against fp64 on the inputs before they are e4m3; the same with one scale per tensor, and in bf16",
        "right",
    )
    return drawn


def plot(found: list[Loss], path: Path) -> None:
    """Draw errors over lengths, a panel for each kind of input; the same errors give the same bytes.

    Args:
        found: at least one.
        path: ends in one of `SUFFIXES`; folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".html":
        path.write_text(_page(found), encoding="utf-8")
    else:
        path.write_bytes(_picture(found, path.suffix))


def _page(found: list[Loss]) -> str:
    """The picture, and its numbers in a table."""
    names = list(dict.fromkeys(name for loss in found for name in loss.rmse))
    rows = [("spec", "shape", "inputs", *names)] + [
        (
            loss.label,
            shape_text(loss.shape),
            KINDS[loss.kind],
            *(f"{loss.rmse[name]:.3e}" if name in loss.rmse else "" for name in names),
        )
        for loss in found
    ]
    cells = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    svg = _picture(found, ".svg").decode("utf-8")
    svg = svg[svg.index("<svg") :]
    title = "Error against fp64 over length"
    return f'<!doctype html>\n<meta charset="utf-8">\n<title>{title}</title>\n{svg}\n<table>\n{cells}\n</table>\n'


def _picture(found: list[Loss], suffix: str) -> bytes:
    labels = list(dict.fromkeys(loss.label for loss in found))
    written = io.BytesIO()
    with figure_panels(written, suffix, 1, len(KINDS), figsize=(12, 5), sharey=True) as panels:
        for axes, (kind, words) in zip(panels[0], KINDS.items(), strict=True):
            of_kind = [loss for loss in found if loss.kind == kind]
            for label in labels:
                mine = [loss for loss in of_kind if loss.label == label]
                for name in dict.fromkeys(name for loss in mine for name in loss.rmse):
                    points = [(loss.shape.seqlen_k, loss.rmse[name]) for loss in mine if name in loss.rmse]
                    axes.plot(*zip(*points, strict=True), marker="o", label=f"{label}: {name}")
            lengths = sorted({loss.shape.seqlen_k for loss in of_kind})
            axes.set(xscale="log", yscale="log", title=words, xlabel="seqlen")
            axes.set_xticks(lengths, [str(length) for length in lengths])
            axes.minorticks_off()
        panels[0, 0].set_ylabel("RMSE against fp64")
        panels[0, 0].legend()
    return written.getvalue()
