"""`attngen bench` and `attngen fuzz` from the command line."""

import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path

import pytest
import torch
from click.testing import Result

from attngen.check import timing
from attngen.check.inputs import Shape
from attngen.check.judging import draw
from attngen.cli import output
from attngen.cli.facts import SWEEP_COLUMNS

Attngen = Callable[..., Result]
SMALL = ("--seqlen", "64", "--tokens", "64", "--width", "64")


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose GPU is only said to be there: inputs lie on the CPU, and every call takes 2 ms.

    Its lines are so long that no cell is folded.
    """

    def two_ms(candidates: Mapping[str, timing.Run], rounds: int = 7) -> dict[str, list[float]]:
        return {name: [2.0] * rounds for name in candidates}

    def on_cpu(*arguments: object) -> object:
        return draw(*arguments[:2])  # type: ignore[arg-type]

    monkeypatch.setattr(output, "_WIDTH_WITHOUT_TERMINAL", 400)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(timing, "measure", two_ms)
    monkeypatch.setattr(timing, "machine", dict)
    monkeypatch.setattr(import_module("attngen.cli.bench"), "draw", on_cpu)


def row_of(result: Result, label: str) -> str:
    (row,) = [line for line in result.stdout.splitlines() if line.strip().startswith(f"{label} ")]
    return row


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_bench_without_a_gpu_says_what_is_missing(attngen: Attngen) -> None:
    """Exit code 2 and the cure, no traceback."""
    result = attngen("bench", "fa2_d64")
    assert result.exit_code == 2 and "this machine has none" in result.stderr


def test_bench_refuses_an_unknown_peer(attngen: Attngen) -> None:
    """The peers that exist are named."""
    result = attngen("bench", "fa2_d64", "--against", "flashy")
    assert result.exit_code == 2 and "flash, cudnn, efficient, flex" in result.stderr


def test_the_grid_is_that_of_the_papers() -> None:
    """16k tokens on a width of 2048; of what does not fit in there is still one element, with one head."""
    assert timing.grid_shape(512, 64) == Shape(32, 32, 32, 512, 512)
    assert timing.grid_shape(4096, 128, group=8) == Shape(4, 16, 2, 4096, 4096)
    assert timing.grid_shape(100, 6, tokens=64, width=4) == Shape(1, 1, 1, 100, 100)


@pytest.mark.usefixtures("no_clock")
def test_a_bench_sweep_shows_what_each_kernel_takes(attngen: Attngen) -> None:
    """Registers, spills, shared memory and occupancy stand beside the time; a refused value is a row with its rule."""
    sweep = ("--set", "tile.block_m=64", "--set", "tile.block_n=32,40", "-o", "out")
    result = attngen("bench", "fa2_d64", "--arch", "sm_80", *SMALL, "--against", "flash", *sweep)
    assert result.exit_code == 0, result.output
    for column in (*SWEEP_COLUMNS, "seqlen", "time", "attngen", "flash", "TFLOPS of each"):
        assert column in result.stdout
    good = row_of(result, "fa2_d64 tile.block_m=64 tile.block_n=32")
    assert "64x32, stages" in good and " 0 + 0 " in good and " KiB " in good and " blocks, " in good
    assert " 2 ms " in good
    refused = row_of(result, "fa2_d64 tile.block_m=64 tile.block_n=40")
    assert "refused [rule mma-k-step" in refused and refused.split()[-4:] == ["-"] * 4
    rows = json.loads(Path("out/bench.json").read_text())["rows"]
    assert [list(row["facts"]) for row in rows] == [list(SWEEP_COLUMNS)] * 2
    assert int(rows[0]["facts"]["registers"]) > 0 and "refused" in rows[1]["facts"][SWEEP_COLUMNS[-1]]


@pytest.mark.usefixtures("no_clock")
def test_a_sweep_of_nothing_legal_is_the_users_fault(attngen: Attngen) -> None:
    """All rows are refused: they are shown, and the exit code is 2."""
    result = attngen("bench", "fa2_d64", "--arch", "sm_80", *SMALL, "--set", "tile.block_n=40")
    assert result.exit_code == 2 and "refused [rule mma-k-step" in result.stdout


@pytest.mark.usefixtures("no_clock")
def test_a_peer_that_is_not_present_is_said(attngen: Attngen) -> None:
    """The CPU has flash and no cudnn: cudnn's figure is a dash, and its reason is on stderr and in the JSON."""
    result = attngen("bench", "fa2_d64", "--arch", "sm_80", *SMALL, "--against", "flash,cudnn", "-o", "out")
    assert result.exit_code == 0, result.output
    *_, ours, flash, cudnn = row_of(result, "fa2_d64").split()
    assert ours.isdigit() and flash.isdigit() and cudnn == "-"
    assert "cudnn does not take part: No " in result.stderr
    (row,) = json.loads(Path("out/bench.json").read_text())["rows"]
    assert set(row["absent"]) == {"cudnn"} and set(row["ms"]) == {"attngen", "flash"}


