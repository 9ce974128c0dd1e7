"""Calls of a backward pass on a GPU: graphs, memory of the caller's, f32 sums, far strides, parts of a ring."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import attngen
from attngen.arch import arch_for_capability
from tests.gpu.gpu_kernels import KINDS, captured, skip_unless_runs_here
from tests.gradients.backward_cases import BackwardCase

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]

CASE = BackwardCase("causal", "softcap(score, 3.0)", (300, 333), (4, 2), (64, 64))
CASES = (
    CASE,
    replace(CASE, head_dim=(128, 128), inputs="f16"),
    replace(CASE, head_dim=(192, 128)),
    replace(CASE, head_dim=(256, 256), lengths=(130, 130)),
    replace(CASE, mask="causal and document(doc)", lengths=(333, 333), head_dim=(40, 40)),
)


def target() -> str:
    return arch_for_capability(torch.cuda.get_device_capability()).name


def forward(case: BackwardCase) -> tuple[attngen.Kernel, dict[str, torch.Tensor]]:
    """A kernel, and what its backward pass takes."""
    kernel = case.kernel(target())
    (q, k, v, dout), declared = case.inputs_on("cuda")
    out, lse = kernel(q, k, v, return_lse=True, **declared)
    return kernel, {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse, **declared}


def zeros(call: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [torch.zeros(call[name].shape, device="cuda") for name in "qkv"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_f32_gradients_and_sums(case: BackwardCase) -> None:
    """f32 rounds to the short ones to the bit; what memory holds is added in f32 and rounded once."""
    kernel, call = forward(case)
    short, whole = kernel.backward(**call), kernel.backward(**call, grads=zeros(call))
    for x, y in zip(short, whole, strict=True):
        assert torch.equal(x, y.to(x.dtype)) and not torch.equal(x.float(), y)
    for dtype in (torch.float32, short[0].dtype):
        held = [torch.randn_like(x).to(dtype) for x in whole]
        expected = [(x.float() + y).to(dtype) for x, y in zip(held, whole, strict=True)]
        kernel.backward(**call, grads=held, accumulate=True)
        assert all(torch.equal(x, y) for x, y in zip(held, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_go_where_strides_say(dtype: torch.dtype) -> None:
    """Into slices of one packed tensor, and what lies between keeps its values."""
    kernel, call = forward(replace(CASE, heads=(2, 2), lengths=(300, 300)))
    expected = kernel.backward(**call, grads=[x.to(dtype) for x in zeros(call)])
    packed = torch.full((2, 300, 5, 2, 64), 7.0, dtype=dtype, device="cuda")
    grads = [packed[:, :, 1], packed[:, :, 3], torch.empty_like(call["v"], dtype=dtype)]
    kernel.backward(**call, grads=grads)
    assert all(torch.equal(x, y) for x, y in zip(grads, expected, strict=True))
    assert (packed[:, :, ::2] == 7).all()


def test_a_captured_step_can_be_replayed() -> None:
    """Forward and backward by autograd in one graph: two replays on two inputs have the bits of calls outside."""
    kernel, call = forward(CASE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(
        side
    ):  # autograd meets again the stream that it saw first, which must not be the legacy one
        leaves = [call[name].clone().requires_grad_() for name in "qkv"]

        def step() -> list[torch.Tensor]:
            return list(torch.autograd.grad(kernel(*leaves), leaves, call["dout"]))

        step()
    torch.cuda.current_stream().wait_stream(side)
    graph, found = captured(step)  # type: ignore[arg-type]
    for seed in (1, 2):
        with torch.no_grad():
            torch.manual_seed(seed)
            for x in leaves:
                x.copy_(torch.randn_like(x))
        for x in found:
            x.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(x, y) and x.any() for x, y in zip(found, step(), strict=True))


def test_given_memory_leaves_two_rows_to_allocate() -> None:
    """With gradients of the caller's a pass allocates D and lse in log2 units, and nothing else."""
    kernel, call = forward(replace(CASE, lengths=(512, 512), heads=(4, 4)))
    grads = zeros(call)
    kernel.backward(**call, grads=grads)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kernel.backward(**call, grads=grads, accumulate=True)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before == 2 * 4 * call["lse"].numel()


FAR: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows 2^20 apart": lambda x: (
        torch.empty(300 * 2**20, dtype=x.dtype, device="cuda")
        .as_strided(x[:1].shape, (0, 2**20, 64, 1))
        .copy_(x[:1])
    ),
    "rows 2^23 apart": lambda x: (
        torch.empty(300 * 2**23, dtype=x.dtype, device="cuda")
        .as_strided(x[:1].shape, (0, 2**23, 64, 1))
        .copy_(x[:1])
    ),
    "transposed": lambda x: x[:1].transpose(1, 2).contiguous().transpose(1, 2),
    "one row for all": lambda x: x[:1, :1].expand(x[:1].shape),
}


