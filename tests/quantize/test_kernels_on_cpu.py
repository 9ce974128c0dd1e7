"""The emitted quantisation kernels, run by g++, against the torch reference: the same bytes and the same descales."""

from functools import cache

import pytest
import torch

from attngen.check.inputs import Shape
from attngen.errors import ArgumentError
from attngen.quantize import SCALE_KINDS, ScaleKind, pack_values, quantize
from attngen.runtime import Launcher
from tests.plans import no_code
from tests.quantize.cases import assert_same, outlying_inputs
from tests.quantize.on_cpu import CpuKernels
from tests.quantize.quantizing import Quantizing, kernel_that_quantises

SEED = 11


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one multiprocessor, so that a block of threads works on several parts."""
    monkeypatch.setattr("attngen.runtime.launch.sms_of", lambda arch, device: 1)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)


@cache
def launcher(head_dims: tuple[int, int], scales: ScaleKind, seed: int | None) -> Quantizing:
    kernel = kernel_that_quantises(head_dims, scales, seed)
    (module,) = (module for name, module in kernel.modules.items() if name.endswith("_quantize"))
    kernels = CpuKernels(module.source)
    return Quantizing(Launcher(kernel.manifest, no_code, load=kernels.load, start=kernels.start))


@pytest.mark.matrix(most=3)
@pytest.mark.parametrize("seed", [None, SEED])
@pytest.mark.parametrize("scales", SCALE_KINDS)
def test_every_kind_of_scale(scales: ScaleKind, seed: int | None) -> None:
    """Odd lengths, groups of heads, zeros, subnormals, infinities, NaN, no rows, strides of both layouts and types."""
    run = launcher((64, 64), scales, seed)
    for layout, dtype, shape in (
        ("bshd", torch.bfloat16, Shape(2, 4, 2, 131, 200)),
        ("bhsd", torch.float16, Shape(1, 3, 3, 65, 5)),
        ("bshd", torch.float16, Shape(1, 2, 1, 0, 130)),
        ("bshd", torch.bfloat16, Shape(1, 2, 2, 3, 0)),
        ("bshd", torch.bfloat16, Shape(0, 2, 2, 3, 3)),
    ):
        q, k, v = outlying_inputs(shape, (64, 64), dtype, layout)
        found = run.quantize(q, k, v, layout)
        if layout == "bhsd":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        assert_same(found, quantize(q, k, v, scales, seed))


@pytest.mark.parametrize("scales", SCALE_KINDS)
def test_the_largest_numbers(scales: ScaleKind) -> None:
    """Of bf16: 448 * 2^119 and more, up to the largest finite one, among which a descale of 2^120 is."""
    q, k, v = outlying_inputs(Shape(1, 2, 1, 70, 300), (64, 64), torch.bfloat16)
    v[0, 7, 0, 3], v[0, 150, 0, 9], v[0, 290, 0, 1] = 2.9e38, 3.2e38, torch.finfo(torch.bfloat16).max
    assert_same(launcher((64, 64), scales, None).quantize(q, k, v), quantize(q, k, v, scales))


@pytest.mark.parametrize(
    ("head_dims", "seed"),
    [
        ((32, 32), None),
        ((80, 48), None),
        ((192, 128), None),
        ((64, 256), None),
        ((128, 112), SEED),
        ((256, 64), SEED),
    ],
    ids=str,
)
def test_head_dims(head_dims: tuple[int, int], seed: int | None) -> None:
    """Rows of any multiple of 16, and Hadamard matrices of every order."""
    q, k, v = outlying_inputs(Shape(1, 2, 1, 70, 150), head_dims, torch.bfloat16)
    for scales in ("per_block", "per_token") if head_dims[0] in (80, 256) else ("per_block",):
        assert_same(launcher(head_dims, scales, seed).quantize(q, k, v), quantize(q, k, v, scales, seed))


@pytest.mark.parametrize("dim", [32, 48, 128, 256])
def test_packing(dim: int) -> None:
    """e4m3 V of any strides is laid out as the reference does."""
    run = launcher({32: (32, 32), 48: (80, 48), 128: (192, 128), 256: (64, 256)}[dim], "per_block", None)
    codes = torch.randint(0, 256, (2, 3, 200, dim + 16), dtype=torch.uint8)[..., :dim].view(
        torch.float8_e4m3fn
    )
    found = run.pack_v(codes, "bhsd")
    assert torch.equal(found.view(torch.uint8), pack_values(codes.transpose(1, 2)).view(torch.uint8))
    assert run.pack_v(codes[:, :, :0], "bhsd").shape == (2, 3, dim, 0)


def test_what_is_refused() -> None:
    """Errors name the argument, what is wrong with it and the cure; known signatures are looked at again."""
    run = launcher((64, 64), "per_block", None)
    q, k, v = outlying_inputs(Shape(1, 2, 2, 10, 10), (64, 64), torch.bfloat16)
    run.quantize(q, k, v)
    off = torch.empty(v.numel() * 2, dtype=v.dtype)[1:].as_strided(v.shape, v.stride())
    e4m3 = v.to(torch.float8_e4m3fn)
    for call, message in (
        (lambda: run.quantize(q.float(), k, v), "argument q: got dtype torch.float32"),
        (lambda: run.quantize(None, k, v), "argument q: got NoneType"),  # type: ignore[arg-type]
        (lambda: run.quantize(q, k.half(), v), "argument k: got dtype torch.float16"),
        (lambda: run.quantize(q, k, v[:, :9]), "argument v: got shape"),
        (lambda: run.quantize(q, k, off), "argument v: got an address"),
        (lambda: run.quantize(q.requires_grad_(), k, v), "argument q: got a tensor that requires grad"),
        (lambda: run.quantize(q, k, v, "sbhd"), "argument layout: got 'sbhd'"),  # type: ignore[arg-type]
        (lambda: run.pack_v(v), "argument v: got dtype torch.bfloat16"),
        (lambda: run.pack_v(e4m3[..., :32]), "argument v: got shape"),
        (lambda: run.pack_v(e4m3.transpose(1, 3), "bshd"), "argument v: got "),
        (lambda: run.pack_v([]), "argument v: got list"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ArgumentError) as refusal:
            call()
        assert message in str(refusal.value)
        q.requires_grad_(False)
