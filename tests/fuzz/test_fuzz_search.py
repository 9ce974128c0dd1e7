"""Searching, cases as lines of JSON, memory layouts, and the command."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as with_seed
from planted_faults import FAULTS, plant

from attngen.check.inputs import EXACT_SCALE, KINDS_WITH_SCALES, Kind, Shape
from attngen.cli import main
from attngen.dtypes import dtype
from attngen.errors import PlanError
from attngen.fuzz.case import FAR, Case
from attngen.fuzz.draw_expressions import DECLARATIONS
from attngen.fuzz.draw_pairs import PairTexts, pair_texts
from attngen.fuzz.names import emitted_names
from attngen.fuzz.properties import RULES, PropertyFailure, check
from attngen.fuzz.properties_of_outputs import WIDE_WINDOW
from attngen.fuzz.search_faults import CPU_TARGETS, fuzz, kernels, reproduce
from attngen.fuzz.strategies import cases, plan_of, specs
from attngen.quantize import SCALE_KINDS
from attngen.spec import Spec, load
from tests.effort import examples

SMALL: dict[str, object] = {
    "target": "simulator",
    "problem": {"head_dim": 2},
    "precision": {"inputs": "f32"},
    "tile": {"block_m": 2, "block_n": 2},
}

NO_SHAPE = json.dumps({"spec": SMALL})
WHOLE = Case(load(SMALL), Shape(1, 1, 1, 1, 1)).to_json()
NO_MEMORY = WHOLE.replace("contiguous", "scattered")
NO_STATE = WHOLE.replace('"as imported"', "[]")


def small(**changes: object) -> Spec:
    return load(SMALL | changes)


@settings(suppress_health_check=list(HealthCheck))
@given(cases(specs(CPU_TARGETS)))
def test_a_case_survives_its_line_of_json(case: Case) -> None:
    """Writing and reading gives the same case, on one line."""
    line = case.to_json()
    assert "\n" not in line
    assert Case.from_json(line) == case


@pytest.mark.parametrize("text", ["{", "[]", '{"shape": 3}', NO_SHAPE, NO_MEMORY, NO_STATE])
def test_what_is_no_case_is_refused(text: str) -> None:
    """Text that is no JSON, or lacks a case's keys or has values of its own, is a ValueError."""
    with pytest.raises(ValueError):
        Case.from_json(text)


def test_the_same_seed_draws_the_same_cases() -> None:
    """Two runs of one seed meet the same at first, another something else; long runs may part (docs/design/fuzz.md)."""
    first, second, other = (
        fuzz(examples=10, seed=seed, targets=("simulator",)).coverage.counts for seed in (3, 3, 4)
    )
    assert first == second
    assert first != other


def test_one_spec_stays_as_it_is() -> None:
    """With a spec given, every case has it, and problems still differ."""
    coverage = fuzz(small(mask="causal"), examples=40).coverage
    assert coverage.counts["mask", "causal"] == coverage.cases == 40
    assert coverage.counts["seqlen_q", "8"] and coverage.counts["batch", "3 and more"]


def test_minutes_end_a_run() -> None:
    """A time limit of a second ends a run of no given length after some cases, within a few seconds."""
    report = fuzz(small(), minutes=1 / 60)
    assert report.ok and report.examples > 0
    assert report.seconds < 10


def test_an_illegal_spec_is_the_users_fault() -> None:
    """A spec without a plan raises its own error, before any case."""
    with pytest.raises(PlanError):
        fuzz(small(schedule={"kind": "serial", "stages": 3}), examples=5)


def test_storage_far_apart_holds_the_same_values() -> None:
    """The last batch begins past 2^31 elements, on 16 bytes, and holds what the contiguous layout does."""
    spec = small(precision={"inputs": "bf16"})
    shape = Shape(3, 2, 1, 5, 7)
    near = Case(spec, shape).inputs("cpu")
    far = Case(spec, shape, memory="far").inputs("cpu")
    for x, y in zip(near, far, strict=True):
        assert torch.equal(x, y)
        assert y.stride(0) * 2 >= FAR
        assert y.stride(0) % 8 == 0 and y.stride(-1) == 1


