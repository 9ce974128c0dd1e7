"""Specs whose sequences have lengths of their own, from the command line."""

import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import Result

from attngen import load
from attngen.api import compile
from attngen.check.inputs import Shape
from attngen.check.timing import Point
from attngen.cli.shapes import GivenSizes, shape_text, shapes_of
from attngen.cli.tiles import EMPTY, FULL, NO_TILE, PARTIAL, tile_map

Attngen = Callable[..., Result]
SPEC = """\
name: ragged
target: simulator
problem: {head_dim: 4, queries: ragged, keys: ragged}
tensors: {doc: 'i32[tokens_k]'}
mask: causal and doc[kv_idx] != 3
gradients: [q, k, v]
tile: {block_m: 4, block_n: 2}
schedule: {kind: fa2}
check:
  - {seqlens_q: [5, 0, 9], seqlens_k: [7, 3, 9], heads: 2, heads_kv: 1}
"""


@pytest.fixture
def ragged(tmp_path: Path) -> str:
    """A spec file with a check shape."""
    path = tmp_path / "ragged.yaml"
    path.write_text(SPEC)
    return str(path)


@pytest.mark.usefixtures("wide_lines")
def test_check_judges_each_line_in_both_directions(attngen: Attngen, ragged: str) -> None:
    """The check shape forward, and each gradient."""
    result = attngen("check", ragged, "--run")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if " ok " in line]
    assert len(lines) == 4 and "heads 2:1, lengths 5,0,9 x 7,3,9" in lines[0] and " dq " in lines[1]


@pytest.mark.usefixtures("wide_lines")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--lengths", "5,10,0,7"), "heads 1, lengths 5,10,0,7 "),
        (("--lengths-q", "3,1", "--lengths-k", "4,9", "--heads", "2"), "heads 2, lengths 3,1 x 4,9"),
        (("--lengths", "6,2", "--lengths-k", "8,2"), "lengths 6,2 x 8,2"),
        (("--lengths", ",".join("3" * 40)), "lengths 3..3 of 40 sequences, 120 in all"),
    ],
)
def test_run_takes_lengths(attngen: Attngen, ragged: str, options: tuple[str, ...], told: str) -> None:
    """Of both axes, of one of them, and of many sequences; out, lse and gradients agree with the reference."""
    result = attngen("run", ragged, "--device", "cpu", "--backward", *options)
    assert result.exit_code == 0 and told in result.stdout, result.output
    assert result.stdout.count(" ok ") == 4


@pytest.mark.usefixtures("wide_lines")
@pytest.mark.parametrize(
    ("queries", "keys"), [("padded", "padded"), ("dense", "padded"), ("dense", "ragged")]
)
def test_other_ways_to_cut(attngen: Attngen, tmp_path: Path, queries: str, keys: str) -> None:
    """Padded sequences have rows behind the longest; where queries are dense, lengths are those of keys."""
    path = tmp_path / "other.yaml"
    path.write_text(
        f"target: simulator\nproblem: {{head_dim: 4, queries: {queries}, keys: {keys}}}\nmask: causal\n"
        "tile: {block_m: 4, block_n: 2}\ngradients: [q, k, v]\n"
    )
    options = ("--lengths", "6,0,3") + (("--seqlen-q", "5") if queries == "dense" else ())
    result = attngen("run", str(path), "--device", "cpu", "--backward", *options)
    assert result.exit_code == 0 and result.stdout.count(" ok ") == 4, result.output
    assert ("lengths 5 x 6,0,3" if queries == "dense" else "lengths 6,0,3 ") in result.stdout
    assert (
        attngen("run", str(path), "--device", "cpu").exit_code == 0
    )  # by lengths that stand for the default shape


@pytest.mark.usefixtures("wide_lines")
def test_pages(attngen: Attngen, tmp_path: Path) -> None:
    """Of the check line, or as many rows as an option says; facts name the table, and other keys have no pages."""
    path = tmp_path / "paged.yaml"
    path.write_text(
        "target: simulator\nproblem: {head_dim: 4, queries: ragged, keys: paged}\nmask: causal\n"
        "tile: {block_m: 4, block_n: 2}\n"
        "check: [{heads: 2, heads_kv: 1, seqlens_q: [5, 0, 9], seqlens_k: [7, 3, 9], page: 2}]\n"
    )
    result = attngen("check", str(path), "--run")
    assert result.exit_code == 0 and "lengths 5,0,9 x 7,3,9, page 2" in result.stdout, result.output
    result = attngen("run", str(path), "--device", "cpu", "--lengths", "6,0,3", "--page", "3")
    assert result.exit_code == 0 and "lengths 6,0,3, page 3" in result.stdout, result.output
    assert result.stdout.count(" ok ") == 1
    facts = attngen("explain", str(path)).stdout
    assert (
        "queries ragged, keys paged" in facts and "cache_batch_idx, or none" in facts and "page 2 " in facts
    )
    path.write_text("problem: {head_dim: 4, keys: padded}\ntarget: simulator\n")
    result = attngen("run", str(path), "--lengths", "4", "--page", "3")
    assert result.exit_code == 2 and "--page: got 3, expected left out: keys are padded" in result.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--seqlen", "5"), "--lengths-q: queries are ragged"),
        (("--heads", "2"), "a length for each sequence: queries are ragged"),
        (("--lengths-q", "3,1", "--lengths-k", "4"), "2, as there are of queries"),
        (("--lengths", "4", "--batch", "2"), "as many sequences as lengths"),
        (("--lengths", "4", "--trace"), "dense queries and keys"),
        (("--lengths", "4,x"), "'x' is not a valid integer"),
        (("--lengths", "4,-1"), "-1 is not in the range"),
        (("--lengths", ""), "'' is not a valid integer"),
    ],
)
def test_lengths_that_are_missing_or_extra(
    attngen: Attngen, ragged: str, options: tuple[str, ...], told: str
) -> None:
    """Each is the user's fault, in a line that says what would do."""
    result = attngen("run", ragged, "--device", "cpu", *options)
    assert result.exit_code == 2 and told in result.output, result.output


