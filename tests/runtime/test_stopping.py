"""A compilation ends when somebody wants it to, and costs next to nothing for that."""

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from attngen.arch import ARCHS
from attngen.emit import emit
from attngen.errors import ArgumentError, CompileError
from attngen.runtime import TIMEOUT_VARIABLE, CompilerPool, compile_source
from attngen.runtime.stopping import run_stoppable
from attngen.spec import load
from tests.plans import kernel_plan

SLOW = " or ".join(f"sin(f32(q_idx - kv_idx) * {i}.5) < 0.5" for i in range(60))


def endless(is_stopped: Callable[[], bool]) -> None:
    """Work that ends when it is told to."""
    while not is_stopped():
        time.sleep(0.001)


def interrupt_soon(seconds: float) -> None:
    """Ctrl-C in a while."""
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()


def test_ctrl_c_ends_a_compilation_at_once() -> None:
    """The main thread goes on, and the work is told to end."""
    ended = threading.Event()

    def work(is_stopped: Callable[[], bool]) -> None:
        endless(is_stopped)
        ended.set()

    interrupt_soon(0.1)
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        run_stoppable(work)
    assert time.perf_counter() - start < 2 and ended.wait(2)


def test_ctrl_c_ends_a_pool_of_compilations_at_once() -> None:
    """What runs is stopped, what comes to its compilation later is too, and what waits for a thread never begins."""
    begun: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        time.sleep(0.3)  # as emission may take
        run_stoppable(endless)

    interrupt_soon(0.1)
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt), CompilerPool(max_workers=2) as pool:
        pool.each(work, range(8))
    assert time.perf_counter() - start < 2 and begun == [0, 1]
    assert run_stoppable(lambda is_stopped: 1) == 1  # the next one is not stopped


def test_a_pool_gives_results_in_order_and_the_first_exception() -> None:
    """As map does."""
    with CompilerPool(max_workers=2) as pool:
        assert pool.each(lambda item: item + 1, range(5)) == [1, 2, 3, 4, 5]
    with pytest.raises(ZeroDivisionError), CompilerPool(max_workers=2) as pool:
        pool.each(lambda item: 1 // item, (1, 0))


def test_a_compilation_costs_little_more_than_its_work() -> None:
    """Less than 50 ms, of which the thread takes well under one."""
    start = time.perf_counter()
    results = [run_stoppable(lambda is_stopped: 5) for _ in range(20)]
    assert results == [5] * 20 and (time.perf_counter() - start) / 20 < 0.05


def test_nvrtc_is_stopped_by_a_limit_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error names the limit and where it comes from."""
    source = emit(kernel_plan(load({"problem": {"head_dim": 64}, "mask": SLOW}), ARCHS["sm_80"]))
    monkeypatch.setenv(TIMEOUT_VARIABLE, "0.05")
    start = time.perf_counter()
    with pytest.raises(CompileError, match=r"it took more than ATTNGEN_COMPILE_TIMEOUT = 0\.05 s"):
        compile_source(source, "sm_80")
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan"])
def test_a_limit_that_is_no_time_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name of the variable, before anything runs."""
    monkeypatch.setenv(TIMEOUT_VARIABLE, text)
    with pytest.raises(ArgumentError, match="ATTNGEN_COMPILE_TIMEOUT"):
        run_stoppable(endless)
