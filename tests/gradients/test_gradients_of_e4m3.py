"""Gradients of e4m3 inputs: straight through the rounding, to the bf16 tensors that a call quantises."""

import pytest
import torch

import attngen
from attngen.quantize import SCALE_KINDS
from tests.gradients.backward_cases import BackwardCase

CASE = BackwardCase("causal", "softcap(score, 5.0)", lengths=(70, 90), heads=(4, 2), head_dim=(64, 64))


def of_e4m3(target: str = "sm_90a", **precision: object) -> attngen.Kernel:
    spec = {"precision": {"inputs": "e4m3", **precision}}
    return BackwardCase(**{**vars(CASE), "spec": spec}).kernel(target)


@pytest.mark.parametrize("target", ["simulator", "sm_90a"])
@pytest.mark.parametrize("scales", SCALE_KINDS)
def test_gradients_are_those_of_bf16_on_the_results_of_e4m3(scales: str, target: str) -> None:
    """To the bit those of a bf16 kernel that is handed out and lse of the e4m3 one; near to its own ones."""
    kernel, bf16 = of_e4m3(target, scales=scales, incoherent="hadamard"), CASE.kernel(target)
    (q, k, v, dout), _ = CASE.inputs_on("cpu")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    got = torch.autograd.grad(kernel(*leaves), leaves, dout)
    handed = bf16.backward(dout, q, k, v, *kernel(q, k, v, return_lse=True))
    own = bf16.backward(dout, q, k, v, *bf16(q, k, v, return_lse=True))
    for x, y, z in zip(got, handed, own, strict=True):
        assert x.dtype == torch.bfloat16 and torch.equal(x, y) and not torch.equal(x, z)
        assert (x.float() - z.float()).norm() < 0.04 * z.float().norm()


def test_an_output_of_f32_goes_with_them() -> None:
    """As parts of a ring want it; D is then of the f32 output."""
    kernel = of_e4m3(output="f32")
    (q, k, v, dout), _ = CASE.inputs_on("cpu")
    out, lse = kernel(q, k, v, return_lse=True)
    assert out.dtype == torch.float32
    found = kernel.backward(dout, q, k, v, out, lse)
    short = of_e4m3().backward(dout, q, k, v, out.bfloat16(), lse)
    for x, y in zip(found, short, strict=True):
        assert (x.float() - y.float()).norm() < 0.01 * y.float().norm()


def test_what_has_no_gradient_is_refused_with_the_reason() -> None:
    """f16 and e4m3 tensors, and operands: gradients are of bf16 tensors that the call was given."""
    kernel = of_e4m3("simulator")
    (q, k, v, dout), _ = CASE.inputs_on("cpu")
    out, lse = kernel(q, k, v, return_lse=True)
    half = [x.half() for x in (q, k, v)]
    kernel(*half)
    with pytest.raises(
        attngen.ArgumentError, match="argument q: .*float16, expected torch.bfloat16, which gradients"
    ):
        kernel(half[0].requires_grad_(), *half[1:])
    short = q.to(torch.float8_e4m3fn)
    with pytest.raises(attngen.ArgumentError, match="argument q: .*float8_e4m3fn, expected torch.bfloat16"):
        kernel.backward(dout, short, k, v, out, lse)
    with pytest.raises(attngen.ArgumentError, match="argument q: got operands of kernel.quantize.*of these"):
        kernel.backward(dout, kernel.quantize(q, k, v), None, None, out, lse)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_their_kernels_compile(head_dim: int) -> None:
    """Every text of the call, the quantiser's too, without spills."""
    spec = {
        "precision": {"inputs": "e4m3"},
        "mask": "causal",
        "gradients": ["q", "k", "v"],
        "target": "sm_90a",
    }
    kernel = attngen.compile({"problem": {"head_dim": head_dim}, **spec})
    kernel.compile()
    used = [each for module in kernel.modules.values() for each in module.compiled.resources]
    assert len(used) == len(kernel.manifest.kernels) and all(each.spill_stores == 0 for each in used)
