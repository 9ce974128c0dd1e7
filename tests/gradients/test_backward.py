"""Gradients by autograd and by `Kernel.backward`, on the simulator, which runs the kernels' own programs."""

import math

import pytest
import torch

import attngen
from attngen.check.gradients import attention_gradients
from attngen.plan.steps import Gemm, RecoverP, ScaleGradient, ScoreGradient, walk
from attngen.simulate import STEPS_SIMULATED
from tests.gradients.backward_cases import CASES, BackwardCase, run_backward

SMALL = BackwardCase("causal", lengths=(70, 70), heads=(4, 2))
NAMES = ("dq", "dk", "dv")


@pytest.mark.matrix
@pytest.mark.parametrize("target", ["simulator", "sm_90a"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_within_the_rule(case: BackwardCase, target: str) -> None:
    """Of every mask, score and length, against fp64 and what rounding P and dS costs."""
    kernel = case.kernel(target)
    drawn, declared = case.inputs_on("cpu")
    q, k, v, dout = drawn
    out, lse = kernel(q, k, v, case.scale, return_lse=True, **declared)
    got = kernel.backward(dout, q, k, v, out, lse, softmax_scale=case.scale, **declared)
    verdict = case.verdict(got, drawn, declared, out=out, lse=lse)
    assert verdict.ok, verdict.failures


def test_autograd_gives_what_backward_gives() -> None:
    """A call on inputs that require grad records the pass, in either layout, lse's gradient included."""
    kernel = SMALL.kernel("simulator")
    (q, k, v, dout), _ = SMALL.inputs_on("cpu")
    dlse = torch.randn(2, 4, 70)
    out, lse = kernel(q, k, v, return_lse=True)
    expected = kernel.backward(dout, q, k, v, out, lse, dlse)
    for layout in ("bshd", "bhsd"):
        leaves = [x.transpose(1, 2) if layout == "bhsd" else x for x in (q, k, v)]
        leaves = [x.detach().requires_grad_() for x in leaves]
        made, of_rows = kernel(*leaves, return_lse=True, layout=layout)
        upstream = dout.transpose(1, 2) if layout == "bhsd" else dout
        got = torch.autograd.grad((made, of_rows), leaves, (upstream, dlse))
        for name, x, y in zip(NAMES, got, expected, strict=True):
            assert torch.equal(x.transpose(1, 2) if layout == "bhsd" else x, y), name


def test_a_sum_has_gradients() -> None:
    """dO of a sum is one number in all places, without strides; unused outputs have no part."""
    kernel = SMALL.kernel("simulator")
    (q, k, v, _), _ = SMALL.inputs_on("cpu")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    got = torch.autograd.grad(kernel(*leaves).sum(), leaves)
    ones = torch.ones(2, 70, 4, 32, dtype=torch.bfloat16)
    out, lse = kernel(*(x.detach() for x in leaves), return_lse=True)
    for x, y in zip(got, kernel.backward(ones, *(x.detach() for x in leaves), out, lse), strict=True):
        assert torch.equal(x, y)
    _, lse = kernel(*leaves, return_lse=True)
    dq, dk, dv = torch.autograd.grad(lse.sum(), leaves)
    assert dq.any() and dk.any() and not dv.any()


def test_attention_makes_gradients_where_they_are_asked_for() -> None:
    """`attngen.attention` takes it from requires_grad, and gives what fp64 does."""
    drawn, _ = SMALL.inputs_on("cpu")
    q, k, v, dout = drawn
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attngen.attention(*leaves, "causal")
    got = torch.autograd.grad(out, leaves, dout)
    assert SMALL.verdict(got, drawn, {}).ok
    with torch.no_grad():
        assert not attngen.attention(*leaves, "causal").requires_grad


def test_a_declared_tensor_has_no_gradient_beside_q() -> None:
    """Where q has one and a bias wants one, the call says that the bias gets none."""
    case = BackwardCase("causal", "score + bias[h, q_idx, kv_idx]", lengths=(40, 40))
    (q, k, v, _), declared = case.inputs_on("cpu")
    with pytest.raises(attngen.ArgumentError, match="argument bias: .*no gradient of bias"):
        case.kernel("simulator")(q.requires_grad_(), k, v, bias=declared["bias"].requires_grad_())


def test_second_derivatives_are_refused() -> None:
    """No wrong number comes out, in a sum with others neither."""
    kernel = SMALL.kernel("simulator")
    (q, k, v, _), _ = SMALL.inputs_on("cpu")
    q.requires_grad_()
    with pytest.raises(attngen.ArgumentError, match="create_graph: .*no second derivatives"):
        torch.autograd.grad(kernel(q, k, v).sum(), q, create_graph=True)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dout": torch.zeros(2, 70, 4, 32)}, "argument dout: .*float32"),
        ({"dout": torch.zeros(2, 71, 4, 32).bfloat16()}, "argument dout: .*shape"),
        ({"dout": torch.zeros(2, 70, 32, 4).bfloat16().mT}, "argument dout: .*stride"),
        ({"lse": None}, "argument lse: .*nothing"),
        ({"lse": torch.zeros(2, 70, 4)}, "argument lse: .*shape"),
        ({"out": torch.zeros(2, 70, 4, 32)}, "argument out: .*float32"),
        ({"dlse": torch.zeros(2, 4, 70).double()}, "argument dlse: .*float64"),
        ({"slopes": torch.zeros(4)}, "argument slopes"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, torch.Tensor | None], text: str) -> None:
    """Each argument of a backward pass is checked before anything runs."""
    kernel = SMALL.kernel("sm_90a")
    (q, k, v, dout), _ = SMALL.inputs_on("cpu")
    out, lse = kernel(q, k, v, return_lse=True)
    call = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse} | change
    with pytest.raises(attngen.ArgumentError, match=text):
        kernel.backward(**call)


