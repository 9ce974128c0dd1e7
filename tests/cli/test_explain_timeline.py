"""`attngen explain --timeline`: the picture, the line of figures, and what is refused."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from attngen.cli import main
from attngen.simulate import UNITS

Attngen = Callable[..., Result]

SPEC = (
    "name: small\ntarget: sm_90a\nproblem: {head_dim: 64}\nmask: causal\n"
    "schedule: {kind: warp_specialized, overlap: true}\n"
)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def attngen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Attngen:
    """The command line in a folder of its own, which holds a spec; nothing is compiled, a timeline needs no cubin."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["attngen.cli.explain"], "compile_all", lambda kernels: {})
    (tmp_path / "small.yaml").write_text(SPEC)
    return lambda *arguments: CliRunner().invoke(main, arguments)


def texts(path: Path) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.parse(path).iter() if node.tag.endswith("}text")]


def test_the_picture_has_a_lane_for_each_unit_and_role(attngen: Attngen, tmp_path: Path) -> None:
    """An SVG is written whose text names every unit, every role, the kernel, and both axes."""
    result = attngen("explain", "small.yaml", "--timeline", "pictures/out.svg")
    assert result.exit_code == 0, result.output
    found = texts(tmp_path / "pictures" / "out.svg")
    for unit in UNITS:
        assert any(text.startswith(unit) and text.endswith("%") for text in found), unit
    for text in ("consumer 0", "consumer 1", "consumer 2", "producer", "cycles"):
        assert text in found
    assert any("attn_fwd_sm90a_bf16_d64_causal_warp_specialized" in text for text in found)
    assert any("us on an H200" in text for text in found)


def test_one_line_tells_what_is_predicted(attngen: Attngen) -> None:
    """Cycles a tile, every unit's share, the shape and TFLOPS are printed in one line; the shape is the one given."""
    result = attngen("explain", "small.yaml", "--timeline", "out.png", "--seqlen-q", "2048", "--heads", "32")
    (line,) = (line for line in result.output.splitlines() if "predicted" in line)
    for part in ("cycles a tile", *UNITS, "batch 1, heads 32, 2048x2048", "GHz", "TFLOPS"):
        assert part in line
    assert Path("out.png").read_bytes().startswith(PNG)


def test_the_same_bytes_every_time(attngen: Attngen) -> None:
    """A picture has no date and no random ids in it."""
    for name in ("a.svg", "b.svg"):
        assert attngen("explain", "small.yaml", "--timeline", name).exit_code == 0
    assert Path("a.svg").read_bytes() == Path("b.svg").read_bytes()


def test_kernels_are_drawn_below_one_another(attngen: Attngen) -> None:
    """A sweep gives one picture with a panel, and one line of figures, for each kernel."""
    result = attngen(
        "explain", "small.yaml", "--set", "schedule.kind=warp_specialized,pingpong", "--timeline", "x.svg"
    )
    assert result.exit_code == 0, result.output
    assert sum("predicted" in line for line in result.output.splitlines()) == 2
    titles = [text for text in texts(Path("x.svg")) if "schedule.kind=" in text]
    assert len(titles) == 2


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("out.pdf", "out.png"), ("out.pgn", "out.png"), ("out", "out.txt"), ("a/b.sgv", "a/b.svg")],
)
def test_another_suffix_is_refused(attngen: Attngen, given: str, nearest: str) -> None:
    """The error names the file, what may stand there and the nearest of it; nothing is written, the exit code is 2."""
    result = attngen("explain", "small.yaml", "--timeline", given)
    assert result.exit_code == 2
    for part in (given, ".svg or .png or .txt", f"nearest valid: {nearest}"):
        assert part in " ".join(result.stderr.replace("│", " ").split())
    assert not Path(given).exists() and "Traceback" not in result.output


def test_a_target_without_costs_is_refused(attngen: Attngen) -> None:
    """The simulator's target has no clock: the error says what has, and no picture is left behind."""
    result = attngen("explain", "small.yaml", "--arch", "simulator", "--timeline", "out.svg")
    assert result.exit_code == 2
    assert "no timeline for simulator" in result.stderr and "--arch sm_90a" in result.stderr
    assert not Path("out.svg").exists()


def test_a_refused_spec_leaves_no_picture(attngen: Attngen) -> None:
    """Where no kernel is legal there is nothing to draw."""
    result = attngen("explain", "small.yaml", "--set", "tile.block_n=200,201", "--timeline", "out.svg")
    assert result.exit_code == 2 and not Path("out.svg").exists()


def test_declared_values_decide_what_is_predicted(attngen: Attngen) -> None:
    """Of many documents a call takes less time than of one, since their tiles are skipped."""
    Path("doc.yaml").write_text(
        SPEC.replace("mask: causal", "tensors:\n  doc: i32[batch, seqlen_k]\nmask: causal and document(doc)")
    )
    seconds = {}
    for kind in ("zeros", "sorted"):
        options = ("--timeline", "x.png", "--seqlen", "4096", "--tensor", f"doc={kind}")
        result = attngen("explain", "doc.yaml", *options)
        (found,) = re.findall(r"4096x4096: ([0-9.]+) us at", result.output)
        seconds[kind] = float(found)
    assert seconds["sorted"] < seconds["zeros"] / 2
