"""`attngen explain`: the table of facts, its sweeps, and the listing of a program."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from attngen.api import resolve_arch
from attngen.arch import ARCHS
from attngen.cli.shapes import shapes_of
from attngen.plan import listing
from attngen.plan.hardware_rules import RULES
from attngen.plan.steps import walk
from attngen.simulate import count
from attngen.spec import load
from tests.plans import kernel_plan

Attngen = Callable[..., Result]


def test_explain_shows_specs_side_by_side(attngen: Attngen, small: str) -> None:
    """Both specs are columns of one table: tiles, memory, registers, occupancy, rules, counted and expected bytes."""
    result = attngen("explain", small, "blackboard")
    assert result.exit_code == 0, result.output
    lines = {line[:24].strip(): line for line in result.stdout.splitlines()}
    assert any(line.split() == ["small", "blackboard"] for line in result.stdout.splitlines())
    for name in (
        "tile",
        "memory map",
        "registers",
        "occupancy",
        "binds",
        "bytes, counted",
        "bytes, standard",
    ):
        assert name in lines
    for rule in RULES:
        assert any(name.startswith(f"rule {rule}") for name in lines)
    plan = kernel_plan(load("blackboard"), ARCHS["simulator"])
    shape = shapes_of(load("blackboard"))[0]
    moved = count(plan, shape.seqlen_q, shape.seqlen_k, return_lse=True).bytes_moved
    assert f"{moved} B (reads" in lines["bytes, counted"]


@pytest.mark.parametrize(
    ("spec", "before", "maximum"),
    [
        ("h100_softcap", "-", "none: scores are bounded"),
        ("h100_alibi", "+ slopes[h] * f32(kv_idx + seqlen_q - q_idx - seqlen_k)", "running"),
        ("h100_bf16", "-", "running, three integers at a time"),
        ("fa2_d64", "-", "running"),
    ],
)
def test_explain_tells_how_scores_are_met(attngen: Attngen, spec: str, before: str, maximum: str) -> None:
    """What the score GEMM adds to, and what exponentials are taken relative to."""
    output = attngen("explain", spec).output
    for fact, value in (("before the GEMM", before), ("row maximum", maximum)):
        assert re.search(rf"^ *{fact} +{re.escape(value)} *$", output, re.MULTILINE), output


def test_explain_program_prints_every_step(attngen: Attngen) -> None:
    """--program has a line for each Step of the schedule, in order."""
    result = attngen("explain", "blackboard", "--program")
    spec = load("blackboard")
    position = result.stdout.index("role warps, 1 warp:")
    for step in walk(kernel_plan(spec, resolve_arch(spec)).worker.program):
        position = result.stdout.index(str(step), position) + 1


@pytest.mark.parametrize("kind", ["warp_specialized", "pingpong"])
def test_explain_program_prints_every_role(attngen: Attngen, hopper: str, kind: str) -> None:
    """Consumer and producer have a listing each, in order, under who runs it and with how many registers."""
    result = attngen("explain", hopper, "--program", "--set", f"schedule.kind={kind}")
    assert result.exit_code == 0, result.output
    roles = kernel_plan(load(hopper).replace({"schedule.kind": kind}), ARCHS["sm_90a"]).roles
    headings = (
        "role consumer, 2 warpgroups of 4 warps, 240 registers:",
        "role producer, 1 thread of 4 warps, 24 registers:",
    )
    position = 0
    for role, heading in zip(roles, headings, strict=True):
        position = result.stdout.index(heading, position)
        assert listing(role.program, indent=1) in result.stdout[position:]
    assert ("take turn" in result.stdout) == (kind == "pingpong")


@pytest.mark.usefixtures("wide_lines")
def test_explain_maps_panels_rings_and_the_tile_slot(attngen: Attngen, hopper: str) -> None:
    """128x128 tiles of head_dim 128, worked out by hand: every byte of shared memory has its line."""
    result = attngen("explain", hopper)
    assert result.exit_code == 0, result.output
    lines = {" ".join(line.removeprefix(" memory map").split()) for line in result.stdout.splitlines()}
    assert lines >= {
        "0 .. 32767 q: 128 x 128 bf16, 2 panels",
        "32768 .. 98303 k: 128 x 128 bf16 x 2 stages, 2 panels",
        "98304 .. 163839 v: 128 x 128 bf16 x 2 stages, 2 panels",
        "163840 .. 196607 out: 128 x 128 bf16, 2 panels",
        "196608 .. 196623 q ring: mbarriers full, empty",
        "196624 .. 196655 k ring: mbarriers full, empty x 2 stages",
        "196656 .. 196687 v ring: mbarriers full, empty x 2 stages",
        "196688 .. 196703 tile ring: mbarriers full, empty",
        "196704 .. 196719 number of the next tile",
    }


@pytest.mark.usefixtures("wide_lines")
def test_explain_counts_what_setmaxnreg_hands_on(attngen: Attngen, hopper: str) -> None:
    """Registers at launch and of each role; three warpgroups of 168 take all of a multiprocessor but 1024."""
    result = attngen("explain", hopper)
    (line,) = [line for line in result.stdout.splitlines() if line.startswith(" registers ")]
    expected = "168 a thread at launch, then consumer 240, producer 24 (160 a thread in tiles)"
    assert " ".join(line.split()[1:]) == expected
    assert "1 block, 12 warps (19%), by registers" in result.stdout
    assert "160 of 216 tile registers (56 left)" in result.stdout


def test_an_explain_sweep_keeps_refused_rows(attngen: Attngen, small: str) -> None:
    """A value that breaks a rule is a row with its rule, beside the rows that do not; the sweep is good."""
    result = attngen("explain", small, "--set", "tile.block_n=32,40")
    assert result.exit_code == 0, result.output
    assert "refused [rule mma-k-step" in result.stdout and "x32, stages" in result.stdout
    assert attngen("explain", small, "--set", "tile.block_n=40").exit_code == 2


def test_explain_without_a_compiler_says_what_it_does_not_know(
    attngen: Attngen, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without NVRTC all but the registers is shown, and the cure is named."""
    from attngen.errors import ToolchainError
    from attngen.runtime import DiskCache

    def refuse(*_: object, **__: object) -> None:
        raise ToolchainError("NVRTC cannot be loaded", "install it")

    monkeypatch.setattr(DiskCache, "get", refuse)
    result = attngen("explain", small)
    assert result.exit_code == 0, result.output
    assert "registers are unknown: NVRTC cannot be loaded" in result.stderr
    assert "unknown;" in result.stdout and "bytes, counted" in result.stdout


