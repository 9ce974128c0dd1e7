"""The worked examples that courses use, with their true values."""

import math

import pytest
import torch
from small_plans import KINDS, WARPGROUP_VARIANTS, Variant, lowered

from attngen.check.inputs import Shape, random_inputs
from attngen.check.reference import attention
from attngen.expr import evaluate
from attngen.simulate import trace
from attngen.simulate.trace import BlockRecord

VARIANTS = [Variant("serial", 1), Variant("fa2", 1), *(v for v in WARPGROUP_VARIANTS if v.warpgroups == 2)]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_softmax_of_1_to_6_in_two_blocks_of_three(variant: Variant) -> None:
    """Softmax of [1..6] taken as two blocks of three: maxima, rescale factors, sums, O and the result.

    One query sees six keys whose scores are 1 .. 6; V is the identity, so that O is the softmax itself.
    """
    plan = variant.plan("full", block_m=2, block_n=3, head_dim=1, head_dim_v=6)
    scores = torch.arange(1.0, 7.0)
    q, k, v = torch.ones(1, 1, 1, 1), scores.view(1, 6, 1, 1), torch.eye(6).view(1, 6, 1, 6)
    board = trace(plan, q, k, v, softmax_scale=1.0)
    e = math.e
    low, high = 1 + e**-1 + e**-2, 1 + e**-1 + e**-2  # sums of either block relative to its own maximum
    left_to_right = [(range(0, 3), 3.0, 0.0, low), (range(3, 6), 6.0, e**-3, e**-3 * low + high)]
    right_to_left = [(range(3, 6), 6.0, 0.0, high), (range(0, 3), 6.0, 1.0, high + e**-3 * low)]
    expected = left_to_right if variant.schedule == "serial" else right_to_left
    assert [block.keys for block in board.blocks] == [keys for keys, *_ in expected]
    o = torch.zeros(6)
    for block, (keys, row_max, alpha, row_sum) in zip(board.blocks, expected, strict=True):
        assert block.s.flatten().tolist() == [key + 1.0 for key in keys]
        found = [block.row_max.item(), block.alpha.item(), block.row_sum.item()]
        assert found == pytest.approx([row_max, alpha, row_sum], rel=1e-6)
        o = alpha * o
        o[keys.start : keys.stop] = torch.exp(scores[keys.start : keys.stop] - row_max)
        assert block.o.flatten().tolist() == pytest.approx(o.tolist(), rel=1e-6)
    torch.testing.assert_close(board.out.flatten(), scores.double().softmax(0).float(), rtol=1e-6, atol=0)
    assert board.lse is not None
    assert board.lse.item() == pytest.approx(float(scores.double().logsumexp(0)), rel=1e-6)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_s_of_1_to_16_and_17_to_32_in_2x2_blocks(variant: Variant) -> None:
    """Q = 1..16 and K = 17..32 as 4x4 matrices: the 2x2 blocks put together are Q Kᵀ, exactly."""
    plan = variant.plan("full", block_m=2 * (variant.warpgroups or 1), block_n=2, head_dim=4)
    q, k = torch.arange(1.0, 17.0).view(4, 4), torch.arange(17.0, 33.0).view(4, 4)
    board = trace(plan, *(x.view(1, 4, 1, 4) for x in (q, k, torch.eye(4))), softmax_scale=1.0)
    s = torch.zeros(4, 4)
    for block in board.blocks:
        s[block.rows.start : block.rows.stop, block.keys.start : block.keys.stop] = block.s
    assert len(board.blocks) == 4
    assert s.tolist() == (q @ k.T).tolist()
    assert s.tolist() == [
        [190, 230, 270, 310],
        [486, 590, 694, 798],
        [782, 950, 1118, 1286],
        [1078, 1310, 1542, 1774],
    ]


