"""Counters of persistent kernels: which launches share one. The memory is stood in for."""

import pytest
import torch

from attngen.runtime.counters import SLOTS, TileCounters


class OnHost(TileCounters):
    """Counters whose memory is numbers, and that count how often it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def _make(self, device: int, count: int) -> int:
        self.made += 1
        return 4096 + 16 * SLOTS * self.made


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


@pytest.mark.parametrize("is_captured", [False, True])
def test_more_launches_than_slots_get_fresh_memory(capturing: dict[str, bool], is_captured: bool) -> None:
    """No address is handed out twice, nor are there ever none left, be it in the middle of a capture."""
    counters = OnHost()
    capturing["now"] = is_captured
    found = {counters.address(0, stream) for stream in range(2 * SLOTS + 1)}
    assert len(found) == 2 * SLOTS + 1 and counters.made == 3
    starts = [start for device, start in counters.memory if device == 0]
    assert found <= {start + 4 * slot for start in starts for slot in range(SLOTS)}


def test_prepared_counters_are_made_once(capturing: dict[str, bool]) -> None:
    """Preparing makes what the next launch takes, and nothing where something is left."""
    counters = OnHost()
    for _ in range(3):
        counters.prepare(0)
    assert counters.made == 1
    for stream in range(SLOTS):
        counters.address(0, stream)
    assert counters.made == 1
    counters.prepare(0)
    assert counters.made == 2


def test_a_launch_gets_as_many_counters_as_it_needs(capturing: dict[str, bool]) -> None:
    """Those of a stream grow with what its launches need; nobody else has any of them."""
    counters = OnHost()
    one, many = counters.address(0, 7), counters.address(0, 7, 100)
    assert counters.address(0, 7, 50) == counters.address(0, 7) == many
    others = [counters.address(0, 8, SLOTS), counters.address(0, 9, 3 * SLOTS)]
    capturing["now"] = True
    captured = [counters.address(0, 7, 100) for _ in range(2)]
    sizes = [1, 100, SLOTS, 3 * SLOTS, 100, 100]
    taken = [
        start + 4 * i
        for start, size in zip((one, many, *others, *captured), sizes, strict=True)
        for i in range(size)
    ]
    assert len(taken) == len(set(taken))
