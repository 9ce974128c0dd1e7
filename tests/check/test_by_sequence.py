"""The oracles and the verdict on calls whose sequences have lengths of their own."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from attngen import compile as compile_spec
from attngen.check.by_sequence import CutCall, attention_by_sequence, gradients_by_sequence
from attngen.check.cuts import Cut
from attngen.check.gradients import attention_gradients
from attngen.check.inputs import POISON, Shape, random_inputs
from attngen.check.judging import draw, judge, judge_gradients
from attngen.check.reference import attention, attention_chunked, standard_attention
from attngen.errors import ArgumentError
from attngen.expr import parse_mask, parse_score
from attngen.kernel import Kernel
from attngen.plan import Lengths

RAGGED = Lengths("ragged", "ragged")
QUERIES = Cut("ragged", (3, 0, 7, 1), unused=(1, 0, 2, 0), tail=3)
KEYS = Cut("ragged", (5, 4, 9, 0), skipped=(2, 0, 1, 0), unused=(0, 3, 0, 2), tail=2)
SHAPE = Shape(4, 2, 1, QUERIES.size, KEYS.size, QUERIES, KEYS)


def spec_of(queries: str = "ragged", keys: str = "ragged", **more: Any) -> dict[str, Any]:
    """A small spec of the simulator."""
    problem = {"head_dim": 8, "queries": queries, "keys": keys}
    return {"target": "simulator", "problem": problem, "tile": {"block_m": 4, "block_n": 4}, **more}


def as_nested_loops(mask: Any, softmax_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and lse of `SHAPE` and causal attention plus 0.1 b, pair by pair, from where rows lie by hand."""
    q, k, v = (x.double() for x in random_inputs(SHAPE, 8, 8, torch.float32))
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.full((2, q.shape[0]), -torch.inf).double()
    rows = {0: range(0, 3), 1: range(4, 4), 2: range(4, 11), 3: range(13, 14)}
    keys = {0: range(2, 7), 1: range(7, 11), 2: range(15, 24), 3: range(24, 24)}
    for b in range(4):
        for i, row in enumerate(rows[b]):
            seen = [n for j, n in enumerate(keys[b]) if j <= i + len(keys[b]) - len(rows[b])]
            for h in range(2):
                scores = (
                    torch.stack([softmax_scale * q[row, h] @ k[n, 0] + 0.1 * b for n in seen])
                    if seen
                    else None
                )
                if scores is not None:
                    lse[h, row] = scores.logsumexp(0)
                    out[row, h] = scores.softmax(0) @ v[list(seen), 0]
    return out, lse


@pytest.mark.parametrize("oracle", [attention, attention_chunked])
def test_each_sequence_is_a_call_of_its_own(oracle: Any) -> None:
    """Gaps before and behind, tails and empty sequences count for nothing, and b is the sequence's number."""
    q, k, v = random_inputs(SHAPE, 8, 8, torch.float32)
    mask, score = parse_mask("causal"), parse_score("score + 0.1 * f32(b)")
    out, lse = attention_by_sequence(
        oracle, RAGGED, q, k, v, mask, 0.3, score=score, passed=SHAPE.arguments()
    )
    expected = as_nested_loops(mask, 0.3)
    torch.testing.assert_close(out, expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse, expected[1], rtol=1e-6, atol=1e-6)


