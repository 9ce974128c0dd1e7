"""Gradients in memory that a caller gives: formats, strides, sums of calls, and parts of a ring."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import attngen
from attngen.check.gradients import GradientAccuracy
from tests.gradients.backward_cases import BackwardCase

CASE = BackwardCase("causal", "softcap(score, 3.0)", lengths=(70, 90), heads=(4, 2), head_dim=(64, 32))
CASES = (
    CASE,
    BackwardCase("kv_idx % 3 != q_idx % 2", lengths=(70, 90), heads=(2, 1)),
    BackwardCase("causal", lengths=(70, 90), heads=(2, 1), head_dim=(192, 160), inputs="f16", batch=1),
)
Pass = tuple[attngen.Kernel, dict[str, torch.Tensor]]


def forward(case: BackwardCase, target: str = "sm_90a") -> Pass:
    """A kernel, and what its backward pass takes."""
    kernel = case.kernel(target)
    (q, k, v, dout), _ = case.inputs_on("cpu")
    out, lse = kernel(q, k, v, return_lse=True)
    return kernel, {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse}


def memory(call: dict[str, torch.Tensor], fill: float, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.full_like(call[name], fill, dtype=dtype) for name in "qkv"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_f32_gradients_round_to_the_short_ones(case: BackwardCase) -> None:
    """Each may have a format of its own; what is rounded in one call is the f32 of the other, to the bit."""
    kernel, call = forward(case)
    short = kernel.backward(**call)
    whole = kernel.backward(**call, grads=memory(call, torch.nan, torch.float32))
    for x, y in zip(short, whole, strict=True):
        assert x.dtype == call["q"].dtype and y.dtype == torch.float32
        assert torch.equal(x, y.to(x.dtype)) and not torch.equal(x.float(), y)
    mixed = [whole[0].clone(), torch.empty_like(short[1]), whole[2].clone()]
    made = kernel.backward(**call, grads=mixed)
    assert all(x is y for x, y in zip(made, mixed, strict=True))
    assert (
        torch.equal(mixed[0], whole[0])
        and torch.equal(mixed[1], short[1])
        and torch.equal(mixed[2], whole[2])
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_of_calls_are_f32_sums(case: BackwardCase) -> None:
    """What memory holds is added in f32, once for each call, and rounded where it is written."""
    kernel, call = forward(case)
    whole = kernel.backward(**call, grads=memory(call, 0.0, torch.float32))
    for dtype in (torch.float32, call["q"].dtype):
        held = [torch.randn_like(x).to(dtype) for x in whole]
        expected = [(x.float() + y).to(dtype) for x, y in zip(held, whole, strict=True)]
        kernel.backward(**call, grads=held, accumulate=True)
        assert all(torch.equal(x, y) for x, y in zip(held, expected, strict=True))


def test_micro_batches_add_up() -> None:
    """The sum over parts of a batch in f32 is that of their gradients, where 16 bits would lose the small ones."""
    kernel, call = forward(replace(CASE, batch=4))
    parts = [{name: x[i : i + 1] for name, x in call.items()} for i in range(4)]
    sums = [torch.zeros(1, *call[name].shape[1:]) for name in "qkv"]
    for part in parts:
        kernel.backward(**part, grads=sums, accumulate=True)
    whole = kernel.backward(**call, grads=memory(call, 0.0, torch.float32))
    for x, y in zip(sums, whole, strict=True):
        assert torch.equal(x, y[:1] + y[1:2] + y[2:3] + y[3:])


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_go_where_strides_say(layout: str, dtype: torch.dtype) -> None:
    """Into slices of one packed tensor and rows far apart, in either layout; what lies between keeps its values."""
    kernel, call = forward(replace(CASE, heads=(2, 2), lengths=(70, 70), head_dim=(64, 64)))
    expected = kernel.backward(**call, grads=memory(call, 0.0, dtype))
    packed = torch.full((2, 70, 5, 2, 64), 7.0, dtype=dtype)
    far = torch.full((2, 70, 2, 128), 7.0, dtype=dtype)
    grads = [packed[:, :, 1], packed[:, :, 3], far[..., 64:]]
    if layout == "bhsd":
        of_rows = {name: call[name].transpose(1, 2) for name in ("dout", "q", "k", "v", "out")}
        kernel.backward(**call | of_rows, layout=layout, grads=[x.transpose(1, 2) for x in grads])
    else:
        kernel.backward(**call, grads=grads)
    assert all(torch.equal(x, y) for x, y in zip(grads, expected, strict=True))
    assert (packed[:, :, ::2] == 7).all() and (far[..., :64] == 7).all()


def merged(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over all keys, out of attention over parts of them in f32: (out, lse)."""
    lse = torch.logsumexp(torch.stack([lse for _, lse in parts]), 0)
    weights = [(part - lse).exp().nan_to_num().transpose(1, 2)[..., None] for _, part in parts]
    return sum(weight * out for weight, (out, _) in zip(weights, parts, strict=True)), lse


