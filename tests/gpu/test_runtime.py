"""Launching on a GPU: streams, graphs, allocations, host time."""

import time

import pytest
import torch

import attngen
from attngen.inputs import Shape, random_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

SPEC = {"problem": {"head_dim": 64}, "mask": "causal"}


def inputs(seqlen: int = 512, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return random_inputs(Shape(2, 8, 2, seqlen, seqlen), 64, 64, torch.bfloat16, "cuda", seed)


def test_a_side_stream_behind_a_slow_producer() -> None:
    """A launch waits for what its stream waits for: inputs made late by a slow kernel are the ones used."""
    kernel = attngen.compile(SPEC)
    q, k, v = inputs()
    expected = kernel(q, k, v)
    late = torch.zeros_like(q)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(q)
        out = kernel(late, k, v)
    stream.synchronize()
    assert torch.equal(out, expected)


def test_graph_replay_uses_new_data() -> None:
    """A captured call replays on whatever the input tensors then hold."""
    kernel = attngen.compile(SPEC)
    q, k, v = inputs()
    kernel(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel(q, k, v)
    for seed in (1, 2):
        fresh = inputs(seed=seed)
        for old, new in zip((q, k, v), fresh, strict=True):
            old.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, kernel(*fresh))


@pytest.mark.parametrize("kind", ["fa2", "serial"])
def test_a_call_allocates_its_outputs_and_documented_workspaces_only(kind: str) -> None:
    """One kernel a launch and no other, and no byte beyond out, lse and what explain_launch names."""
    from torch.profiler import ProfilerActivity, profile

    kernel = attngen.compile(SPEC | {"schedule": {"kind": kind}})
    q, k, v = inputs()
    kernel(q, k, v, return_lse=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        out, lse = kernel(q, k, v, return_lse=True)
        torch.cuda.synchronize()
    launched = [event for event in profiler.events() if event.device_type.name == "CUDA"]
    (report,) = kernel.explain_launch(q, k, v)
    assert [event.name for event in launched] == [report.kernel]
    expected = out.numel() * 2 + lse.numel() * 4 + sum(report.workspace_bytes.values())
    assert torch.cuda.max_memory_allocated() - before <= expected + 512 * 5  # the allocator rounds to 512


def test_a_hundred_shapes_compile_once(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes are run-time arguments: a hundred of them leave one entry in the cache."""
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(tmp_path))
    kernel = attngen.compile(SPEC)
    for seed in range(100):
        shape = Shape(1 + seed % 3, 4 * (1 + seed % 2), 2, 1 + 7 * seed % 300, 1 + 11 * seed % 300)
        kernel(*random_inputs(shape, 64, 64, torch.bfloat16, "cuda", seed))
    assert len(attngen.runtime.DiskCache().entries()) == 1


def test_host_time_of_a_call(record_property: object) -> None:
    """With outputs allocated inside and fresh tensors at every call, a call costs at most 15 us on the host."""
    kernel = attngen.compile(SPEC)
    fresh = [inputs(16, seed) for seed in range(200)]
    for tensors in fresh[:20]:
        kernel(*tensors)
    torch.cuda.synchronize()
    samples = []
    for _ in range(5):
        start = time.perf_counter()
        for q, k, v in fresh:
            kernel(q, k, v)
        samples.append((time.perf_counter() - start) / len(fresh) * 1e6)
        torch.cuda.synchronize()
    print(f"host time {sorted(samples)[2]:.1f} us")
    assert sorted(samples)[2] <= 15


def test_a_kernel_for_another_gpu_says_so() -> None:
    """A cubin for an arch that this GPU is not gives an error naming both."""
    other = "sm_80" if torch.cuda.get_device_capability() >= (9, 0) else "sm_90a"
    kernel = attngen.compile(SPEC, arch=other)
    with pytest.raises(attngen.ToolchainError, match=f"{other}.*compute capability"):
        kernel(*inputs())