def test_gradients_are_those_that_autograd_has() -> None:
    """dq, dk and dv by the formulas are those of the oracle, differentiated; 0 where nothing counts."""
    about = (parse_mask("causal"), 0.3)
    cut = replace(SHAPE, keys=replace(KEYS, lengths=(5, 4, 9, 6)))
    q, k, v = (
        x.double().nan_to_num(0.0, 0.0, 0.0).requires_grad_() for x in random_inputs(cut, 8, 8, torch.float32)
    )
    dout = torch.randn(q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    passed = cut.arguments()
    call = CutCall.read(RAGGED, q, k, passed)
    loss = torch.zeros((), dtype=torch.float64)
    for each in call.sequences:
        own_q, own_k, own_v = (x.transpose(1, 2) for x in call.inputs(q, k, v, each))
        i, j = torch.arange(own_q.shape[2])[:, None], torch.arange(own_k.shape[2])
        seen = j <= i + own_k.shape[2] - own_q.shape[2]
        scores = (0.3 * own_q @ own_k.mT).masked_fill(~seen, -torch.inf)
        p = scores.softmax(-1).nan_to_num(0.0)
        loss = loss + ((p @ own_v).transpose(1, 2) * call.rows(dout, "queries", each)).sum()
    expected = torch.autograd.grad(loss, (q, k, v))
    made = gradients_by_sequence(attention_gradients, RAGGED, q, k, v, dout, *about, passed=passed)
    for got, wanted in zip(made, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_padded_keys_and_dense_queries() -> None:
    """A padded axis has a batch a sequence, of which seqused count; queries may have one length all."""
    keys = Cut("padded", (5, 0, 8), tail=2)
    shape = Shape(3, 2, 1, 4, keys.size, None, keys)
    q, k, v = random_inputs(shape, 8, 8, torch.float32)
    assert q.shape == (3, 4, 2, 8) and k.shape == (3, 10, 1, 8) and k[0, 5:].isfinite().logical_not().any()
    out, lse = attention_by_sequence(
        attention, Lengths("dense", "padded"), q, k, v, None, passed=shape.arguments()
    )
    for b, length in enumerate(keys.lengths):
        own = attention(q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length])
        assert torch.equal(out[b], own[0][0]) and torch.equal(lse[b], own[1][0])


def test_inputs_are_poison_where_nothing_counts() -> None:
    """Every row that no sequence counts holds a number that would show; all others are finite."""
    for x, cut in zip(random_inputs(SHAPE, 8, 8, torch.bfloat16), (QUERIES, KEYS, KEYS), strict=True):
        unused = cut.unused_rows[0]
        assert int(unused.sum()) == cut.rows - sum(cut.lengths) > 0
        assert x[~unused].abs().max() < 100 and {float(row[0, 0]) for row in x[unused]} & {torch.inf}
        assert (x[unused].abs().nan_to_num(torch.inf) >= 5e4).all()
    assert len(POISON) == 4


@pytest.mark.parametrize("memory", ["strided", "packed_qkv", "offset", "bhsd", "expanded"])
def test_memory_layouts_hold_the_same_numbers(memory: Any) -> None:
    """But for `expanded`, whose heads of v are one."""
    plain, laid = (
        random_inputs(SHAPE, 8, 8, torch.bfloat16, layout=layout) for layout in ("contiguous", memory)
    )
    for x, y in zip(plain[:2], laid[:2], strict=True):
        assert x.shape == y.shape and torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))


def test_sequences_that_overlap_have_no_right_result() -> None:
    """The entry is named; those out of range are kept within the tensor."""
    q = torch.zeros(9, 1, 8)
    passed = {"cu_seqlens_q": torch.tensor([0, 5, 3]), "cu_seqlens_k": torch.tensor([-2, 4, 100])}
    with pytest.raises(ArgumentError, match=r"cu_seqlens_q\[2\]: got 3, expected at least 5"):
        CutCall.read(RAGGED, q, q, passed)
    passed["cu_seqlens_q"] = torch.tensor([0, 5, 7])
    call = CutCall.read(RAGGED, q, q, passed)
    assert [each.rows["keys"] for each in call.sequences] == [slice(0, 4), slice(4, 9)]


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    """Causal, with gradients."""
    return compile_spec(spec_of(mask="causal", gradients=["q", "k", "v"]))


def made_by(kernel: Kernel) -> tuple[Any, ...]:
    """Inputs of `SHAPE`, what is passed, out, lse, dout and gradients."""
    inputs, passed = draw(kernel.plan, SHAPE), SHAPE.arguments()
    out, lse = kernel(*inputs, return_lse=True, **passed)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    return inputs, passed, out, lse, dout, kernel.backward(dout, *inputs, out, lse, **passed)