@pytest.mark.parametrize("scale", [1.0, None])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_four_queries_of_two_dimensions(variant: Variant, scale: float | None) -> None:
    """Q = 1..8, K = 2,1,4,3,...: the true output, though printed versions are often wrong."""
    q = torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8]])
    k = torch.tensor([[2.0, 1], [4, 3], [6, 5], [8, 7]])
    v = torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0]])
    plan = variant.plan("full", block_m=2, block_n=2, head_dim=2)
    board = trace(plan, *(x.view(1, 4, 1, 2) for x in (q, k, v)), softmax_scale=scale)
    s = (q @ k.T).double() * (1 / math.sqrt(2) if scale is None else scale)
    true = s.softmax(1) @ v.double()
    torch.testing.assert_close(board.out.view(4, 2).double(), true, rtol=1e-5, atol=0)
    assert board.lse is not None
    torch.testing.assert_close(board.lse.flatten().double(), s.logsumexp(1), rtol=1e-6, atol=0)
    reference, _ = attention(*(x.view(1, 4, 1, 2) for x in (q, k, v)), softmax_scale=scale)
    torch.testing.assert_close(reference.view(4, 2), true)
    if scale == 1.0:
        # The first row by hand: scores 4, 10, 16, 22, so O = (e^-18 + e^-6, e^-12 + e^-6) / (1 + e^-6 + ...).
        total = 1 + math.exp(-6) + math.exp(-12) + math.exp(-18)
        first = [(math.exp(-18) + math.exp(-6)) / total, (math.exp(-12) + math.exp(-6)) / total]
        assert board.out[0, 0, 0].tolist() == pytest.approx(first, rel=1e-5)


def test_text_is_what_a_teacher_writes() -> None:
    """A block of keys shows S, running max, rescale factor, running sum and O; the end shows O and lse."""
    plan = lowered("serial", "causal", 1, block_m=1, block_n=3, head_dim=1)
    x = torch.arange(1.0, 7.0).view(1, 6, 1, 1)
    board = trace(plan, x[:, :1], x, x, softmax_scale=-1.0)
    assert str(board).splitlines() == [
        "batch 0, head 0, rows 0, keys 0 .. 2",
        "  S                   -1  -2  -3",
        "  running max         -1",
        "  rescale factor      0",
        "  running sum         1.5032",
        "  O, not normalised   2.1418",
        "batch 0, head 0, rows 0, keys 3 .. 5",
        "  S                   -4  -5  -6",
        "  running max         -1",
        "  rescale factor      1",
        "  running sum         1.5781",
        "  O, not normalised   2.4729",
        "batch 0, head 0, rows 0, done",
        "  O                   1.5671",
        "  lse                 -0.54381",
    ]


def test_long_matrices_are_cut_and_ragged_ones_trimmed() -> None:
    """Rows and keys past the end are not shown; of a long matrix the beginning is."""
    plan = lowered("fa2", "full", 1, block_m=16, block_n=32, head_dim=1)
    x = torch.ones(1, 13, 1, 1)
    board = trace(plan, x[:, :2], x, x)
    assert board.blocks[0].s.shape == (2, 13)
    assert str(board).splitlines()[1].endswith("  1  ...")


@pytest.mark.parametrize("score", ["softcap(score, 2.0)", "score + f32(kv_idx)", "abs(score) - f32(q_idx)"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_shows_scores_as_the_spec_has_them(kind: str, score: str) -> None:
    """In natural units, whether they are seeded, bounded, capped or scaled on the way; -inf where masked."""
    plan = lowered(kind, "causal", score=score, block_m=4, block_n=2, head_dim=2)
    q, k, v = random_inputs(Shape(1, 1, 1, 5, 7), 2, 2, torch.float32, seed=3)
    board = trace(plan, q, k, v, softmax_scale=-0.7)
    rows, keys = torch.arange(5)[:, None], torch.arange(7)
    products = -0.7 * q[0, :, 0] @ k[0, :, 0].T
    names = {"score": products, "q_idx": rows, "kv_idx": keys}
    expected = (
        torch.as_tensor(evaluate(plan.score, names)).expand(5, 7).masked_fill(keys > rows + 2, -math.inf)
    )
    blocks = [record for record in board.records if isinstance(record, BlockRecord)]
    assert {(row, key) for record in blocks for row in record.rows for key in record.keys} >= {
        (int(row), int(key)) for row, key in (keys <= rows + 2).nonzero()
    }
    for record in blocks:
        part = expected[record.rows.start : record.rows.stop, record.keys.start : record.keys.stop]
        torch.testing.assert_close(record.s, part, rtol=1e-5, atol=1e-5)
