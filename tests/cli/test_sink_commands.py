"""Commands on specs with a learned sink: drawn or given, judged by the references, told and searched."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import attngen
from attngen.check.inputs import Shape
from attngen.cli import main
from attngen.fuzz.case import Case

SPEC = """
name: with_sink
target: simulator
problem: {head_dim: 8}
precision: {inputs: f32}
mask: causal
sink: per_head
gradients: [q, k, v, sink]
tile: {block_m: 8, block_n: 8}
schedule: {kind: fa2}
check:
  - {batch: 2, heads: 4, heads_kv: 2, seqlen_q: 20, seqlen_k: 12}
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    path = tmp_path / "with_sink.yaml"
    path.write_text(SPEC)
    return str(path)


def run(*arguments: str, code: int = 0) -> str:
    found = CliRunner().invoke(main, list(arguments))
    assert found.exit_code == code, found.output
    return found.output


def test_check_and_run_judge_a_kernel_with_a_sink(spec: str) -> None:
    """Its output and its gradients, that of the sink too."""
    checked, ran = run("check", spec, "--run"), run("run", spec, "--backward", "--device", "cpu")
    for output in (checked, ran):
        assert "dsink" in output and "FAILED" not in output
    board = run("run", spec, "--trace", "--device", "cpu")
    assert "FAILED" not in board


def test_a_sink_may_be_given(spec: str, tmp_path: Path) -> None:
    """As a kind, or as a file of any format that calls take; what is wrong is refused by name."""
    for sink in (torch.tensor([1.0, -2.0, 30.0, -float("inf")]), torch.zeros(4, dtype=torch.bfloat16)):
        torch.save(sink, tmp_path / "sink.pt")
        assert "FAILED" not in run("run", spec, "--device", "cpu", "--tensor", f"sink={tmp_path / 'sink.pt'}")
    assert "FAILED" not in run("run", spec, "--device", "cpu", "--tensor", "sink=zeros")
    torch.save(torch.zeros(3), tmp_path / "sink.pt")
    said = run("run", spec, "--device", "cpu", "--tensor", f"sink={tmp_path / 'sink.pt'}", code=2)
    assert "argument sink: got shape (3,)" in said
    plain = tmp_path / "plain.yaml"
    plain.write_text(SPEC.replace("sink: per_head\n", "").replace(", sink]", "]"))
    assert "--tensor sink" in run("run", str(plain), "--device", "cpu", "--tensor", "sink=zeros", code=2)


def test_explain_tells_what_a_call_passes_and_which_kernel_sums(spec: str) -> None:
    """The sink in its formats, and the kernels of the backward pass by name."""
    said = " ".join(run("explain", spec, "--program").split())
    assert "sink: f32, bf16, f16 [num_heads_q]" in said
    assert "of q, k, v, sink, by" in said and "sum_sink" in said
    assert "inv_sum, row_lse = those of keys and sink" in said


def test_fuzz_tries_a_spec_with_a_sink(spec: str) -> None:
    """And repeats a case of one; the sinks of a case are of its seed, some of them none, and not all f32."""
    assert "ok: 5 cases" in run("fuzz", spec, "--examples", "5", "--device", "cpu")
    loaded = attngen.load(Path(spec).read_text())
    drawn = [Case(loaded, Shape(1, 4, 2, 9, 9), seed=seed).declared("cpu")["sink"] for seed in range(6)]
    again = [Case(loaded, Shape(1, 4, 2, 9, 9), seed=seed).declared("cpu")["sink"] for seed in range(6)]
    assert all(torch.equal(x, y) for x, y in zip(drawn, again, strict=True))
    assert [bool(x.isneginf().any()) for x in drawn] == [False, False, True, False, False, True]
    case = Case(loaded.replace({"precision.inputs": "bf16"}), Shape(1, 4, 2, 9, 9), seed=3)
    assert case.declared("cpu")["sink"].dtype == torch.bfloat16
    assert Case.from_json(case.to_json()) == case
    assert "holds" in run("fuzz", "--repro", case.to_json(), "--device", "cpu")


def test_the_schema_has_the_key() -> None:
    """With its values, for editors."""
    schema = json.loads(run("schema"))
    assert schema["properties"]["sink"]["enum"] == ["none", "per_head"]
