"""The disk cache of compiled kernels: safe for many processes, never trusted blindly.

An entry is a directory named by a digest of everything that decides the cubin. It is built in a temporary
directory beside its place and renamed into it, so that a killed build leaves nothing half done; a lock per entry
lets eight ranks compile once; what does not fit its digest, or is another kernel, is rebuilt with a warning that
names it. A cubin is code: a directory that others may write to is not used at all.
"""

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_dir

from attngen.runtime.nvrtc import Compiled, KernelResources, compile_source, flags, nvrtc_version

CACHE_DIR_VARIABLE = "ATTNGEN_CACHE_DIR"

_SOURCE, _CUBIN, _REPORT = "kernel.cu", "kernel.cubin", "report.json"
_FORMAT = "2"  # of a report: another one is another entry
_BUILDING = "building-"
_ENTRY = re.compile(r"[0-9a-f]{32}")
_LOCK = re.compile(r"[0-9a-f]{32}\.lock")
_LEFT = re.compile(_BUILDING + r"\w{8}")  # of a build that was killed; the ending is tempfile's
_MOST_BYTES = 2**28  # no cubin comes near
_refused: set[Path] = set()  # directories that a warning has told of


class CacheWarning(UserWarning):
    """The cache could not be used as meant; the kernel is compiled all the same."""


@dataclass(frozen=True)
class CompiledKernel:
    """A cubin, its report, and whether it came from the cache."""

    cubin: bytes
    resources: tuple[KernelResources, ...]
    warnings: tuple[str, ...]
    seconds: float
    nvrtc_version: str
    was_cached: bool

    @property
    def digest(self) -> str:
        """sha256 of the cubin."""
        return hashlib.sha256(self.cubin).hexdigest()


