"""`attngen bench` and `attngen fuzz` from the command line."""

import pytest
import torch
from click.testing import CliRunner

from attngen.cli import main


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_bench_without_a_gpu_says_what_is_missing() -> None:
    """Exit code 2 and the cure, no traceback."""
    result = CliRunner().invoke(main, ["bench", "fa2_d64"])
    assert result.exit_code == 2 and "this machine has none" in result.stderr


def test_bench_refuses_an_unknown_peer() -> None:
    """The peers that exist are named."""
    result = CliRunner().invoke(main, ["bench", "fa2_d64", "--against", "flashy"])
    assert result.exit_code == 2 and "flash, cudnn, efficient" in result.stderr


@pytest.mark.gpu
def test_bench_times_this_kernel_and_its_peers(tmp_path: object) -> None:
    """On a GPU the table holds attngen and flash, and the files are written."""
    arguments = ["bench", "fa2_d64", "--seqlen", "1024", "--rounds", "2", "-o", str(tmp_path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "attngen" in result.output and "flash" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.png", "bench.svg"]


@pytest.mark.gpu
def test_bench_times_an_edited_kernel(tmp_path: object) -> None:
    """A .cu edited by hand is what runs: one that does not compile is refused with NVRTC's words."""
    broken = tmp_path / "broken.cu"
    broken.write_text("this is no kernel")
    result = CliRunner().invoke(main, ["bench", "fa2_d64", "--seqlen", "1024", "--source", str(broken)])
    assert result.exit_code == 2 and "NVRTC" in result.stderr


def test_fuzz_finds_nothing_wrong_in_a_shipped_spec() -> None:
    """A few cases of the simulator's: exit code 0."""
    result = CliRunner().invoke(main, ["fuzz", "blackboard", "--examples", "5"])
    assert result.exit_code == 0, result.output
