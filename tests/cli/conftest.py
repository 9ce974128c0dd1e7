"""The command line as a fixture, and specs for it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from attngen.cli import main, output
from attngen.runtime.disk_cache import CACHE_DIR_VARIABLE

Attngen = Callable[..., Result]

GOOD_SPEC = (
    "name: small\ntarget: sm_80\nproblem: {head_dim: 32}\ncheck:\n  - {heads: 2, seqlen_q: 5, seqlen_k: 70}\n"
)


@pytest.fixture
def attngen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Attngen:
    """The command line in a directory of its own, with the cache that all tests of a run share."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, arguments)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a cache in which nothing has been compiled yet."""
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


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
