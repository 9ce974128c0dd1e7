"""The committed output of the shipped specs, and what emission promises."""

import pytest

import attngen
from attngen.arch import ARCHS
from attngen.emit import Manifest, emit, manifest
from attngen.emit.environment import emission_environment, finalize, step_macros
from attngen.lower import lower
from attngen.plan import STEPS
from attngen.simulate import STEPS_SIMULATED
from attngen.spec import Spec
from tests.emit.regenerate import FOLDER, expected_files


def plan(**changes: object):
    return lower(attngen.load({"problem": {"head_dim": 64}} | changes), ARCHS["sm_90a"])


def test_generated_is_in_step_with_the_templates() -> None:
    """generated/ holds exactly what the shipped specs emit now; if not, run tests/emit/regenerate.py and read it."""
    expected = expected_files()
    found = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    assert sorted(found) == sorted(expected)
    changed = [name for name in expected if found[name] != expected[name]]
    assert not changed, f"differ: {changed}"


def test_a_step_has_one_name_in_three_places() -> None:
    """The Step classes, the macros that emit them and the functions that simulate them are the same set."""
    names = {step.__name__ for step in STEPS}
    assert set(step_macros(emission_environment(plan()))) == names
    assert {step.__name__ for step in STEPS_SIMULATED} == names


def test_the_text_of_causal_emits_the_bytes_of_causal() -> None:
    """A mask is its meaning: the definition's name, its text and a chain that says the same emit equal bytes."""
    texts = ("causal", "kv_idx <= q_idx + seqlen_k - seqlen_q", "not kv_idx > q_pos")
    sources = {emit(plan(mask=text)) for text in texts}
    assert len(sources) == 1
    assert emit(plan(mask="full")) not in sources


def test_the_same_spec_emits_the_same_bytes() -> None:
    """Emission has no clock, no path and no memory."""
    assert emit(plan(mask="causal")) == emit(plan(mask="causal"))


@pytest.mark.parametrize("value", [None, float("nan"), (1,), [1], {"a": 1}])
def test_templates_cannot_print_what_is_no_text(value: object) -> None:
    """None, nan and containers never reach the emitted text."""
    with pytest.raises(attngen.InternalError):
        finalize(value)


def test_the_manifest_survives_its_json() -> None:
    """What a launch needs comes back from the .json unchanged, and another schema version is refused."""
    made = manifest(plan(schedule={"kind": "serial"}))
    assert Manifest.from_json(made.to_json()) == made
    with pytest.raises(ValueError, match="schema_version"):
        Manifest.from_json(made.to_json().replace('"schema_version": 1', '"schema_version": 99'))


def test_an_emitted_kernel_carries_only_what_it_uses() -> None:
    """A causal fa2 kernel holds no f16 and no device function of the serial schedule."""
    source = emit(plan(mask="causal"))
    assert "struct Bf16" in source and "struct F16" not in source and "load_fragment" not in source
    assert isinstance(attngen.load({"problem": {"head_dim": 64}}), Spec)
