import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from attngen.api import compile, resolve_arch
from attngen.arch import ARCHS
from attngen.cli import main, output
from attngen.cli.comparison import execute
from attngen.cli.limits import MARGINS, binding, margins, occupancy
from attngen.cli.shapes import shapes_of
from attngen.inputs import Shape, random_inputs
from attngen.lower import lower
from attngen.plan import Plan, listing
from attngen.plan.rules import RULES
from attngen.plan.steps import walk
from attngen.simulate import count
from attngen.spec import load

Attngen = Callable[..., Result]

SPECIALISED = ("warp_specialized", "pingpong")

GOOD_SPEC = (
    "name: small\ntarget: sm_80\nproblem: {head_dim: 32}\ncheck:\n  - {heads: 2, seqlen_q: 5, seqlen_k: 70}\n"
)


@pytest.fixture
def attngen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Attngen:
    """The command line with a cache of its own, in a directory of its own."""
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, arguments)


@pytest.fixture
def small(tmp_path: Path) -> str:
    """A spec file that is good on every machine."""
    path = tmp_path / "small.yaml"
    path.write_text(GOOD_SPEC)
    return str(path)


@pytest.fixture
def hopper(tmp_path: Path) -> str:
    """A spec file that `auto` lowers to warp_specialized."""
    path = tmp_path / "hopper.yaml"
    path.write_text("name: hopper\ntarget: sm_90a\nproblem: {head_dim: 128}\n")
    return str(path)


@pytest.fixture
def wide_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines so long that no cell is folded."""
    monkeypatch.setattr(output, "_WIDTH_WITHOUT_TERMINAL", 400)


def spec_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    return "bad.yaml"


def assert_refused(result: Result, *parts: str) -> None:
    """Exit code 2, every part on stderr, no traceback, and nothing that looks like a result."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    for part in parts:
        assert part in result.stderr
    assert "Traceback" not in result.output


# ---- what the user gets wrong


@pytest.mark.parametrize("command", ["check", "build", "run", "explain"])
def test_an_unknown_key_is_drawn_where_it_stands(attngen: Attngen, tmp_path: Path, command: str) -> None:
    """Every command draws an unknown key with its line and column, and exits with 2."""
    name = spec_file(tmp_path, "target: sm_80\nproblem: {head_dim: 64}\ntile: {blok_m: 64}\n")
    assert_refused(
        attngen(command, name),
        "bad.yaml:3:8: unknown key tile.blok_m\n    3 | tile: {blok_m: 64}\n      |        ^^^^^^",
        "nearest valid: block_m",
        "[rule known-keys]",
    )


@pytest.mark.parametrize("command", ["check", "build", "run", "explain"])
def test_block_n_200_names_the_rule_and_what_would_do(attngen: Attngen, tmp_path: Path, command: str) -> None:
    """block_n 200 is no multiple of the k-step of bf16: the report has the carets, the reason and a valid value."""
    name = spec_file(tmp_path, "target: sm_80\nproblem: {head_dim: 128}\ntile: {block_n: 200}\n")
    result = attngen(command, name)
    assert_refused(
        result,
        "bad.yaml:3:17: tile.block_n = 200 must be a multiple of 16\n"
        "    3 | tile: {block_n: 200}\n"
        "      |                 ^^^ P·V consumes block_n in k-steps of 16 for bf16\n",
        "[rule mma-k-step]",
    )
    nearest = result.stderr.split("nearest valid: ")[1].split()[0]
    mended = attngen("check", name, "--set", f"tile.block_n={nearest}")
    assert mended.exit_code == 0, mended.output


def test_head_dim_100_names_its_neighbours(attngen: Attngen, tmp_path: Path) -> None:
    """head_dim 100 is refused with 96 and 104."""
    name = spec_file(tmp_path, "problem: {head_dim: 100}\n")
    assert_refused(
        attngen("check", name),
        "bad.yaml:1:21: problem.head_dim = 100 must be a multiple of 8 from 32 to 256",
        "nearest valid: 96 or 104",
        "[rule head-dim]",
    )


