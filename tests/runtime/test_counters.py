"""Counters of persistent kernels: which launches share one. The memory is stood in for."""

from collections.abc import Iterator
from itertools import count

import pytest
import torch

from attngen.runtime.counters import SLOTS, TileCounters


class OnHost(TileCounters):
    """Counters whose memory is numbers, and that count how often it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0
        self._addresses: Iterator[int] = count(4096, 4)

    def _make(self, device: int) -> list[int]:
        self.made += 1
        return [next(self._addresses) for _ in range(SLOTS)]


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Whether the current stream is being captured into a graph."""
    state = {"now": False}
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: state["now"], raising=False)
    return state


def test_launches_of_one_stream_share_a_counter(capturing: dict[str, bool]) -> None:
    """They follow one another; another stream or device may run beside them and has its own."""
    counters = OnHost()
    first = counters.address(0, 7)
    assert counters.address(0, 7) == first
    others = {counters.address(0, 8), counters.address(1, 7), counters.address(1, 8)}
    assert len(others) == 3 and first not in others
    assert counters.made == 2  # once a device


def test_a_captured_launch_has_a_counter_of_its_own(capturing: dict[str, bool]) -> None:
    """A graph may run on any stream, beside any other: no launch in it shares its counter."""
    counters = OnHost()
    plain = counters.address(0, 7)
    capturing["now"] = True
    captured = {counters.address(0, 7) for _ in range(SLOTS - 1)}
    assert len(captured) == SLOTS - 1 and plain not in captured
    capturing["now"] = False
    assert counters.address(0, 7) == plain and counters.made == 1


def test_more_streams_than_slots_get_fresh_memory(capturing: dict[str, bool]) -> None:
    """No address is handed out twice."""
    counters = OnHost()
    assert len({counters.address(0, stream) for stream in range(SLOTS + 1)}) == SLOTS + 1
    assert counters.made == 2
