"""Specs that declare scalars and tensors, from the command line."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from click.testing import Result

from attngen import load
from attngen.api import resolve_arch
from attngen.check import timing
from attngen.check.inputs import Shape
from attngen.check.judging import draw
from attngen.cli.comparison import draw_declared, draw_inputs, execute
from attngen.kernel import Kernel
from attngen.lower import lower

Attngen = Callable[..., Result]
SPEC = """\
name: declared
target: simulator
problem: {head_dim: 4}
scalars:
  cap: f32 = 2.0
tensors:
  doc: i32[batch, seqlen_k]
  slopes: f32[num_heads_q]
mask: causal and document(doc)
score: softcap(score, cap) + alibi(slopes)
tile: {block_m: 4, block_n: 2}
schedule: {kind: fa2}
check:
  - {batch: 2, heads: 4, heads_kv: 2, seqlen_q: 9, seqlen_k: 21}
"""


@pytest.fixture
def declared(tmp_path: Path) -> str:
    """A spec file that declares what a call passes."""
    path = tmp_path / "declared.yaml"
    path.write_text(SPEC)
    return str(path)


@pytest.mark.parametrize("kind", ["sorted", "random", "hashed", "zeros"])
def test_check_and_run_pass_what_is_declared(attngen: Attngen, declared: str, kind: str) -> None:
    """Whatever the documents are, the simulator agrees with the reference, and another cap changes nothing of that."""
    options = ("--tensor", f"doc={kind}", "--scalar", "cap=0.5")
    for command in (("check", declared, "--run"), ("run", declared, "--device", "cpu")):
        result = attngen(*command, *options)
        assert result.exit_code == 0 and " ok " in result.stdout, result.output


def test_what_is_passed_counts(declared: str) -> None:
    """Another document or another cap gives another output: values reach the kernel, and the reference."""
    spec = load(declared)
    kernel = Kernel(spec, lower(spec, resolve_arch(spec)))
    inputs = draw_inputs(kernel, Shape(1, 2, 2, 6, 6), "cpu", 0)
    first = draw_declared(kernel, inputs, 0)
    outputs = [kernel(*inputs, **passed) for passed in (first, first | {"cap": 0.1})]
    assert not torch.equal(outputs[0], outputs[1])  # type: ignore[arg-type]
    assert execute(kernel, inputs, "", first | {"cap": 0.1}).accuracy.ok


def test_a_trace_shows_modified_scores(attngen: Attngen, declared: str) -> None:
    """--trace runs with the values of the call."""
    result = attngen("run", declared, "--trace", "--seqlen", "4", "--scalar", "cap=1.5")
    assert result.exit_code == 0 and "running max" in result.stdout, result.output


def test_files_are_taken_for_tensors(attngen: Attngen, declared: str, tmp_path: Path) -> None:
    """A tensor of torch.save fits its call, or the call says what it should be."""
    torch.save(torch.tensor([[1, 1, 2, 2, 3]], dtype=torch.int32), tmp_path / "doc.pt")
    good = attngen("run", declared, "--device", "cpu", "--seqlen", "5", "--tensor", "doc=doc.pt")
    assert good.exit_code == 0, good.output
    bad = attngen("run", declared, "--device", "cpu", "--seqlen", "6", "--tensor", "doc=doc.pt")
    assert bad.exit_code == 2 and "where seqlen_k is 6" in bad.stderr and "Traceback" not in bad.output


@pytest.mark.parametrize("command", [("check", "--run"), ("run", "--device", "cpu"), ("explain",)])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--tensor", "dok=zeros"), "--tensor dok: got a name that no spec declares"),
        (("--scalar", "doc=1"), "--scalar doc: got a name that no spec declares"),
        (("--scalar", "cap=x"), "argument cap: got 'x'"),
        (("--tensor", "doc"), "'doc' is not NAME=KIND"),
        (("--scalar", "=2"), "'=2' is not NAME=VALUE"),
        (("--tensor", "doc=zeros", "--tensor", "doc=sorted"), "doc is given twice"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    attngen: Attngen, declared: str, command: tuple[str, ...], arguments: tuple[str, ...], expected: str
) -> None:
    """Exit code 2 and the reason, from every command."""
    result = attngen(*command, declared, *arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert expected in " ".join(result.stderr.replace("│", " ").split())


def test_a_scalar_without_default_must_be_given(attngen: Attngen, declared: str) -> None:
    """`run` names the option; with it, all is good; `fuzz`, whose cases say nothing of scalars, names --set."""
    bare = ("--set", "scalars.cap=f32")
    missing = attngen("run", declared, "--device", "cpu", *bare)
    assert missing.exit_code == 2 and "--scalar cap=VALUE" in missing.stderr
    assert attngen("run", declared, "--device", "cpu", *bare, "--scalar", "cap=3").exit_code == 0
    refused = attngen("fuzz", declared, *bare, "--examples", "1")
    assert refused.exit_code == 2 and "--set 'scalars.cap=f32 = VALUE'" in refused.stderr


def test_fuzz_finds_nothing_wrong_with_declared_values(attngen: Attngen, declared: str) -> None:
    """Properties hold of a spec with documents, slopes and a cap; the table counts them."""
    result = attngen("fuzz", declared, "--examples", "30")
    assert result.exit_code == 0 and "ok: 30 cases" in result.stdout, result.output


@pytest.mark.usefixtures("wide_lines")
def test_build_reports_the_kernel_that_fills_tables(attngen: Attngen) -> None:
    """A mask that looks up by key has two kernels, and the one that fills tables has no tiles in shared memory."""
    result = attngen("build", "h100_document")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if line.strip().startswith("h100_document ")]
    attention, tables = sorted(rows, key=lambda row: row[1])
    assert tables[1] == f"{attention[1]}_tables"
    assert float(tables[tables.index("KiB") - 1]) < 8 < float(attention[attention.index("KiB") - 1])


def test_bench_passes_what_is_declared(
    attngen: Attngen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours is called with its values, flash is told to know no such mask, and the figures are those of ours."""

    def once(candidates: dict[str, timing.Run], rounds: int = 7) -> dict[str, list[float]]:
        for run in candidates.values():
            run()
        return {name: [2.0] * rounds for name in candidates}

    text = SPEC.replace("simulator", "sm_80").replace("head_dim: 4", "head_dim: 32")
    text = text.replace("block_m: 4, block_n: 2", "block_m: 64, block_n: 32")
    (tmp_path / "gpu.yaml").write_text(text)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(timing, "measure", once)
    monkeypatch.setattr(import_module("attngen.cli.bench"), "draw", lambda plan, shape, *_: draw(plan, shape))
    size = ("--seqlen", "16", "--tokens", "16", "--width", "64", "--against", "flash")
    result = attngen("bench", "gpu.yaml", *size, "--tensor", "doc=hashed")
    assert result.exit_code == 0 and " 2 ms " in result.stdout, result.output
    assert "flash does not take part" in result.stderr
