"""Clamped indices: reported where the mask shows the pair and the element has a part in the result."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

from attngen import load
from attngen.check.declared_inputs import declared_inputs
from attngen.check.inputs import Shape
from attngen.cli import clamps as clamps_module
from attngen.cli.clamps import clamps

SHAPE = Shape(2, 4, 2, 9, 6)


def found(mask: str = "full", score: str = "score", shape: Shape = SHAPE, **tensors: str) -> list[str]:
    """What is reported of a call of these sizes."""
    spec = load(
        {"target": "simulator", "problem": {"head_dim": 4}, "mask": mask, "score": score, "tensors": tensors}
    )
    return [str(each) for each in clamps(spec, shape, declared_inputs(spec.declarations, shape))]


@pytest.mark.parametrize("rows", [1, 2**22])
def test_the_first_visible_pair_is_named(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor, dimension, index, size and pair, however many rows are asked at a time."""
    monkeypatch.setattr(clamps_module, "PAIRS", rows)
    (line,) = found(
        "causal", "score + bias[h, q_idx, kv_idx + 2]", bias="bf16[num_heads_q, seqlen_q, seqlen_k]"
    )
    assert line == (
        "bias is read at 6 in dimension 2 (seqlen_k), which has 6: clamped, "
        "first at the visible pair b = 0, h = 0, q_idx = 7, kv_idx = 4"
    )
    below, above = found(score="score + t[q_pos] + t[kv_idx]", t="f32[4]")
    assert "t is read at -3 in dimension 0 (4)" in below and "q_idx = 0, kv_idx = 0" in below
    assert "t is read at 4 in dimension 0 (4)" in above and "q_idx = 0, kv_idx = 4" in above


@pytest.mark.parametrize(
    ("mask", "score"),
    [
        ("full", "score + t[min(kv_idx, 3)]"),
        ("kv_idx < 4", "score + t[kv_idx]"),
        ("full", "score + (t[kv_idx] if kv_idx < 4 else 0.0)"),
        ("full", "score + (0.0 if not kv_idx < 4 else 2.0 * t[kv_idx])"),
        ("kv_idx < 4 and t[kv_idx] > 0.0", "score"),
        ("kv_idx >= 4 or t[kv_idx] > 0.0", "score"),
        ("not (kv_idx < 4 and t[kv_idx] > 0.0)", "score"),
        ("full", "score + t[i32(score)]"),
    ],
)
def test_what_does_not_count_is_not_reported(mask: str, score: str) -> None:
    """Indices inside, hidden pairs, sides that are not taken; and indices that only the products tell."""
    assert found(mask, score, t="f32[4]") == []


def test_a_lookup_of_the_mask_counts_too() -> None:
    """A mask's own lookup counts where the pair is visible by it."""
    lines = found("document(doc) and kv_idx < 2", doc="i32[batch, seqlen_k]")
    assert len(lines) == 1 and "doc is read at -3 in dimension 1 (seqlen_k)" in lines[0]


def test_run_warns(attngen: Callable[..., Result], tmp_path: Path) -> None:
    """On stderr, beside a comparison that is as good as ever; a call that clamps nothing says nothing."""
    path = tmp_path / "far.yaml"
    for size, warns in ((4, True), (8, False)):
        path.write_text(
            f"name: far\ntarget: simulator\nproblem: {{head_dim: 4}}\ntensors:\n  t: f32[{size}]\n"
            "score: score + t[kv_idx]\ncheck:\n  - {batch: 1, heads: 1, seqlen_q: 3, seqlen_k: 8}\n"
        )
        result = attngen("run", str(path))
        assert result.exit_code == 0, result.output
        assert ("warning: far, " in result.stderr and "t is read at 4" in result.stderr) == warns


def test_tensors_of_files_are_asked_by_their_own_sizes() -> None:
    """A dimension of a name of its own has the size that the call's tensor has."""
    spec = load(
        {
            "target": "simulator",
            "problem": {"head_dim": 4},
            "score": "score + t[kv_idx]",
            "tensors": {"t": "f32[n]"},
        }
    )
    assert [each.size for each in clamps(spec, SHAPE, {"t": torch.zeros(5)})] == [5]
