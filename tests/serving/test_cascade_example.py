"""The example of a shared prefix runs as a reader runs it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_example_says_that_two_calls_and_a_merge_are_one_call(tmp_path: Path) -> None:
    """Out and lse are near, and neither is nothing."""
    command = [sys.executable, ROOT / "examples/cascade.py", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment)
    out, lse, keys = run.stdout.splitlines()
    for line, name, size in ((out, "out", "of up to 0."), (lse, "lse", "of up to 6.")):
        assert line.startswith(f"{name}: two calls and a merge, and one call: as near as rounding lets them")
        assert size in line
    assert keys == "keys read: 500 instead of 1,400"
