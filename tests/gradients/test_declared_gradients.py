"""Gradients of what a spec declares, on the simulator, which runs the kernels' own programs."""

from dataclasses import replace

import pytest
import torch

import attngen
from attngen.bind import bind, check_arguments
from attngen.plan import GRADIENTS_INTAKE
from attngen.plan.steps import AddPairs, AddToElements, AddToTable, StorePairs, SumPairs
from attngen.simulate import STEPS_SIMULATED
from attngen.simulate.launches import run_call
from tests.gradients.declared_cases import (
    ANY_ORDER,
    CASES,
    HEADS,
    KEYS,
    LENGTHS,
    PAIRS,
    QUERIES,
    TABLES,
    DeclaredCase,
)


@pytest.mark.matrix
@pytest.mark.parametrize("target", ["simulator", "sm_90a"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_within_the_rule(case: DeclaredCase, target: str) -> None:
    """Of every class of owners, against fp64 and what f32 loses of sums of the same numbers."""
    kernel = case.kernel(target)
    drawn, declared = case.inputs_on("cpu")
    q, k, v, dout = drawn
    out, lse = kernel(q, k, v, return_lse=True, **declared)
    got = kernel.backward(dout, q, k, v, out, lse, **declared)
    verdict = case.verdict(got, drawn, declared, out=out, lse=lse)
    assert verdict.ok, f"{verdict.failures}\n{verdict}"


def leaves_of(case: DeclaredCase) -> tuple[list[torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
    """Q, K, V and what is declared, all of which require grad, and dO."""
    drawn, declared = case.inputs_on("cpu")
    tensors = {name: torch.as_tensor(value).requires_grad_() for name, value in declared.items()}
    return [x.requires_grad_() for x in drawn[:3]], tensors, drawn[3]


@pytest.mark.parametrize("case", [LENGTHS[3], HEADS[3], TABLES[1]], ids=str)
def test_autograd_gives_what_backward_gives(case: DeclaredCase) -> None:
    """Each gradient goes to the tensor that was passed, in its shape, format and place; that of a scalar too."""
    kernel = case.kernel("simulator")
    (q, k, v), declared, dout = leaves_of(case)
    made = torch.autograd.grad(kernel(q, k, v, **declared), [q, k, v, *declared.values()], dout)
    with torch.no_grad():
        out, lse = kernel(q, k, v, return_lse=True, **declared)
        expected = kernel.backward(dout, q, k, v, out, lse, **declared)
    assert all(torch.equal(x, y) for x, y in zip(made, expected, strict=True))
    for x, of in zip(made[3:], declared.values(), strict=True):
        assert (x.shape, x.dtype) == (of.shape, of.dtype) and x.any()


def test_one_gradient_alone() -> None:
    """Q, K and V need not require grad, and what does not gets none."""
    case = LENGTHS[3]
    kernel = case.kernel("simulator")
    drawn, declared = case.inputs_on("cpu")
    declared["t"].requires_grad_()
    kernel(*drawn[:3], **declared).float().sum().backward()
    assert declared["t"].grad.any() and drawn[0].grad is None and declared["u"].grad is None


def test_attention_makes_gradients_of_what_requires_grad() -> None:
    """`attngen.attention` takes it from the tensors, passed or held by an expression, and gives what fp64 does."""
    (q, k, v), declared, dout = leaves_of(PAIRS[4])
    bias = declared["bias"]
    text, function = (
        "score + bias[q_idx, kv_idx]",
        attngen.expression(lambda score, b, h, q_idx, kv_idx: score + bias[q_idx, kv_idx]),
    )
    passed = attngen.attention(q, k, v, "window(40, 3)", text, tensors={"bias": "f32[m, n]"}, bias=bias)
    held = attngen.attention(q, k, v, "window(40, 3)", function)
    found = [torch.autograd.grad(out, (q, k, v, bias), dout) for out in (passed, held)]
    for got in found:
        assert PAIRS[4].verdict(got, [x.detach() for x in (q, k, v, dout)], {"bias": bias.detach()}).ok


def test_attention_sums_in_any_order_where_it_may() -> None:
    """A table whose length a call binds: refused by name, and made where the call allows any order."""
    case = ANY_ORDER[0]
    (q, k, v), declared, dout = leaves_of(case)
    call = {"tensors": {"table": "f32[n]"}, **declared}
    with pytest.raises(attngen.PlanError, match="deterministic: false"):
        attngen.attention(q, k, v, case.mask, case.score, **call)
    out = attngen.attention(q, k, v, case.mask, case.score, deterministic=False, **call)
    got = torch.autograd.grad(out, (q, k, v, declared["table"]), dout)
    assert case.verdict(got, [x.detach() for x in (q, k, v, dout)], {"table": declared["table"].detach()}).ok


def test_what_has_no_gradient_is_told_with_the_key() -> None:
    """A tensor and a scalar that require grad, of a spec that does not name them."""
    spec = {"target": "simulator", "problem": {"head_dim": 32}, "score": "softcap(score, cap) * t[q_idx]"}
    declares = {"tensors": {"t": "f32[seqlen_q]"}, "scalars": {"cap": "f32"}}
    kernel = attngen.compile({**spec, **declares, "gradients": ["q", "k", "v"]})
    x, t, cap = torch.zeros(1, 5, 1, 32).bfloat16(), torch.ones(5), torch.tensor(2.0)
    for name, call in (
        ("t", {"t": t.clone().requires_grad_(), "cap": 2.0}),
        ("cap", {"t": t, "cap": cap.requires_grad_()}),
    ):
        for q in (x, x.clone().requires_grad_()):
            with pytest.raises(
                attngen.ArgumentError, match=rf"argument {name}: .*\n.*gradients: \[q, k, v, {name}\]"
            ):
                kernel(q, x, x, **call)


def test_a_tensor_that_ends_before_its_pairs_is_refused() -> None:
    """Its last elements would belong to many pairs; nothing is launched."""
    case = PAIRS[5]
    kernel, (drawn, declared) = case.kernel("sm_90a"), case.inputs_on("cpu")
    q, k, v, dout = drawn
    bias = declared["bias"][:, :, :122].contiguous()
    out, lse = kernel(q, k, v, return_lse=True, bias=bias)
    with pytest.raises(
        attngen.ArgumentError, match=r"argument bias: got shape \(75, 3, 122\), expected \(75, 3, 130\)"
    ):
        kernel.backward(dout, q, k, v, out, lse, bias=bias)


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)])
def test_no_pair_has_no_gradient(lengths: tuple[int, int]) -> None:
    """Without queries or without keys gradients are zeros, written."""
    case = replace(LENGTHS[0], lengths=lengths)
    tensors = {"bias": ("f32[seqlen_q, seqlen_k]", lengths), "t": ("f32[n]", (5,)), "u": ("f32[n]", (5,))}
    case = replace(case, tensors=tensors)
    kernel, (drawn, declared) = case.kernel("sm_90a"), case.inputs_on("cpu")
    q, k, v, dout = drawn
    out, lse = kernel(q, k, v, return_lse=True, **declared)
    for x, like in zip(kernel.backward(dout, q, k, v, out, lse, **declared)[3:], declared, strict=True):
        assert x.shape == torch.as_tensor(declared[like]).shape and not x.any()


def test_any_strides_and_layouts_give_the_same_bits() -> None:
    """Of dO, of a bias that is transposed and sliced, and of Q, K and V with their heads first; lse has a gradient."""
    case = PAIRS[1]
    kernel, (drawn, declared) = case.kernel("sm_90a"), case.inputs_on("cpu")
    q, k, v, dout = drawn
    dlse = torch.randn(2, 4, 70)
    out, lse = kernel(q, k, v, return_lse=True, **declared)
    expected = kernel.backward(dout, q, k, v, out, lse, dlse, **declared)[3]
    wide = torch.empty(4, 140, 200, dtype=torch.bfloat16).mT[:, 7:137, 3:73].mT
    bias = wide.copy_(declared["bias"])
    turned = [x.transpose(1, 2) for x in (dout, q, k, v, out)]
    assert torch.equal(kernel.backward(*turned, lse, dlse, layout="bhsd", bias=bias)[3], expected)
    verdict = case.verdict(
        kernel.backward(dout, q, k, v, out, lse, dlse, **declared),
        drawn,
        declared,
        out=out,
        lse=lse,
        dlse=dlse,
    )
    assert verdict.ok, verdict.failures


@pytest.mark.parametrize(
    ("case", "step"),
    [
        (PAIRS[4], AddPairs),
        (PAIRS[4], StorePairs),
        (QUERIES[0], SumPairs),
        (KEYS[0], SumPairs),
        (HEADS[0], SumPairs),
        (TABLES[0], AddToTable),
        (ANY_ORDER[0], AddToElements),
    ],
    ids=str,
)
def test_a_fault_in_a_step_is_found(case: DeclaredCase, step: type) -> None:
    """The rule fails where a Step drops what it has of one block of keys, so that it holds for a reason."""
    kernel = case.kernel("sm_90a")
    drawn, declared = case.inputs_on("cpu")
    q, k, v, dout = drawn
    out, lse = kernel(q, k, v, return_lse=True, **declared)
    got = kernel.backward(dout, q, k, v, out, lse, **declared)
    own, place = STEPS_SIMULATED[step], {StorePairs: "src"}.get(step, "s")

    def forgets(found, role):
        n = role.tile.n_block if role.tile.n_block is not None else role.variables.get("n", 0)
        registers = role.registers[getattr(found, place).name]
        if n == 1:
            role.registers[getattr(found, place).name] = torch.zeros_like(registers)
        own(found, role)

    wanted = kernel.gradients_of(declared)[3:]
    named = {"dout": dout, "out": out, "lse": lse, **declared}
    given = check_arguments(kernel.manifest, q, k, v, None, {}, "bshd", named, GRADIENTS_INTAKE)
    changed = run_call(kernel.call, bind(kernel.manifest, given, wanted, 2), steps={step: forgets})[wanted[0]]
    assert case.verdict(got, drawn, declared, out=out, lse=lse).ok
    verdict = case.verdict((*got[:3], changed), drawn, declared, out=out, lse=lse)
    assert not verdict.ok and all(each.startswith(f"d{case.wanted[0]}") for each in verdict.failures)


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.02])
@pytest.mark.parametrize("case", [PAIRS[1], KEYS[0], QUERIES[0], HEADS[0], TABLES[0]], ids=str)
def test_a_wrong_gradient_is_found(case: DeclaredCase, factor: float) -> None:
    """Zeros, a slope or a scale too many, two parts in a hundred: the rule tells each of every class."""
    kernel = case.kernel("simulator")
    drawn, declared = case.inputs_on("cpu")
    q, k, v, dout = drawn
    out, lse = kernel(q, k, v, return_lse=True, **declared)
    *inputs, got = kernel.backward(dout, q, k, v, out, lse, **declared)
    verdict = case.verdict((*inputs, factor * got), drawn, declared, out=out, lse=lse)
    assert not verdict.ok and all(each.startswith(f"d{case.wanted[0]}") for each in verdict.failures)