def test_a_spec_without_gradients_has_no_backward_pass() -> None:
    """Whoever asks is told the key, by a call on inputs that require grad too."""
    kernel = attngen.compile({"target": "simulator", "problem": {"head_dim": 32}})
    x = torch.zeros(1, 1, 1, 32, dtype=torch.bfloat16)
    with pytest.raises(attngen.ArgumentError, match=r"gradients: \[q, k, v\]"):
        kernel.backward(x, x, x, x, x, torch.zeros(1, 1, 1))
    with pytest.raises(attngen.ArgumentError, match=r"gradients: \[q, k, v\]"):
        kernel(x.clone().requires_grad_(), x, x)


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)])
def test_no_pair_has_no_gradient(lengths: tuple[int, int]) -> None:
    """Without queries or without keys the gradients are zeros, written."""
    case = BackwardCase(lengths=lengths)
    kernel = case.kernel("simulator")
    (q, k, v, dout), _ = case.inputs_on("cpu")
    out, lse = kernel(q, k, v, return_lse=True)
    for x, like in zip(kernel.backward(dout, q, k, v, out, lse), (q, k, v), strict=True):
        assert x.shape == like.shape and not x.any()


def test_the_sum_over_keys_of_the_gradient_of_scores_is_that_of_lse() -> None:
    """A constant in every score changes nothing but lse; where lse counts, its gradient comes out."""
    case = BackwardCase(lengths=(40, 40), heads=(1, 1))
    drawn, _ = case.inputs_on("cpu")
    q, k, v, dout = drawn
    shifted = case.kernel("simulator"), BackwardCase(score="score + 3.0").kernel("simulator")
    made = []
    for kernel in shifted:
        out, lse = kernel(q, k, v, return_lse=True)
        made.append(kernel.backward(dout, q, k, v, out, lse))
    for x, y in zip(*made, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(
    ("target", "step"),
    [
        *(("sm_80", step) for step in (RecoverP, ScoreGradient, ScaleGradient, Gemm)),
        *(("sm_90a", step) for step in (RecoverP, ScoreGradient, ScaleGradient)),
    ],
)
def test_a_fault_in_a_step_is_found(target: str, step: type) -> None:
    """The rule fails where any Step of the pass does little, so that it holds for a reason."""
    case = BackwardCase("causal", "softcap(score, 3.0)", lengths=(70, 70))
    kernel = case.kernel(target)
    own = STEPS_SIMULATED[step]

    def does_little(found, role):
        own(found, role)
        place = found.ds if step is ScoreGradient else found.acc if step is not RecoverP else found.s
        role.write(place, lambda: role.registers[place.name] * 0.75)

    got = run_backward(case, kernel, steps={step: does_little})
    drawn, declared = case.inputs_on("cpu")
    out, lse = kernel(*drawn[:3], return_lse=True)
    assert not case.verdict(got, drawn, declared, out=out, lse=lse).ok


def test_each_gradient_has_one_owner() -> None:
    """No kernel of the pass has scratch memory, and each block of a gradient is stored once: the bits do not vary."""
    kernel = SMALL.kernel("sm_90a")
    written = [place.name for plan in kernel.call.gradients for place in plan.writes]
    assert sorted(written) == ["dk", "dk_f32", "dq", "dq_f32", "dv", "dv_f32"]
    assert not any(plan.scratch for plan in kernel.call.gradients)


def test_wide_heads_have_a_kernel_for_each_gradient() -> None:
    """At more than 128 columns registers do not hold dK and dV together."""
    names = {
        dim: [plan.schedule for plan in BackwardCase(head_dim=(dim, dim)).kernel("sm_90a").call.gradients]
        for dim in (32, 192)
    }
    assert names[32] == ["query_gradients", "key_gradients"]
    assert names[192] == ["query_gradients", "dv_gradients", "dk_gradients"]
    assert any(
        isinstance(step, RecoverP) for step in walk(SMALL.kernel("sm_90a").call.gradients[0].worker.program)
    )
    assert math.isfinite(attention_gradients(*SMALL.inputs_on("cpu")[0]).dq.sum().item())
