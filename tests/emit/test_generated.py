"""The committed output of the shipped specs, and what emission promises."""

import re

import pytest

import attngen
from attngen.arch import ARCHS
from attngen.emit import emit
from attngen.emit.environment import Templates, finalize
from attngen.emit.sheet_text import sheet_macros
from attngen.lower import lower
from attngen.plan import SHEETS, STEPS, Manifest
from attngen.plan.call import SCHEMA_VERSION
from attngen.runtime.nvrtc import compile_source
from attngen.simulate import STEPS_SIMULATED
from attngen.simulate.simulated_sheets import SHEETS_SIMULATED
from attngen.spec import Spec
from tests.emit.regenerate import FOLDER, LIBRARY, expected_files
from tests.plans import kernel_plan


def plan(**changes: object):
    return kernel_plan(attngen.load({"problem": {"head_dim": 64}} | changes), ARCHS["sm_90a"])


def made_of(**changes: object) -> Manifest:
    return lower(attngen.load({"problem": {"head_dim": 64}} | changes), ARCHS["sm_90a"]).manifest


def test_generated_is_in_step_with_the_templates() -> None:
    """generated/ holds exactly what the shipped specs emit now; if not, run tests/emit/regenerate.py and read it."""
    expected = expected_files()
    found = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    assert sorted(found) == sorted(expected)
    changed = [name for name in expected if found[name] != expected[name]]
    assert not changed, f"differ: {changed}"


@pytest.mark.parametrize("name", ["h100_alibi", "fa2_d64", "h100_fp8_quantize"])
def test_generated_compiles(name: str) -> None:
    """With its includes in it a generated file is a whole text, though it carries more than it needs."""
    text = (FOLDER / f"{name}.cu").read_text(encoding="utf-8")
    for file, parts in LIBRARY.items():
        assert text.count(f'#include "{file}"') == 1
        text = text.replace(f'#include "{file}"', "\n\n".join(parts))
    assert compile_source(text, "sm_90a").cubin


def test_a_step_has_one_name_in_three_places() -> None:
    """The Step classes, the macros that emit them and the functions that simulate them are the same set."""
    names = {step.__name__ for step in STEPS}
    assert set(Templates(plan()).steps.keys()) == names
    assert {step.__name__ for step in STEPS_SIMULATED} == names


def test_a_sheet_has_one_name_in_three_places() -> None:
    """The classes of sheets, the macros that emit them and the functions that mean them are the same set."""
    names = {sheet.__name__ for sheet in SHEETS}
    assert set(sheet_macros()) == names
    assert {sheet.__name__ for sheet in SHEETS_SIMULATED} == names
    assert {function.__name__.replace("_", "") for function in SHEETS_SIMULATED.values()} == {
        name.lower() for name in names
    }


def test_the_text_of_causal_emits_the_bytes_of_causal() -> None:
    """A mask is its meaning: the definition's name, its text and a chain that says the same emit equal bytes."""
    texts = ("causal", "kv_idx <= q_idx + seqlen_k - seqlen_q", "not kv_idx > q_pos")
    for kind in ("fa2", "warp_specialized"):
        sources = {emit(plan(mask=text, schedule={"kind": kind})) for text in texts}
        assert len(sources) == 1
        assert emit(plan(mask="full", schedule={"kind": kind})) not in sources


def test_the_same_spec_emits_the_same_bytes() -> None:
    """Emission has no clock, no path and no memory."""
    for kind in ("fa2", "warp_specialized"):
        first, second = (emit(plan(mask="causal", schedule={"kind": kind})) for _ in range(2))
        assert first == second


@pytest.mark.parametrize("value", [None, float("nan"), (1,), [1], {"a": 1}])
def test_templates_cannot_print_what_is_no_text(value: object) -> None:
    """None, nan and containers never reach the emitted text."""
    with pytest.raises(attngen.InternalError):
        finalize(value)


def test_the_manifest_survives_its_json() -> None:
    """What a launch needs comes back from the .json unchanged, and another schema version is refused."""
    for kind in ("serial", "fa2", "warp_specialized", "pingpong"):
        made = made_of(schedule={"kind": kind})
        assert Manifest.from_json(made.to_json()) == made
        for version in (SCHEMA_VERSION - 1, 99):
            other = made.to_json().replace(
                f'"schema_version": {SCHEMA_VERSION}', f'"schema_version": {version}'
            )
            with pytest.raises(ValueError, match=f"schema_version is {version}"):
                Manifest.from_json(other)


def test_the_manifest_describes_the_tensor_maps() -> None:
    """Each map parameter has a descriptor: extents by name, boxes of one panel, rows of a block or of a warpgroup."""
    made = made_of(problem={"head_dim": {"qk": 192, "v": 128}})
    *_, kernel = made.kernels
    found = {entry.value: (entry.dims, entry.box) for entry in kernel.tensor_maps}
    assert found == {
        "q": ((192, "seqlen_q", "num_heads_q", "batch"), (64, 128, 1, 1)),
        "k": ((192, "seqlen_k", "num_heads_kv", "batch"), (64, 112, 1, 1)),
        "v": ((128, "seqlen_k", "num_heads_kv", "batch"), (64, 112, 1, 1)),
        "out": ((128, "seqlen_q", "num_heads_q", "batch"), (64, 64, 1, 1)),
    }
    assert {param.value for param in kernel.params if param.ctype == "tensor_map"} == {
        f"{x}.map" for x in found
    }
    assert {entry.dtype for entry in kernel.tensor_maps} == {"bf16"}
    assert {entry.swizzle_bytes for entry in kernel.tensor_maps} == {128}
    assert made_of(schedule={"kind": "fa2"}).kernels[-1].tensor_maps == ()


def test_only_a_persistent_kernel_asks_for_a_counter() -> None:
    """The counter is a parameter of what draws tiles, and its grid is bounded by the GPU's multiprocessors."""
    for persistent in (True, False):
        made = made_of(schedule={"persistent": persistent})
        values = {param.value for param in made.kernels[-1].params}
        assert ("counter.ptr" in values) == persistent
        assert ("num_sms" in str(made.launches[-1].grid)) == persistent


def test_an_emitted_kernel_carries_only_what_it_uses() -> None:
    """A causal fa2 kernel holds no f16 and no device function of the serial schedule."""
    source = emit(plan(mask="causal", schedule={"kind": "fa2"}))
    assert "struct Bf16" in source and "struct F16" not in source and "load_fragment" not in source
    assert not re.search(r"wgmma|mbarrier|TensorMap|setmaxnreg", source)
    assert isinstance(attngen.load({"problem": {"head_dim": 64}}), Spec)


def test_an_emitted_kernel_of_warpgroups_carries_only_what_it_uses() -> None:
    """No copy by threads and no ldmatrix; turns only where warpgroups take them, one wgmma of each shape it issues."""
    sources = {
        kind: emit(plan(mask="causal", problem={"head_dim": 128}, schedule={"kind": kind}))
        for kind in ("warp_specialized", "pingpong")
    }
    for source in sources.values():
        assert "struct Bf16" in source and "struct F16" not in source
        assert not re.search(r"cp\.async\.c[ag]|ldmatrix\.", source)
        shapes = re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m64n\d+k16)", source)
        assert sorted(shapes) == [
            "m64n128k16",
            "m64n128k16",
        ]  # S = Q Kᵀ from shared memory, O += P V from registers
    assert "next_warpgroup" in sources["pingpong"] and "next_warpgroup" not in sources["warp_specialized"]
