"""Specs: what is read, and how each fault is drawn."""

from pathlib import Path

import pytest

import attngen
from attngen.resources import shipped_specs
from attngen.spec import json_schema


def report(text: str) -> str:
    with pytest.raises(attngen.SpecError) as caught:
        attngen.load(text)
    return str(caught.value)


def test_only_head_dim_is_required() -> None:
    """Everything else has a default or is auto."""
    spec = attngen.load("problem: {head_dim: 128}\n")
    assert (spec.problem.head_dim.qk, spec.problem.head_dim.v, spec.target, spec.mask) == (
        128,
        128,
        "auto",
        "full",
    )
    assert spec.tile.block_n == spec.schedule.kind == "auto"


def test_all_violations_stand_in_one_report_in_the_order_of_the_text() -> None:
    """Eight faults of every kind, each at its line and column."""
    text = (
        "name: x\ntarget: sm_90\nproblem: {head_dim: 100}\nmask: kv_idx <= q_indx\n"
        "tile: {block_m: on, block_n: 200, blok: 3}\ntile: 3\nschedule:\n  kind: pingpang\n  stages: 0\n"
    )
    found = report(text)
    places = ["2:9", "3:21", "4:17", "5:17", "5:35", "6:1", "8:9", "9:11"]
    assert [line.split(" ")[0].strip(":") for line in found.splitlines() if line.startswith("<text>")] == [
        f"<text>:{place}" for place in places
    ]


def test_a_fault_is_drawn_with_source_caret_rule_and_nearest() -> None:
    """The form of an error, to the letter."""
    lines = report("problem: {head_dim: 100}\n").splitlines()
    assert lines[0] == "<text>:1:21: problem.head_dim = 100 must be a multiple of 8 from 32 to 256"
    assert lines[1] == "    1 | problem: {head_dim: 100}"
    assert lines[2].startswith("      |                     ^^^ ")
    assert lines[3].startswith("  nearest valid: 96 or 104") and lines[3].endswith("[rule head-dim]")


@pytest.mark.parametrize(
    ("mask", "line", "column"),
    [
        ("mask: kv_idx <= nonsense", 2, 17),
        ('mask: "kv_idx <= nonsense"', 2, 18),
        ("mask: 'kv_idx <= nonsense'", 2, 18),
        ("mask: >\n  kv_idx <=\n  nonsense", 4, 3),
        ("mask: |\n  kv_idx\n  <= nonsense", 4, 6),
    ],
)
def test_carets_are_right_in_every_style_of_scalar(mask: str, line: int, column: int) -> None:
    """The unknown name is underlined where it stands in the file."""
    assert report(f"problem: {{head_dim: 64}}\n{mask}\n").startswith(f"<text>:{line}:{column}: ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("problem: {head_dim: 64}\nname: &a x\n", "is an anchor"),
        ("problem: {head_dim: 64}\nname: *a\n", "is an alias"),
        ("problem: {head_dim: 64}\nname: !!str x\n", "is a tag"),
        ("problem: {head_dim: 64}\n<<: {name: x}\n", "merge key"),
        ("problem: {head_dim: 64\nname: x\n", "is not YAML"),
        ("problem: {head_dim: 64}\ntile: {block_m: 1e2}\n", "tile.block_m = "),
        ("problem: {head_dim: 64}\ntile: {block_m: yes}\n", "tile.block_m = "),
        ("problem: {head_dim: 64}\nscore: score + 1\n", "score"),
        ("\n\n", "is empty"),
        ("- 1\n", "is not a spec"),
        ("mask: causal\n", "problem.head_dim must be given"),
    ],
)
def test_yaml_that_a_spec_is_not_written_in(text: str, words: str) -> None:
    """Refused with a reason, never guessed at."""
    assert words in report(text)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing file, a binary file, an unknown name: an error each, which names it."""
    with pytest.raises(attngen.SpecError, match="cannot be read"):
        attngen.load(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(attngen.SpecError, match="is not a text"):
        attngen.load(tmp_path / "binary.yaml")
    with pytest.raises(attngen.SpecError, match="neither a file nor a shipped spec"):
        attngen.load("fa2_d65")


def test_replace_validates_and_keeps_the_original() -> None:
    """A replaced value passes the same rules; the first spec is as it was."""
    spec = attngen.load({"problem": {"head_dim": 64}})
    changed = spec.replace({"tile.block_n": 64, "mask": "causal"})
    assert (changed.tile.block_n, changed.mask, spec.tile.block_n) == (64, "causal", "auto")
    with pytest.raises(attngen.SpecError, match="unknown key tile.blok_n"):
        spec.replace({"tile.blok_n": 64})


def test_the_digest_is_of_the_meaning() -> None:
    """Names and check shapes do not count, a mask counts by what it says."""
    base = {"problem": {"head_dim": 64}, "mask": "causal"}
    digest = attngen.load(base).digest()
    assert (
        attngen.load(base | {"name": "other", "check": [{"seqlen_q": 1, "seqlen_k": 1}]}).digest() == digest
    )
    assert attngen.load(base | {"mask": "kv_idx <= q_idx + seqlen_k - seqlen_q"}).digest() == digest
    assert attngen.load(base | {"mask": "full"}).digest() != digest


@pytest.mark.parametrize("path", shipped_specs(), ids=lambda path: path.stem)
def test_shipped_specs_load_by_name_and_come_back_from_their_yaml(path: Path) -> None:
    """The file's name is the spec's, and to_yaml loses nothing."""
    spec = attngen.load(path.stem)
    assert spec.name == path.stem and path.read_text().startswith("# ")
    assert attngen.load(spec.to_yaml()) == spec


def test_the_json_schema_knows_every_key() -> None:
    """Editors complete from it: the sections are there, and no other key is allowed."""
    schema = json_schema()
    assert set(schema["properties"]) >= {"problem", "mask", "tile", "schedule", "check"}
    assert schema["additionalProperties"] is False and schema["required"] == ["problem"]
