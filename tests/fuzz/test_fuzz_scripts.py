"""The scripts that count cases of fuzzing go on where they were stopped, and keep faults."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attngen.fuzz import search_faults
from attngen.fuzz.coverage import Coverage
from attngen.fuzz.search_faults import FuzzReport

FOLDER = Path(__file__).parents[2] / "benchmarks"
KINDS = {"fuzz_gradients": "backward", "fuzz_ragged": "is_cut"}
"""What each script draws, as `fuzz` calls it."""


@pytest.fixture(params=KINDS)
def name(request: pytest.FixtureRequest) -> str:
    """The name of a script, and of its file."""
    return str(request.param)


@pytest.fixture
def run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, dict[str, Any]]]:
    """The script on a folder of the test's: its exit code, and what stands in its file."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def script(*arguments: str) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", [name, "--out", str(tmp_path), *arguments])
        sys.modules.pop("fuzz_counts", None)  # which holds the fuzz of the run before
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        return int(ended.value.code or 0), json.loads((tmp_path / f"{name}.json").read_text())

    return script


def test_a_stopped_run_goes_on(name: str, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds follow each other over runs, no case is tried twice, and all specs are of the script's kind."""
    asked: list[dict[str, Any]] = []

    def stopped_at_the_third(**options: Any) -> FuzzReport:
        asked.append(options)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return FuzzReport(True, options["examples"], None, 1.0, options["seed"], "cpu", Coverage())

    monkeypatch.setattr(search_faults, "fuzz", stopped_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run("--cases", "25", "--examples", "10")
    code, found = run("--cases", "25", "--examples", "10")
    assert code == 0
    assert [(each["seed"], each["examples"]) for each in asked] == [(1, 10), (2, 10), (3, 5), (3, 5)]
    assert all(each[KINDS[name]] for each in asked)
    (counted,) = found["summary"].values()
    assert counted["cases"] == 25 and counted["seeds"] == [1, 3] and counted["faults"] == 0
    assert run("--cases", "25")[0] == 0 and len(asked) == 4


def test_a_fault_is_kept(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command stands in the file, later seeds are tried all the same, and every run says that there is one."""

    class Faulty(FuzzReport):
        repro = "attngen fuzz --repro '{}'"

    def faulty_at_first(**options: Any) -> FuzzReport:
        kind = Faulty if options["seed"] == 1 else FuzzReport
        return kind(kind is FuzzReport, 4, None, 1.0, options["seed"], "cpu", Coverage())

    monkeypatch.setattr(search_faults, "fuzz", faulty_at_first)
    code, found = run("--cases", "8")
    assert code == 1 and [row["fault"] for row in found["rows"]] == ["attngen fuzz --repro '{}'", None]
    assert run("--cases", "8")[0] == 1