@pytest.mark.usefixtures("wide_lines")
def test_a_sweep_of_warpgroups_names_them(attngen: Attngen, hopper: str) -> None:
    """The tile of a row counts what the spec can set: warpgroups, not warps; what a rule refuses is a row."""
    result = attngen("explain", hopper, "--set", "schedule.warpgroups=1,2,4")
    assert result.exit_code == 0, result.output
    assert "64x128, stages 2, warpgroups 1 " in result.stdout
    assert "128x128, stages 2, warpgroups 2 " in result.stdout
    assert "refused [rule warpgroups" in result.stdout


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "split: auto",
            ("as many as fill the GPU, of 64 keys at least", "all query heads that share its keys"),
        ),
        ("split: {keys: 1024}", ("at multiples of 1024 keys", "all query heads that share its keys")),
        ("split: auto\nscore: score * f32(h)", ("as many as fill the GPU", "one head, for which is asked")),
    ],
)
def test_how_keys_are_cut_is_told(attngen: Attngen, tmp_path: Path, text: str, says: tuple[str, str]) -> None:
    """By what, and whose rows a tile has."""
    spec = tmp_path / "cut.yaml"
    spec.write_text(f"target: sm_80\nproblem: {{head_dim: 64}}\n{text}\n")
    told = attngen("explain", str(spec)).stdout
    (parts,) = (line for line in told.splitlines() if line.startswith(" parts of keys"))
    (rows,) = (line for line in told.splitlines() if line.startswith(" rows of a tile"))
    assert says[0] in parts and says[1] in rows
