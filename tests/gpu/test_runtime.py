"""Launching on a GPU: streams, graphs, tile counters, allocations, host time."""

import random
import threading
import time
from collections.abc import Callable
from statistics import median

import pytest
import torch
from gpu_kernels import KINDS, WARPGROUP_KINDS, captured, counters_are_zero, kernel, wait_for_gpu
from torch.nn.functional import scaled_dot_product_attention

import attngen
from attngen.check.accuracy import compare
from attngen.check.inputs import Shape, random_inputs
from attngen.runtime import launch as launch_module
from attngen.runtime.counters import SLOTS, TileCounters

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

SPEC = {"problem": {"head_dim": 64}, "mask": "causal"}


def inputs(
    seqlen: int = 512, seed: int = 0, device: str = "cuda"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return random_inputs(Shape(2, 8, 2, seqlen, seqlen), 64, 64, torch.bfloat16, device, seed)


def in_a_thread(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What a call gives on a thread that has not used the GPU, when it has ended; its error, if it raises."""
    found: list[torch.Tensor | BaseException] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:  # a thread would print it and the test would pass
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    wait_for_gpu()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_side_stream_behind_a_slow_producer(kind: str) -> None:
    """A launch waits for what its stream waits for: inputs made late by a slow kernel are the ones used."""
    made = kernel(kind)
    q, k, v = inputs()
    expected = made(q, k, v)
    late = torch.zeros_like(q)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(q)
        out = made(late, k, v)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_two_streams_at_once(kind: str) -> None:
    """Launches on two streams overlap and do not disturb each other: each gives what it gives alone."""
    made = kernel(kind)
    calls = (inputs(512, seed=1), inputs(300, seed=2))
    expected = [made(*call) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    outs: tuple[list[torch.Tensor], ...] = ([], [])
    for _ in range(100):
        for stream, call, found in zip(streams, calls, outs, strict=True):
            with torch.cuda.stream(stream):
                found.append(made(*call))
    for stream in streams:
        torch.cuda.current_stream().wait_stream(stream)
    wait_for_gpu()
    for found, right in zip(outs, expected, strict=True):
        assert bool((torch.stack(found) == right).all())
    assert counters_are_zero()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_first", [False, True])
def test_the_first_cuda_call_of_a_thread(kind: str, is_first: bool) -> None:
    """A thread has no context before it uses the GPU: a launch makes one current, of a known signature or a new one.

    With all tensors of the main thread the launch is the thread's first call; with its own, torch's allocator comes
    first.
    """
    expected, made = kernel(kind), kernel(kind)
    q, k, v = inputs(seed=9)
    right = expected(q, k, v)
    assert bool(right.any())
    if not is_first:
        made(q, k, v)
    out = torch.zeros_like(q)
    torch.cuda.synchronize()
    assert torch.equal(in_a_thread(lambda: made(q, k, v, out=out)), right)
    assert torch.equal(in_a_thread(lambda: made(q, k, v)), right)
    assert torch.equal(in_a_thread(lambda: made(*inputs(seed=9))), right)
    assert counters_are_zero()


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_on_another_device_than_the_current_one(kind: str) -> None:
    """The launch goes to the tensors' device and its current stream; the caller's current device stays what it was."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    made = kernel(kind)
    here, there = inputs(seed=10), inputs(seed=10, device="cuda:1")
    right = made(*here)
    stream = torch.cuda.Stream("cuda:1")
    stream.wait_stream(torch.cuda.current_stream("cuda:1"))
    with torch.cuda.stream(stream), torch.cuda.device(0):
        found = [made(*there) for _ in range(3)]
        found.append(in_a_thread(lambda: made(*there)))
        assert torch.cuda.current_device() == 0
    torch.cuda.synchronize("cuda:1")
    assert bool(right.any())
    for out in found:
        assert out.device.index == 1 and torch.equal(out.cpu(), right.cpu())
    assert counters_are_zero()


def chain(made: attngen.Kernel, call: tuple[torch.Tensor, ...], pause: bool = False) -> torch.Tensor:
    """The last of four launches each of which has the output of the one before for V; NaN where nothing is written."""
    q, k, values = call
    outputs = [torch.full_like(values, torch.nan) for _ in range(4)]
    for out in outputs:
        made(q, k, values, out=out)
        values = out
        if pause:
            torch.cuda.synchronize()
    return values


@pytest.mark.parametrize("kind", KINDS)
def test_each_launch_waits_for_the_one_before(kind: str) -> None:
    """Launches may start before the last has ended, but read what it wrote: one after another, and in a graph."""
    made = kernel(kind)
    call = random_inputs(Shape(4, 16, 16, 640, 640), 64, 64, torch.bfloat16, "cuda", 5)
    expected = chain(made, call, pause=True)
    graph, out = captured(lambda: chain(made, call))
    for _ in range(20):
        graph.replay()
        wait_for_gpu()
        assert torch.equal(out, expected) and torch.equal(chain(made, call), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_launches_between_streams_copies_and_fills(kind: str) -> None:
    """What a launch follows may be an event of another stream, a copy or a fill, or the last launch but one."""
    made = kernel(kind)
    q, k, v = call = random_inputs(Shape(4, 16, 16, 640, 640), 64, 64, torch.bfloat16, "cuda", 6)
    side = torch.cuda.Stream()

    def mixed(pause: bool = False) -> torch.Tensor:
        def rest() -> None:
            if pause:
                torch.cuda.synchronize()

        first = chain(made, call, pause)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            second = made(q, k, first)
        torch.cuda.current_stream().wait_stream(side)
        rest()
        third = made(q, second, first)
        rest()
        copy = torch.zeros_like(third).copy_(third)
        rest()
        return made(q, copy, second)

    expected = mixed(pause=True)
    graph, out = captured(mixed)
    for _ in range(20):
        graph.replay()
        wait_for_gpu()
        assert torch.equal(out, expected) and torch.equal(mixed(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_graph_replay_uses_new_data(kind: str) -> None:
    """A captured call replays on whatever the input tensors then hold, twice in a row too."""
    made = kernel(kind)
    q, k, v = inputs()
    made(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = made(q, k, v)
    for seed in (1, 2):
        fresh = inputs(seed=seed)
        for old, new in zip((q, k, v), fresh, strict=True):
            old.copy_(new)
        out.zero_()
        graph.replay()
        graph.replay()
        wait_for_gpu()
        assert torch.equal(out, made(*fresh))
    assert counters_are_zero()


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_replays_beside_other_launches(kind: str) -> None:
    """A graph on one stream and plain launches on another do not share a counter: both stay right."""
    made = kernel(kind)
    call, other = inputs(seed=3), inputs(300, seed=4)
    expected, right = made(*call), made(*other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = made(*call)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    found = []
    for _ in range(50):
        with torch.cuda.stream(side):
            graph.replay()
        found.append(made(*other))
    torch.cuda.current_stream().wait_stream(side)
    wait_for_gpu()
    assert torch.equal(out, expected) and all(torch.equal(x, right) for x in found)
    assert counters_are_zero()


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_call_may_be_captured(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading the kernel and making counters in the middle of a capture does not break it; the replay is right."""
    counters = TileCounters()
    monkeypatch.setattr(launch_module, "COUNTERS", counters)
    expected, made = kernel(kind), kernel(kind)
    q, k, v = inputs(seed=6)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = made(q, k, v, return_lse=True)
    for seed in (6, 7):
        for old, new in zip((q, k, v), inputs(seed=seed), strict=True):
            old.copy_(new)
        out.zero_()
        graph.replay()
        wait_for_gpu()
        right, right_lse = expected(q, k, v, return_lse=True)
        assert bool(right.any()) and torch.equal(out, right) and torch.equal(lse, right_lse)
    assert len(counters.memory) == (kind in WARPGROUP_KINDS) and counters_are_zero(counters)


@pytest.mark.parametrize("kind", WARPGROUP_KINDS)
def test_more_captured_launches_than_counters_are_made_at_a_time(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graph after graph, each launch keeps a counter; more are made when none is left, all replay."""
    counters = TileCounters()
    monkeypatch.setattr(launch_module, "COUNTERS", counters)
    made = kernel(kind)
    q, k, v = inputs(64, seed=8)
    out, right = torch.empty_like(q), made(q, k, v)
    graphs = []
    for _ in range(3):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(SLOTS // 2):
                made(q, k, v, out=out)
        graphs.append(graph)
    assert len(counters.memory) == 2
    for graph in graphs:
        out.zero_()
        graph.replay()
        wait_for_gpu()
        assert torch.equal(out, right)
    assert counters_are_zero(counters)


@pytest.mark.parametrize("kind", WARPGROUP_KINDS)
def test_tile_counter_is_zero_after_every_launch(kind: str) -> None:
    """Whatever the tiles and the blocks, one tile or thousands: the next launch finds the counter at 0."""
    made = kernel(kind)
    draw = random.Random(0)
    q, k, v = random_inputs(Shape(4, 64, 2, 600, 600), 64, 64, torch.bfloat16, "cuda")
    for _ in range(100):
        batch, group = draw.randint(1, 4), draw.choice((1, 2, 8, 32))
        rows, keys = draw.randint(1, 600), draw.randint(0, 600)
        made(q[:batch, :rows, : 2 * group], k[:batch, :keys], v[:batch, :keys])
        wait_for_gpu()
        assert counters_are_zero(), f"batch {batch}, group {group}, {rows} rows, {keys} keys"


@pytest.mark.timeout(120, method="thread")
@pytest.mark.parametrize("kind", WARPGROUP_KINDS)
def test_ten_thousand_launches_of_random_lengths(kind: str) -> None:
    """One kernel on random lengths, launch behind launch, never hangs; every 1000th result is judged."""
    made = kernel(kind)
    draw = random.Random(1)
    q, k, v = inputs(640, seed=5)
    lengths = [draw.randint(1, 640) for _ in range(60)]  # 3600 pairs: the launcher remembers 4096 signatures
    for launch in range(1, 10_001):
        rows, keys = draw.choice(lengths), draw.choice(lengths)
        call = (q[:, :rows], k[:, :keys], v[:, :keys])
        out, lse = made(*call, return_lse=True)
        if launch % 1000 == 0:
            wait_for_gpu()
            accuracy = compare(out, lse, *call, made.spec.mask_expr)
            assert accuracy.ok, f"launch {launch}, {rows} rows, {keys} keys: {accuracy}"
    assert counters_are_zero()


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_allocates_its_outputs_and_documented_workspaces_only(kind: str) -> None:
    """One kernel a launch and no other, and no byte beyond out, lse and what explain_launch names."""
    from torch.profiler import ProfilerActivity, profile

    made = kernel(kind)
    q, k, v = inputs()
    made(q, k, v, return_lse=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        out, lse = made(q, k, v, return_lse=True)
        torch.cuda.synchronize()
    launched = [event for event in profiler.events() if event.device_type.name == "CUDA"]
    (report,) = made.explain_launch(q, k, v)
    assert [event.name for event in launched] == [report.kernel]
    expected = out.numel() * 2 + lse.numel() * 4 + sum(report.workspace_bytes.values())
    assert torch.cuda.max_memory_allocated() - before <= expected + 512 * 5  # the allocator rounds to 512


def test_a_hundred_shapes_compile_once(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes are run-time arguments: a hundred of them compile nothing that `compile` has not."""
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(tmp_path))
    kernel = attngen.compile(SPEC)
    entries = len(attngen.runtime.DiskCache().entries())
    assert entries == len(kernel.modules)
    for seed in range(100):
        shape = Shape(1 + seed % 3, 4 * (1 + seed % 2), 2, 1 + 7 * seed % 300, 1 + 11 * seed % 300)
        kernel(*random_inputs(shape, 64, 64, torch.bfloat16, "cuda", seed))
    assert len(attngen.runtime.DiskCache().entries()) == entries


def test_host_time_of_a_call() -> None:
    """With fresh tensors and outputs allocated inside, a call costs the host no more than torch's own attention does.

    The goal is 12 us; hosts differ by a factor of two, from hour to hour too.
    """
    kernel = attngen.compile(SPEC)
    fresh = [inputs(16, seed) for seed in range(200)]
    of_torch = [(q.transpose(1, 2),) * 3 for q, _, _ in fresh]  # as many heads of K and V as of Q
    calls = {"attngen": (kernel, fresh), "torch": (scaled_dot_product_attention, of_torch)}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(7):
        for name, (call, passed) in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for q, k, v in passed:
                call(q, k, v)
            samples[name].append((time.perf_counter() - start) / len(passed) * 1e6)
    medians = {name: median(times) for name, times in samples.items()}
    print("host time", ", ".join(f"{name} {us:.1f} us" for name, us in medians.items()))
    assert medians["attngen"] <= medians["torch"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_argument_of_a_known_signature_is_named(kind: str) -> None:
    """What was remembered of good calls lets no bad one through: nothing is launched, the next good call is right."""
    made = kernel(kind)
    q, k, v = inputs(seed=11)
    right = made(q, k, v, softmax_scale=1.0)
    bad = {
        "q": (None, q[..., :32], q.float()),
        "k": (None, k.cpu(), k.tolist(), k.to_sparse(), k.half(), k[:, :, :, 1:]),
        "v": (None, v.cpu(), v[:, 1:], v.clone().requires_grad_()),
        "out": (1, right.float(), q),
        "layout": (None, ["bshd"], "dhsb"),
        "softmax_scale": (True, "1", float("nan")),
    }
    for argument, values in bad.items():
        for value in values:
            with pytest.raises(attngen.ArgumentError) as caught:
                made(**{"q": q, "k": k, "v": v, "softmax_scale": 1.0} | {argument: value})
            assert caught.value.argument == argument
    assert bool(right.any()) and torch.equal(made(q, k, v, softmax_scale=1.0), right)


def test_a_kernel_for_another_gpu_says_so() -> None:
    """A cubin for an arch that this GPU is not gives an error naming both."""
    other = "sm_80" if torch.cuda.get_device_capability() >= (9, 0) else "sm_90a"
    kernel = attngen.compile(SPEC, arch=other)
    with pytest.raises(attngen.ToolchainError, match=f"{other}.*compute capability"):
        kernel(*inputs())
