"""Cubin -> SASS, by NVIDIA's disassembler."""

import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from attngen.errors import ToolchainError


def disassemble(cubin: bytes) -> str:
    """The machine code of a cubin as text.

    Raises:
        ToolchainError: nvdisasm is not installed, or refuses the cubin.
    """
    tool = _nvdisasm()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([tool, "-c", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ToolchainError(f"nvdisasm: {done.stderr.strip()}", "install a newer nvidia-cuda-nvdisasm")
    return done.stdout


def _nvdisasm() -> str:
    site = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    for path in sorted(site.glob("*/bin/nvdisasm*"), reverse=True):
        return str(path)
    if tool := shutil.which("nvdisasm"):
        return tool
    raise ToolchainError("nvdisasm is not installed", "pip install nvidia-cuda-nvdisasm")
