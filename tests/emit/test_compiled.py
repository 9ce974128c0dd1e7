"""What NVRTC makes of the emitted text. Needs no GPU."""

import re

import pytest

import attngen
from attngen.arch import ARCHS
from attngen.resources import shipped_specs
from attngen.runtime import compile_source, disassemble

SHIPPED = [path.stem for path in shipped_specs() if attngen.load(path).target != "simulator"]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_spec_compiles_without_spills(name: str) -> None:
    """No spill, no stack, no local memory in the SASS, the planned matrix instruction and no other, no C75xx."""
    kernel = attngen.compile(name)
    compiled = compile_source(kernel.source, kernel.plan.arch.name)
    (used,) = compiled.resources
    assert (used.spill_stores, used.spill_loads, used.stack_bytes) == (0, 0, 0)
    assert compiled.warnings == ()
    sass = disassemble(compiled.cubin)
    assert not re.search(r"\b(LDL|STL)\b", sass)
    assert re.search(r"\bHMMA\.16816\.F32", sass) and re.search(r"\bLDSM\b", sass)
    assert re.search(r"\bLDGSTS\b", sass)


@pytest.mark.parametrize("head_dim", [32, 40, 80, 96, 192, 256])
@pytest.mark.parametrize("kind", ["fa2", "serial"])
def test_auto_tiles_do_not_spill(kind: str, head_dim: int) -> None:
    """What auto picks for each head dim compiles without spills, causal, on sm_90a."""
    spec = {"problem": {"head_dim": head_dim}, "mask": "causal", "schedule": {"kind": kind}}
    kernel = attngen.compile(spec, arch="sm_90a")
    (used,) = compile_source(kernel.source, "sm_90a").resources
    assert used.spill_stores == used.stack_bytes == 0


@pytest.mark.parametrize("arch", [name for name, arch in ARCHS.items() if arch.emits])
def test_every_target_compiles(arch: str) -> None:
    """head_dim 128 finds a legal tile on every target, those with 99 KB of shared memory too."""
    kernel = attngen.compile({"problem": {"head_dim": 128}, "mask": "causal"}, arch=arch)
    assert compile_source(kernel.source, arch).resources[0].registers <= 255
