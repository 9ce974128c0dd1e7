"""`attngen explain --tiles`: classes of tiles, the picture, and the lines that tell how blocks of keys are found."""

import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner, Result

from attngen import load
from attngen.api import resolve_arch
from attngen.check.inputs import Shape
from attngen.cli import main, output
from attngen.cli.tiles import EMPTY, FULL, PARTIAL, TileMap, over_approximated, tile_map
from attngen.errors import ArgumentError
from attngen.kernel import Kernel
from attngen.lower import lower

Attngen = Callable[..., Result]
PNG = b"\x89PNG\r\n\x1a\n"
DOCUMENTS = (
    "name: documents\ntarget: sm_90a\nproblem: {head_dim: 64}\ntensors:\n  doc: i32[batch, seqlen_k]\n"
    "mask: causal and document(doc)\nscore: softcap(score, 30.0)\n"
)


@pytest.fixture
def attngen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Attngen:
    """The command line in a folder of its own, which holds a spec; nothing is compiled and no cell is folded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["attngen.cli.explain"], "compile_all", lambda kernels: {})
    monkeypatch.setattr(output, "_WIDTH_WITHOUT_TERMINAL", 400)
    (tmp_path / "documents.yaml").write_text(DOCUMENTS)
    return lambda *arguments: CliRunner().invoke(main, arguments)


def tiny(mask: str, block_m: int = 2, block_n: int = 2, **more: object) -> Kernel:
    """A kernel of the simulator with tiles that a person can draw."""
    tile = {"block_m": block_m, "block_n": block_n}
    spec = load(
        {"target": "simulator", "problem": {"head_dim": 2}, "tile": tile, "schedule": {"kind": "fa2"}}
        | {"mask": mask, **more}
    )
    return Kernel(spec, lower(spec, resolve_arch(spec)))


def drawn(kernel: Kernel, seqlen_q: int, seqlen_k: int, **declared: object) -> TileMap:
    return tile_map(kernel, Shape(1, 1, 1, seqlen_q, seqlen_k), declared)


def texts(path: Path) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.parse(path).iter() if node.tag.endswith("}text")]


def test_a_window_with_sinks_as_drawn_by_hand() -> None:
    """Eight rows and keys in tiles of 2x2, each sees itself, the two before and key 0."""
    tiles = drawn(tiny("causal and (window(2, 0) or sinks(1))"), 8, 8)
    assert tiles.classes.tolist() == [
        [PARTIAL, EMPTY, EMPTY, EMPTY],
        [FULL, PARTIAL, EMPTY, EMPTY],  # the sink stands where the window of row 3 ends
        [PARTIAL, PARTIAL, PARTIAL, EMPTY],
        [PARTIAL, EMPTY, PARTIAL, PARTIAL],
    ]
    assert (tiles.visited, tiles.needed, tiles.excess) == (9, 9, 1.0)


def test_bounds_in_closed_form_as_drawn_by_hand() -> None:
    """Bottom-right causal of 4 queries on 7 keys: the last key block is cut off by the length, so it is masked."""
    tiles = drawn(tiny("causal"), 4, 7)
    assert tiles.classes.tolist() == [[FULL, FULL, PARTIAL, EMPTY], [FULL, FULL, FULL, PARTIAL]]
    assert str(tiles).startswith("1 empty, 2 partial, 5 full: 7 of 8 tiles visited (87.5%)")


def test_ids_out_of_order_are_over_approximated() -> None:
    """Sorted ids visit what they need; the intervals of ids that jump overlap, and a line tells the ratio."""
    kernel = tiny("document(doc)", tensors={"doc": "i32[batch, seqlen_k]"})
    ordered = drawn(kernel, 6, 6, doc=torch.tensor([[1, 1, 2, 2, 3, 3]], dtype=torch.int32))
    assert ordered.classes.tolist() == [[FULL, EMPTY, EMPTY], [EMPTY, FULL, EMPTY], [EMPTY, EMPTY, FULL]]
    assert over_approximated(ordered) is None
    jumping = drawn(kernel, 6, 6, doc=torch.tensor([[1, 9, 2, 8, 3, 7]], dtype=torch.int32))
    assert jumping.classes.tolist() == [[PARTIAL] * 3] * 3
    assert jumping.needed == 3 and "3.00 times" in str(over_approximated(jumping))


def test_scalars_change_the_classes() -> None:
    """A scalar that is passed counts in place of its default."""
    kernel = tiny("prefix(n)", scalars={"n": "i32 = 0"})
    assert drawn(kernel, 4, 4).counts == {"empty": 1, "partial": 2, "full": 1}
    assert drawn(kernel, 4, 4, n=4).counts == {"empty": 0, "partial": 0, "full": 4}


def test_what_a_call_would_refuse_is_refused() -> None:
    """A tensor of another length is no tensor of this call."""
    kernel = tiny("document(doc)", tensors={"doc": "i32[batch, seqlen_k]"})
    with pytest.raises(ArgumentError, match="where seqlen_k is 6"):
        drawn(kernel, 6, 6, doc=torch.zeros(1, 5, dtype=torch.int32))


@pytest.mark.parametrize("shape", [(1, 1, 1, 0, 4), (1, 1, 1, 4, 0), (0, 1, 1, 4, 4)])
def test_calls_without_rows_or_keys_visit_nothing(shape: tuple[int, int, int, int, int]) -> None:
    """No tile is visited, none is needed, and nothing is divided by 0."""
    tiles = tile_map(tiny("causal and (window(2, 0) or sinks(1))"), Shape(*shape), {})
    assert (tiles.visited, tiles.needed, tiles.excess) == (0, 0, None) and str(tiles)


def test_the_picture_has_classes_counts_and_the_mask(attngen: Attngen) -> None:
    """An SVG whose text has the title, the mask, the shape, each class with its count, and what is needed."""
    arguments = ("documents.yaml", "--tiles", "pictures/out.svg", "--seqlen", "1024")
    result = attngen("explain", *arguments)
    assert result.exit_code == 0, result.output
    found = texts(Path("pictures/out.svg"))
    for part in ("documents", "mask: causal and document(doc)", "batch 1, heads 1, 1024x1024"):
        assert any(part in text for text in found), part
    for name in ("empty: ", "partial: ", "full: "):
        assert any(text.startswith(name) for text in found)
    (line,) = (line for line in result.output.splitlines() if line.startswith("documents, batch 1"))
    assert (
        "1024x1024" in line and "hold a visible pair" in line and "tiles: pictures/out.svg" in result.output
    )
    first = Path("pictures/out.svg").read_bytes()
    assert attngen("explain", *arguments).exit_code == 0
    assert Path("pictures/out.svg").read_bytes() == first


def test_specs_are_drawn_side_by_side(attngen: Attngen) -> None:
    """One panel and one line for each of two kernels of a sweep; a PNG where its name says so."""
    masks = ("--set", "mask=causal,window(256, 0)")
    result = attngen("explain", "h100_bf16", *masks, "--tiles", "x.png", "--seqlen", "512")
    assert result.exit_code == 0, result.output
    assert sum("tiles visited" in line for line in result.output.splitlines()) == 2
    assert Path("x.png").read_bytes().startswith(PNG)


def test_explain_tells_how_blocks_are_found(attngen: Attngen) -> None:
    """Walks, their tables, the score and what a call passes have a line each; closed forms say that they are one."""
    result = attngen("explain", "documents.yaml", "h100_bf16", "--tensor", "doc=hashed", "--seqlen", "4096")
    assert result.exit_code == 0, result.output
    lines = {line[:24].strip(): line for line in result.stdout.splitlines()}
    assert "softcap(score, 30.0)" in lines["score"]
    assert "doc: i32[batch, seqlen_k]" in lines["a call passes"]
    assert "by a walk" in lines["blocks of keys"] and "closed form" in lines["blocks of keys"]
    assert "extremes of doc[b, kv_idx] over blocks of" in result.stdout
    assert "times as many tiles as hold a visible pair" in lines["over-approximated"]
    assert "528 of 1024 tiles visited" in lines["tiles of head 0"]


def test_explain_counts_what_declared_values_leave(attngen: Attngen) -> None:
    """FLOPs are those of the tiles that documents leave: one document for all is causal, of many there are fewer."""
    found = {}
    for kind in ("zeros", "sorted"):
        result = attngen("explain", "documents.yaml", "--tensor", f"doc={kind}", "--seqlen", "4096")
        lines = {line[:24].strip(): line.split() for line in result.stdout.splitlines()}
        found[kind] = float(lines["FLOPs, counted"][2].rstrip(","))
        standard = float(lines["FLOPs, standard"][2])
    assert 0.5 < found["zeros"] / standard < 0.6 and found["sorted"] < found["zeros"] / 3


@pytest.mark.parametrize("mask", ["window(width, 0)", "causal and chunked(max(width, 1))"])
def test_explain_does_without_a_scalar_that_nobody_gave(attngen: Attngen, mask: str) -> None:
    """The table has no line of tiles then; a picture is refused with the option that would do."""
    Path("width.yaml").write_text(
        f"name: w\ntarget: sm_90a\nproblem: {{head_dim: 64}}\nscalars:\n  width: i32\nmask: {mask}\n"
    )
    result = attngen("explain", "width.yaml")
    assert result.exit_code == 0 and "tiles of head 0" not in result.stdout, result.output
    refused = attngen("explain", "width.yaml", "--tiles", "out.svg")
    assert refused.exit_code == 2 and "--scalar width=VALUE" in refused.stderr
    assert not Path("out.svg").exists()
    drawn_too = attngen("explain", "width.yaml", "--tiles", "out.svg", "--scalar", "width=512")
    assert drawn_too.exit_code == 0 and Path("out.svg").exists(), drawn_too.output
