"""Models of transformers with attngen in them; left out where transformers is not installed (`.[test]` brings it)."""

import os
from collections import Counter
from importlib.util import find_spec

import pytest

import attngen
from attngen.simulate import Simulator

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is to be fetched: all models are random
collect_ignore_glob = [] if find_spec("transformers") else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def registered() -> None:
    """attngen is known to transformers, once and once more, and so is what it is judged by."""
    from tests.hf.exact_attention import register_exact

    register_exact()
    attngen.hf.register()
    attngen.hf.register()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many calls the simulator has run, by pass: a layer that is computed by anything else is missing."""
    found: Counter[str] = Counter()
    make = Simulator.make

    def counted(self: Simulator, wanted: tuple[str, ...], *arguments: object, **named: object) -> object:
        made = make(self, wanted, *arguments, **named)
        found["forward" if "out" in wanted else "backward"] += 1
        return made

    monkeypatch.setattr(Simulator, "make", counted)
    return found