def test_lengths_are_for_specs_that_have_them(attngen: Attngen, small: str) -> None:
    """A dense spec wants one length; a file of tensors says none."""
    result = attngen("run", small, "--device", "cpu", "--lengths", "4,5")
    assert result.exit_code == 2 and "--seqlen: the spec's sequences are dense" in result.output
    result = attngen("run", small, "--device", "cpu", "--lengths-k", "4,5")
    assert result.exit_code == 2 and "--seqlen-k: keys are dense" in result.output


def test_inputs_of_a_file_say_no_lengths(attngen: Attngen, ragged: str, tmp_path: Path) -> None:
    """Which is told before the file is read."""
    (tmp_path / "x.safetensors").write_bytes(b"")
    result = attngen("run", ragged, "--inputs", "x.safetensors")
    assert result.exit_code == 2 and "a spec of dense sequences" in result.output


@pytest.mark.usefixtures("wide_lines")
def test_explain_counts_a_ragged_call(attngen: Attngen, ragged: str) -> None:
    """FLOPs and bytes as counted are those of the closed form; what a call passes is told, optional or not."""
    result = attngen("explain", ragged)
    assert result.exit_code == 0, result.output
    told = {line[:38].strip(): line[38:].strip() for line in result.stdout.splitlines()}
    assert told["sequences"] == "queries ragged, keys ragged" and told["their lengths by"] == "cu_seqlens_q"
    assert "leftpad_k, or none" in result.stdout and "max_seqlen_q, or none" in result.stdout
    assert told["for one call of"] == "heads 2:1, lengths 5,0,9 x 7,3,9"
    assert told["FLOPs, counted"].split(",")[0] == told["FLOPs, closed form"]
    standard = sum(2 * queries * keys * 8 * 2 for queries, keys in ((5, 7), (0, 3), (9, 9)))
    assert float(told["FLOPs, standard"]) == pytest.approx(standard, rel=1e-3)
    assert "list_tiles of query_gradients" in result.stdout


def test_useful_flops_are_those_of_pairs_within_sequences() -> None:
    """So that TFLOPS of a ragged call mean what those of a dense one do."""
    (shape,) = shapes_of(load(SPEC))
    assert shape.pairs == 5 * 7 + 9 * 9 and Point(shape, 4, 4, False).flops == 2 * shape.pairs * 8 * 2
    assert shape_text(Shape(2, 4, 2, 3, 5)) == "batch 2, heads 4:2, 3x5"


def test_tiles_are_those_within_sequences() -> None:
    """Causal, tiles of 2x2: what is not of one sequence is no tile; the first sequence has more keys than rows."""
    spec = {"target": "simulator", "problem": {"head_dim": 2, "queries": "ragged", "keys": "ragged"}}
    kernel = compile(
        spec | {"mask": "causal", "tile": {"block_m": 2, "block_n": 2}, "schedule": {"kind": "fa2"}}
    )
    shape = GivenSizes(lengths_q=(3, 0, 2), lengths_k=(5, 2, 2)).shape(kernel.spec)
    tiles = tile_map(kernel, shape, shape.arguments())
    off = NO_TILE
    assert tiles.classes.tolist() == [
        [FULL, PARTIAL, EMPTY, off, off],
        [FULL, FULL, PARTIAL, off, off],
        [off, off, off, off, PARTIAL],
    ]
    assert (tiles.count, tiles.visited, tiles.needed) == (7, 6, 6)


def test_the_picture_shows_sequences(
    attngen: Attngen, ragged: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An SVG that says so, the same bytes twice; PNG too. Without lengths some that a person can see are drawn."""
    monkeypatch.setattr(sys.modules["attngen.cli.explain"], "compile_all", lambda kernels: {})
    for name in ("a.svg", "b.svg"):
        result = attngen("explain", ragged, "--tiles", name, "--lengths", "12,3,0,9")
        assert result.exit_code == 0 and "ragged, heads 1, lengths 12,3,0,9: " in result.output, result.output
    picture = (tmp_path / "a.svg").read_bytes()
    assert picture == (tmp_path / "b.svg").read_bytes()
    assert "sequence after sequence" in " ".join(ElementTree.fromstring(picture).itertext())
    sweep = ("--set", "tile.block_m=64", "--set", "tile.block_n=64")
    result = attngen("explain", ragged, *sweep, "--tiles", "c.png")
    assert "lengths 1500,200,1000,0,700,696" in result.output and (tmp_path / "c.png").is_file()


@pytest.mark.usefixtures("wide_lines")
def test_fuzz_draws_them(attngen: Attngen, ragged: str) -> None:
    """With --ragged all specs have lengths of their own; a spec that has them is tried as well."""
    result = attngen("fuzz", "--ragged", "--examples", "6", "--seed", "4", "--arch", "simulator")
    assert result.exit_code == 0 and "queries x keys" in result.output, result.output
    assert "dense x dense" not in result.output
    result = attngen("fuzz", ragged, "--examples", "5", "--backward")
    assert result.exit_code == 0 and "ragged x ragged 5" in " ".join(result.output.split()), result.output
