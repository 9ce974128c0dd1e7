"""Tables: data files that say which numbers are best for which features, and where that was measured.

A case holds where one of its conditions does, and the first case that holds counts. A condition is a mapping of names
of `Features` to what they must be: a value, one of a list of words, or for a head dim the least and the most. A case
names the script that tunes it and the result (in benchmarks/results) that its rows are from, or `why` there is none.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from attngen.errors import InternalError
from attngen.lower.block_tiles import fitted, fitted_warpgroups
from attngen.lower.choice import Choice, WarpgroupChoice
from attngen.lower.features import Features
from attngen.resources import data_dir
from attngen.schedules import WARPGROUP_SCHEDULES

Condition = Mapping[str, Any]
PARTS = {"whole": 1, "half": 2, "quarter": 4}
"""Into how many slices at most O is parted where it is promoted."""
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where libyaml is
_CASE = {"when", "rows", "script", "result", "why"}
_EVIDENCE = ({"script", "result"}, {"script", "why"}, {"why"})


@dataclass(frozen=True)
class Row:
    """What `auto` stands for on calls of up to `up_to` keys; on all others in the last row of a case."""

    up_to: int | None
    schedule: str
    choice: WarpgroupChoice


@dataclass(frozen=True)
class Case:
    """Rows for specs of some features, as a file has them, and the evidence: a script and its result, or why none."""

    when: tuple[Condition, ...]
    rows: tuple[Mapping[str, Any], ...]
    script: str = ""
    result: str = ""
    why: str = ""

    def holds(self, features: Features) -> bool:
        """Whether the rows are for such a spec."""
        return any(
            all(_meets(getattr(features, name), wanted) for name, wanted in each.items())
            for each in self.when
        )


def rows(features: Features) -> tuple[Row, ...]:
    """Kernels that measurement says are best on sm_90a, the shortest sequences first."""
    return tuple(
        Row(row.get("up_to"), row["schedule"], _warpgroups(row, features))
        for row in _case("warpgroups" if features.scales is None else "warpgroups_8bit", features).rows
    )


def offers(features: Features, schedule: str) -> tuple[Choice | WarpgroupChoice, ...]:
    """What measurement says is best in a schedule for sequences of any length, then smaller tiles."""
    if schedule not in WARPGROUP_SCHEDULES:
        found = _case(schedule, features).rows
        return tuple(fitted(Choice(**row, longest_first=features.upper), features) for row in found)
    best = rows(features)[-1].choice
    if not features.fits_instructions:
        return (fitted_warpgroups(WarpgroupChoice(64, 64, 2, 2, part_cols=best.part_cols), features),)
    smaller = (
        WarpgroupChoice(128, 64, 2, 2, out_over_q=True, part_cols=best.part_cols),
        WarpgroupChoice(64, 64, 2, 1, out_over_q=True, part_cols=best.part_cols),
    )
    return (best, *(fitted_warpgroups(each, features) for each in smaller))


def slice_of(cols: int, parts: int) -> int:
    """The narrowest slices that share out columns evenly and are one of so many parts of them or wider.

    Of what wgmma takes, a multiple of 8 columns; where head dims are not multiples of 16, any number.
    """
    step = 1 if cols % 16 else 8
    return next(width for width in range(step, cols + 1, step) if cols % width == 0 and width * parts >= cols)


@cache
def table(name: str) -> tuple[Case, ...]:
    """The cases of a table.

    Raises:
        InternalError: the file has what no table has.
    """
    return read_table(data_dir("lower/tables") / f"{name}.yaml")


def read_table(path: Path) -> tuple[Case, ...]:
    """The cases of a file; see `table`."""
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _LOADER)
        return tuple(_read_case(case) for case in loaded["cases"])
    except (KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise InternalError(f"the table {path} is broken: {error}") from error


def _read_case(case: Mapping[str, Any]) -> Case:
    """A case whose keys are all known, and whose rows make choices."""
    when = case["when"] if isinstance(case["when"], list) else [case["when"]]
    evidence = case.keys() - {"when", "rows"}
    known = {each.name for each in fields(Features)} | {name for name in dir(Features) if name[0] != "_"}
    if unknown := {name for each in when for name in each} - known | (case.keys() - _CASE):
        raise ValueError(f"nothing is called {', '.join(sorted(unknown))}")
    if evidence not in _EVIDENCE or not case["rows"]:
        raise ValueError(f"a case has rows, a script, and its result or why there is none: {case}")
    for row in case["rows"]:
        if "schedule" not in row:
            Choice(**row)
        elif _as_choice(row, 64) and row["schedule"] not in WARPGROUP_SCHEDULES:
            raise ValueError(f"{row['schedule']} is no schedule of warpgroups")
    return Case(tuple(when), tuple(case["rows"]), **{key: case[key] for key in evidence})


def _case(name: str, features: Features) -> Case:
    return next(case for case in table(name) if case.holds(features))


def _warpgroups(row: Mapping[str, Any], features: Features) -> WarpgroupChoice:
    return fitted_warpgroups(_as_choice(row, features.head_dim_v), features)


def _as_choice(row: Mapping[str, Any], head_dim_v: int) -> WarpgroupChoice:
    numbers = {name: value for name, value in row.items() if name not in ("up_to", "schedule")}
    if "part_cols" in numbers:
        numbers["part_cols"] = slice_of(head_dim_v, PARTS[numbers["part_cols"]])
    return WarpgroupChoice(**numbers)


def _meets(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        least_and_most = isinstance(value, int) and not isinstance(value, bool)
        return bool(wanted[0] <= value <= wanted[1]) if least_and_most else value in wanted
    return bool(value == wanted)
