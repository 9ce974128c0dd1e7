"""The wheel carries templates and specs, and works outside the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

CODE = """
import attngen, sys
assert attngen.__file__.startswith(sys.argv[1]), attngen.__file__
kernel = attngen.compile("fa2_d64")
assert "gemm_nt_ss" in kernel.source
"""


@pytest.mark.timeout(200)
def test_an_installed_wheel_emits_a_shipped_spec(tmp_path: Path) -> None:
    """From another folder, with the checkout off the path, a shipped spec is found, lowered and emitted."""
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("no checkout to build from")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("attngen-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    metadata = next(site.glob("*.dist-info/METADATA")).read_text(encoding="utf-8")
    assert "License-Expression: Apache-2.0" in metadata
    (tmp_path / "elsewhere").mkdir()
    subprocess.run(
        [sys.executable, "-P", "-c", CODE, str(site)],
        cwd=tmp_path / "elsewhere",
        env={**os.environ, "PYTHONPATH": str(site)},
        check=True,
    )
