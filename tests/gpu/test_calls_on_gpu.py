"""`attngen explain --calls` on one GPU: attngen is measured as all others are, and needs what it was worked out to."""

import pytest
import torch

import attngen
from attngen.arch import ARCHS
from attngen.check.declared_inputs import NOTHING_GIVEN
from attngen.check.inputs import Shape
from attngen.cli.calls import CHUNKED, EAGER, OURS, ways_of
from attngen.cli.launched_memory import launched_bytes
from attngen.cli.variants import kernel_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]
DEVICE = torch.device("cuda")
SLACK = 32 * 512
"""Bytes: torch's allocator rounds each of some allocations up to 512."""


@pytest.mark.parametrize("mask", ["causal", "document(doc)"])
@pytest.mark.parametrize("gradients", [[], ["q", "k", "v"]], ids=["forward", "forward and backward"])
def test_every_way_is_measured(mask: str, gradients: list[str]) -> None:
    """Eager attention needs most, attngen what its launches were said to allocate; all that run take time."""
    tensors = {"doc": "i32[batch, seqlen_k] sorted"} if "doc" in mask else {}
    kernel = attngen.compile(
        {"problem": {"head_dim": 64}, "mask": mask, "tensors": tensors, "gradients": gradients}
    )
    shape = Shape(2, 8, 8, 2048, 2048)
    found = {way.name: way for way in ways_of(kernel, shape, NOTHING_GIVEN, DEVICE)}
    ours = found[OURS]
    assert ours.takes and ours.is_measured and ours.peak_bytes is not None and ours.seconds
    q, k, v = torch.empty(3, 2, 2048, 8, 64, dtype=torch.bfloat16, device=DEVICE)
    doc = torch.zeros(2, 2048, dtype=torch.int32, device=DEVICE)
    needs = launched_bytes(kernel, q, k, v, {"doc": doc} if tensors else {})
    assert needs <= ours.peak_bytes <= needs + SLACK
    for name in (EAGER, CHUNKED, "sdpa: efficient", "sdpa: math"):
        assert found[name].takes and found[name].seconds and found[name].peak_bytes, found[name]
    assert found[EAGER].peak_bytes > 2 * shape.pairs * shape.heads  # of 16 bits at least
    assert found[EAGER].peak_bytes > found[CHUNKED].peak_bytes > ours.peak_bytes
    chosen = [name for name, way in found.items() if "torch's own choice" in way.told]
    assert len(chosen) == 1
    refused = [way for way in found.values() if not way.takes]
    assert all(way.told and way.peak_bytes is way.seconds is None for way in refused)
    assert ("sdpa: flash" in {way.name for way in refused}) == bool(tensors)  # it takes no mask tensor


def test_a_kernel_for_another_gpu_is_told() -> None:
    """attngen's row says why it does not take the call; the others are measured."""
    other = "sm_120" if torch.cuda.get_device_capability() != (12, 0) else "sm_90a"
    spec = attngen.load({"target": other, "problem": {"head_dim": 64}})
    kernel = kernel_of(spec, ARCHS[other])
    found = {way.name: way for way in ways_of(kernel, Shape(1, 2, 2, 128, 128), NOTHING_GIVEN, DEVICE)}
    assert not found[OURS].takes and "sm_" in found[OURS].told
    assert found[EAGER].takes and found["sdpa: math"].takes
