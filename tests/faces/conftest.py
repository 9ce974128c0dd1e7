"""What tests of faces share."""

from collections import Counter

import pytest

from attngen.simulate import Simulator


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
