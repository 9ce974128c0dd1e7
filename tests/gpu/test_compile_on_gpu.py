"""torch.compile on one GPU: CUDA graphs of calls with tables and of persistent kernels, lengths that vary, inductor."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from gpu_kernels import skip_unless_runs_here
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.cudagraph_trees import get_manager

import attngen
from attngen.capture import pack

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

HEADS, HEAD_DIM, LENGTH = 4, 64, 600
SPEC = {
    "problem": {"head_dim": HEAD_DIM},
    "mask": "causal and document(doc)",
    "score": "score + alibi(slopes)",
    "tensors": {"doc": "i32[batch, seqlen_k]", "slopes": "f32[num_heads_q]"},
    "gradients": ["q", "k", "v"],
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "auto": {},
    "persistent": {"schedule": {"kind": "warp_specialized", "persistent": True}},
}
Step = Callable[..., Any]


@cache
def kernel(schedule: str) -> attngen.Kernel:
    if schedule == "persistent":
        skip_unless_runs_here("warp_specialized")
    return attngen.compile({**SPEC, **SCHEDULES[schedule]})


def inputs(seed: int, length: int = LENGTH, requires_grad: bool = False) -> list[torch.Tensor]:
    """q, k, v, documents and slopes, new ones each time."""
    generator = torch.Generator("cuda").manual_seed(seed)
    tensors = [
        torch.randn(2, length, HEADS, HEAD_DIM, generator=generator, device="cuda", dtype=torch.float32)
        .bfloat16()
        .requires_grad_(requires_grad)
        for _ in range(3)
    ]
    doc = torch.arange(length, dtype=torch.int32, device="cuda").expand(2, -1) // (50 + 37 * seed)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.1], dtype=torch.float32, device="cuda") * (seed + 1)
    return [*tensors, doc.contiguous(), slopes]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Every test compiles for itself, and torch looks after each recording for memory that should not be there."""
    torch._dynamo.reset()
    counters.clear()
    with inductor.patch({"triton.slow_path_cudagraph_asserts": True}):
        yield
    torch._dynamo.reset()


def attends(schedule: str) -> Step:
    """Two layers with work of inductor's own between them, whose memory lies in the pool of the graph."""
    made = kernel(schedule)

    def step(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, doc: torch.Tensor, slopes: torch.Tensor
    ) -> Any:
        first = made(q * 0.5, k, v, doc=doc, slopes=slopes)
        return made(first, k + v, v, doc=doc, slopes=2 * slopes) + first

    return step


def was_recorded() -> bool:
    """Whether there is a CUDA graph of torch.compile, and nothing was left out of one."""
    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    return manager is not None and any(manager.roots.values()) and not counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_cuda_graphs_with_tables(schedule: str) -> None:
    """mode="reduce-overhead": tables of each replay are of its documents, whatever eager calls do in between.

    Memory that stays from call to call may not be torch's inside of a recording: it is given to others there.
    """
    step = attends(schedule)
    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for seed in range(8):
            torch.compiler.cudagraph_mark_step_begin()
            given = inputs(seed)
            found = compiled(*given).clone()
            right = step(*given)
            filler = [torch.full((1 << 18,), 7, dtype=torch.uint8, device="cuda") for _ in range(16)]
            assert torch.equal(found, right) and bool(found.any()), seed
            del filler
    assert was_recorded()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_cuda_graphs_of_a_training_step(schedule: str) -> None:
    """Both passes are recorded, and gradients are those of eager steps, bit for bit."""
    step = attends(schedule)
    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    for seed in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        given = inputs(seed, requires_grad=True)
        found = torch.autograd.grad(compiled(*given).float().square().sum(), given[:3])
        found = [x.clone() for x in found]
        right = torch.autograd.grad(step(*given).float().square().sum(), given[:3])
        for x, y in zip(found, right, strict=True):
            # Between the layers inductor rounds where eager torch does, or once less.
            assert float((x - y).abs().max()) <= 2.0**-6 * float(y.abs().max()) and bool(x.any()), seed
    assert was_recorded()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_lengths_that_vary_are_two_frames(requires_grad: bool) -> None:
    """From 128 to 2048, across the lengths at which another kernel takes over."""
    counter = CompileCounterWithBackend("inductor")

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return attngen.attention(q, k, v, "causal")

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for length in (128, 200, 512, 1000, 2048):
        given = inputs(0, length, requires_grad)[:3]
        found, right = compiled(*given), step(*given)
        assert torch.equal(found, right)
        if requires_grad:
            dout = torch.randn_like(right)
            of_found, of_right = (torch.autograd.grad(out, given, dout) for out in (found, right))
            assert all(torch.equal(x, y) and x.any() for x, y in zip(of_found, of_right, strict=True))
    assert counter.frame_count <= 2


def test_torch_finds_no_fault() -> None:
    """Fake sizes and strides are those of a GPU's results: torch.library.opcheck."""
    made = kernel("auto")
    for layout in ("bshd", "bhsd"):
        *rows, doc, slopes = inputs(1, requires_grad=True)
        q, k, v = (x.detach().transpose(1, 2).requires_grad_() if layout == "bhsd" else x for x in rows)
        packed = pack(None, layout, None, {"doc": doc, "slopes": slopes})
        torch.library.opcheck(torch.ops.attngen.attention_with_lse.default, (q, k, v, made.text, *packed))


def test_autocast_and_vmap() -> None:
    """f32 inputs become those of the context; what is mapped over is part of the batch."""
    q, k, v = (x.float() for x in inputs(3)[:3])
    with torch.autocast("cuda", dtype=torch.float16):
        out = attngen.attention(q, k, v, "causal")
    right = attngen.attention(q.half(), k.half(), v.half(), "causal")
    assert out.dtype == torch.float16 and torch.equal(out, right)
    mapped = torch.func.vmap(lambda *given: attngen.attention(*given, "causal"))(
        *(torch.stack([x, 2 * x]).half() for x in (q, k, v))
    )
    assert torch.equal(mapped[0], right) and not torch.equal(mapped[1], right)