def test_all_faults_of_all_specs_are_reported_at_once(attngen: Attngen, tmp_path: Path, small: str) -> None:
    """A bad spec neither hides its second fault nor the good spec beside it."""
    name = spec_file(tmp_path, "smurf: 3\nproblem: {head_dim: 100}\n")
    result = attngen("check", name, small)
    assert_refused(result, "unknown key smurf", "problem.head_dim = 100")
    assert "1 legal plan\n" in result.stdout


def test_a_missing_file_and_an_unknown_name_are_the_users(attngen: Attngen) -> None:
    """A path that is not there says so; a bare name that is no shipped spec names the shipped ones near it."""
    assert_refused(attngen("run", "no.yaml"), "no.yaml cannot be read: No such file or directory")
    assert_refused(attngen("run", "fa2_d46"), "'fa2_d46' is neither a file nor a shipped spec", "fa2_d64")


def test_an_unknown_arch_is_refused_with_the_nearest(attngen: Attngen, small: str) -> None:
    """--arch sm_91 names sm_90a."""
    assert_refused(attngen("build", small, "--arch", "sm_91"), "sm_91", "nearest valid: sm_90a")


@pytest.mark.parametrize("command", ["check", "build", "run", "explain"])
def test_an_arch_takes_no_head_dim_that_its_specs_may_not_have(
    attngen: Attngen, tmp_path: Path, command: str
) -> None:
    """--arch sm_90a on a spec for the simulator is held to the GPU's rule, where the head_dim stands."""
    name = spec_file(tmp_path, "target: simulator\nproblem: {head_dim: 6}\n")
    assert_refused(
        attngen(command, name, "--arch", "sm_90a"),
        "bad.yaml:2:21: problem.head_dim = 6 must be a multiple of 8 from 32 to 256",
        "[rule head-dim]",
    )


def test_one_of_two_head_dims_is_set(attngen: Attngen, small: str) -> None:
    """--set problem.head_dim.qk leaves that of V at the one number the spec gives for both."""
    result = attngen("check", small, "--set", "problem.head_dim.qk=96")
    assert "attn_fwd_sm80_bf16_d96x32_" in result.stdout, result.output