@pytest.mark.usefixtures("no_clock")
def test_a_refused_spec_hides_no_other(attngen: Attngen) -> None:
    """Of two specs one has no kernel: it is reported, the other measured, and the exit code is 2."""
    Path("bad.yaml").write_text("target: sm_80\nproblem: {head_dim: 64}\ntile: {block_n: 40}\n")
    result = attngen("bench", "bad.yaml", "fa2_d64", "--arch", "sm_80", *SMALL, "--against", "")
    assert result.exit_code == 2 and "must be a multiple of 16" in result.stderr
    assert " 2 ms " in row_of(result, "fa2_d64")


TRAINED = "name: trained\ntarget: sm_80\nproblem: {head_dim: 64}\nmask: causal\ngradients: [q, k, v]\n"


@pytest.mark.usefixtures("no_clock")
def test_bench_times_both_passes(attngen: Attngen) -> None:
    """A row a pass, ours and a peer's: in as much time the backward pass does 2.5 times the FLOPs."""
    Path("trained.yaml").write_text(TRAINED)
    shape = ("--seqlen", "128", "--tokens", "512", "--width", "1024")
    result = attngen("bench", "trained.yaml", *shape, "--backward", "--against", "flash", "-o", "out")
    assert result.exit_code == 0, result.output
    rows = json.loads(Path("out/bench.json").read_text())["rows"]
    assert [row["pass"] for row in rows] == ["forward", "backward"]
    for name in ("attngen", "flash"):
        forward, backward = (row["tflops"][name] for row in rows)
        assert backward == 2.5 * forward > 0
    assert [line.split()[1] for line in result.stdout.splitlines() if " ms " in line] == [
        "forward",
        "backward",
    ]


@pytest.mark.usefixtures("no_clock")
def test_a_sweep_shows_what_each_kernel_of_a_pass_takes(attngen: Attngen) -> None:
    """A row of the backward pass has a line for each of its kernels; one of the forward has its own."""
    Path("trained.yaml").write_text(TRAINED)
    sweep = ("--set", "mask=full", "--against", "", "-o", "out")
    result = attngen("bench", "trained.yaml", *SMALL, "--backward", *sweep)
    assert result.exit_code == 0, result.output
    forward, backward = (row["facts"] for row in json.loads(Path("out/bench.json").read_text())["rows"])
    for name in ("registers", "tile"):
        assert len(forward[name].splitlines()) == 1 and len(backward[name].splitlines()) == 2
    assert backward["tile"] == "64x64, stages 2, warps 4\n64x64, stages 2, warps 4"


@pytest.mark.usefixtures("no_clock")
def test_bench_backward_wants_gradients(attngen: Attngen) -> None:
    """A spec without them is told the key and hides no other; an edited kernel has no backward pass."""
    Path("trained.yaml").write_text(TRAINED)
    result = attngen("bench", "fa2_d64", "trained.yaml", *SMALL, "--backward", "--against", "")
    assert result.exit_code == 2 and " ms " in result.stdout
    assert "fa2_d64: gradients = [] must" in result.stderr and "gradients: [q, k, v]" in result.stderr
    Path("edited.cu").write_text("")
    result = attngen("bench", "trained.yaml", "--backward", "--source", "edited.cu")
    assert result.exit_code == 2 and "leave out --backward" in result.stderr


def test_fuzz_finds_nothing_wrong_in_a_shipped_spec(attngen: Attngen) -> None:
    """A few cases of the simulator's: exit code 0."""
    result = attngen("fuzz", "blackboard", "--examples", "5")
    assert result.exit_code == 0, result.output


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.timeout(120)
def test_run_on_the_gpu_is_right_and_timed(attngen: Attngen) -> None:
    """The cubin runs, is within the bound, and its time makes TFLOPS; nothing is said of a simulator."""
    result = attngen(
        "run", "fa2_d64", "--device", "cuda", "--heads", "4", "--heads-kv", "2", "--seqlen-q", "65"
    )
    assert result.exit_code == 0, result.output
    assert torch.cuda.get_device_name() in result.stdout and "simulator" not in result.stdout
    *_, tflops, verdict = row_of(result, "fa2_d64").split()
    assert float(tflops) >= 0 and verdict == "ok"


