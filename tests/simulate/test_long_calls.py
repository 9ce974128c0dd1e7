"""What a call on the CPU does beside computing: threads, what it says of its cost, and that it can be stopped."""

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from small_plans import KINDS, lowered

import attngen
from attngen.check.inputs import Shape, random_inputs
from attngen.plan import KernelPlan
from attngen.simulate import Event, Progress, closed_form, simulate


@pytest.fixture
def threads() -> Iterator[int]:
    """Torch's number of threads, other than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def elsewhere(ask: Callable[[], int]) -> int:
    """What a new thread answers."""
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(ask()))
    thread.start()
    thread.join()
    return answers[0]


def small_call() -> tuple[KernelPlan, list[torch.Tensor]]:
    plan = lowered("fa2", "causal", 1)
    return plan, list(random_inputs(Shape(1, 2, 2, 9, 9), 4, 4, torch.float32))


# ---- threads --------------------------------------------------------------------------------------------------------
def test_a_call_runs_on_one_thread_and_gives_the_number_back(threads: int) -> None:
    """Every Step has one thread of torch's, a thread begun meanwhile has the caller's number, and so has the caller."""
    plan, inputs = small_call()
    seen: set[tuple[int, int]] = set()

    def observe(event: Event) -> None:
        if not seen:
            seen.add((torch.get_num_threads(), elsewhere(torch.get_num_threads)))

    simulate(plan, *inputs, observer=observe)
    assert seen == {(1, threads)}
    assert torch.get_num_threads() == elsewhere(torch.get_num_threads) == threads


def test_the_number_of_threads_comes_back_after_a_fault(threads: int) -> None:
    """An exception of a Step, or of the user, leaves torch as it was."""
    plan, inputs = small_call()
    for error in (ValueError, KeyboardInterrupt):

        def fail(event: Event, error: type[BaseException] = error) -> None:
            raise error

        with pytest.raises(error):
            simulate(plan, *inputs, observer=fail)
        assert torch.get_num_threads() == elsewhere(torch.get_num_threads) == threads


def test_calls_of_several_threads_leave_each_its_own_number() -> None:
    """Two calls overlap; both get what they compute alone, and each thread has its number of threads again."""
    plan, inputs = small_call()
    alone, _ = simulate(plan, *inputs, observer=lambda event: None)
    meet = threading.Barrier(2, timeout=20)
    found: dict[int, tuple[bool, int]] = {}

    def call(number: int) -> None:
        torch.get_num_threads()  # a thread that never asked takes over what others set
        torch.set_num_threads(number)
        meet.wait()
        first = iter([True])
        out, _ = simulate(plan, *inputs, observer=lambda event: meet.wait() if next(first, False) else None)
        found[number] = torch.equal(out, alone), torch.get_num_threads()

    before = torch.get_num_threads()
    calls = [threading.Thread(target=call, args=(number,)) for number in (2, 3)]
    for each in calls:
        each.start()
    for each in calls:
        each.join()
    torch.set_num_threads(before)
    assert found == {2: (True, 2), 3: (True, 3)}


# ---- what it says ---------------------------------------------------------------------------------------------------
class Clock:
    """Goes on by so many seconds each time it is asked."""

    def __init__(self, step: float) -> None:
        self.time, self.step = 0.0, step

    def __call__(self) -> float:
        self.time += self.step
        return self.time


@pytest.mark.parametrize("schedule", KINDS)
@pytest.mark.parametrize("mask", ["full", "kv_idx < 5 * h"])
def test_a_long_call_says_once_what_it_costs(
    schedule: str, mask: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It names all FLOPs of the call, by all heads, and the time from the rate of its first second."""
    plan = lowered(schedule, mask, 2)
    q, k, v = random_inputs(Shape(1, 3, 3, 40, 80), 4, 4, torch.float32)
    clock = Clock(0.5)
    with Progress(lambda: closed_form(plan, 40, 80, 1, 3).flops, clock) as progress:
        simulate(plan, q, k, v, memory=progress)
    flops = closed_form(plan, 40, 80, 1, 3).flops
    assert progress.flops == flops
    assert len(caplog.records) == 1
    record = caplog.records[0]
    assert record.levelno == logging.WARNING
    told_flops, told_seconds, told_rate, sample = record.args  # type: ignore[misc]
    assert told_flops == flops / 1e9 and sample == 1.0
    assert told_seconds == pytest.approx(clock.time, rel=0.35)
    assert told_seconds * told_rate == pytest.approx(told_flops)


def test_a_short_call_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Under ten seconds there is no line, and under one second nothing is even counted beforehand."""
    plan, inputs = small_call()
    with Progress(lambda: pytest.fail("counted"), Clock(1e-4)) as progress:
        simulate(plan, *inputs, memory=progress)
    with Progress(lambda: closed_form(plan, 9, 9, 1, 2).flops, Clock(0.1)) as progress:
        simulate(plan, *inputs, memory=progress)
    assert not caplog.records


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_bar_is_for_terminals(
    is_terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where stderr is a terminal a bar comes to 100 %; a file gets none of it. stdout gets nothing either way."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    monkeypatch.setenv("TERM", "xterm")
    plan, inputs = small_call()
    with Progress(lambda: closed_form(plan, 9, 9, 1, 2).flops, Clock(2.0)) as progress:
        simulate(plan, *inputs, memory=progress)
    out, err = capsys.readouterr()
    assert out == "" and ("100%" in err) is is_terminal and ("\x1b" in err) is is_terminal


# ---- a call of users ------------------------------------------------------------------------------------------------
LONG_SHAPE = (1, 16384, 8, 128)
"""A call of minutes."""


def test_ctrl_c_stops_a_long_call_at_once(threads: int) -> None:
    """SIGINT in the midst of it raises KeyboardInterrupt within a fraction of a second."""
    q = torch.zeros(LONG_SHAPE)
    sent: list[float] = []

    def interrupt() -> None:
        sent.append(time.monotonic())
        signal.raise_signal(signal.SIGINT)

    attngen.attention(
        q[:, :64], q[:, :64], q[:, :64]
    )  # so that the timer does not meet the kernel's lowering
    timer = threading.Timer(0.5, interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        attngen.attention(q, q, q)
    assert time.monotonic() - sent[0] < 1.0
    assert torch.get_num_threads() == threads


def test_a_long_call_of_attention_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`attngen.attention` itself says what it will cost; here with the measured second made short."""
    monkeypatch.setattr("attngen.simulate.progress.SAMPLE", 0.05)
    q = torch.zeros(LONG_SHAPE)

    class Told(Exception):
        pass

    class Stop(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise Told

    logger = logging.getLogger("attngen.simulate")
    logger.addHandler(handler := Stop())
    try:
        with pytest.raises(Told):
            attngen.attention(q, q, q, "causal")
    finally:
        logger.removeHandler(handler)
