"""The commands check, run, build, cache and schema, and what every command refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file

from attngen.api import compile
from attngen.arch import ARCHS
from attngen.bind import Bound
from attngen.check.inputs import Shape, random_inputs
from attngen.cli.comparison import execute
from attngen.plan import Call
from attngen.spec import load
from tests.plans import kernel_plan

Attngen = Callable[..., Result]


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
            "argument --heads-kv: got 2, expected a divisor of 3",
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
    assert kernel_plan(load(small), ARCHS["sm_80"]).name in plain.stdout
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
    from attngen.simulate import simulator

    def zeros(call: Call, bound: Bound, *_: object, **options: object) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(made.shape, dtype=made.dtype) for name, made in bound.made.items()}

    monkeypatch.setattr(simulator, "run_call", zeros)
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


def test_a_comma_in_brackets_does_not_cut(attngen: Attngen, small: str) -> None:
    """`--set` sweeps two masks here, not three, though one of them has a comma of its own."""
    result = attngen("explain", small, "--set", "mask=full,f(1,2)")
    assert "mask=full " in result.stdout and "mask=f(1,2) " in result.stdout
    assert result.stdout.count("mask=") == 2


# ---- build, cache and schema


@pytest.mark.usefixtures("own_cache")
def test_build_writes_three_files_and_finds_them_cached(attngen: Attngen, small: str) -> None:
    """`build -o` writes source, manifest and cubin; the second build is from the cache, with other flags it is not."""
    first, second = attngen("build", small, "-o", "built"), attngen("build", small)
    lineinfo = attngen("build", small, "--lineinfo")
    assert (first.exit_code, second.exit_code) == (0, 0), first.output
    name = kernel_plan(load(small), ARCHS["sm_80"]).name
    assert sorted(path.name for path in Path("built").iterdir()) == [
        f"{name}.{x}" for x in ("cu", "cubin", "json")
    ]
    assert json.loads(Path("built", f"{name}.json").read_text())["kernels"][0]["name"] == name
    assert "cached" not in first.stdout and "cached" in second.stdout and "cached" not in lineinfo.stdout


def test_cache_counts_and_clears(attngen: Attngen, small: str, own_cache: Path) -> None:
    """`cache` names the directory, counts what `build` put there and removes it."""
    assert attngen("cache", "path").stdout.strip() == str(own_cache)
    assert attngen("cache", "size").stdout == "0 kernels, 0 B\n"
    attngen("build", small)
    assert attngen("cache", "size").stdout.startswith("1 kernel, ")
    assert "removed 1 kernel " in attngen("cache", "clear").stdout
    assert attngen("cache", "size").stdout == "0 kernels, 0 B\n"


def test_schema_prints_the_schema_and_nothing_else(attngen: Attngen) -> None:
    """The output of `schema` is JSON that knows the keys of a spec."""
    assert {"problem", "tile", "schedule", "mask"} <= set(json.loads(attngen("schema").stdout)["properties"])
