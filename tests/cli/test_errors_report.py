"""What `attngen run` says of e4m3 inputs: errors against fp64 beside the time, and the plot over lengths."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

from attngen.api import resolve_arch
from attngen.check.inputs import Shape, random_inputs
from attngen.check.reference import attention
from attngen.cli import errors_report
from attngen.cli.losses import beside, in_bf16, per_tensor, rmse_of, sampled_rows
from attngen.kernel import Kernel
from attngen.lower import lower
from attngen.spec import Spec, load

Attngen = Callable[..., Result]
SPEC = """\
name: fp8
target: sm_90a
problem: {head_dim: 64}
precision: {inputs: e4m3, incoherent: hadamard, seed: 3}
mask: causal
tile: {block_m: 128, block_n: 128}
schedule: {kind: warp_specialized}
check:
  - {heads: 2, seqlen_q: 9, seqlen_k: 40}
  - {heads: 2, heads_kv: 1, seqlen_q: 40, seqlen_k: 300}
"""


@pytest.fixture
def fp8(tmp_path: Path) -> str:
    """A spec file of e4m3 inputs."""
    path = tmp_path / "fp8.yaml"
    path.write_text(SPEC)
    return str(path)


def kernel_of(spec: Spec) -> Kernel:
    return Kernel(spec, lower(spec, resolve_arch(spec)))


def test_run_reports_errors_of_both_inputs(attngen: Attngen, fp8: str, wide_lines: None) -> None:
    """For the largest check shape a row each of normal and outlying input: this kernel, per tensor, bf16."""
    result = attngen("run", fp8, "--device", "cpu")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if "per_block, hadamard" in line]
    assert [row[-6] for row in rows] == ["normal", "outliers"], result.output
    for row in rows:
        assert "2:1," in row and "40x300" in row
        ours, tensor, bf16 = map(float, row[-3:])
        assert 0 < 5 * bf16 < min(ours, tensor)
    ours, tensor, _ = map(float, rows[1][-3:])
    assert ours < tensor  # of outliers


def test_specs_of_other_inputs_have_no_such_report(
    attngen: Attngen, small: str, fp8: str, tmp_path: Path
) -> None:
    """Of 16-bit specs nothing is said, and a plot of nothing is refused; check judges and does not report."""
    result = attngen("run", small, "--device", "cpu")
    assert result.exit_code == 0 and "per_tensor" not in result.stdout
    result = attngen("run", small, "--device", "cpu", "--report", str(tmp_path / "out.svg"))
    assert result.exit_code == 2 and "e4m3" in result.output
    result = attngen("check", fp8, "--run")
    assert result.exit_code == 0 and result.stdout.count(" ok ") == 2 and "per_tensor" not in result.stdout


@pytest.mark.parametrize("suffix", errors_report.SUFFIXES)
def test_the_plot_is_written(
    attngen: Attngen, fp8: str, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page with the picture and its numbers, or the picture; lengths are on it."""
    monkeypatch.setitem(errors_report.LENGTHS, "cpu", (16, 48))
    path = tmp_path / "deep" / f"errors{suffix}"
    result = attngen("run", fp8, "--device", "cpu", "--heads", "1", "--seqlen", "20", "--report", str(path))
    assert result.exit_code == 0 and f"report: {path}" in result.stdout, result.output
    written = path.read_bytes()
    if suffix == ".png":
        assert written.startswith(b"\x89PNG")
    else:
        text = written.decode()
        assert "fp8: per_block, hadamard" in text and "fp8: bf16" in text and "48" in text
        assert ("<td>" in text) == (suffix == ".html")


def test_another_suffix_is_refused(attngen: Attngen, fp8: str) -> None:
    """The message names what would do."""
    result = attngen("run", fp8, "--report", "out.htm")
    assert result.exit_code == 2 and "out.html" in result.output


def test_a_trace_of_e4m3_is_refused(attngen: Attngen, fp8: str) -> None:
    """The board shows S and O in their units, which scales would change."""
    result = attngen("run", fp8, "--trace")
    assert result.exit_code == 2 and "--trace" in result.output and "e4m3" in result.output


def test_variants_are_the_same_attention() -> None:
    """Mask, head dim and output type stay; tiles and schedule, which the spec gave for e4m3, are free."""
    spec = load(SPEC)
    tensor, bf16 = per_tensor(spec), in_bf16(spec)
    assert tensor.precision.scales == "per_tensor" and tensor.precision.incoherent == "none"
    assert bf16.precision.inputs == "bf16" and bf16.precision.seed == 0
    for other in (tensor, bf16):
        assert other.mask_expr is spec.mask_expr and other.tile.block_m == other.schedule.kind == "auto"
    assert list(beside(kernel_of(spec))) == ["per_block, hadamard", "per_tensor", "bf16"]
    assert list(beside(kernel_of(tensor))) == ["per_tensor", "bf16"]


def test_errors_are_against_fp64_on_the_inputs() -> None:
    """An exact kernel has the error of its rounding, one that doubles V that of the output itself; rows are sampled."""
    kernel = kernel_of(
        load({"target": "simulator", "problem": {"head_dim": 16}, "precision": {"inputs": "f32"}})
    )
    inputs = random_inputs(Shape(1, 2, 1, 200, 30), 16, 16, torch.float32)

    class Doubled(Kernel):
        def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return attention(q, k, 2 * v)[0].float()

    double = Doubled(kernel.spec, kernel.call)
    found = rmse_of({"exact": kernel, "doubled": double}, inputs, relative=True)
    assert found["exact"] < 1e-6 and found["doubled"] == pytest.approx(1.0, abs=1e-6)
    assert list(sampled_rows(5)) == [0, 1, 2, 3, 4]
    rows = sampled_rows(200)
    assert len(set(rows)) == 64 and (rows[0], rows[-1]) == (0, 199)
