"""`attngen explain --calls` and `--curves`: who takes a call, what each way needs, what is said of what is not run."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

import attngen as package
from attngen.check.declared_inputs import NOTHING_GIVEN, declared_inputs
from attngen.check.inputs import Shape
from attngen.cli import calls
from attngen.cli.calls import CHUNKED, EAGER, OURS, Way, ways_of
from attngen.cli.launched_memory import launched_bytes
from attngen.cli.shapes import DEFAULT_LENGTHS, DEFAULT_SHAPE, cut_shape

Attngen = Callable[..., Result]
CPU = torch.device("cpu")
BACKENDS = ("flash", "efficient", "cudnn", "math")
NAMES = [EAGER, CHUNKED, *(f"sdpa: {name}" for name in BACKENDS), OURS]
SPEC: dict[str, Any] = {"target": "simulator", "problem": {"head_dim": 32}}


def ways(shape: Shape, **spec: Any) -> dict[str, Way]:
    kernel = package.compile({**SPEC, **spec})
    found = ways_of(kernel, shape, NOTHING_GIVEN, CPU)
    assert [way.name for way in found] == NAMES
    return {way.name: way for way in found}


@pytest.fixture
def spec(tmp_path: Path) -> str:
    path = tmp_path / "causal.yaml"
    path.write_text(
        "name: causal\ntarget: simulator\nproblem: {head_dim: 32}\nmask: causal\ngradients: [q, k, v]\n"
    )
    return str(path)


def test_the_table_has_every_way(attngen: Attngen, spec: str) -> None:
    """What takes the call has memory and time; attngen, which is not run, no time, and a line says so."""
    result = attngen("explain", spec, "--calls", "--heads", "2", "--seqlen", "256")
    assert result.exit_code == 0, result.output
    text = result.stdout[result.stdout.index("causal, batch 1, heads 2, 256x256, bf16:") :]
    size, time = r"[\d.]+ (?:KiB|MiB)", r"[\d.]+ (?:us|ms|s)"
    for name in (EAGER, CHUNKED, "sdpa: math"):
        assert re.search(rf"^ *{name} +{size} +{time} +yes *$", text, re.MULTILINE), text
    assert re.search(rf"^ *sdpa: flash +{size} +{time} +yes, torch's own choice *$", text, re.MULTILINE)
    assert re.search(
        r"^ *sdpa: cudnn +- +- +no: torch has it on GPUs alone, not for cpu tensors *$", text, re.MULTILINE
    )
    assert re.search(
        rf"^ *attngen +{size} +- +yes, by attn_fwd_simulator_bf16_d32_causal\S+ *$", text, re.MULTILINE
    )
    assert "forward and backward; memory is the most at once beyond q, k, v and the gradient of out" in text
    assert "worked out and not measured, and there is no time of it on this machine" in text


def test_curves_are_figures_or_a_picture(attngen: Attngen, spec: str, tmp_path: Path) -> None:
    """Of lengths that double; the picture names what was not run, and each way that was."""
    options = ("explain", spec, "--heads", "2", "--seqlen", "64", "--curves")
    result = attngen(*options, "curves.json")
    assert result.exit_code == 0 and "curves: curves.json" in result.stdout, result.output
    rows = json.loads((tmp_path / "curves.json").read_text())["rows"]
    assert [row["seqlen"] for row in rows if row["name"] == OURS] == [16, 32, 64]
    eager = [row["peak_bytes"] for row in rows if row["name"] == EAGER]
    assert (
        eager == sorted(eager)
        and eager[0] > 0
        and all(row["seconds"] for row in rows if row["name"] == EAGER)
    )
    for row in rows:
        assert row["is_measured"] == (row["name"] != OURS) and row["device"].startswith("cpu, ")
        assert (row["peak_bytes"] is not None) == row["takes"]
        assert (row["seconds"] is not None) == (row["takes"] and row["is_measured"])
    assert attngen(*options, "a.svg").exit_code == attngen(*options, "b.svg").exit_code == 0
    drawn = (tmp_path / "a.svg").read_text()
    assert all(name in drawn for name in (EAGER, CHUNKED, "sdpa: flash", "attngen: worked out, not run"))
    assert "sdpa: cudnn" not in drawn


def test_reasons_are_torchs_own() -> None:
    """Other columns of V keep its flash away, which says so, and math is its choice; what no name says is a mask."""
    shape = Shape(1, 2, 2, 64, 64)
    found = ways(shape, problem={"head_dim": {"qk": 32, "v": 16}})
    assert not found["sdpa: flash"].takes and "same last dimension" in found["sdpa: flash"].told
    assert found["sdpa: math"].told == "yes, torch's own choice"
    found = ways(shape, mask="window(4, 0)")
    assert found["sdpa: flash"].told == "yes, torch's own choice, with a mask of 4 KiB in memory"
    plain = ways(shape)["sdpa: flash"].peak_bytes
    assert plain is not None and found["sdpa: flash"].peak_bytes >= plain + 64 * 64
    found = ways(shape, score="softcap(score, 5.0)")
    assert all(not found[f"sdpa: {name}"].takes for name in BACKENDS)
    assert found[EAGER].takes and found[CHUNKED].takes and found[OURS].takes


def test_what_cannot_be_held_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention of more scores than this machine has memory for is told, and not started."""
    monkeypatch.setattr("attngen.memory.machine_bytes", lambda: 2**23)
    found = ways(Shape(1, 2, 2, 1024, 1024))
    for name in (EAGER, "sdpa: math"):
        assert not found[name].takes and found[name].told.startswith("out of memory: its score matrix takes")
    assert found[CHUNKED].takes and found["sdpa: flash"].takes
    monkeypatch.setattr("attngen.memory.machine_bytes", lambda: 7 * 2**20)
    found = ways(Shape(1, 2, 2, 1024, 1024), mask="window(4, 0)")
    assert found["sdpa: flash"].told.startswith("out of memory: a mask that is written out takes")


