"""The example of generation runs as a reader runs it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_example_says_what_eager_attention_says(tmp_path: Path) -> None:
    """It shows both masks, and all tokens are those of eager attention."""
    command = [sys.executable, ROOT / "examples/hf_generate.py", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.stdout.count("padding[b, kv_idx]") == 2 and "seqlen_k - seqlen_q - 7" in run.stdout
    assert "24 of 24 tokens are those of eager attention" in run.stdout
