"""How much a run of the tests tries: some of everything, or all of it where $ATTNGEN_TESTS is `large`.

A property holds for as many random examples as its run's profile of Hypothesis says, or a multiple. A matrix, which is
a test marked `matrix`, keeps in a small run as many of its cases as show every row of each of its `parametrize`, or all
`classes` of its own, or the `most` that show most of them, where a case takes seconds; the others are marked
`exhaustive`.
"""

import os
from collections import defaultdict
from collections.abc import Hashable, Sequence
from math import inf

import pytest
from hypothesis import settings

VARIABLE = "ATTNGEN_TESTS"
EXAMPLES = {"small": 40, "large": 400}
"""Profiles of Hypothesis: how many examples a property is tried with."""


def profile() -> str:
    """The profile of this run.

    Raises:
        UsageError: there is none of that name.
    """
    name = os.environ.get(VARIABLE, "small")
    if name not in EXAMPLES:
        raise pytest.UsageError(f"${VARIABLE} is {name!r}, and not one of {', '.join(EXAMPLES)}")
    return name


def load_profile() -> None:
    """Set what every Hypothesis test of this run is given; a time limit on an example only tells of a busy machine."""
    for name, count in EXAMPLES.items():
        settings.register_profile(name, max_examples=count, deadline=None)
    settings.load_profile(profile())


def examples(times: float) -> int:
    """So many times the profile's number of examples, for `max_examples`."""
    return round(times * settings().max_examples)


def mark_exhaustive(items: Sequence[pytest.Item]) -> None:
    """Mark the cases of every matrix that show nothing which the others do not show."""
    matrices: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("matrix") is not None:
            matrices[item.nodeid.partition("[")[0]].append(item)
    for cases in matrices.values():
        (marker,) = cases[0].iter_markers("matrix")
        kept = cover([_classes(case) for case in cases], marker.kwargs.get("most", inf))
        for place, case in enumerate(cases):
            if place not in kept:
                case.add_marker(pytest.mark.exhaustive)


def _classes(case: pytest.Item) -> set[Hashable]:
    """What a case shows: a row of each `parametrize`, or all that the marker's `classes` says of the parameters."""
    (marker,) = case.iter_markers("matrix")
    values = case.callspec.params  # type: ignore[attr-defined]
    if (classes := marker.kwargs.get("classes")) is not None:
        return set(classes(**values))
    rows = (mark.args[0] for mark in case.iter_markers("parametrize"))
    names = (row.replace(" ", "").split(",") if isinstance(row, str) else row for row in rows)
    return {tuple((name, id(values[name])) for name in row) for row in names}


def cover(shown: Sequence[set[Hashable]], most: float = inf) -> set[int]:
    """Places of a few sets whose union is that of all, the first of those that add most taken in turn; or `most`."""
    missing = set[Hashable]().union(*shown)
    kept: set[int] = set()
    while missing and len(kept) < most:
        place = max(range(len(shown)), key=lambda i: len(shown[i] & missing))
        kept.add(place)
        missing -= shown[place]
    return kept
