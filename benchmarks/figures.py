"""Figures beside their goals: candidates that are held against a wanted result before any of them is timed.

Who gives something else than is wanted takes no part, is named, and makes the run fail: what is wrong cannot win.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch

from attngen.check import timing

Row = dict[str, Any]
Tensors = tuple[torch.Tensor, ...]
Medians = Mapping[str, float]
"""Milliseconds of each candidate that is right."""
MOST_DIFFERENCE = 0.02
"""Of two results that were both rounded to bf16 a head's block of rows differs by less than 0.01 of its norm; where one
block of 512 of keys was left out by 1/sqrt(512), which is 0.044."""
BLOCK = 128
"""Rows over which norms are taken."""


@dataclass(frozen=True)
class Figure:
    """A number, and what it shall be: at least, at most, or neither where it only informs."""

    name: str
    value: float
    at_least: float = -math.inf
    at_most: float = math.inf
    unit: str = ""

    @property
    def is_met(self) -> bool:
        """Whether the goal is reached; a figure that could not be had reaches none."""
        return self.at_least <= self.value <= self.at_most

    def __str__(self) -> str:
        text = f"{self.name} {self.value:.3f}{self.unit}"
        bounds = {"at least": self.at_least, "at most": self.at_most}
        goal = "".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))
        fault = ", not measured" if math.isnan(self.value) else "" if self.is_met else ", MISSED"
        return f"{text} ({goal}{fault})" if goal else text


@dataclass(frozen=True)
class Candidate:
    """A call, and what it should return.

    Attributes:
        run: the call.
        wanted: tensors (..., rows, heads, head_dim).
        read: the tensors in what the call returns that are to be held against these.
    """

    run: timing.Run
    wanted: Tensors
    read: Callable[[Any], Tensors] = lambda made: made if isinstance(made, tuple) else (made,)

    def difference(self) -> float:
        """The largest of `difference` over what is wanted."""
        return max(difference(x, y) for x, y in zip(self.read(self.run()), self.wanted, strict=True))


def peer(name: str, make: Callable[[], Candidate]) -> dict[str, Candidate]:
    """A candidate of others, already run once; none, told in a line, where it cannot be had or does not run."""
    try:
        candidate = make()
        candidate.run()
    except (RuntimeError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        _tell_once(f"{name} does not take part: {reason}")
        return {}
    return {name: candidate}


@cache
def _tell_once(text: str) -> None:
    print(text, flush=True)


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The norm of what two tensors differ by, over the norm of the wanted one: the largest of all blocks of rows.

    Args:
        got: (..., rows, heads, head_dim); NaN in it is an infinite difference.
        wanted: likewise. A block whose norm is less than a tenth of the mean counts as of that.
    """
    if got.shape != wanted.shape:
        raise ValueError(f"a result of shape {tuple(got.shape)}, wanted is {tuple(wanted.shape)}")
    norms = []
    for rows in zip(*(x.flatten(0, -3).split(BLOCK) for x in (got, wanted)), strict=True):
        mine, theirs = (x.float() for x in rows)
        norms.append(torch.stack([(mine - theirs).norm(dim=(0, 2)), theirs.norm(dim=(0, 2))]))
    differing, norm = torch.stack(norms, 1)
    ratio = float((differing / norm.clamp_min(norm.mean() / 10)).max())
    return math.inf if math.isnan(ratio) else ratio


class Measurement(Protocol):
    """What a point measures."""

    def measure(self, rounds: int) -> Row:
        """Samples, differences, and `figures`, a list of `Figure`."""


@dataclass(frozen=True)
class Comparison:
    """Candidates that are timed in one interleaved run.

    Attributes:
        candidates: by name.
        figures: what follows of their medians.
    """

    candidates: Mapping[str, Candidate]
    figures: Callable[[Medians], Iterable[Figure]]

    def differences(self) -> dict[str, float]:
        """How far the result of each is from the wanted one."""
        return {name: each.difference() for name, each in self.candidates.items()}

    def measure(self, rounds: int) -> Row:
        """Time whoever is right."""
        found = self.differences()
        right = {name: each.run for name, each in self.candidates.items() if found[name] <= MOST_DIFFERENCE}
        samples = timing.measure(right, rounds)
        medians = {name: median(times) for name, times in samples.items()}
        wrong = sorted(found.keys() - right.keys())
        figures = [*self.figures(Present(medians))]
        return {"ms": samples, "differences": found, "wrong": wrong, "figures": figures}


class Present(dict[str, float]):
    """Medians; that of a candidate that takes no part is NaN, and so is what follows of it."""

    def __missing__(self, name: str) -> float:
        return math.nan


@dataclass(frozen=True)
class Point:
    """A line of output: its name, and how to set up what it measures, which takes memory and compilations."""

    name: str
    set_up: Callable[[], Measurement]


def measure_point(part: str, point: Point, rounds: int) -> Row:
    """The row of a point, printed."""
    row = {"part": part, "point": point.name} | point.set_up().measure(rounds)
    times = ", ".join(f"{name} {median(samples):.4f}" for name, samples in row["ms"].items())
    largest = max(row.get("differences", {}).values(), default=0.0)
    print(f"{part}, {point.name}: {times} ms; largest difference {largest:.1e}", flush=True)
    for name in row.get("wrong", ()):
        print(f"    WRONG, and not timed: {name} differs by {row['differences'][name]:.1e}", flush=True)
    for figure in row["figures"]:
        print(f"    {figure}", flush=True)
    return row


def command_line(about: str | None, parts: Iterable[str]) -> argparse.ArgumentParser:
    """The options of a script.

    Args:
        about: what it says of itself.
        parts: their names.
    """
    names = list(parts)
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these parts")
    parser.add_argument("--points", default="", help="points whose names have this in them")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser


def measure_parts(
    given: argparse.Namespace,
    file: str,
    parts: Mapping[str, Callable[[], Iterable[Point]]],
    means: Mapping[str, float],
) -> int:
    """Measure what the command line names, and write it after each point; the exit code: 1 where a result is wrong.

    Args:
        given: by `command_line`.
        file: name of the file of rows.
        parts: points by the name of their part.
        means: the least geometric mean over all points, by the name of a figure.
    """
    rows: list[Row] = []
    for part in given.only:
        of_part = []
        for point in parts[part]():
            if given.points in point.name:
                of_part.append(measure_point(part, point, given.rounds))
                torch.cuda.empty_cache()
                _write(given.out / file, [*rows, *of_part])
        rows += of_part
        for figure in _means(of_part, means):
            print(f"{part}, over {len(of_part)} points: {figure}", flush=True)
    return int(any(row.get("wrong") for row in rows))


def _means(rows: Iterable[Row], goals: Mapping[str, float]) -> list[Figure]:
    """The geometric mean of each figure that has a goal for it."""
    values: dict[str, list[float]] = {}
    for figure in (figure for row in rows for figure in row["figures"] if figure.name in goals):
        values.setdefault(figure.name, []).append(figure.value)
    return [
        Figure(f"geometric mean of {name}", timing.geometric_mean(found), at_least=goals[name])
        for name, found in values.items()
    ]


def _write(path: Path, rows: list[Row]) -> None:
    """Write rows, figures as text is not: their numbers and goals."""
    written = [
        row | {"figures": [{"name": f.name, "value": f.value, "goal": str(f)} for f in row["figures"]]}
        for row in rows
    ]
    timing.write_json(path, written)