@pytest.mark.parametrize("how", FAR)
def test_far_strides_are_read_and_written(how: str) -> None:
    """Offsets beyond 2^31 elements are those of 64 bits: of dout, of out, and of dq."""
    kernel, call = forward(CASE)
    call = {name: x[:1] for name, x in call.items()}
    dense = call | {"dout": FAR[how](call["dout"]).contiguous()}
    expected = kernel.backward(**dense, grads=zeros(call))
    far = dense | {
        name: FAR[how](call[name]) for name in ("dout", "out") if "one row" not in how or name == "dout"
    }
    grads = zeros(call)
    if "apart" in how:
        step = far["dout"].stride(1)
        grads[0] = torch.empty(300 * step, device="cuda").as_strided(call["q"].shape, (0, step, 64, 1))
    kernel.backward(**far, grads=grads)
    are_equal = all(torch.equal(x, y) for x, y in zip(grads, expected, strict=True))
    del dense, far, grads
    torch.cuda.empty_cache()  # others share the GPU's memory
    assert are_equal


def test_a_later_call_off_16_bytes_is_refused() -> None:
    """Of a signature that is known; the GPU goes on."""
    kernel, call = forward(CASE)
    expected = kernel.backward(**call)
    dout = call["dout"]
    off = torch.zeros(dout.numel() + 8, dtype=dout.dtype, device="cuda")[4:-4].view(dout.shape)
    with pytest.raises(attngen.ArgumentError, match="argument dout: got an address that is 8 bytes past"):
        kernel.backward(**call | {"dout": off})
    assert all(torch.equal(x, y) for x, y in zip(kernel.backward(**call), expected, strict=True))


@pytest.mark.parametrize("head_dim", [(64, 64), (128, 128), (40, 40), (192, 128)])
@pytest.mark.parametrize("inputs", ["bf16", "f16"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_of_f32_round_to_the_short_ones(kind: str, inputs: str, head_dim: tuple[int, int]) -> None:
    """Of every schedule, into memory of any strides; what lies between rows keeps its values."""
    skip_unless_runs_here(kind)
    case = replace(CASE, inputs=inputs, head_dim=head_dim, spec={"schedule": {"kind": kind}})
    (q, k, v, _), _ = case.inputs_on("cuda")
    short, lse = case.kernel(target())(q, k, v, return_lse=True)
    wide = replace(case, spec={**case.spec, "precision": {"inputs": inputs, "output": "f32"}}).kernel(
        target()
    )
    whole, of_whole = wide(q, k, v, return_lse=True)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole, short.float(), rtol=2**-8, atol=2**-8)
    torch.testing.assert_close(of_whole, lse)
    apart = torch.full((*short.shape[:3], 2 * short.shape[3]), 7.0, device="cuda")
    wide(q, k, v, out=apart[..., : short.shape[3]])
    assert torch.equal(apart[..., : short.shape[3]], whole) and (apart[..., short.shape[3] :] == 7).all()


def test_parts_of_a_ring_give_the_whole_gradient() -> None:
    """Each part of the keys has its call, on out and lse merged in f32, whose sums keep the rule on gradients."""
    case = replace(CASE, mask="full", spec={"precision": {"inputs": "bf16", "output": "f32"}})
    kernel = case.kernel(target())
    drawn, _ = case.inputs_on("cuda")
    q, k, v, dout = drawn
    spans = (slice(0, 128), slice(128, 200), slice(200, 333))
    parts = [kernel(q, k[:, keys], v[:, keys], return_lse=True) for keys in spans]
    lse = torch.logsumexp(torch.stack([each for _, each in parts]), 0)
    out = sum((each - lse).exp().transpose(1, 2)[..., None] * part for part, each in parts)
    grads = [torch.zeros(x.shape, device="cuda") for x in (q, k, v)]
    for keys in spans:
        mine = (grads[0], grads[1][:, keys], grads[2][:, keys])
        kernel.backward(dout, q, k[:, keys], v[:, keys], out, lse, grads=mine, accumulate=True)
    verdict = case.verdict(tuple(x.bfloat16() for x in grads), drawn, {})
    assert verdict.ok, verdict.failures


@pytest.mark.parametrize("output", ["auto", "f32"])
def test_gradients_of_e4m3_are_those_of_bf16_on_its_results(output: str) -> None:
    """Straight through the rounding: out and lse are those of e4m3, all else is bf16's, to the bit."""
    skip_unless_runs_here("warp_specialized")
    case = replace(CASE, spec={"precision": {"inputs": "e4m3", "output": output}})
    bf16 = replace(CASE, spec={"precision": {"inputs": "bf16", "output": output}}).kernel(target())
    (q, k, v, dout), _ = case.inputs_on("cuda")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = case.kernel(target())(*leaves, return_lse=True)
    got = torch.autograd.grad(out, leaves, dout.to(out.dtype))
    expected = bf16.backward(dout, q, k, v, out.detach(), lse.detach())
    assert all(torch.equal(x, y) and x.any() for x, y in zip(got, expected, strict=True))
