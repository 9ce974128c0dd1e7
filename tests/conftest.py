"""Shared by all tests: which of them run here, how much they try, and where what they compile is kept."""

import atexit
import os
import shutil
import tempfile
from collections import Counter

import pytest
import torch

from attngen.errors import ToolchainError
from attngen.runtime import disassemble
from attngen.runtime.disk_cache import CACHE_DIR_VARIABLE
from attngen.simulate import Simulator
from tests.effort import load_profile, mark_exhaustive, profile

load_profile()
torch.set_num_threads(1)  # the tensors are small, and as many tests run at a time as there are cores
if CACHE_DIR_VARIABLE not in os.environ:  # processes that run tests side by side inherit it
    os.environ[CACHE_DIR_VARIABLE] = tempfile.mkdtemp(prefix="attngen-tests-")
    atexit.register(shutil.rmtree, os.environ[CACHE_DIR_VARIABLE], ignore_errors=True)


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by what is marked here
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `exhaustive` in a small run, and skip what is marked `gpu` on a machine without one."""
    mark_exhaustive(items)
    if profile() == "small":
        left_out = [item for item in items if "exhaustive" in item.keywords]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if "exhaustive" not in item.keywords]
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def nvdisasm() -> None:
    """Skip what reads machine code where nothing is installed that writes it as text."""
    try:
        disassemble(b"")
    except ToolchainError as error:  # nvdisasm refuses what is no cubin
        if "not installed" in error.message:
            pytest.skip(f"{error.message}; {error.cure}")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many calls the simulator has run, by pass: what is computed by anything else is missing."""
    found: Counter[str] = Counter()
    make = Simulator.make

    def counted(self: Simulator, wanted: tuple[str, ...], *arguments: object, **named: object) -> object:
        made = make(self, wanted, *arguments, **named)
        found["forward" if "out" in wanted else "backward"] += 1
        return made

    monkeypatch.setattr(Simulator, "make", counted)
    return found
