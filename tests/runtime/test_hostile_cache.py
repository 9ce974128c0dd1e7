"""The disk cache in a directory that others wrote to: nothing is trusted, waited for, compiled twice or removed."""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from attngen.runtime import CacheWarning, Compiled, DiskCache, KernelResources

SOURCE, OTHER = "kernel 1", "kernel 2"


class Compiler:
    """Makes a cubin of any text, and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, source: str, arch: str, *, lineinfo: bool = False) -> Compiled:
        self.calls += 1
        used = KernelResources("kernel", 32, 0, 0, 0, 0)
        return Compiled(f"cubin of {source}".encode(), "", (used,), (), 0.1, "13.0")


def filled(path: Path) -> tuple[DiskCache, Compiler, Path]:
    """A cache with the entry of `SOURCE`."""
    compiler = Compiler()
    cache = DiskCache(path, compiler)
    cache.get(SOURCE, "sm_80")
    (entry,) = cache.entries()
    return cache, compiler, entry


def fifo(entry: Path, name: str) -> None:
    (entry / name).unlink()
    os.mkfifo(entry / name)


def rewrite(entry: Path, **changes: object) -> None:
    report = json.loads((entry / "report.json").read_text())
    (entry / "report.json").write_text(json.dumps(report | changes))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cubin is a fifo": lambda entry: fifo(entry, "kernel.cubin"),
    "report is a fifo": lambda entry: fifo(entry, "report.json"),
    "report is deep": lambda entry: (entry / "report.json").write_text("[" * 100_000),
    "report is a long number": lambda entry: (entry / "report.json").write_text("9" * 5000),
    "report is no text": lambda entry: (entry / "report.json").write_bytes(b"\xff\xfe\x00"),
    "report is a list": lambda entry: (entry / "report.json").write_text("[1]"),
    "report says another key": lambda entry: rewrite(entry, key="0" * 64),
    "report lacks numbers": lambda entry: rewrite(entry, resources=[{"name": "kernel"}]),
    "a number is a text": lambda entry: rewrite(
        entry, resources=[vars(KernelResources("k", "x", 0, 0, 0, 0))]  # type: ignore[arg-type]
    ),
    "report is a folder": lambda entry: ((entry / "report.json").unlink(), (entry / "report.json").mkdir()),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_hostile_entry_is_named_and_built_anew_once(tmp_path: Path, damage: str) -> None:
    """Whatever stands in an entry's place: the right cubin, one compilation, one warning, and a good entry after it."""
    cache, compiler, entry = filled(tmp_path)
    DAMAGES[damage](entry)
    with pytest.warns(CacheWarning, match=entry.name):
        again = cache.get(SOURCE, "sm_80")
    assert (again.cubin, compiler.calls) == (b"cubin of kernel 1", 2)
    assert cache.get(SOURCE, "sm_80").was_cached


def test_an_entry_of_another_kernel_is_not_taken_for_this_one(tmp_path: Path) -> None:
    """A whole entry, digests and all, moved to another kernel's place is not loaded there."""
    cache, _, entry = filled(tmp_path / "one")
    other, compiler, others = filled(tmp_path / "two")
    other.get(OTHER, "sm_80")
    (of_other,) = set(other.entries()) - {others}
    shutil.rmtree(entry)
    shutil.copytree(of_other, entry)
    with pytest.warns(CacheWarning, match="another kernel's"):
        assert cache.get(SOURCE, "sm_80").cubin == b"cubin of kernel 1"


@pytest.mark.parametrize("kind", ["file", "fifo", "link"])
def test_what_stands_in_an_entrys_place_is_replaced(tmp_path: Path, kind: str) -> None:
    """A file, a pipe or a link of an entry's name gives way, and what a link names is left alone."""
    cache, compiler, entry = filled(tmp_path / "cache")
    shutil.rmtree(entry)
    if kind == "file":
        entry.write_text("")
    elif kind == "fifo":
        os.mkfifo(entry)
    else:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "kernel.cu").write_text("mine")
        entry.symlink_to(tmp_path / "mine")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CacheWarning)
        assert cache.get(SOURCE, "sm_80").cubin == b"cubin of kernel 1"
    assert compiler.calls == 2 and cache.get(SOURCE, "sm_80").was_cached
    assert kind != "link" or (tmp_path / "mine" / "kernel.cu").read_text() == "mine"


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), NotImplementedError("no locks")])
def test_a_write_that_fails_costs_no_second_compilation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    """A full disk, or one without locks, leaves the kernel that was compiled, a warning, and no remains."""
    compiler = Compiler()
    cache = DiskCache(tmp_path, compiler)

    def fails(*_: object, **__: object) -> None:
        raise fault

    where = (
        "pathlib.Path.write_bytes" if isinstance(fault, OSError) else "attngen.runtime.disk_cache.FileLock"
    )
    monkeypatch.setattr(where, fails)
    with pytest.warns(CacheWarning, match="compiling without it"):
        assert cache.get(SOURCE, "sm_80").cubin == b"cubin of kernel 1"
    assert compiler.calls == 1 and not list(tmp_path.glob("building-*"))


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_can_write_to_is_not_used(tmp_path: Path, mode: int) -> None:
    """A planted cubin is never loaded: each kernel is compiled, nothing is written, and one warning says the cure."""
    cache, compiler, entry = filled(tmp_path)
    (entry / "kernel.cubin").write_bytes(b"planted")
    tmp_path.chmod(mode)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = [cache.get(source, "sm_80").cubin for source in (SOURCE, OTHER, SOURCE)]
    tmp_path.chmod(0o700)
    assert found == [b"cubin of kernel 1", b"cubin of kernel 2", b"cubin of kernel 1"] and compiler.calls == 4
    (warning,) = map(str, (each.message for each in told))
    assert "can be written by others" in warning and f"chmod 700 {tmp_path}" in warning
    assert cache.entries() == (entry,)


def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who owns the directory can write what they like into it; root's is trusted."""
    cache, compiler, _ = filled(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    if tmp_path.stat().st_uid == 0:
        assert cache.get(SOURCE, "sm_80").was_cached
        os.chown(tmp_path, 4321, -1)
    with pytest.warns(CacheWarning, match="belongs to user"):
        assert not cache.get(SOURCE, "sm_80").was_cached


def test_the_folder_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    """Whatever the umask, nobody else writes to a directory that attngen made."""
    before = os.umask(0)
    try:
        filled(tmp_path / "a" / "cache")
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "cache").stat().st_mode & 0o077 == 0


def test_clear_removes_what_attngen_wrote_and_nothing_else(tmp_path: Path) -> None:
    """Entries, locks and the remains of killed builds go; folders and files of others stay, inside an entry too."""
    cache, _, _ = filled(tmp_path)
    cache.get(OTHER, "sm_80")
    left = tmp_path / "building-abc_1234"
    left.mkdir()
    (left / "kernel.cu").write_text("")
    mine = [tmp_path / name for name in ("project/kernel.cubin", "building-site/plan", "notes.lock", "a.txt")]
    mine.append(cache.entries()[0] / "notes")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ("0" * 32)).symlink_to(tmp_path / "elsewhere")
    mine.append(tmp_path / "elsewhere" / "kernel.cubin")
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    size = cache.size_bytes()
    assert cache.clear() == 2 and cache.entries() == () and size > 0
    assert [file.read_text() for file in mine] == ["mine"] * len(mine)
    assert not left.exists() and len(list(tmp_path.iterdir())) == len(mine) + 1  # and the link
