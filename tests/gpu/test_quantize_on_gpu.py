"""The quantisation kernels on a GPU against the torch reference: the same bytes and the same descales."""

from functools import cache

import pytest
import torch
from gpu_kernels import skip_unless_runs_here, wait_for_gpu

import attngen
from attngen.arch import arch_for_capability
from attngen.check.inputs import Shape
from attngen.quantize import HADAMARD_DIMS, SCALE_KINDS, ScaleKind, pack_values, quantize
from attngen.runtime import Launcher
from tests.quantize.cases import assert_same, outlying_inputs
from tests.quantize.quantizing import Quantizing, kernel_that_quantises

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

SEED = 11
SHAPES = (
    Shape(2, 4, 2, 131, 200),
    Shape(1, 6, 2, 64, 128),
    Shape(3, 3, 3, 1, 1000),
    Shape(2, 2, 2, 513, 3),
    Shape(1, 2, 1, 0, 130),
    Shape(1, 2, 2, 3, 0),
    Shape(0, 2, 2, 3, 3),
)
DIMS = (64, 64), (128, 128), (256, 256), (80, 48), (192, 128), (64, 256)
DIMS_AND_SEEDS = [
    (dims, seed) for dims in DIMS for seed in (None, SEED) if seed is None or dims[0] in HADAMARD_DIMS
]


@cache
def kernel_of(head_dims: tuple[int, int], scales: ScaleKind, seed: int | None) -> attngen.Kernel:
    skip_unless_runs_here("pingpong")  # on no other GPU do kernels take e4m3
    arch = arch_for_capability(torch.cuda.get_device_capability())
    return kernel_that_quantises(head_dims, scales, seed, arch.name)


def launcher(head_dims: tuple[int, int], scales: ScaleKind, seed: int | None) -> Quantizing:
    return fresh(kernel_of(head_dims, scales, seed))


def fresh(kernel: attngen.Kernel) -> Quantizing:
    """The kernels behind a launcher that has launched nothing yet."""
    return Quantizing(Launcher(kernel.manifest, lambda module: kernel.modules[module].compiled.cubin))


def on_gpu(x: torch.Tensor) -> torch.Tensor:
    """The tensor on the GPU, rows as far apart as they are."""
    span = (
        sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)) + 1 if x.numel() else 0
    )
    there = torch.zeros(span, dtype=x.dtype, device="cuda").as_strided(x.shape, x.stride())
    return there.copy_(x) if x.numel() else there


@pytest.mark.parametrize("scales", SCALE_KINDS)
@pytest.mark.parametrize(("head_dims", "seed"), DIMS_AND_SEEDS, ids=str)
def test_the_same_as_the_reference(seed: int | None, scales: ScaleKind, head_dims: tuple[int, int]) -> None:
    """Odd lengths, groups of heads, zeros, subnormals, infinities, NaN, no rows, strides of both layouts and types."""
    run = launcher(head_dims, scales, seed)
    for number, shape in enumerate(SHAPES):
        for dtype in (torch.bfloat16, torch.float16):
            layout = ("bshd", "bhsd")[number % 2]
            q, k, v = outlying_inputs(shape, head_dims, dtype, layout, number)
            found = run.quantize(*map(on_gpu, (q, k, v)), layout)
            wait_for_gpu()
            if layout == "bhsd":
                q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            assert_same(found, quantize(q, k, v, scales, seed))


@pytest.mark.parametrize("scales", SCALE_KINDS)
def test_the_reference_on_a_gpu(scales: ScaleKind) -> None:
    """torch gives the same on either device."""
    inputs = outlying_inputs(SHAPES[0], (64, 64), torch.bfloat16)
    assert_same(quantize(*(x.cuda() for x in inputs), scales, SEED), quantize(*inputs, scales, SEED))


@pytest.mark.parametrize("head_dim", HADAMARD_DIMS)
@pytest.mark.parametrize("scales", SCALE_KINDS)
def test_more_parts_than_blocks(scales: ScaleKind, head_dim: int) -> None:
    """Each block of threads takes part after part, of Q, of K and of V, the next one's copies under way."""
    run = launcher((head_dim, head_dim), scales, SEED)
    q, k, v = (
        torch.randn(2, n, h, head_dim, device="cuda").half() for n, h in ((9001, 8), (9100, 4), (9100, 4))
    )
    for _ in range(2):
        found = run.quantize(q, k, v)
        wait_for_gpu()
        assert_same(found, quantize(q, k, v, scales, SEED))


def test_many_rows() -> None:
    """A large tensor, whose offsets pass 2^31 elements: the last head's rows are those of the reference."""
    run = launcher((128, 128), "per_head", None)
    x = torch.empty(1, 2**20 + 77, 18, 128, dtype=torch.bfloat16, device="cuda").normal_()
    small = torch.zeros(1, 1, 18, 128, dtype=torch.bfloat16, device="cuda")
    found = run.quantize(x, small, small)
    wait_for_gpu()
    last = x[:, :, -1:].contiguous()
    expected = quantize(last, last[:, :1], last[:, :1], "per_head")
    assert torch.equal(found.q[:, :, -1:].view(torch.uint8), expected.q.view(torch.uint8))
    assert torch.equal(found.q_descale[:, -1:], expected.q_descale)


@pytest.mark.parametrize("head_dims", DIMS, ids=str)
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_packing(layout: str, head_dims: tuple[int, int]) -> None:
    """e4m3 V of any strides is laid out as the reference does."""
    run = launcher(head_dims, "per_block", None)
    for seqlen in (0, 1, 127, 128, 300):
        shape = (2, seqlen, 3, head_dims[1] + 16) if layout == "bshd" else (2, 3, seqlen, head_dims[1] + 16)
        codes = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
        v = codes[..., : head_dims[1]].view(torch.float8_e4m3fn)
        found = run.pack_v(v, layout)
        wait_for_gpu()
        expected = pack_values(v if layout == "bshd" else v.transpose(1, 2))
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("scales", ["per_tensor", "per_block"])
def test_captured_and_on_a_side_stream(scales: ScaleKind) -> None:
    """A first call may be captured; a replay quantises what the inputs hold then, maxima found anew."""
    run = fresh(kernel_of((128, 128), scales, SEED))
    first, second = (outlying_inputs(SHAPES[0], (128, 128), torch.bfloat16, seed=seed) for seed in (1, 2))
    held = [x.cuda() for x in first]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run.quantize(*held)
    for inputs in (second, first):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            for x, value in zip(held, inputs, strict=True):
                x.copy_(value * 0.5)
            graph.replay()
        stream.synchronize()
        assert_same(found, quantize(*(x.cpu() for x in held), scales, SEED))
