"""The benchmark of ragged batches on tiny calls of the simulator: what it compares agrees, and what is wrong is out."""

import importlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
MODULES = ("figures", "blocks_and_sinks", "varlen_peers", "ragged_launches", "bench_ragged")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The scripts, by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        sys.modules.pop(name, None)


def sequences(modules: Mapping[str, Any], *lengths: int) -> Any:
    return modules["bench_ragged"].packed(list(lengths), "cpu", heads=2)


POINTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "documents": lambda at: at["bench_ragged"].documents(sequences(at, 90, 1, 60)),
    "equal lengths": lambda at: at["bench_ragged"].equal_lengths(sequences(at, 70, 70)),
    "skewed": lambda at: at["bench_ragged"].skewed(sequences(at, 30, 150, 30)),
    "backward": lambda at: at["bench_ragged"].backward_documents(sequences(at, 90, 40), True),
    "backward of equal lengths": lambda at: at["bench_ragged"].backward_equal(sequences(at, 70, 70), False),
    "blocks": lambda at: at["blocks_and_sinks"].given_blocks(512, 0.5, "cpu", 2),
    "all blocks": lambda at: at["blocks_and_sinks"].given_blocks(256, 1.0, "cpu", 1),
    "sink": lambda at: at["blocks_and_sinks"].learned_sink(256, 64, True, "cpu", 128),
}


@pytest.mark.parametrize("name", POINTS)
def test_candidates_give_what_is_wanted(modules: dict[str, Any], name: str) -> None:
    """Each within the bound beyond which it would take no part, and more than one; their figures follow of medians."""
    comparison = POINTS[name](modules)
    found = comparison.differences()
    assert found and max(found.values()) < modules["figures"].MOST_DIFFERENCE
    assert min(found.values()) > 0  # bf16 is not what torch has in f32, or sums in another order
    figures = [*comparison.figures(dict.fromkeys((*found, "flex"), 2.0))]
    assert figures and all(figure.value > 0 or math.isnan(figure.value) for figure in figures)


def test_who_is_wrong_is_not_timed(modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate that leaves a block of keys out is named, and a figure that needs it is not to be had."""
    figures, blocks = modules["figures"], modules["blocks_and_sinks"]
    monkeypatch.setattr(
        figures.timing, "measure", lambda runs, rounds: {name: [1.0] * rounds for name in runs}
    )
    q, k, v = blocks.normal(3, (1, 8192, 1, 128), "cpu")
    kept = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    wanted = blocks.in_f32(q, k, v, kept=kept)
    kept[..., 7] = False
    fewer = blocks.in_f32(q, k, v, kept=kept)
    comparison = figures.Comparison(
        {
            "right": figures.Candidate(lambda: wanted, wanted),
            "wrong": figures.Candidate(lambda: fewer, wanted),
        },
        lambda ms: [figures.Figure("speed", ms["right"] / ms["wrong"], at_least=1.0)],
    )
    row = comparison.measure(3)
    assert row["wrong"] == ["wrong"] and row["ms"] == {"right": [1.0, 1.0, 1.0]}
    assert str(row["figures"][0]) == "speed nan (at least 1, not measured)"
    nan = torch.full((1, 128, 1, 8), math.nan)
    assert figures.difference(nan, torch.ones_like(nan)) == math.inf