def test_the_simulator_has_nothing_to_build(attngen: Attngen) -> None:
    """`build` of a spec for the simulator is refused at its target, and writes nothing."""
    result = attngen("build", "blackboard", "-o", "built")
    assert_refused(result, "target = simulator has no code to build", "[rule target-emits]")
    assert not Path("built").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--set", "tile.block_n"), "is not KEY=VALUE"),
        (("--set", "tile.block_n="), "is not KEY=VALUE"),
        (("--set", "tile.block_n=16", "--set", "tile.block_n=32"), "given twice"),
        (("--set", "tile.block_q=3"), "unknown key tile.block_q"),
        (("--inputs", "none.safetensors"), "does not exist"),
        (("--heads", "-1"), "-1 is not in the range"),
        (("--trace", "--device", "cuda"), "leave out --device cuda"),
        (
            ("--device", "cpu", "--heads", "3", "--heads-kv", "2"),
            "argument k: got 2 heads, expected a divisor",
        ),
    ],
)
def test_bad_options_of_run_are_refused(
    attngen: Attngen, small: str, arguments: tuple[str, ...], expected: str
) -> None:
    """Every option that cannot be meant exits with 2 and says why."""
    assert_refused(attngen("run", small, *arguments), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_without_a_gpu_cuda_and_auto_say_what_to_do(attngen: Attngen, tmp_path: Path) -> None:
    """--device cuda names --device cpu; building for `auto` names --arch."""
    name = spec_file(tmp_path, "problem: {head_dim: 32}\n")
    assert_refused(attngen("run", name, "--device", "cuda"), "no CUDA GPU", "cure: --device cpu")
    assert_refused(attngen("build", name), "target is auto", "--arch")


# ---- check and run


def test_check_lowers_and_runs_nothing_without_run(attngen: Attngen, small: str) -> None:
    """`check` prints the plan; only `--run` compares."""
    plain, run = attngen("check", small), attngen("check", small, "--run")
    assert (plain.exit_code, run.exit_code) == (0, 0), run.output
    assert lower(load(small), ARCHS["sm_80"]).name in plain.stdout
    assert "verdict" not in plain.stdout
    assert "batch 1, heads 2, 5x70" in run.stdout and " ok " in run.stdout


def test_auto_without_a_gpu_is_lowered_for_sm_80_and_said(attngen: Attngen, tmp_path: Path) -> None:
    """On the CPU the target `auto` is sm_80, never silently."""
    name = spec_file(tmp_path, "problem: {head_dim: 32}\n")
    for arguments in (("check", name), ("run", name, "--device", "cpu", "--seqlen-q", "3")):
        result = attngen(*arguments)
        assert result.exit_code == 0, result.output
        assert "target is auto; lowered for sm_80 (choose with --arch)" in result.stdout


@pytest.mark.parametrize("kind", ["serial", "fa2"])
def test_f32_is_judged_by_its_blocks(kind: str) -> None:
    """2048 blocks of one key and one v: what each block rounds is no fault of the kernel's."""
    spec = {
        "target": "simulator",
        "problem": {"head_dim": 4},
        "precision": {"inputs": "f32"},
        "tile": {"block_m": 64, "block_n": 1},
        "schedule": {"kind": kind},
    }
    kernel = compile(spec)
    q, k, v = random_inputs(Shape(1, 1, 1, 64, 2048), 4, 4, torch.float32)
    inputs = (torch.zeros_like(q), k, v[:, :1].expand(-1, 2048, -1, -1))
    assert execute(kernel, inputs, kind).accuracy.ok


@pytest.mark.parametrize("command", [("check", "--run"), ("run", "--device", "cpu")])
def test_a_wrong_kernel_fails_the_comparison(
    attngen: Attngen, small: str, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An output of zeros exits with 1 and says where the error is largest."""
    from attngen import api

    def zeros(plan: object, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: object) -> object:
        return torch.zeros_like(q), torch.zeros(q.shape[0], q.shape[2], q.shape[1])

    monkeypatch.setattr(api, "simulate", zeros)
    result = attngen(command[0], small, *command[1:])
    assert result.exit_code == 1, result.output
    assert "FAILED (" in result.stdout and "got 0, expected" in result.stdout


def test_a_spec_that_cannot_run_hides_no_other(attngen: Attngen, small: str) -> None:
    """Inputs that fit one of two specs: the other is refused, the fitting one is run and judged."""
    q = torch.randn(1, 3, 2, 64).bfloat16()
    save_file({"q": q, "k": q.clone(), "v": q.clone()}, "d64.safetensors")
    result = attngen("run", small, "fa2_d64", "--device", "cpu", "--inputs", "d64.safetensors")
    assert_refused(result, "argument q", "32")
    assert "fa2_d64 " in result.stdout and " ok " in result.stdout


def test_run_says_that_the_simulator_ran(attngen: Attngen, small: str) -> None:
    """A time of the simulator is never shown as the kernel's, and no TFLOPS are made of it."""
    result = attngen("run", small, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "on the simulator (CPU)" in result.stdout and "time (simulator)" in result.stdout
    (row,) = [line for line in result.stdout.splitlines() if "5x70" in line]
    assert row.split()[-2:] == ["-", "ok"]


def test_the_shape_given_replaces_the_check_shapes(attngen: Attngen, small: str) -> None:
    """Shape options are one shape; what they leave out follows from what they say."""
    result = attngen("run", small, "--device", "cpu", "--heads", "4", "--heads-kv", "2", "--seqlen-k", "9")
    assert "batch 1, heads 4:2, 9x9" in result.stdout and "5x70" not in result.stdout


def test_trace_prints_the_board(attngen: Attngen) -> None:
    """`run --trace` shows S, maxima, sums and O for each of the blocks that a 4x4 causal problem sees in 2x2."""
    result = attngen("run", "blackboard", "--trace")
    assert result.exit_code == 0, result.output
    for heading in ("running max", "rescale factor", "running sum", "O, not normalised", "lse"):
        assert heading in result.stdout
    assert result.stdout.count("running max") == 3  # (0, 0), (1, 0), (1, 1): the fourth is all masked


def test_inputs_come_from_the_file(attngen: Attngen, small: str) -> None:
    """`run --inputs` computes on the tensors of the file, and refuses a file without them."""
    q, k, v = (torch.randn(1, n, 2, 32).bfloat16() for n in (3, 7, 7))
    save_file({"q": q, "k": k, "v": v}, "good.safetensors")
    save_file({"q": q, "keys": k}, "lacking.safetensors")
    save_file({"q": q.float(), "k": k.float(), "v": v.float()}, "f32.safetensors")
    Path("junk.safetensors").write_bytes(b"junk")
    result = attngen("run", small, "--device", "cpu", "--inputs", "good.safetensors")
    assert result.exit_code == 0 and "heads 2, 3x7" in result.stdout, result.output
    on_cpu = ("run", small, "--device", "cpu", "--inputs")
    assert_refused(attngen(*on_cpu, "lacking.safetensors"), "k, v missing")
    assert_refused(attngen(*on_cpu, "junk.safetensors"), "expected a safetensors file")
    assert_refused(attngen(*on_cpu, "f32.safetensors"), "argument q", "float32", "bfloat16")
    assert_refused(attngen(*on_cpu, "good.safetensors", "--heads", "2"), "brings its own shape")


def test_set_runs_every_combination(attngen: Attngen, small: str) -> None:
    """Two values of each of two keys are four runs, each under its own label."""
    result = attngen(
        "run", small, "--device", "cpu", "--set", "tile.block_n=16,32", "--set", "mask=full,causal"
    )
    assert result.exit_code == 0, result.output
    for block_n in (16, 32):
        for mask in ("full", "causal"):
            assert f"small tile.block_n={block_n} mask={mask} " in result.stdout


@pytest.mark.usefixtures("wide_lines")
def test_set_reads_truth_values(attngen: Attngen, hopper: str) -> None:
    """true and false are read as in YAML, and stand so in the label; another word is refused."""
    sweep = ("--set", "schedule.overlap=true,false", "--set", "schedule.persistent=false,maybe")
    result = attngen("explain", hopper, *sweep)
    assert result.exit_code == 0, result.output
    for overlap in ("true", "false"):
        assert f"hopper schedule.overlap={overlap} schedule.persistent=false " in " ".join(
            result.stdout.split()
        )
    assert result.stdout.count("refused [rule boolean]") == 2


@pytest.mark.usefixtures("wide_lines")
def test_a_sweep_of_warpgroups_names_them(attngen: Attngen, hopper: str) -> None:
    """The tile of a row counts what the spec can set: warpgroups, not warps; what a rule refuses is a row."""
    result = attngen("explain", hopper, "--set", "schedule.warpgroups=1,2,4")
    assert result.exit_code == 0, result.output
    assert "64x128, stages 2, warpgroups 1 " in result.stdout
    assert "128x128, stages 2, warpgroups 2 " in result.stdout
    assert "refused [rule warpgroups" in result.stdout


def test_a_comma_in_brackets_does_not_cut(attngen: Attngen, small: str) -> None:
    """`--set` sweeps two masks here, not three, though one of them has a comma of its own."""
    result = attngen("explain", small, "--set", "mask=full,f(1,2)")
    assert "mask=full " in result.stdout and "mask=f(1,2) " in result.stdout
    assert result.stdout.count("mask=") == 2


# ---- build and explain


def test_build_writes_three_files_and_finds_them_cached(attngen: Attngen, small: str) -> None:
    """`build -o` writes source, manifest and cubin; the second build is from the cache, with other flags it is not."""
    first, second = attngen("build", small, "-o", "built"), attngen("build", small)
    lineinfo = attngen("build", small, "--lineinfo")
    assert (first.exit_code, second.exit_code) == (0, 0), first.output
    name = lower(load(small), ARCHS["sm_80"]).name
    assert sorted(path.name for path in Path("built").iterdir()) == [
        f"{name}.{x}" for x in ("cu", "cubin", "json")
    ]
    assert json.loads(Path("built", f"{name}.json").read_text())["kernels"][0]["name"] == name
    assert "cached" not in first.stdout and "cached" in second.stdout and "cached" not in lineinfo.stdout


def test_cache_counts_and_clears(attngen: Attngen, small: str, tmp_path: Path) -> None:
    """`cache` names the directory, counts what `build` put there and removes it."""
    assert attngen("cache", "path").stdout.strip() == str(tmp_path / "cache")
    assert attngen("cache", "size").stdout == "0 kernels, 0 B\n"
    attngen("build", small)
    assert attngen("cache", "size").stdout.startswith("1 kernel, ")
    assert "removed 1 kernel " in attngen("cache", "clear").stdout
    assert attngen("cache", "size").stdout == "0 kernels, 0 B\n"


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
    plan = lower(load("blackboard"), ARCHS["simulator"])
    shape = shapes_of(load("blackboard"))[0]
    moved = count(plan, shape.seqlen_q, shape.seqlen_k, return_lse=True).bytes_moved
    assert f"{moved} B (reads" in lines["bytes, counted"]


def test_explain_program_prints_every_step(attngen: Attngen) -> None:
    """--program has a line for each Step of the schedule, in order."""
    result = attngen("explain", "blackboard", "--program")
    spec = load("blackboard")
    position = result.stdout.index("role warps, 1 warp:")
    for step in walk(lower(spec, resolve_arch(spec)).kernel.worker.program):
        position = result.stdout.index(str(step), position) + 1


@pytest.mark.parametrize("kind", SPECIALISED)
def test_explain_program_prints_every_role(attngen: Attngen, hopper: str, kind: str) -> None:
    """Consumer and producer have a listing each, in order, under who runs it and with how many registers."""
    result = attngen("explain", hopper, "--program", "--set", f"schedule.kind={kind}")
    assert result.exit_code == 0, result.output
    roles = lower(load(hopper).replace({"schedule.kind": kind}), ARCHS["sm_90a"]).kernel.roles
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
    from attngen.api import DiskCache
    from attngen.errors import ToolchainError

    def refuse(*_: object, **__: object) -> None:
        raise ToolchainError("NVRTC cannot be loaded", "install it")

    monkeypatch.setattr(DiskCache, "get", refuse)
    result = attngen("explain", small)
    assert result.exit_code == 0, result.output
    assert "registers are unknown: NVRTC cannot be loaded" in result.stderr
    assert "unknown;" in result.stdout and "bytes, counted" in result.stdout


def test_schema_prints_the_schema_and_nothing_else(attngen: Attngen) -> None:
    """The output of `schema` is JSON that knows the keys of a spec."""
    assert {"problem", "tile", "schedule", "mask"} <= set(json.loads(attngen("schema").stdout)["properties"])


# ---- limits


def test_every_rule_has_a_margin() -> None:
    """A rule added to the table of the plan must be shown by explain."""
    assert set(MARGINS) == set(RULES)


def assert_margins_are_kept(plan: Plan) -> None:
    for margin in margins(plan):
        assert margin.used <= margin.limit if margin.is_amount else margin.used % margin.limit == 0, margin
    tile_rules = ("registers", "shared-memory", "wgmma-columns")
    assert binding(plan).share == max(m.share for m in margins(plan) if m.rule in tile_rules)


@pytest.mark.parametrize("name", ["fa2_d128_causal", "fa2_d64", "serial_d64", "fa2_d192x128"])
def test_margins_of_a_legal_plan_are_kept(name: str) -> None:
    """A plan that passed the rules is within every margin, and the margin says what binds."""
    spec = load(name)
    plan = lower(spec, resolve_arch(spec))
    assert_margins_are_kept(plan)
    assert {m.rule for m in margins(plan)} == set(RULES) - {"warpgroups", "wgmma-rows", "wgmma-columns"}


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("kind", SPECIALISED)
def test_margins_of_warpgroups_are_kept(kind: str, head_dim: int) -> None:
    """The same where warpgroups compute; the rows of mma.sync say nothing there."""
    plan = lower(load({"problem": {"head_dim": head_dim}, "schedule": {"kind": kind}}), ARCHS["sm_90a"])
    assert_margins_are_kept(plan)
    assert {m.rule for m in margins(plan)} == set(RULES) - {"mma-rows"}


def hopper_margin(rule: str, **changes: object) -> str:
    plan = lower(load({"problem": {"head_dim": 128}} | changes), ARCHS["sm_90a"])
    (found,) = [str(margin) for margin in margins(plan) if margin.rule == rule]
    return found


def test_the_registers_of_a_consumer_are_those_that_setmaxnreg_gives() -> None:
    """Two warpgroups hold 240 less 24, three 160 less 32, one what a launch may give; P has registers of its own."""
    small: dict[str, object] = {"problem": {"head_dim": 64}}
    assert hopper_margin("registers") == "160 of 216 tile registers (56 left)"
    assert hopper_margin("registers", tile={"block_m": 64}) == "160 of 208 tile registers (48 left)"
    assert hopper_margin("registers", **small) == "128 of 128 tile registers (0 left)"
    assert (
        hopper_margin("registers", **small, schedule={"warpgroups": 2})
        == "128 of 216 tile registers (88 left)"
    )
    assert (
        hopper_margin("registers", schedule={"kind": "fa2"}) == "192 of 208 accumulator registers (16 left)"
    )


def test_what_binds_warpgroups() -> None:
    """A block_n of 256, the widest wgmma, binds before anything else where registers are left."""
    plan = lower(
        load({"problem": {"head_dim": 32}, "tile": {"block_m": 128, "block_n": 256}}), ARCHS["sm_90a"]
    )
    assert str(binding(plan)) == "256 of 256 keys (0 left)"
    assert hopper_margin("wgmma-rows") == "128 = 1 x 128 rows"
    assert hopper_margin("warpgroups") == "2 of 3 consumer warpgroups (1 left)"
    assert hopper_margin("threads-per-block") == "384 of 1024 threads (640 left)"


@pytest.mark.parametrize("count", [2, 3])
def test_the_pools_of_setmaxnreg_are_what_the_launch_gives(count: int) -> None:
    """The roles' registers sum to the block's at launch: the largest number of eights that threads can get."""
    spec = load({"problem": {"head_dim": 64}, "schedule": {"kind": "pingpong", "warpgroups": count}})
    kernel = lower(spec, ARCHS["sm_90a"]).kernel
    at_launch = ARCHS["sm_90a"].registers_per_sm // kernel.threads // 8 * 8
    held = [role.registers for role in kernel.roles if role.registers is not None]
    assert (
        sum(32 * role.warps * n for role, n in zip(kernel.roles, held, strict=True))
        == kernel.threads * at_launch
    )
    assert occupancy(ARCHS["sm_90a"], kernel.threads, at_launch, kernel.smem_bytes).blocks == 1


def test_the_plan_at_the_limit_of_registers_is_bound_by_them() -> None:
    """128x64 tiles of head_dim 128 fill 192 of 208 registers; one k-step more fits exactly, two are refused."""
    from attngen.errors import PlanError

    spec = load("fa2_d128_causal").replace({"tile.block_m": 128, "tile.block_n": 64, "schedule.warps": 4})
    assert str(binding(lower(spec, ARCHS["sm_90a"]))) == "192 of 208 accumulator registers (16 left)"
    assert binding(lower(spec.replace({"tile.block_n": 80}), ARCHS["sm_90a"])).share == 1.0
    with pytest.raises(PlanError) as refused:
        lower(spec.replace({"tile.block_n": 96}), ARCHS["sm_90a"])
    assert [d.rule for d in refused.value.diagnostics] == ["registers"]


@pytest.mark.parametrize(
    ("threads", "registers", "smem", "blocks", "limit"),
    [
        (128, 128, 0, 4, "registers"),  # 65536 / (128 * 128)
        (128, 121, 0, 4, "registers"),  # 121 is granted as 128
        (128, 32, 64 * 1024, 3, "shared memory"),  # 228 KiB holds three of 65 KiB
        (1024, 16, 0, 2, "threads"),  # 2048 threads
        (384, 168, 0, 1, "registers"),  # two consumers and a producer: 64512 of 65536
        (512, 128, 0, 1, "registers"),  # three and a producer: all of them
        (
            160,
            200,
            0,
            1,
            "registers",
        ),  # each quarter of the multiprocessor holds two warps of 6400, a block has five
    ],
)
def test_occupancy_on_hopper(threads: int, registers: int, smem: int, blocks: int, limit: str) -> None:
    """Resident blocks of an sm_90a multiprocessor, worked out by hand."""
    found = occupancy(ARCHS["sm_90a"], threads, registers, smem)
    assert found.blocks == blocks
    assert found.warps == blocks * threads // 32
    assert found.limited_by == limit
