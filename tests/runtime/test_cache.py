"""The disk cache: one compilation for many processes, and nothing broken left or trusted."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from attngen.runtime import CacheWarning, Compiled, DiskCache, compile_source
from attngen.runtime.nvrtc import parse_resources

SOURCE = 'extern "C" __global__ void kernel(int* x) { x[threadIdx.x] = 1; }'


def _compile_and_log(log: Path, seconds: float = 0.0):
    def compiler(source: str, arch: str, *, lineinfo: bool = False) -> Compiled:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        return compile_source(source, arch, lineinfo=lineinfo)

    return compiler


def _get(path: Path, log: Path, seconds: float) -> None:
    DiskCache(path, _compile_and_log(log, seconds)).get(SOURCE, "sm_90a")


def test_the_second_get_reads_the_disk_within_100_ms(tmp_path: Path) -> None:
    """A cubin compiled once is the same bytes afterwards, found fast: 100 ms of CPU time."""
    first = DiskCache(tmp_path).get(SOURCE, "sm_90a")
    start = time.process_time()
    second = DiskCache(tmp_path).get(SOURCE, "sm_90a")
    assert time.process_time() - start < 0.1
    assert second.was_cached and not first.was_cached
    assert (second.cubin, second.resources) == (first.cubin, first.resources)


def test_text_arch_and_lineinfo_are_told_apart(tmp_path: Path) -> None:
    """Whatever changes the cubin changes the entry."""
    cache = DiskCache(tmp_path)
    cache.get(SOURCE, "sm_90a")
    cache.get(SOURCE, "sm_80")
    cache.get(SOURCE, "sm_90a", lineinfo=True)
    cache.get(SOURCE + "\n", "sm_90a")
    assert len(cache.entries()) == 4
    assert cache.size_bytes() > 0
    assert cache.clear() == 4 and cache.entries() == ()


def test_eight_processes_compile_once(tmp_path: Path) -> None:
    """Eight ranks that start together on an empty cache leave one line in the compiler's log."""
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_get, args=(tmp_path / "cache", log, 0.2)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 8
    assert len(log.read_text().splitlines()) == 1


def test_a_killed_build_leaves_no_entry(tmp_path: Path) -> None:
    """A process killed while it compiles leaves nothing that a later one would read, and no lock that stops it."""
    log = tmp_path / "log"
    process = multiprocessing.get_context("fork").Process(target=_get, args=(tmp_path / "cache", log, 30.0))
    process.start()
    while not log.exists():
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join(10)
    cache = DiskCache(tmp_path / "cache")
    assert cache.entries() == ()
    assert not cache.get(SOURCE, "sm_90a").was_cached


@pytest.mark.parametrize("damage", ["truncate", "garble report", "remove report"])
def test_a_corrupt_entry_is_rebuilt_with_a_warning_that_names_it(tmp_path: Path, damage: str) -> None:
    """What is not what was written is never loaded."""
    cache = DiskCache(tmp_path)
    good = cache.get(SOURCE, "sm_90a")
    (entry,) = cache.entries()
    if damage == "truncate":
        (entry / "kernel.cubin").write_bytes(good.cubin[:100])
    elif damage == "garble report":
        (entry / "report.json").write_text("{")
    else:
        (entry / "report.json").unlink()
    with pytest.warns(CacheWarning, match=entry.name):
        again = cache.get(SOURCE, "sm_90a")
    assert again.cubin == good.cubin and not again.was_cached
    assert cache.get(SOURCE, "sm_90a").was_cached


def test_a_cache_that_cannot_be_written_compiles_all_the_same(tmp_path: Path) -> None:
    """A file where the directory should be costs the cache, not the kernel, and a warning says so."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.warns(CacheWarning, match="compiling without it"):
        assert DiskCache(blocked).get(SOURCE, "sm_90a").cubin


def test_a_spilling_kernel_is_reported() -> None:
    """Spills and stack are read from ptxas: a kernel held to few registers shows them, a small one does not."""
    start = "".join(f"float a{i} = x[{i} * t];" for i in range(80))
    step = "".join(f"a{i} = a{i} * x[k] + {i}.f;" for i in range(80))
    source = (
        'extern "C" __global__ void __launch_bounds__(1024, 2) spills(float* x, int n) { int t = threadIdx.x;'
        f"{start} for (int k = 0; k < n; ++k) {{ {step} }} x[t] = {' + '.join(f'a{i}' for i in range(80))}; }}"
    )
    (used,) = compile_source(source, "sm_90a").resources
    assert used.name == "spills" and used.spill_stores > 0 and used.spill_loads > 0
    (small,) = compile_source(SOURCE, "sm_90a").resources
    assert small.spill_stores == small.stack_bytes == 0 < small.registers
    assert parse_resources("nothing of ptxas") == ()
