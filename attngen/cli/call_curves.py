"""Memory and time of every way to compute a call over the length of its sequences: as a picture, or as figures."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from attngen.check.inputs import Shape
from attngen.check.timing import write_json
from attngen.cli.calls import OURS, Way
from attngen.cli.output import seconds_text, size_text
from attngen.cli.picture import PICTURES, figure_panels
from attngen.cli.shapes import shape_text
from attngen.errors import ArgumentError

CURVES = (*PICTURES, ".json")
_LENGTHS = 6
_SHORTEST = 16
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#D55E00")
"""Okabe and Ito's, which differ for every eye."""
Curves = Mapping[str, Mapping[int, list[Way]]]
"""By what is computed, then by length."""


def shapes_to_draw(shape: Shape) -> list[Shape]:
    """Shapes of lengths that double up to those of a shape.

    Raises:
        ArgumentError: the shape has no pair of a query and a key.
    """
    if not shape.pairs * shape.heads:
        must = "a call with queries and keys: axes are powers"
        raise ArgumentError("--curves", shape_text(shape), must)
    found = [shape]
    while len(found) < _LENGTHS and min(found[0].seqlen_q, found[0].seqlen_k) >= 2 * _SHORTEST:
        found.insert(0, replace(found[0], seqlen_q=found[0].seqlen_q // 2, seqlen_k=found[0].seqlen_k // 2))
    return found


def write_curves(curves: Curves, device: torch.device, path: Path) -> None:
    """A row of two panels for each call, memory and time; or rows of figures, in a file of JSON."""
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {_threads()}"
    if path.suffix == ".json":
        rows = [
            {"call": label, "device": on, "seqlen": seqlen, **asdict(way)}
            for label, by_length in curves.items()
            for seqlen, ways in by_length.items()
            for way in ways
        ]
        write_json(path, rows)
        return
    with figure_panels(path, path.suffix, len(curves), 2, figsize=(11, 4.5 * len(curves))) as panels:
        for (memory, time), (label, by_length) in zip(panels, curves.items(), strict=True):
            _draw(memory, by_length, lambda way: way.peak_bytes)
            _finish(
                memory, f"{label}: memory beyond inputs", by_length, 2, lambda size: size_text(round(size))
            )
            _draw(time, by_length, lambda way: way.seconds)
            _finish(time, f"time on {on}", by_length, 10, seconds_text)
            memory.legend(fontsize="small")


def _draw(axes: Any, by_length: Mapping[int, list[Way]], figure: Callable[[Way], float | None]) -> None:
    """A line for each way that has figures, in the colour that it has in every panel."""
    names = dict.fromkeys(way.name for ways in by_length.values() for way in ways)
    for name, colour in zip(names, _COLOURS, strict=True):
        own = [(seqlen, way) for seqlen, ways in by_length.items() for way in ways if way.name == name]
        is_measured = all(way.is_measured for _, way in own)
        points = [(seqlen, figure(way)) for seqlen, way in own if figure(way) is not None]
        if points:
            width = 2.5 if name == OURS else 1.2
            label = name if is_measured else f"{name}: worked out, not run"
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", label=label, linewidth=width)


def _finish(axes: Any, title: str, lengths: Iterable[int], base: int, text: Callable[[float], str]) -> None:
    """Both axes by powers: what grows with the square of the length is twice as steep as what grows with it."""
    axes.set(title=title, xlabel="keys")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=base)
    axes.set_xticks([*lengths], [str(length) for length in lengths])
    axes.yaxis.set_major_formatter(lambda value, _: text(value))
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.grid(alpha=0.3)


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count != 1)}"
