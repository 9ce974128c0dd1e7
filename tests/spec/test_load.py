"""Loading: the sources a spec may come from, its defaults, and one error to the letter."""

from pathlib import Path

import pytest

import attngen
from attngen.resources import shipped_names, spec_path

TEXT = "problem: {head_dim: 128}\n"


def test_only_head_dim_is_required() -> None:
    """Everything else has a default or is auto."""
    spec = attngen.load(TEXT)
    assert (spec.problem.head_dim.qk, spec.problem.head_dim.v) == (128, 128)
    assert (spec.target, spec.mask, spec.score, spec.name, spec.check) == ("auto", "full", "score", "", ())
    assert (spec.precision.inputs, spec.precision.output) == ("bf16", "auto")
    choices = (
        spec.tile.block_m,
        spec.tile.block_n,
        spec.schedule.kind,
        spec.schedule.stages,
        spec.schedule.warps,
    )
    assert set(choices) == {"auto"}


def test_every_source_gives_the_same_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Path, its name, a name without suffix that is a file, text on one line or two, a dict, a Spec."""
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(TEXT)
    Path("b").write_text(TEXT)
    spec = attngen.load(TEXT)
    for source in (
        Path("a.yaml"),
        tmp_path / "b",
        "a.yaml",
        str(tmp_path / "a.yaml"),
        "b",
        TEXT.strip(),
        "{problem: {head_dim: 128}}",
        "problem:\n  head_dim: {qk: 128, v: 128}",
        {"problem": {"head_dim": 128}},
        {"problem": {"head_dim": {"qk": 128, "v": 128}}},
        spec,
    ):
        assert attngen.load(source) == spec, source


def test_a_fault_in_a_file_is_drawn_to_the_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Place, source line, carets with the reason, nearest values and rule, as the style guide has them."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("# A comment.\nproblem: {head_dim: 100}\n")
    with pytest.raises(attngen.SpecError) as caught:
        attngen.load("mine.yaml")
    assert str(caught.value) == (
        "mine.yaml:2:21: problem.head_dim = 100 must be a multiple of 8 from 32 to 256\n"
        "    2 | problem: {head_dim: 100}\n"
        "      |                     ^^^ rows are copied 16 bytes at a time, and O is kept in registers\n"
        "  nearest valid: 96 or 104                                                   [rule head-dim]"
    )


def test_expression_fields_are_read_from_their_own_text() -> None:
    """Whatever type YAML would give them."""
    spec = attngen.load("problem: {head_dim: 64}\nname: 1e-3\nmask: true\n")
    assert (spec.name, spec.mask, spec.mask_expr.value) == ("1e-3", "true", True)


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_specs_load_by_name_and_say_what_they_are_for(name: str) -> None:
    """The file's name is the spec's, and the first line is a comment."""
    spec, path = attngen.load(name), spec_path(name)
    assert path is not None and path.read_text(encoding="utf-8").startswith("# ")
    assert spec.name == name.replace("/", "_")
    assert attngen.load(spec.to_yaml()) == spec and spec.check
