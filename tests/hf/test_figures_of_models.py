"""The benchmark of models on tiny ones and the simulator: what it compares agrees, and what is wrong is not timed."""

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from attngen.hf.model_attention import attend

FOLDER = Path(__file__).parents[2] / "benchmarks"
MODULES = ("figures", "error_rule", "watched_attention", "hf_models", "bench_hf")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script, as it is where there is no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("bench_hf")
    for name in MODULES:
        sys.modules.pop(name, None)


def llama(bench: Any) -> Any:
    return bench.TINY_SHAPES["llama"]


POINTS: dict[str, tuple[Callable[[Any], Any], set[str]]] = {
    "prefill": (lambda bench: bench.llama_prefill(llama(bench)), {"attngen", "sdpa"}),
    "training": (lambda bench: bench.llama_training(llama(bench)), {"attngen", "sdpa"}),
    "windows": (
        lambda bench: bench.gemma_prefill(bench.TINY_SHAPES["gemma"], {"eager": 5.0}),
        {"attngen", "eager"},
    ),
    "compiled": (lambda bench: bench.compiled_lengths(llama(bench)), {"eager", "compiled"}),
}


@pytest.mark.parametrize("name", POINTS)
def test_candidates_are_right_and_timed(bench: Any, name: str) -> None:
    """Each within the rule, though none has what f32 has, and a time for each, and figures that follow of them."""
    set_up, names = POINTS[name]
    row = set_up(bench).measure(2)
    assert row["wrong"] == [] and row["differences"].keys() == names
    assert all(error > 0 for error in row["differences"].values())
    assert names <= row["ms"].keys() and all(len(times) == 2 for times in row["ms"].values())
    figures = {figure.name: figure.value for figure in row["figures"]}
    assert figures and all(map(math.isfinite, figures.values()))
    if name == "compiled":
        assert figures["graph breaks"] == 0 and 1 <= row["graphs"][-1] <= 2
    elif name != "training":
        assert all(row["ms"][f"{each}'s attention"][0] > 0 for each in names)


def test_who_is_wrong_is_not_timed(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention of another scale is named, by layers' outputs and by gradients, and figures cannot be had."""

    def wrong(*given: Any, scaling: float, **options: Any) -> Any:
        return attend(*given, scaling=1.1 * scaling, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, "attngen", wrong)
    for set_up in (bench.llama_prefill, bench.llama_training):
        row = set_up(llama(bench)).measure(1)
        assert row["wrong"] == ["attngen"] and "attngen" not in row["ms"] and "sdpa" in row["ms"]
        assert any(math.isnan(figure.value) for figure in row["figures"])
