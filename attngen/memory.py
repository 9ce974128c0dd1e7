"""Room in this machine's memory: asked for before much is drawn, and how its lack shows."""

import os
import re
import sys
from contextlib import suppress
from pathlib import Path

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_NO_MEMORY = re.compile(
    r"out of memory|can't allocate|not enough memory|bad_alloc|size calculation overflowed"
)
_WANTED = re.compile(r"[Tt]ried to allocate ([\d.]+ \w+)")


def machine_bytes() -> int:
    """The memory of this machine, or what a container allows of it; endless where nothing says so."""
    limits = [sys.maxsize]
    with suppress(AttributeError, OSError, ValueError):  # no POSIX
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):  # no container, or "max"
        limits.append(int(_CGROUP_LIMIT.read_text(encoding="ascii")))
    return min(limits)


def check_room(size: int, what: str) -> None:
    """Refuse what can never be held: Linux would promise it, and end the process when it is written to.

    Args:
        size: bytes.
        what: takes them, in words.

    Raises:
        MemoryError: it is more than the machine has.
    """
    has = machine_bytes()
    if size > has:
        raise MemoryError(f"{what} takes {size / 2**30:.3g} GiB, and this machine has {has / 2**30:.3g} GiB")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: Python's, or one of torch's allocators, CPU or GPU."""
    is_torchs = isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
    return is_torchs or isinstance(error, MemoryError)


def lack_of_memory(error: BaseException) -> str:
    """What could not be had, in a line."""
    found = _WANTED.search(str(error))
    return f"{found[1]} could not be allocated" if found else str(error) or "an allocation failed"
