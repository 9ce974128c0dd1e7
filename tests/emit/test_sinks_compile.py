"""What NVRTC makes of kernels with learned sinks, and where their texts read one. Needs no GPU."""

import re

import pytest

import attngen
from attngen.compiled_module import Module
from attngen.emit import emit_module
from attngen.runtime import KernelResources
from tests.emit.sass import done_before_waiting

pytestmark = pytest.mark.usefixtures("nvdisasm")
KINDS = (
    *(("sm_80", kind) for kind in ("serial", "fa2")),
    *(("sm_90a", kind) for kind in ("serial", "fa2", "warp_specialized", "pingpong")),
)


def compiled(target: str, head_dim: int, kind: str, score: str, inputs: str, sink: str) -> Module:
    spec = {
        "target": target,
        "problem": {"head_dim": head_dim},
        "precision": {"inputs": inputs},
        "mask": "causal",
        "score": score,
        "sink": sink,
        "schedule": {"kind": kind},
    }
    return attngen.compile(spec).module


def assert_a_sink_costs_no_registers(*spec: object) -> None:
    """No spill, no stack, no local memory, and no register more than without; nothing is read before the wait."""
    module, plain = (compiled(*spec, sink) for sink in ("per_head", "none"))  # type: ignore[arg-type]
    used, usual = (own(each) for each in (module, plain))
    assert (used.spill_stores, used.spill_loads, used.stack_bytes) == (0, 0, 0)
    assert used.registers <= usual.registers + 8 and module.compiled.warnings == ()
    sass = module.sass()
    assert not re.search(r"\b(LDL|STL)\b", sass)
    assert spec[0] != "sm_90a" or not done_before_waiting(sass)
    assert module.source.count("read_sink(params, tile.head)") == 1
    assert module.source.count("  join_sink(inv_sum, row_lse, sink[0]);") == 1
    assert "sink" not in plain.source


def own(module: Module) -> KernelResources:
    """What the attention kernel of a module takes."""
    (used,) = (each for each in module.compiled.resources if each.name == module.name)
    return used


@pytest.mark.matrix(most=2)
@pytest.mark.parametrize("score", ["score", "softcap(score, 30.0)"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("target", "kind"), KINDS)
def test_kernels_with_sinks_compile_without_spills(target: str, kind: str, head_dim: int, score: str) -> None:
    """Every schedule, with a running maximum and without."""
    assert_a_sink_costs_no_registers(target, head_dim, kind, score, "bf16")


@pytest.mark.matrix
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kind", ["warp_specialized", "pingpong"])
def test_kernels_of_e4m3_with_sinks_compile_without_spills(kind: str, head_dim: int) -> None:
    """Whose rows' maxima are in log2 units, and whose sums are lifted."""
    assert_a_sink_costs_no_registers("sm_90a", head_dim, kind, "score", "e4m3")


def test_one_spec_emits_one_text() -> None:
    """The same bytes, of the attention kernel and of the sum of its sink's gradient."""
    spec = {"problem": {"head_dim": 64}, "sink": "per_head", "gradients": ["q", "k", "v", "sink"]}
    texts = [
        {
            name: emit_module(kernels)
            for name, kernels in attngen.compile(spec, arch="sm_90a").call.modules.items()
        }
        for _ in range(2)
    ]
    assert texts[0] == texts[1] and any(name.endswith("_sink") for name in texts[0])
