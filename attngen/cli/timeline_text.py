"""A timeline as text: a line for each unit and role, a column for some cycles. Numbers come from `simulate`."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from attngen.cli.timeline import kind_of, product_text
from attngen.simulate import UNITS, Interval, Timeline

COLUMNS = 90
"""Most columns of a line."""
UNIT_AT_WORK = "#"
KIND_SYMBOLS = {
    "waits": ".",
    "waits for a GEMM": ":",
    "scores to probabilities": "x",
    "other work": "-",
}
"""What a role does, by a symbol; GEMMs have the last letter of what they make, also in the tensor core's line."""
LEGEND = f"""\
a letter is a GEMM, for S, O, P of dP, Q of dQ, K of dK or V of dV; {UNIT_AT_WORK} is other work of a unit
of a role: {", ".join(f"{symbol} {kind}" for kind, symbol in KIND_SYMBOLS.items())}"""


def write_text(timelines: Mapping[str, Timeline], path: Path) -> None:
    """Write timelines below one another, each on a scale of its own; the same timelines give the same bytes.

    Args:
        timelines: by their titles; at least one.
        path: of a text; folders are made.
    """
    lines = [line for title, timeline in timelines.items() for line in _lines(title, timeline)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, LEGEND, ""]), encoding="utf-8")


def _lines(title: str, timeline: Timeline) -> Iterator[str]:
    cycles = max(1, -(-timeline.cycles // COLUMNS))
    tiles = f"{timeline.tiles} tile{'s' * (timeline.tiles != 1)}"
    took = f"{timeline.cycles} cycles on an {timeline.costs.name}"
    yield f"{title}: {tiles} on one SM, {took}, a column is {cycles} of them"
    lanes = {f"{unit}  {timeline.share(unit):4.0%}": unit for unit in UNITS} | {
        role: role for role in timeline.roles
    }
    width = max(map(len, lanes))
    for name, lane in lanes.items():
        there = [each for each in timeline.intervals if (each.unit or each.role) == lane]
        yield f"{name:{width}} |{_drawn(there, cycles, timeline.cycles)}|"
    yield ""


def _drawn(intervals: Iterable[Interval], cycles: int, end: int) -> str:
    """Of each column the symbol of what takes most of it, a blank where nothing does."""
    columns = [Counter({" ": cycles}) for _ in range(-(-end // cycles))]
    for interval in intervals:
        for number in range(interval.begin // cycles, -(-interval.end // cycles)):
            part = min(interval.end, (number + 1) * cycles) - max(interval.begin, number * cycles)
            columns[number][_symbol(interval)] += part
            columns[number][" "] -= part
    return "".join(max(column, key=column.__getitem__) for column in columns)


def _symbol(interval: Interval) -> str:
    if interval.acc:
        return product_text(interval.acc)[-1]
    return UNIT_AT_WORK if interval.unit else KIND_SYMBOLS[kind_of(interval)]