def test_a_kernel_passes(kernel: Kernel) -> None:
    """Forward and backward, every sequence within the rule of a dense call, all else exactly 0."""
    inputs, passed, out, lse, dout, gradients = made_by(kernel)
    verdict = judge(kernel.spec, kernel.plan, out, lse, *inputs, declared=passed)
    assert verdict.ok and 0 < verdict.max_error <= verdict.max_bound and verdict.worst_index
    assert out[QUERIES.unused_rows[0]].abs().sum() == 0
    assert judge_gradients(kernel.spec, gradients, inputs, dout, out, lse, declared=passed).ok


@pytest.mark.parametrize(
    "row, column, failure",
    [(1, 0.5, "max"), (3, 1e-9, "outside"), (16, float("nan"), "outside"), (9, float("nan"), "max")],
)
def test_what_is_wrong_is_found_where_it_is(kernel: Kernel, row: int, column: float, failure: str) -> None:
    """A row of a sequence, or one that no sequence counts: behind one, and behind all."""
    inputs, passed, out, lse, dout, gradients = made_by(kernel)
    wrong = out.clone()
    wrong[row, 1, 2] = column
    verdict = judge(kernel.spec, kernel.plan, wrong, lse, *inputs, declared=passed)
    assert not verdict.ok and failure in verdict.failures
    assert failure != "max" or verdict.worst_index == (row, 1, 2)
    for place, axis in enumerate(("dq", "dk", "dv")):
        spoilt = [x.clone() for x in gradients]
        spoilt[place][row, 0, 3] = 1.0
        found = judge_gradients(kernel.spec, spoilt, inputs, dout, out, lse, declared=passed)
        assert {each.split()[0] for each in found.failures} == {axis}


@pytest.mark.parametrize("row", [2, 3])
def test_lse_is_judged_too(kernel: Kernel, row: int) -> None:
    """Of rows that count, and of others, where it is -inf."""
    inputs, passed, out, lse, _, _ = made_by(kernel)
    wrong = lse.clone()
    wrong[1, row] = 0.0
    verdict = judge(kernel.spec, kernel.plan, out, wrong, *inputs, declared=passed)
    assert not verdict.ok and any("lse" in each for each in verdict.failures)


def test_the_yardstick_goes_by_sequence_too() -> None:
    """At the kernel's precision, all numbers are near those of fp64, and rounded."""
    q, k, v = random_inputs(SHAPE, 8, 8, torch.bfloat16)
    passed = SHAPE.arguments()
    exact, _ = attention_by_sequence(attention, RAGGED, q, k, v, passed=passed)
    short, _ = attention_by_sequence(standard_attention, RAGGED, q, k, v, passed=passed)
    assert torch.equal(short.to(torch.bfloat16).double(), short)
    assert 0 < (exact - short).abs().max() < 0.05


def test_a_sink_is_judged_over_all_sequences() -> None:
    """Its gradient is a sum; lse of a row that no sequence counts is the sink, and out 0."""
    kernel = compile_spec(spec_of(mask="causal", gradients=["q", "k", "v", "sink"], sink="per_head"))
    inputs, passed = draw(kernel.plan, SHAPE), SHAPE.arguments() | {"sink": torch.tensor([0.5, -1.0])}
    out, lse = kernel(*inputs, return_lse=True, **passed)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    gradients = kernel.backward(dout, *inputs, out, lse, **passed)
    assert judge(kernel.spec, kernel.plan, out, lse, *inputs, declared=passed).ok
    verdict = judge_gradients(kernel.spec, gradients, inputs, dout, out, lse, declared=passed)
    assert verdict.ok and abs(verdict.declared["sink"].expected) > 0.05
    spoilt = (*gradients[:3], gradients[3] * 1.01)
    found = judge_gradients(kernel.spec, spoilt, inputs, dout, out, lse, declared=passed)
    assert {each.split()[0] for each in found.failures} == {"dsink"}
    wrong = lse.clone()
    wrong[1, 3] = 0.5
    assert not judge(kernel.spec, kernel.plan, out, wrong, *inputs, declared=passed).ok
    ref, ref_lse = attention_by_sequence(attention, RAGGED, *inputs, parse_mask("causal"), passed=passed)
    torch.testing.assert_close(lse.double(), ref_lse, rtol=1e-4, atol=1e-4)