# What breaks one property, without breaking the error bound, by property: nothing that is computed is wrong.
def flip_last_bit(x: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(x, torch.full_like(x, 100.0))


class Restless:
    """A right kernel that adds the last bit at every second call."""

    def __init__(self, spec: Spec) -> None:
        self.inner = kernels()(spec)
        self.plan = self.inner.plan
        self.calls = 0

    def __call__(self, *args: object, **options: object) -> object:
        self.calls += 1
        out, lse = self.inner(*args, **options | {"return_lse": True})  # type: ignore[arg-type]
        out = flip_last_bit(out) if self.calls % 2 == 0 else out
        return (out, lse) if options.get("return_lse") else out


@pytest.mark.parametrize("rule", ["repeat", "surroundings", "repeated-heads"])
def test_one_bit_is_noticed(rule: str) -> None:
    """Two runs that are to be the same and differ in the last bit break the property, not the bound."""
    case = Case(small(), Shape(2, 4, 2, 3, 5), rule=rule)
    with pytest.raises(PropertyFailure) as caught:
        check(case, Restless)
    assert caught.value.rule == rule


class Reckless:
    """A right kernel that writes to the memory after its output."""

    def __init__(self, spec: Spec) -> None:
        self.inner = kernels()(spec)
        self.plan = self.inner.plan

    def __call__(self, *args: object, out: torch.Tensor | None = None, **options: object) -> object:
        result = self.inner(*args, out=out, **options)  # type: ignore[arg-type]
        if out is not None:
            beyond = (out.shape[0], out.shape[1] + 1, *out.shape[2:])
            out.as_strided(beyond, out.stride())[:, -1] = 0.0
        return result


def test_a_write_past_the_output_is_noticed() -> None:
    """One row too many overwrites the canary."""
    with pytest.raises(PropertyFailure, match="memory around out was written, at") as caught:
        check(Case(small(), Shape(1, 2, 1, 3, 5), rule="surroundings"), Reckless)
    assert caught.value.rule == "surroundings"


@pytest.mark.matrix(classes=lambda kind, inputs, scale, rule: {(kind, rule), (inputs, rule), scale})
@pytest.mark.parametrize(
    "rule", [name for name, rule in RULES.items() if not rule.of_gradients and rule.lengths != "own"]
)
@pytest.mark.parametrize("scale", [None, -EXACT_SCALE, 0.0])
@pytest.mark.parametrize("inputs", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("kind", ["serial", "fa2", "warp_specialized", "pingpong"])
def test_a_right_kernel_holds_each_rule(kind: str, inputs: str, scale: float | None, rule: str) -> None:
    """Several blocks of rows and keys with the full mask, to which every rule applies."""
    spec = small(schedule={"kind": kind}, precision={"inputs": inputs})
    case = Case(spec, Shape(3, 6, 2, 7, 9), scale, seed=5, rule=rule)
    assert reproduce(case) is None


@pytest.mark.parametrize("scales", SCALE_KINDS)
@pytest.mark.parametrize("kind", KINDS_WITH_SCALES)
def test_a_right_kernel_of_e4m3_holds_each_rule_that_applies(kind: Kind, scales: str) -> None:
    """Full mask; the rules that need operands which both runs share apply to fewer kinds of scales."""
    precision = {"inputs": "e4m3", "scales": scales}
    spec = small(problem={"head_dim": 16}, precision=precision, tile={"block_m": 4, "block_n": 32})
    plan = plan_of(spec)
    assert plan is not None
    applicable = [name for name, rule in RULES.items() if rule.may_hold(spec, plan)]
    assert ("permuted-keys" in applicable) == (scales in ("per_tensor", "per_head"))
    assert ("batch-slice" in applicable) == (scales != "per_tensor")
    assert ("repeated-heads" in applicable) == (scales != "per_head")
    assert {"shifted-scores", "split-keys"}.isdisjoint(applicable)
    for rule in applicable:
        case = Case(spec, Shape(2, 4, 2, 9, 150), seed=5, rule=rule, kind=kind)
        assert (failure := reproduce(case)) is None, str(failure)


def test_a_window_has_a_plan_where_the_full_mask_has_one() -> None:
    """Found by fuzzing: for a window the table has wider slices of O than this tile has registers for."""
    spec = load(
        {
            "target": "sm_90a",
            "problem": {"head_dim": 64},
            "precision": {"inputs": "e4m3", "scales": "per_block", "promote": 1},
            "tile": {"block_m": 192, "block_n": 128},
            "schedule": {"kind": "warp_specialized", "warpgroups": 3, "stages": 2},
        }
    )
    assert plan_of(spec) is not None and plan_of(spec.replace({"mask": WIDE_WINDOW})) is not None
    check(Case(spec, Shape(1, 1, 1, 3, 5), rule="wide-window"), kernels())


def test_e4m3_without_keys() -> None:
    """V of no keys has strides that no copy engine takes, and nothing to copy; found by fuzzing."""
    spec = load({"target": "sm_90a", "problem": {"head_dim": 32}, "precision": {"inputs": "e4m3"}})
    assert reproduce(Case(spec, Shape(1, 1, 1, 1, 0))) is None


def test_a_wrong_integer_is_found_on_the_exact_tier() -> None:
    """The exact tier has a complaint of its own for an error that bf16's bound forgives."""
    case = Case(small(precision={"inputs": "bf16"}), Shape(1, 1, 1, 4, 9), EXACT_SCALE, kind="integers")
    plain = kernels()(case.spec)

    class Off:
        plan = plain.plan

        def __call__(self, *args: object, **options: object) -> object:
            out, lse = plain(*args, **options)  # type: ignore[arg-type]
            return out + out.abs().clamp(min=0.01) * 2.0**-6.5, lse

    failure = reproduce(case, make=lambda spec: Off())
    assert failure is not None
    assert reproduce(case) is None


@pytest.mark.parametrize("inputs", ["f16", "bf16"])
def test_a_large_constant_is_judged_by_what_f32_keeps(inputs: str) -> None:
    """Scores of 1e4 over 80 columns lose more than 1e-6 of lse in f32; found by fuzzing (seed 20, f16)."""
    spec = load({"target": "sm_80", "problem": {"head_dim": 80}, "precision": {"inputs": inputs}})
    case = Case(spec, Shape(4, 4, 2, 48, 1), 1.0, kind="outliers", seed=38617, rule="shifted-scores")
    assert reproduce(case) is None


def test_serial_in_f32_may_round_at_every_block() -> None:
    """serial normalises O at each block of keys, which the bound's f32 term does not know; found by fuzzing."""
    for seed in range(20):
        shape = Shape(2, 4, 2, 5, 40)
        spec = small(schedule={"kind": "serial"}, problem={"head_dim": {"qk": 2, "v": 4}})
        assert reproduce(Case(spec, shape, EXACT_SCALE, kind="integers", seed=seed)) is None


def test_what_is_declared_has_names_of_emitted_texts_too() -> None:
    """Beside its usual names, and those that kernels make up for lookups and bounds of tiles are among them."""
    made_up = {
        "ahead0_bias",
        "term0_slopes",
        "q_first",
        "kv_last",
        "q_tile",
        "extremes0_lo",
        "tile",
        "params",
    }
    assert made_up <= set(emitted_names()) and "q_idx" not in emitted_names()
    met: set[str] = set()

    @with_seed(1)
    @settings(max_examples=examples(5), database=None, suppress_health_check=list(HealthCheck))
    @given(pair_texts())
    def collect(texts: PairTexts) -> None:
        load(SMALL | texts)
        met.update(texts["scalars"], texts["tensors"])

    collect()
    usual = {*DECLARATIONS.scalars, *DECLARATIONS.tensors}
    assert len(met & usual) >= 5 and len(met - usual) >= 8 and met - usual <= {*emitted_names()}


def test_a_pool_holds_different_specs() -> None:
    """For a GPU a few specs are drawn beforehand, the same for the same seed."""
    from attngen.fuzz.search_faults import _pool

    first, second = (_pool(specs(("sm_80",)), 5, 12) for _ in range(2))
    assert first == second
    assert 4 <= len(set(first)) == len(first) <= 12


@pytest.mark.gpu
def test_kernels_hold_every_property_on_the_gpu() -> None:
    """A hundred cases on the cubins of some drawn specs."""
    report = fuzz(examples=100, device="cuda", seed=11)
    assert report.ok, str(report)


# ---- the command --------------------------------------------------------------------------------------
def spec_file(folder: Path) -> str:
    path = folder / "small.yaml"
    path.write_text(small(mask="causal").to_yaml())
    return str(path)


def test_the_command_prints_what_was_met(tmp_path: Path) -> None:
    """A good run exits with 0 and prints the table."""
    result = CliRunner().invoke(main, ["fuzz", spec_file(tmp_path), "--examples", "30", "--seed", "2"])
    assert result.exit_code == 0, result.output
    assert (
        "schedule" in result.output and "seqlen_k" in result.output and "ok: 30 cases on cpu" in result.output
    )


def test_a_failing_run_prints_a_line_that_shows_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It exits with 1; its last line, run with the fault, exits with 1 again and without it with 0."""
    from attngen.fuzz import search_faults

    made = plant(FAULTS["lse unscaled"])
    with monkeypatch.context() as patch:
        patch.setattr(search_faults, "kernels", lambda: made)
        result = CliRunner().invoke(main, ["fuzz", spec_file(tmp_path), "--examples", "30"])
        assert result.exit_code == 1, result.output
        line = result.output.rstrip().splitlines()[-1]
        assert line.startswith("attngen fuzz --device cpu --repro '{")
        repro = line.partition("--repro ")[2].strip("'")
        assert CliRunner().invoke(main, ["fuzz", "--repro", repro]).exit_code == 1
    again = CliRunner().invoke(main, ["fuzz", "--repro", repro])
    assert again.exit_code == 0 and "the case holds" in again.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["no_such_spec"],
        ["--repro", "{"],
        ["--repro", json.dumps({"spec": {}, "shape": {}})],
        ["--arch", "sm_70"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_the_users_faults_exit_with_2(arguments: list[str]) -> None:
    """An unknown spec or arch and a case that is none are told on stderr."""
    result = CliRunner().invoke(main, ["fuzz", *arguments, "--examples", "1"])
    assert result.exit_code == 2, result.output


def test_float_types_are_drawn_as_the_target_has_them() -> None:
    """f32 is drawn for the simulator and for no GPU."""
    coverage = fuzz(examples=60, targets=("sm_80",), rules=("error",)).coverage
    assert coverage.counts["dtype", "f32"] == 0
    assert coverage.counts["dtype", dtype("f16").name] and coverage.counts["dtype", "bf16"]