@pytest.mark.parametrize("target", ["simulator", "sm_90a", "sm_80"])
def test_parts_of_a_ring_give_the_whole_gradient(target: str) -> None:
    """Each part of the keys has its call, on merged out and lse; dq adds up in f32, and each dk, dv is its own."""
    spec = {"precision": {"inputs": "bf16", "output": "f32"}}
    case = BackwardCase(score="softcap(score, 3.0)", lengths=(70, 150), heads=(4, 2), spec=spec)
    kernel = case.kernel(target)
    drawn, _ = case.inputs_on("cpu")
    q, k, v, dout = drawn
    spans = (slice(0, 64), slice(64, 150))
    parts = [kernel(q, k[:, keys], v[:, keys], return_lse=True) for keys in spans]
    assert all(out.dtype == torch.float32 for out, _ in parts)
    out, lse = merged(parts)
    grads = [torch.zeros(x.shape) for x in (q, k, v)]
    for keys in spans:
        dk, dv = grads[1][:, keys], grads[2][:, keys]
        kernel.backward(dout, q, k[:, keys], v[:, keys], out, lse, grads=(grads[0], dk, dv), accumulate=True)
    verdict: GradientAccuracy = case.verdict(tuple(x.bfloat16() for x in grads), drawn, {})
    assert verdict.ok, verdict.failures
    at_once = kernel.backward(dout, q, k, v, *kernel(q, k, v, return_lse=True))
    for x, y in zip(grads, at_once, strict=True):
        torch.testing.assert_close(x, y.float(), rtol=2**-6, atol=2**-6)


def overlapping(call: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    one = torch.zeros(2, 90, 2, 64, dtype=torch.bfloat16)
    return [torch.zeros_like(call["q"]), one, one[..., :32]]


GRADS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "a tensor": (lambda call: call["q"].clone(), "argument grads: got Tensor, expected .dq, dk, dv."),
    "two": (lambda call: memory(call, 0.0, torch.float32)[:2], "argument grads: got 2 of them"),
    "none of one": (lambda call: [None, *memory(call, 0.0, torch.float32)[1:]], "argument dq: got NoneType"),
    "f16": (
        lambda call: memory(call, 0.0, torch.float16),
        "argument dq: got dtype torch.float16, expected torch.bfloat16 or torch.float32",
    ),
    "shape": (lambda call: [x[:, :-1] for x in memory(call, 0.0, torch.float32)], "argument dq: got shape"),
    "another device": (
        lambda call: [x.to("meta") for x in memory(call, 0.0, torch.float32)],
        "argument dq: got device meta",
    ),
    "columns apart": (
        lambda call: [x.repeat(1, 1, 1, 2)[..., ::2] for x in memory(call, 0.0, torch.float32)],
        "argument dq: got stride 2 in the last dimension",
    ),
    "rows off 16 bytes": (
        lambda call: [
            torch.zeros(*x.shape[:3], 67)[..., : x.shape[3]] for x in memory(call, 0.0, torch.float32)
        ],
        "argument dq: got stride 67",
    ),
    "overlaps itself": (
        lambda call: [torch.zeros(1, *x.shape[1:]).expand_as(x) for x in memory(call, 0.0, torch.float32)],
        "argument dq: got strides .* overlap itself",
    ),
    "each other": (overlapping, "argument dv: got memory shared with dk"),
    "q": (
        lambda call: [call["q"], *memory(call, 0.0, torch.float32)[1:]],
        "argument dq: got memory shared with q",
    ),
    "dout": (
        lambda call: [
            *memory(call, 0.0, torch.float32)[:2],
            call["dout"].view(2, -1)[:, : 90 * 64].view(2, 90, 2, 32),
        ],
        "argument dv: got memory shared with dout",
    ),
    "read alone": (
        lambda call: [x.expand(2, *x.shape[1:])._neg_view() for x in memory(call, 0.0, torch.float32)],
        "argument dq: got a view that negates",
    ),
}


@pytest.mark.parametrize("how", GRADS)
def test_memory_that_cannot_hold_gradients_is_refused(how: str) -> None:
    """The error names the gradient; nothing has run, and what memory holds is as it was."""
    kernel, call = forward(CASE)
    make, text = GRADS[how]
    grads = make(call)
    held = [x.clone() for x in grads if isinstance(x, torch.Tensor)]
    for accumulate in (False, True):
        with pytest.raises(attngen.ArgumentError, match=text):
            kernel.backward(**call, grads=grads, accumulate=accumulate)
    if "meta" not in text:
        assert all(
            torch.equal(x, y)
            for x, y in zip([x for x in grads if isinstance(x, torch.Tensor)], held, strict=True)
        )


def test_nothing_is_added_to_nothing() -> None:
    """Whoever accumulates says where."""
    kernel, call = forward(CASE)
    with pytest.raises(attngen.ArgumentError, match="argument accumulate: got True without grads"):
        kernel.backward(**call, accumulate=True)
    with pytest.raises(attngen.ArgumentError, match="argument accumulate: got 1, expected True or False"):
        kernel.backward(**call, grads=memory(call, 0.0, torch.float32), accumulate=1)
