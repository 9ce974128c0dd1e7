"""What went wrong in public backward passes and shows on a GPU alone: memory, strides, streams, graphs, early starts.

The numbers are those of `tests/gradients/test_traps.py`, which names the reports.
"""

import math
from dataclasses import replace

import pytest
import torch

import attngen
from tests.gpu.test_gradients_on_gpu import gradients, target
from tests.gradients.backward_cases import BackwardCase

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]

CASE = BackwardCase("causal", lengths=(300, 300), heads=(4, 2), head_dim=(64, 64))
MASKED = replace(CASE, mask="kv_idx < lens[b]", score="softcap(score, 3.0)", lengths=(200, 296))


def are_same(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def assert_within_the_rule(case: BackwardCase, drawn: list[torch.Tensor], declared: dict) -> None:
    kernel = case.kernel(target())
    q, k, v, dout = drawn
    out, lse = kernel(q, k, v, case.scale, return_lse=True, **declared)
    got = kernel.backward(dout, q, k, v, out, lse, softmax_scale=case.scale, **declared)
    assert all(x.isfinite().all() for x in got)
    verdict = case.verdict(got, drawn, declared, out=out, lse=lse)
    assert verdict.ok, verdict.failures


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("inputs", ["bf16", "f16"])
@pytest.mark.parametrize("mask", ["full", "causal", "kv_idx < lens[b]", "kv_idx % 3 != q_idx % 2"])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
def test_1_to_3_low_lse_and_keys_that_do_not_exist(
    head_dim: int, mask: str, inputs: str, deterministic: bool
) -> None:
    """Products near -122 with a last tile half empty, one row, one key; and three times N(0, 1)."""
    for lengths in ((70, 96), (1, 128), (1, 100), (130, 32), (1, 1), (1, 3), (65, 3), (256, 1), (300, 200)):
        case = BackwardCase(mask, lengths=lengths, head_dim=(head_dim, head_dim), inputs=inputs,
                            spec={"deterministic": deterministic})  # fmt: skip
        drawn, declared = case.inputs_on("cuda")
        assert_within_the_rule(case, [3 * x for x in drawn], declared)
        q, k, v, dout = drawn
        low = replace(case, scale=1 / 5.6568)
        q, k = q / 8, k / 8
        q[..., 0], k[..., 0] = 26.0, -26.5
        assert_within_the_rule(low, [q, k, v, dout], declared)


@pytest.mark.parametrize("case", [CASE, MASKED, replace(CASE, head_dim=(192, 128))], ids=str)
def test_4_what_is_in_memory_before_is_not_read(case: BackwardCase) -> None:
    """NaN where gradients and workspaces will be, and NaN behind the last row and key: no bit differs."""
    kernel = case.kernel(target())
    drawn, declared, _, _, expected = gradients(case, kernel)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    poison = [torch.full((2**n,), math.nan, device="cuda") for n in range(9, 25) for _ in range(8)]
    del poison
    longer = [x.new_full((x.shape[0], x.shape[1] + 128, *x.shape[2:]), math.nan) for x in drawn]
    for x, y in zip(longer, drawn, strict=True):
        x[:, : y.shape[1]] = y
    q, k, v, dout = (x[:, : y.shape[1]] for x, y in zip(longer, drawn, strict=True))
    out, lse = kernel(q, k, v, return_lse=True, **declared)
    assert are_same(kernel.backward(dout, q, k, v, out, lse, **declared), expected)


@pytest.mark.parametrize("score", ["sqrt(abs(score))", "log(score * score)", "score / (kv_idx - 300)"])
@pytest.mark.parametrize("mask", ["full", "causal", "kv_idx % 3 != q_idx % 2"])
def test_7_slopes_of_what_is_not_seen(mask: str, score: str) -> None:
    """A pair of weight 0 contributes 0, whatever the slope of its score is."""
    case = replace(CASE, mask=mask, score=score, lengths=(270, 270))
    assert_within_the_rule(case, *case.inputs_on("cuda"))


def test_11_rows_that_lie_far_apart() -> None:
    """Rows 2^20 elements apart: the last lie past 2^31 elements, and gradients are those of dense rows."""
    rows, heads, columns = 2112, 2, 64
    case = BackwardCase(
        "window(200, 0)", lengths=(rows, rows), heads=(heads, heads), head_dim=(64, 64), batch=1
    )
    kernel = case.kernel(target())
    drawn, _, _, _, expected = gradients(case, kernel)
    far = torch.empty(rows, 2**20, device="cuda", dtype=drawn[0].dtype)
    width = heads * columns
    places = [far[None, :, i * width : (i + 1) * width].unflatten(-1, (heads, columns)) for i in range(5)]
    for place, x in zip(places, drawn, strict=False):
        place.copy_(x)
    q, k, v, dout, out = places
    made, lse = kernel(q, k, v, return_lse=True)
    out.copy_(made)
    assert q.stride(1) * (rows - 1) > 2**31
    assert are_same(kernel.backward(dout, q, k, v, out, lse), expected)


def test_11_two_million_rows() -> None:
    """Of 2^21 rows under a window the last have the gradients that they have alone."""
    rows, last, kept = 2**21, 1152, 1024
    case = BackwardCase("window(63, 0)", lengths=(rows, rows), heads=(1, 1), head_dim=(64, 64), batch=1)
    kernel = case.kernel(target())
    drawn, _, out, lse, made = gradients(case, kernel)
    q, k, v, dout, out = (x[:, -last:].contiguous() for x in (*drawn, out))
    alone = kernel.backward(dout, q, k, v, out, lse[..., -last:].contiguous())
    assert are_same(tuple(x[:, -kept:] for x in alone), tuple(x[:, -kept:] for x in made))


def test_12_nothing_is_read_before_it_is_written() -> None:
    """A kernel that writes dO late, the forward and the pass start one upon the other: the bits are those of calm."""
    kernel = CASE.kernel(target())
    drawn, _, _, _, expected = gradients(CASE, kernel)
    q, k, v, dout = drawn
    late = torch.empty_like(dout)
    for _ in range(20):
        late.fill_(math.nan)
        torch.cuda.synchronize()
        out, lse = kernel(q, k, v, return_lse=True)
        torch.cuda._sleep(200_000)
        late.copy_(dout)
        got = kernel.backward(late, q, k, v, out, lse)
        assert are_same(got, expected)


def test_15_a_graph_is_replayed_on_other_inputs() -> None:
    """A captured training step gives, each time, what a call on the inputs of that time gives."""
    kernel = CASE.kernel(target())
    drawn, _, _, _, _ = gradients(CASE, kernel)
    q, k, v, dout = drawn
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = kernel(q, k, v, return_lse=True)
        replayed = kernel.backward(dout, q, k, v, out, lse)
    for seed in range(3):
        torch.cuda.manual_seed(seed)
        for x in drawn:
            x.normal_()
        graph.replay()
        torch.cuda.synchronize()
        made, of_rows = kernel(q, k, v, return_lse=True)
        assert are_same(tuple(replayed), tuple(kernel.backward(dout, q, k, v, made, of_rows)))


def test_two_streams_do_not_meet() -> None:
    """Passes of one kernel on two streams at a time have the bits that they have one after the other."""
    case = replace(CASE, lengths=(1024, 1024))
    kernel = case.kernel(target())
    (q, k, v, dout), _, out, lse, _ = gradients(case, kernel)
    calls = [(dout, q, k, v, out, lse), (-dout, q, k, v, out, lse)]
    expected = [kernel.backward(*call) for call in calls]
    assert not are_same(*map(tuple, expected))
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for stream, call in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                found.append(kernel.backward(*call))
        torch.cuda.synchronize()
        assert all(are_same(x, y) for x, y in zip(found, expected, strict=True))


def test_20_second_derivatives_are_refused() -> None:
    """On a GPU as on the simulator: no wrong number comes out."""
    drawn, _ = CASE.inputs_on("cuda")
    q, k, v, _ = drawn
    q.requires_grad_()
    with pytest.raises(attngen.ArgumentError, match="no second derivatives"):
        torch.autograd.grad(attngen.attention(q, k, v, "causal").sum(), q, create_graph=True)
