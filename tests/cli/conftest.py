"""The command line as a fixture, and specs for it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from attngen.cli import main, output

Attngen = Callable[..., Result]

GOOD_SPEC = (
    "name: small\ntarget: sm_80\nproblem: {head_dim: 32}\ncheck:\n  - {heads: 2, seqlen_q: 5, seqlen_k: 70}\n"
)


@pytest.fixture
def attngen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Attngen:
    """The command line with a cache of its own, in a directory of its own."""
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, arguments)


@pytest.fixture
def small(tmp_path: Path) -> str:
    """A spec file that is good on every machine."""
    path = tmp_path / "small.yaml"
    path.write_text(GOOD_SPEC)
    return str(path)


@pytest.fixture
def hopper(tmp_path: Path) -> str:
    """A spec file that `auto` lowers to warp_specialized."""
    path = tmp_path / "hopper.yaml"
    path.write_text("name: hopper\ntarget: sm_90a\nproblem: {head_dim: 128}\n")
    return str(path)


@pytest.fixture
def wide_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines so long that no cell is folded."""
    monkeypatch.setattr(output, "_WIDTH_WITHOUT_TERMINAL", 400)
