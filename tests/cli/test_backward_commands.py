"""`run --backward`, its trace, and `check --run` of specs with gradients."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

from attngen.bind import Bound
from attngen.plan import Call
from attngen.simulate import simulator

Attngen = Callable[..., Result]

SPEC = (
    "name: trained\ntarget: sm_80\nproblem: {head_dim: 32}\nmask: causal\nscore: softcap(score, 3.0)\n"
    "gradients: [q, k, v]\ncheck:\n  - {heads: 2, heads_kv: 1, seqlen_q: 5, seqlen_k: 70}\n"
)


@pytest.fixture
def trained(tmp_path: Path) -> str:
    """A spec with gradients."""
    path = tmp_path / "trained.yaml"
    path.write_text(SPEC)
    return str(path)


def gradients_in(result: Result) -> list[list[str]]:
    """The cells of a table of gradients from the gradient's name on, a list a row."""
    rows = [line.split() for line in result.stdout.splitlines()]
    return [
        row[row.index(name) :] for row in rows for name in ("dq", "dk", "dv") if name in row and "/" in row
    ]


@pytest.mark.parametrize(
    "command", [("run", "--backward", "--device", "cpu"), ("check", "--run")], ids=lambda words: words[0]
)
def test_gradients_are_judged_beside_the_output(
    attngen: Attngen, trained: str, command: tuple[str, ...]
) -> None:
    """A table of dq, dk and dv, each with its errors, bounds and verdict, follows that of the output."""
    result = attngen(command[0], trained, *command[1:])
    assert result.exit_code == 0, result.output
    assert "lse error / bound" in result.stdout
    found = gradients_in(result)
    assert [row[0] for row in found] == ["dq", "dk", "dv"]
    for row in found:
        assert row[-1] == "ok" and 0 < float(row[1]) <= float(row[3]) and 0 < float(row[4]) <= float(row[6])


@pytest.mark.parametrize(
    "command", [("run", "--backward", "--device", "cpu"), ("check", "--run")], ids=lambda words: words[0]
)
def test_wrong_gradients_fail_the_comparison(
    attngen: Attngen, trained: str, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the output is right and dk is half of itself, the exit code is 1, and dk alone has failed."""
    right = simulator.run_call

    def halved(call: Call, bound: Bound, *more: object, **options: object) -> dict[str, torch.Tensor]:
        made = right(call, bound, *more, **options)  # type: ignore[arg-type]
        return made | ({"dk": made["dk"] / 2} if "dk" in made else {})

    monkeypatch.setattr(simulator, "run_call", halved)
    result = attngen(command[0], trained, *command[1:])
    assert result.exit_code == 1, result.output
    assert [row[-1] for row in gradients_in(result)] == ["ok", "FAILED", "ok"]
    assert "dk FAILED (" in result.stdout and "expected" in result.stdout


def test_a_plain_run_leaves_the_backward_pass_out(attngen: Attngen, trained: str) -> None:
    """`run` without --backward is about the output, `check` without --run about the plan."""
    for arguments in (("run", trained, "--device", "cpu"), ("check", trained)):
        result = attngen(*arguments)
        assert result.exit_code == 0 and gradients_in(result) == []


def test_a_spec_without_gradients_is_told_the_key(attngen: Attngen, small: str, trained: str) -> None:
    """It names spec, key and valid text, hides no other spec, and the text that it names is good."""
    result = attngen("run", small, trained, "--backward", "--device", "cpu")
    assert result.exit_code == 2
    for part in (
        "small: gradients = [] must say what has gradients",
        "nearest valid: gradients: [q, k, v]",
        "[rule backward-has-gradients]",
    ):
        assert part in result.stderr
    assert len(gradients_in(result)) == 3
    mended = attngen("run", small, "--backward", "--device", "cpu", "--set", "gradients=[q, k, v]")
    assert mended.exit_code == 0, mended.output
    assert "small gradients=[q, k, v]" in mended.stdout and len(gradients_in(mended)) == 3
    Path("none.yaml").write_text("problem: {head_dim: 32}\ngradients: []\n")
    located = attngen("run", "none.yaml", "--backward", "--device", "cpu")
    assert "none.yaml:2:12: gradients = [] must" in located.stderr


def test_trace_shows_how_a_gradient_grows(attngen: Attngen) -> None:
    """After the board of the forward pass pairs of blocks show dS and gradients so far, once for each owner."""
    result = attngen("run", "blackboard", "--trace", "--backward")
    assert result.exit_code == 0, result.output
    forward, _, backward = result.stdout.partition("  dS ")
    assert forward.count("running max") == 3
    assert backward.count("  dS ") == 5  # of 2x2 blocks of 2x2 causal shows three, to dQ and to dK with dV
    assert backward.count("dQ so far") == backward.count("dK so far") == backward.count("dV so far") == 3
    assert [backward.count(f"  {name}  ") for name in ("dQ", "dK", "dV")] == [2, 2, 2]
    assert len(gradients_in(result)) == 3
