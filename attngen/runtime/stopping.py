"""A compilation that can be stopped: by Ctrl-C, and by a limit of time.

Python handles no signal while its main thread is inside the compiler. So the compiler runs in a thread of its own,
which is asked to end and not waited for. Nothing here knows what is compiled.
"""

import math
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar, cast

from attngen.errors import ArgumentError, CompileError

TIMEOUT_VARIABLE = "ATTNGEN_COMPILE_TIMEOUT"
"""Seconds that one compilation may take; no limit where it is not set."""

_POLL_SECONDS = 0.1  # a wait without end may not notice a signal, which another thread may have been given

T = TypeVar("T")
U = TypeVar("U")


class _Stoppable(threading.Thread, Generic[T]):
    """One compilation in a thread that does not keep the process from ending."""

    def __init__(self, work: Callable[[Callable[[], bool]], T]) -> None:
        super().__init__(name="attngen-compile", daemon=True)
        self.ended = threading.Event()
        self.is_stopped = False
        self.result: T | None = None
        self.error: BaseException | None = None
        self._work = work

    def run(self) -> None:
        """Do the work."""
        try:
            self.result = self._work(lambda: self.is_stopped)
        except BaseException as error:  # it is the caller's
            self.error = error
        self.ended.set()

    def stop(self) -> None:
        """Ask the compiler to end, and let those who wait go on."""
        self.is_stopped = True
        self.ended.set()


_running: set[_Stoppable[Any]] = set()
_interrupted = threading.Event()


def run_stoppable(work: Callable[[Callable[[], bool]], T]) -> T:
    """The result of some work, or its exception.

    Args:
        work: takes a function that says whether it is to end.

    Raises:
        CompileError: it took longer than $ATTNGEN_COMPILE_TIMEOUT, or a `CompilerPool` stopped it.
        ArgumentError: $ATTNGEN_COMPILE_TIMEOUT is no time.
    """
    limit = _time_limit()
    thread = _Stoppable(work)
    try:
        _running.add(thread)
        thread.start()
        if _interrupted.is_set():
            thread.stop()
        left = limit
        while left > 0 and not thread.ended.wait(min(left, _POLL_SECONDS)):
            left -= _POLL_SECONDS
        if not thread.ended.is_set():
            message = f"the compilation was stopped: it took more than {TIMEOUT_VARIABLE} = {limit:g} s"
            raise CompileError(message, "")
        if thread.is_stopped:
            raise CompileError("the compilation was stopped", "")
        if thread.error is not None:
            raise thread.error
        return cast(T, thread.result)
    finally:
        thread.stop()
        _running.discard(thread)


class CompilerPool(ThreadPoolExecutor):
    """Threads that compile. On Ctrl-C they are stopped, whatever they are at, since leaving the pool waits for them."""

    def each(self, work: Callable[[U], T], items: Iterable[U]) -> list[T]:
        """The results of some work on each item, in their order; the first exception ends it."""
        futures = [self.submit(work, item) for item in items]
        pending = set(futures)
        while pending:
            done, pending = wait(pending, _POLL_SECONDS, FIRST_EXCEPTION)
            for future in done:
                future.result()
        return [future.result() for future in futures]

    def __exit__(self, *raised: Any) -> None:
        """Leave the pool when its threads are done; what has not begun is dropped where something went wrong."""
        is_interrupt = raised[0] is KeyboardInterrupt
        if is_interrupt:
            _interrupted.set()  # some may not have come to their compilation
            for thread in tuple(_running):
                thread.stop()
        self.shutdown(cancel_futures=raised[0] is not None)
        if is_interrupt:
            _interrupted.clear()


def _time_limit() -> float:
    """The seconds that a compilation may take, infinite where nothing is said."""
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    try:
        seconds = float(text) if text else math.inf
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise ArgumentError(f"${TIMEOUT_VARIABLE}", repr(text), "a positive number of seconds")
    return seconds