def test_memory_of_launches_is_what_they_write() -> None:
    """Forward out alone; with gradients out, lse, three gradients and a few numbers for each row, linear in lengths."""
    for length in (1, 4):
        shape = Shape(2, 4, 2, 100 * length, 130 * length)
        q, k, v = (
            torch.empty(2, rows, heads, 32, dtype=torch.bfloat16)
            for rows, heads in ((shape.seqlen_q, 4), (shape.seqlen_k, 2), (shape.seqlen_k, 2))
        )
        assert launched_bytes(package.compile(SPEC), q, k, v, {}) == q.nbytes
        row = 2 * 4 * shape.seqlen_q * 4  # of f32 for each row of all heads
        written = q.nbytes + row + sum(x.nbytes for x in (q, k, v))
        found = launched_bytes(package.compile({**SPEC, "gradients": ["q", "k", "v"]}), q, k, v, {})
        assert written + row <= found <= written + 4 * row


def test_tables_of_a_mask_count() -> None:
    """What a kernel keeps of documents, beside out."""
    kernel = package.compile({**SPEC, "mask": "document(doc)", "tensors": {"doc": "i32[batch, seqlen_k]"}})
    passed = declared_inputs(kernel.spec.arguments, Shape(1, 1, 1, 4096, 4096))
    q, k, v = (torch.empty(1, 4096, 1, 32, dtype=torch.bfloat16) for _ in range(3))
    tables = launched_bytes(kernel, q, k, v, passed) - q.nbytes
    blocks = math.ceil(4096 / kernel.plan.block_n)
    assert 2 * 4 * blocks <= tables < q.nbytes


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--curves", "curves.txt"), "nearest valid: curves"),
        (("--curves", "a.svg", "--seqlen", "0"), "argument --curves: got batch 1"),
    ],
)
def test_mistakes_are_told(attngen: Attngen, spec: str, options: tuple[str, ...], told: str) -> None:
    """By the option, before anything is measured."""
    result = attngen("explain", spec, *options)
    assert result.exit_code == 2 and told in result.output


def test_sequences_with_lengths_of_their_own_are_refused() -> None:
    """torch's function takes none of them, and given blocks neither."""
    kernel = package.compile({**SPEC, "problem": {"head_dim": 32, "queries": "padded", "keys": "padded"}})
    shape = cut_shape(kernel.spec, DEFAULT_LENGTHS, DEFAULT_SHAPE)
    with pytest.raises(package.ArgumentError, match="--calls"):
        calls.ways_of(kernel, shape, NOTHING_GIVEN, CPU)
    blocked = package.compile({**SPEC, "blocks": {"block_m": 64, "block_n": 64}})
    with pytest.raises(package.ArgumentError, match="--calls"):
        calls.ways_of(blocked, DEFAULT_SHAPE, NOTHING_GIVEN, CPU)