@pytest.mark.gpu
@pytest.mark.timeout(240)
def test_bench_times_this_kernel_and_its_peers(attngen: Attngen) -> None:
    """On a GPU the table holds attngen, flash and flex, and the files are written."""
    peers = ("--against", "flash,flex", "--rounds", "2", "-o", "out")
    result = attngen("bench", "fa2_d64", "--seqlen", "256", "--tokens", "512", "--width", "256", *peers)
    assert result.exit_code == 0, result.output
    *_, ours, flash, flex = row_of(result, "fa2_d64").split()
    assert ours.isdigit() and flash.isdigit()
    assert flex.isdigit() or "flex does not take part: " in result.stderr  # it wants triton
    assert sorted(path.name for path in Path("out").iterdir()) == ["bench.json", "bench.png", "bench.svg"]


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_backward_passes_run_and_are_timed_on_the_gpu(attngen: Attngen) -> None:
    """`run --backward` judges the cubins' gradients, `bench --backward` times them beside flash and flex."""
    Path("trained.yaml").write_text(TRAINED.replace("sm_80", "auto"))
    result = attngen("run", "trained.yaml", "--device", "cuda", "--backward", "--seqlen", "200")
    assert result.exit_code == 0, result.output
    (dq,) = (line.split() for line in result.stdout.splitlines() if " dq " in line)
    assert float(dq[-2]) > 0 and dq[-1] == "ok"
    peers = ("--against", "flash,flex", "--rounds", "2", "-o", "out")
    shape = ("--seqlen", "256", "--tokens", "512", "--width", "256")
    result = attngen("bench", "trained.yaml", *shape, "--backward", *peers)
    assert result.exit_code == 0, result.output
    rows = json.loads(Path("out/bench.json").read_text())["rows"]
    assert [row["pass"] for row in rows] == ["forward", "backward"]
    assert all({"attngen", "flash"} <= set(row["tflops"]) for row in rows)
    assert all("flex" in {**row["tflops"], **row["absent"]} for row in rows)  # it wants triton


@pytest.mark.gpu
@pytest.mark.timeout(120)
def test_bench_sweeps_on_the_gpu(attngen: Attngen) -> None:
    """Two tiles are two rows with their own registers and times."""
    result = attngen(
        "bench", "fa2_d64", *SMALL, "--against", "", "--rounds", "2", "--set", "tile.block_n=32,64"
    )
    assert result.exit_code == 0, result.output
    for block_n in (32, 64):
        assert f"x{block_n}, stages" in row_of(result, f"fa2_d64 tile.block_n={block_n}")


@pytest.mark.gpu
@pytest.mark.timeout(120)
def test_bench_times_an_edited_kernel(attngen: Attngen) -> None:
    """A .cu edited by hand is what runs: one that does not compile is refused with NVRTC's words."""
    Path("broken.cu").write_text("this is no kernel")
    result = attngen("bench", "fa2_d64", "--seqlen", "1024", "--source", "broken.cu")
    assert result.exit_code == 2 and "NVRTC" in result.stderr


@pytest.mark.gpu
@pytest.mark.timeout(240)
def test_fuzz_finds_nothing_wrong_on_the_gpu(attngen: Attngen) -> None:
    """A few cases of a shipped spec's cubin: exit code 0."""
    result = attngen("fuzz", "fa2_d128_causal", "--device", "cuda", "--examples", "20")
    assert result.exit_code == 0, result.output


RAGGED = "name: cut\ntarget: sm_80\nproblem: {head_dim: 32, queries: ragged, keys: ragged}\nmask: causal\n"


def test_bench_times_sequences(attngen: Attngen, no_clock: None, tmp_path: Path) -> None:
    """Of one length by default, as the grid has them, which peers take too; TFLOPS count pairs of one sequence."""
    (tmp_path / "cut.yaml").write_text(RAGGED + "gradients: [q, k, v]\n")
    grid = ("--seqlen", "16", "--tokens", "64", "--width", "64", "--backward", "--rounds", "3")
    result = attngen("bench", "cut.yaml", *grid, "--against", "flash", "-o", "out")
    assert result.exit_code == 0, result.output
    forward, backward = json.loads((tmp_path / "out/bench.json").read_text())["rows"]
    assert forward["shape"] == "heads 2, lengths 16,16,16,16" and forward["seqlen"] == 16
    flops = 2 * 4 * 16 * 16 * 64 * 2 / 2
    assert forward["tflops"] == pytest.approx({"attngen": flops / 2e9, "flash": flops / 2e9})
    assert backward["tflops"]["attngen"] == pytest.approx(2.5 * flops / 2e9)


def test_bench_times_lengths_that_are_given(attngen: Attngen, no_clock: None, tmp_path: Path) -> None:
    """Which peers do not take: they are told; dense specs have no use for them."""
    (tmp_path / "cut.yaml").write_text(RAGGED)
    options = ("--lengths", "3,20,0", "--width", "64", "--against", "flash", "--rounds", "3")
    result = attngen("bench", "cut.yaml", *options, "-o", "out")
    assert result.exit_code == 0 and "flash does not take part: sequences of several" in result.stderr
    (row,) = json.loads((tmp_path / "out/bench.json").read_text())["rows"]
    assert row["shape"] == "heads 2, lengths 3,20,0" and list(row["tflops"]) == ["attngen"]
    assert row["tflops"]["attngen"] == pytest.approx(2 * (9 + 400) * 64 * 2 / 2 / 2e9)
    result = attngen("bench", "fa2_d64", *options)
    assert result.exit_code == 2 and "--seqlen: the spec's sequences are dense" in result.output