class DiskCache:
    """Compiled kernels under one directory.

    Args:
        path: the directory; $ATTNGEN_CACHE_DIR or the user's cache directory where None.
        compiler: what makes a cubin; tests count its calls.
    """

    def __init__(self, path: Path | None = None, compiler: Callable[..., Compiled] = compile_source) -> None:
        self.path = path or Path(os.environ.get(CACHE_DIR_VARIABLE) or user_cache_dir("attngen"))
        self._compiler = compiler

    def get(self, source: str, arch: str, *, lineinfo: bool = False) -> CompiledKernel:
        """The compiled kernel, from the disk or fresh.

        Raises:
            CompileError: NVRTC refused the text.
            ToolchainError: NVRTC is missing.
        """
        key = hashlib.sha256(
            "\0".join((_FORMAT, source, *flags(arch, lineinfo), nvrtc_version())).encode()
        ).hexdigest()
        entry = self.path / key[:32]
        compiled = None
        try:
            if (why := self._distrust()) is not None:
                self._warn_once(why)
                return _as_kernel(self._compiler(source, arch, lineinfo=lineinfo))
            if (found := self._read(entry, key)) is not None:
                return found
            with FileLock(f"{entry}.lock"):
                if (found := self._read(entry, key, warn=True)) is not None:
                    return found
                compiled = self._compiler(source, arch, lineinfo=lineinfo)
                self._write(entry, key, source, compiled)
        except (OSError, NotImplementedError) as error:  # the latter from a file system without locks
            warnings.warn(
                f"the cache at {self.path} cannot be written ({error}); compiling without it",
                CacheWarning,
                stacklevel=2,
            )
        return _as_kernel(compiled or self._compiler(source, arch, lineinfo=lineinfo))

    def size_bytes(self) -> int:
        """Bytes of all entries."""
        return sum(file.lstat().st_size for entry in self.entries() for file in _files(entry))

    def entries(self) -> tuple[Path, ...]:
        """The directories of the entries."""
        return tuple(child for child in self._written(_ENTRY) if (child / _CUBIN).is_file())

    def clear(self) -> int:
        """Remove entries, their locks and what killed builds left, and say how many entries there were.

        Whatever else is in the directory stays, in an entry too.
        """
        count = len(self.entries())
        for child in (*self._written(_ENTRY), *self._written(_LEFT)):
            for file in _files(child):
                file.unlink(missing_ok=True)
            with suppress(OSError):  # something else is in it
                child.rmdir()
        for lock in self._written(_LOCK):
            with suppress(OSError):  # it is no file
                lock.unlink()
        return count

    def _written(self, name: re.Pattern[str]) -> tuple[Path, ...]:
        """What bears a name that this class gives; links are somebody else's."""
        if not self.path.is_dir():
            return ()
        found = (child for child in self.path.iterdir() if name.fullmatch(child.name))
        return tuple(sorted(child for child in found if not child.is_symlink()))

    def _distrust(self) -> str | None:
        """Why what the directory holds may be somebody else's; it is made where there is none.

        Raises:
            OSError: it cannot be made.
        """
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not hasattr(os, "geteuid"):  # Windows, where it lies in the user's profile
            return None
        facts = self.path.stat()
        if facts.st_uid not in (0, os.geteuid()):
            return f"belongs to user {facts.st_uid}"
        if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return "can be written by others"
        return None

    def _warn_once(self, why: str) -> None:
        """Tell that the directory is not used, the first time."""
        if self.path not in _refused:
            _refused.add(self.path)
            cure = f"`attngen cache clear` and `chmod 700 {self.path}` mend it"
            warnings.warn(
                f"the cache at {self.path} {why} and is not used, for a cubin in it would be run; "
                f"{cure}, or ${CACHE_DIR_VARIABLE} names a directory of your own",
                CacheWarning,
                stacklevel=3,
            )

    def _read(self, entry: Path, key: str, warn: bool = False) -> CompiledKernel | None:
        """The entry, or None where there is none or it is not what was written for this key."""
        try:
            if not entry.is_dir():
                return None
            cubin = _bytes(entry / _CUBIN)
            report = json.loads(_bytes(entry / _REPORT))
            if report["key"] != key:
                raise ValueError("it is another kernel's")
            if report["cubin_sha256"] != hashlib.sha256(cubin).hexdigest():
                raise ValueError("the cubin is not the one that was written")
            resources = tuple(KernelResources(**kernel) for kernel in report["resources"])
            if not all(type(number) is int for kernel in resources for number in astuple(kernel)[1:]):
                raise TypeError("a number of the report is none")
            return CompiledKernel(
                cubin,
                resources,
                tuple(report["warnings"]),
                report["seconds"],
                report["nvrtc_version"],
                was_cached=True,
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            if warn:
                warnings.warn(
                    f"cache entry {entry} is corrupt ({error}) and is built anew", CacheWarning, stacklevel=4
                )
            return None

    def _write(self, entry: Path, key: str, source: str, compiled: Compiled) -> None:
        """Put an entry in its place in one step."""
        building = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=self.path))
        try:
            report = {
                "key": key,
                "cubin_sha256": hashlib.sha256(compiled.cubin).hexdigest(),
                "resources": [asdict(kernel) for kernel in compiled.resources],
                "warnings": list(compiled.warnings),
                "seconds": compiled.seconds,
                "nvrtc_version": compiled.nvrtc_version,
            }
            (building / _SOURCE).write_text(source, encoding="utf-8")
            (building / _CUBIN).write_bytes(compiled.cubin)
            (building / _REPORT).write_text(json.dumps(report), encoding="utf-8")
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)
            building.rename(entry)
        finally:
            shutil.rmtree(building, ignore_errors=True)


def _files(entry: Path) -> Iterator[Path]:
    """Those files of an entry that `DiskCache` wrote."""
    for name in (_SOURCE, _CUBIN, _REPORT):
        if os.path.lexists(entry / name):
            yield entry / name


def _bytes(path: Path) -> bytes:
    """What a file holds; a pipe or a device, which may never end, is refused.

    Raises:
        ValueError: it is no plain file, or larger than any cubin.
        OSError: it cannot be read.
    """
    with open(
        path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))
    ) as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > _MOST_BYTES:
            raise ValueError(f"{path.name} is no file of attngen's")
        return file.read()


def _as_kernel(compiled: Compiled) -> CompiledKernel:
    return CompiledKernel(
        compiled.cubin,
        compiled.resources,
        compiled.warnings,
        compiled.seconds,
        compiled.nvrtc_version,
        was_cached=False,
    )
