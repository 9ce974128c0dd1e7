"""The disk cache of compiled kernels: safe for many processes, never trusted blindly.

An entry is a directory named by a digest of everything that decides the cubin. It is built in a temporary
directory beside its place and renamed into it, so that a killed build leaves nothing half done; a lock per entry
lets eight ranks compile once; what does not fit its digest is rebuilt with a warning that names it.
"""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_dir

from attngen.runtime.nvrtc import Compiled, KernelResources, compile_source, flags, nvrtc_version

CACHE_DIR_VARIABLE = "ATTNGEN_CACHE_DIR"


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
            "\0".join((source, *flags(arch, lineinfo), nvrtc_version())).encode()
        ).hexdigest()
        entry = self.path / key[:32]
        if (found := self._read(entry)) is not None:
            return found
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{entry}.lock"):
                if (found := self._read(entry, warn=True)) is not None:
                    return found
                compiled = self._compiler(source, arch, lineinfo=lineinfo)
                self._write(entry, source, compiled)
        except OSError as error:
            warnings.warn(
                f"the cache at {self.path} cannot be written ({error}); compiling without it",
                CacheWarning,
                stacklevel=2,
            )
            compiled = self._compiler(source, arch, lineinfo=lineinfo)
        return _as_kernel(compiled)

    def size_bytes(self) -> int:
        """Bytes of all entries."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def entries(self) -> tuple[Path, ...]:
        """The directories of the entries."""
        if not self.path.is_dir():
            return ()
        return tuple(sorted(child for child in self.path.iterdir() if (child / "kernel.cubin").is_file()))

    def clear(self) -> int:
        """Remove every entry, and say how many there were. Other files in the directory stay."""
        entries = self.entries()
        for entry in entries:
            shutil.rmtree(entry, ignore_errors=True)
        return len(entries)

    def _read(self, entry: Path, warn: bool = False) -> CompiledKernel | None:
        """The entry, or None where there is none or it is not what was written."""
        if not entry.is_dir():
            return None
        try:
            cubin = (entry / "kernel.cubin").read_bytes()
            report = json.loads((entry / "report.json").read_text(encoding="utf-8"))
            if report["cubin_sha256"] != hashlib.sha256(cubin).hexdigest():
                raise ValueError("the cubin is not the one that was written")
            return CompiledKernel(
                cubin,
                tuple(KernelResources(**kernel) for kernel in report["resources"]),
                tuple(report["warnings"]),
                report["seconds"],
                report["nvrtc_version"],
                was_cached=True,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            if warn:
                warnings.warn(
                    f"cache entry {entry} is corrupt ({error}) and is built anew", CacheWarning, stacklevel=4
                )
            return None

    def _write(self, entry: Path, source: str, compiled: Compiled) -> None:
        """Put an entry in its place in one step."""
        building = Path(tempfile.mkdtemp(prefix="building-", dir=self.path))
        try:
            report = {
                "cubin_sha256": hashlib.sha256(compiled.cubin).hexdigest(),
                "resources": [asdict(kernel) for kernel in compiled.resources],
                "warnings": list(compiled.warnings),
                "seconds": compiled.seconds,
                "nvrtc_version": compiled.nvrtc_version,
            }
            (building / "kernel.cu").write_text(source, encoding="utf-8")
            (building / "kernel.cubin").write_bytes(compiled.cubin)
            (building / "report.json").write_text(json.dumps(report), encoding="utf-8")
            if entry.exists():
                shutil.rmtree(entry)
            building.rename(entry)
        finally:
            shutil.rmtree(building, ignore_errors=True)


def _as_kernel(compiled: Compiled) -> CompiledKernel:
    return CompiledKernel(
        compiled.cubin,
        compiled.resources,
        compiled.warnings,
        compiled.seconds,
        compiled.nvrtc_version,
        was_cached=False,
    )
