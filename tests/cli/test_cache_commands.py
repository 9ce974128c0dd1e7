"""Specs of a cache in e4m3 from the command line."""

from collections.abc import Callable

import pytest
from click.testing import Result

Attngen = Callable[..., Result]
SPEC = "h100_decode_fp8"


@pytest.mark.usefixtures("wide_lines")
@pytest.mark.parametrize("scales", ["per_tensor", "per_token", "per_page"])
def test_check_and_run_judge_drawn_caches(attngen: Attngen, scales: str) -> None:
    """On the simulator; descales are drawn with the cache."""
    result = attngen("check", SPEC, "--run", "--set", f"precision.scales={scales}")
    assert result.exit_code == 0, result.output
    assert sum(" ok " in line for line in result.stdout.splitlines()) == 2
    shape = ("--seqlen-q", "2", "--lengths-k", "5,100,0", "--heads", "4", "--page", "3")
    result = attngen("run", SPEC, "--set", f"precision.scales={scales}", "--device", "cpu", *shape)
    assert result.exit_code == 0 and "page 3" in result.stdout, result.output


@pytest.mark.usefixtures("wide_lines")
def test_explain_says_what_a_cache_is_and_does(attngen: Attngen) -> None:
    """Its format, what shares a scale, and the Steps that it adds."""
    result = attngen("explain", SPEC, "--arch", "simulator", "--program", "--lengths-k", "100,200")
    assert result.exit_code == 0, result.output
    for said in ("e4m3, per_head", "q as f16, rows times powers of two", "acc_o with its columns in order"):
        assert said in result.stdout


def test_a_timeline_has_all_of_its_steps(attngen: Attngen, tmp_path: object) -> None:
    """Descales of keys among them."""
    spec = (SPEC, "--set", "precision.scales=per_token", "--set", "split=none")
    result = attngen("explain", *spec, "--lengths-k", "300", "--timeline", f"{tmp_path}/line.txt")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("more", [("--trace",), ("--backward",)])
def test_what_there_is_none_of_is_refused(attngen: Attngen, more: tuple[str, ...]) -> None:
    """By a sentence, and the user's exit code."""
    dense = ("--set", "problem.keys=dense", "--set", "split=none", "--seqlen", "64")
    result = attngen("run", SPEC, "--device", "cpu", *dense, *more)
    assert result.exit_code == 2


def test_fuzz_takes_such_a_spec(attngen: Attngen) -> None:
    """Its properties that hold for caches, on drawn lengths."""
    result = attngen("fuzz", SPEC, "--examples", "5")
    assert result.exit_code == 0, result.output
