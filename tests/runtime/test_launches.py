"""One list of launches: what a call begins with decides which of them it needs, on the GPU and on the simulator."""

from typing import Any

import pytest
import torch

import attngen
from attngen.arch import ARCHS
from attngen.emit import emit_module
from attngen.lower import lower
from attngen.plan import Call
from attngen.runtime import Launcher, launch
from attngen.runtime.nvrtc import compile_source
from attngen.simulate import launches, simulator
from tests.plans import no_code

DOCUMENTS: dict[str, Any] = {"mask": "document(doc)", "tensors": {"doc": "i32[batch, seqlen_k]"}}
QUANTISED: dict[str, Any] = {"precision": {"inputs": "e4m3", "scales": "per_head"}}


def call_of(changes: dict[str, Any], target: str = "sm_90a") -> Call:
    spec = {"problem": {"head_dim": 64}, "target": target, **changes}
    return lower(attngen.load(spec), ARCHS[target])


class Named:
    """Stands for a module, and for the kernel of it that was asked for."""

    def function(self, name: str, smem_bytes: int, starts_early: bool) -> "Named":
        named = Named()
        named.name = name
        return named

    def prepare(self, device: int, count: int = 1) -> None:
        pass


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what a launcher starts, of CPU tensors in the place of a GPU's."""
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False, raising=False)
    monkeypatch.setattr("attngen.runtime.tensor_maps.encode_tensor_map", lambda *map_: bytes(128))
    monkeypatch.setattr("attngen.runtime.prepared.address_comes_first", lambda: True)

    class Counters:
        def prepare(self, device: int, count: int = 1) -> None:
            pass

        def address(self, device: int, stream: int, count: int = 1) -> int:
            return 0xC0C0

    monkeypatch.setattr(launch, "COUNTERS", Counters())
    return []


def launcher(call: Call, started: list[str]) -> Launcher:
    def start(function: Named, *rest: object) -> None:
        started.append(function.name)

    return Launcher(call.manifest, no_code, load=lambda cubin: Named(), start=start)


@pytest.mark.parametrize(
    ("changes", "kernels"),
    [(DOCUMENTS, ["_tables", ""]), (QUANTISED, ["_amax_bf16", "_quantize_bf16", ""])],
    ids=["tables", "quantisation"],
)
def test_simulator_and_runtime_run_one_list(
    changes: dict[str, Any], kernels: list[str], started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels that a launcher starts are, in order, those that the simulator runs, sheets and programs alike."""
    call = call_of(changes | {"schedule": {"kind": "warp_specialized"}})
    q = torch.randn(1, 70, 2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    declared = {"doc": torch.zeros(1, 70, dtype=torch.int32)} if changes is DOCUMENTS else {}
    launcher(call, started).run(q, q, q, declared=declared)
    assert started == [call.attention.name + kernel for kernel in kernels]
    simulated: list[str] = []
    sheets = {
        sheet: lambda kernel, *rest, means=means: (simulated.append(kernel.name), means(kernel, *rest))[1]
        for sheet, means in launches.SHEETS_SIMULATED.items()
    }
    monkeypatch.setattr(launches, "SHEETS_SIMULATED", sheets)
    run_blocks = launches._run_blocks
    monkeypatch.setattr(
        launches,
        "_run_blocks",
        lambda each, source: (simulated.append(each.plan.name), run_blocks(each, source)),
    )
    assert simulator.run_call is launches.run_call
    attngen.Kernel(attngen.load({"problem": {"head_dim": 64}}), call)(q, q, q, **declared)
    assert simulated == started


@pytest.mark.parametrize("changes", [{}, {"mask": "causal"}, DOCUMENTS, QUANTISED], ids=str)
def test_nothing_is_launched_that_is_not_in_the_call(changes: dict[str, Any]) -> None:
    """The entries of the cubins are the kernels of the manifest, each launched by some call."""
    call = call_of(changes)
    entries = {
        used.name
        for kernels in call.modules.values()
        for used in compile_source(emit_module(kernels), "sm_90a").resources
    }
    assert entries == {kernel.name for kernel in call.manifest.kernels}
    assert entries == {each.kernel for each in call.manifest.launches}


def test_a_first_call_of_few_keys_is_checked_once(
    started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever kernel takes it, a new signature is looked at once, and a known one not at all."""
    call = call_of({"mask": "causal"})
    short, longest = call.programs
    assert short.up_to is not None
    checked: list[object] = []
    check = launch.check_arguments
    monkeypatch.setattr(
        launch, "check_arguments", lambda *passed: (checked.append(passed), check(*passed))[1]
    )
    q = torch.zeros(1, 8, 2, 64).bfloat16()
    run_launcher = launcher(call, started)
    for count in (1, 1):
        run_launcher.run(q, q, q)
        assert len(checked) == count
    assert started == [short.name] * 2 and longest.name not in started


def test_values_of_a_prefix_leave_its_launches_out() -> None:
    """What is given is not made again; what nobody can make is named."""
    manifest = call_of(QUANTISED).manifest
    sizes = {"seqlen_k": 100}
    sources = ("q.bf16", "k.bf16", "v.bf16")
    operands = ("q", "k", "v", "q_descale", "k_descale", "v_descale")
    whole = manifest.launches_for(sources, ("out",), sizes)
    prefix = manifest.launches_for(sources, operands, sizes)
    assert prefix == whole[:-1] and manifest.launches_for(operands, ("out",), sizes) == whole[-1:]
    assert manifest.launches_for(operands, operands, sizes) == ()
    with pytest.raises(KeyError, match="out"):
        manifest.launches_for(("q", "k", "v"), ("out",), sizes)
