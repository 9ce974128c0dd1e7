"""What a simulated plan computes, against the fp64 reference and by hand."""

import math
from dataclasses import replace

import pytest
import torch
from small_plans import KINDS, VARIANTS, Variant, lowered

import attngen
from attngen.check.accuracy import compare
from attngen.check.inputs import Shape, poison, random_inputs
from attngen.check.reference import attention
from attngen.expr import parse_mask
from attngen.plan import KernelPlan
from attngen.plan.steps import ConvertP, LoadTile, MaskScores, RowMax, TmaLoad
from attngen.simulate import STEPS_SIMULATED, simulate

MASKS = ["full", "causal", "kv_idx > q_pos - 6 and kv_idx <= q_pos + 1", "kv_idx != q_pos", "false"]
SHAPES = [
    Shape(1, 1, 1, 1, 1),
    Shape(2, 3, 3, 9, 17),
    Shape(1, 4, 2, 17, 9),
    Shape(3, 6, 1, 16, 32),
    Shape(1, 2, 2, 33, 33),
    Shape(2, 2, 1, 1, 40),
]


def accurate(plan: KernelPlan, mask: str, shape: Shape, seed: int = 0, scale: float | None = None) -> None:
    """Hold a plan against the reference on random inputs."""
    dtype = getattr(torch, plan.inputs.torch_name)
    q, k, v = random_inputs(shape, plan.head_dim_qk, plan.head_dim_v, dtype, seed=seed)
    out, lse = simulate(plan, q, k, v, return_lse=True, softmax_scale=scale)
    accuracy = compare(out, lse, q, k, v, parse_mask(mask), scale)
    assert accuracy.ok, accuracy


@pytest.mark.matrix(
    classes=lambda variant, mask, inputs: [
        ("variant", str(variant), mask),
        ("inputs", str(variant), inputs),
        ("mask", mask, inputs),
    ]
)
@pytest.mark.parametrize("inputs", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_agrees_with_the_reference(variant: Variant, mask: str, inputs: str) -> None:
    """Every schedule is within the bound on every mask, with GQA and odd lengths, in every format."""
    plan = variant.plan(mask, block_n=4, inputs=inputs)
    for seed, shape in enumerate(SHAPES):
        accurate(plan, mask, shape, seed)


@pytest.mark.parametrize("scale", [0.0, -0.0, -0.3, 1.7, 1e-30])
@pytest.mark.parametrize("schedule", KINDS)
def test_any_softmax_scale(schedule: str, scale: float) -> None:
    """Zero, negative, large and tiny scales give what the reference gives."""
    accurate(lowered(schedule, "causal", 1, inputs="bf16"), "causal", Shape(1, 2, 1, 17, 20), scale=scale)


@pytest.mark.parametrize("schedule", KINDS)
@pytest.mark.parametrize(
    "step", [MaskScores, RowMax], ids=["without masking", "with a maximum that is never raised"]
)
def test_the_bound_catches_faults(schedule: str, step: type) -> None:
    """The comparison above is no formality: with one Step undone the same inputs are out of bounds."""
    plan = lowered(schedule, "causal", 1, block_n=4)

    def undone(step: MaskScores | RowMax, role) -> None:  # type: ignore[no-untyped-def]
        if isinstance(step, RowMax):
            row_max = role.read(step.row_max)
            role.write(step.alpha, torch.zeros_like, row_max)
            role.write(step.reference, torch.zeros_like, row_max)
            if step.exponent_scale:
                scale = role.call.scale["softmax_scale_log2"]
                role.write(step.exponent_scale, lambda: torch.full_like(row_max, scale)[..., None])

    q, k, v = random_inputs(Shape(2, 3, 3, 9, 17), plan.head_dim_qk, plan.head_dim_v, torch.float32)
    out, _ = simulate(plan, q, k, v, steps={step: undone})
    assert not compare(out, None, q, k, v, parse_mask("causal")).ok


@pytest.mark.parametrize("schedule", KINDS)
def test_wrong_head_is_found(schedule: str) -> None:
    """Reading the K and V of another head gives another result: heads are not interchangeable."""
    plan = lowered(schedule, "full", 2)

    def wrong(step: LoadTile | TmaLoad, role) -> None:  # type: ignore[no-untyped-def]
        right = role.tile
        role.tile = replace(right, members=tuple(m._replace(head_kv=m.head % 2) for m in right.members))
        STEPS_SIMULATED[type(step)](step, role)
        role.tile = right

    q, k, v = random_inputs(Shape(1, 4, 2, 9, 9), plan.head_dim_qk, plan.head_dim_v, torch.float32)
    assert compare(simulate(plan, q, k, v)[0], None, q, k, v).ok
    out, _ = simulate(plan, q, k, v, steps={LoadTile: wrong, TmaLoad: wrong})
    assert not compare(out, None, q, k, v).ok


@pytest.mark.parametrize("schedule", KINDS)
def test_sizes_of_zero(schedule: str) -> None:
    """No batch, heads or queries: an empty result; no keys: zeros and lse = -inf."""
    plan = lowered(schedule, "causal", 2)
    d = plan.head_dim_qk
    for batch, heads, seqlen_q in ((0, 2, 3), (2, 0, 3), (2, 2, 0)):
        q, kv = torch.ones(batch, seqlen_q, heads, d), torch.ones(batch, 5, heads, d)
        out, lse = simulate(plan, q, kv, kv, return_lse=True)
        assert out.shape == q.shape and lse is not None and lse.shape == (batch, heads, seqlen_q)
    none = torch.ones(2, 0, 3, d)
    out, lse = simulate(plan, torch.ones(2, 11, 3, d), none, none, return_lse=True)
    assert lse is not None
    assert torch.equal(out, torch.zeros(2, 11, 3, d)) and torch.equal(lse, torch.full((2, 3, 11), -math.inf))


@pytest.mark.parametrize("schedule", KINDS)
def test_nan_and_inf_stay_in_their_row(schedule: str) -> None:
    """NaN or +inf among the scores of a row makes that row NaN and no other; -inf is a masked key."""
    plan = lowered(schedule, "full", 1, block_n=4)
    q, k, v = random_inputs(Shape(1, 1, 1, 9, 10), plan.head_dim_qk, plan.head_dim_v, torch.float32)
    q[..., 0] = k[..., 0] = 0.0
    k[0, 7, 0, 0] = 1e10
    q[0, 1, 0, 0], q[0, 3, 0, 1], q[0, 5, 0, 0], q[0, 7, 0, 0] = math.nan, math.inf, -1e30, 1e30
    out, lse = simulate(plan, q, k, v, return_lse=True)
    assert lse is not None
    for values in (out[0, :, 0].isnan().any(-1), lse[0, 0].isnan()):
        assert values.nonzero().flatten().tolist() == [1, 3, 7]
    # Row 5 has a score of -inf where the reference has -5e39: it sees the nine other keys.
    ref, ref_lse = attention(q, k, v)
    rest = [0, 2, 4, 5, 6, 8]
    torch.testing.assert_close(out[:, rest].double(), ref[:, rest], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse[..., rest].double(), ref_lse[..., rest], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["packed_qkv", "strided", "expanded", "offset", "bhsd"])
@pytest.mark.parametrize("schedule", KINDS)
def test_strides_change_nothing(schedule: str, layout: str) -> None:
    """Any strides give bitwise what contiguous tensors of the same values give; so does layout="bhsd"."""
    plan = lowered(schedule, "causal", 2, inputs="bf16")
    shape = Shape(2, 3, 3, 9, 17) if layout != "packed_qkv" else Shape(2, 3, 3, 17, 17)
    q, k, v = random_inputs(shape, plan.head_dim_qk, plan.head_dim_v, torch.bfloat16, layout=layout)
    found, found_lse = simulate(plan, q, k, v, return_lse=True)
    dense = [x.contiguous() for x in (q, k, v)]
    out, lse = simulate(plan, *dense, return_lse=True)
    assert torch.equal(found, out) and torch.equal(found_lse, lse)
    out, lse = simulate(plan, *(x.transpose(1, 2) for x in dense), return_lse=True, layout="bhsd")
    assert torch.equal(found, out.transpose(1, 2)) and torch.equal(found_lse, lse)


@pytest.mark.parametrize("schedule", KINDS)
def test_surroundings_change_nothing(schedule: str) -> None:
    """NaN, Inf and large numbers around the inputs, past the last key too, change no bit."""
    plan = lowered(schedule, "full", 2)
    q, k, v = random_inputs(Shape(2, 2, 1, 9, 17), plan.head_dim_qk, plan.head_dim_v, torch.float32)
    assert torch.equal(simulate(plan, q, k, v)[0], simulate(plan, *poison(q, k, v))[0])


@pytest.mark.parametrize("schedule", KINDS)
@pytest.mark.parametrize("mask", ["causal", "kv_idx % 64 < 24 * b or kv_idx <= q_pos + 3 * h"])
def test_heads_in_lockstep_equal_heads_alone(schedule: str, mask: str) -> None:
    """Stacking the heads is a matter of speed: one head at a time gives the same bits.

    Of 32 rows and more, since torch's exp2 rounds otherwise where less than a vector is left.
    """
    for inputs, score in (("bf16", "score"), ("f32", "softcap(score + 0.1 * h, 9.0)")):
        plan = lowered(schedule, mask, 1, block_m=64, block_n=8, inputs=inputs, head_dim=40, score=score)
        dtype = getattr(torch, plan.inputs.torch_name)
        q, k, v = random_inputs(Shape(3, 4, 2, 70, 90), 40, 40, dtype)
        together, lse = simulate(plan, q, k, v, return_lse=True)
        alone, alone_lse = simulate(plan, q, k, v, return_lse=True, observer=lambda event: None)
        assert torch.equal(together, alone) and torch.equal(lse, alone_lse)


@pytest.mark.parametrize("schedule", ["fa2", "warp_specialized"])
def test_only_blocks_that_are_visited_are_touched(schedule: str) -> None:
    """Of 2^40 keys, which are one in memory, only the blocks that some row sees are copied."""
    plan = lowered(schedule, "window(2, 0)", 1, block_n=4, head_dim=4)
    q = torch.ones(1, 3, 2, 4)
    k, v = torch.ones(1, 1, 2, 4).expand(1, 2**40, 2, 4), torch.tensor(3.0).expand(1, 2**40, 2, 4)
    out, _ = simulate(plan, q, k, v)
    assert torch.equal(out, torch.full((1, 3, 2, 4), 3.0))


def test_masks_that_ask_for_the_head() -> None:
    """A mask over h and b: each head and each element of the batch visits its own blocks of keys."""
    mask = "kv_idx <= q_pos - 3 * h + b"
    for schedule in KINDS:
        accurate(lowered(schedule, mask, 2), mask, Shape(2, 3, 1, 17, 19))


def test_probabilities_are_rounded_to_the_input_type() -> None:
    """P is rounded before P V and not before the sums: two keys worked out by hand, in bf16."""
    plan = lowered("fa2", "full", 1, block_n=4, inputs="bf16", head_dim=4)
    q, k, v = (torch.zeros(1, n, 1, 4, dtype=torch.bfloat16) for n in (1, 2, 2))
    q[..., 0], k[0, 1, 0, 0], v[0, 1, 0, 0] = 1.0, -1.0, 1.0  # scores 0 and -1
    p = torch.tensor(math.exp(-1.0))
    rounded = p.to(torch.bfloat16).float()
    assert (p - rounded).abs() > 1e-4
    seen: dict[str, torch.Tensor] = {}
    simulate(
        plan,
        q,
        k,
        v,
        softmax_scale=1.0,
        observer=lambda event: (
            seen.update(p=event.value(event.step.p), s=event.value(event.step.s))
            if isinstance(event.step, ConvertP)
            else None
        ),
    )
    assert seen["p"][0, 1] == rounded and torch.isclose(seen["s"][0, 1], p, rtol=1e-6)
    out, lse = simulate(plan, q, k, v, softmax_scale=1.0, return_lse=True)
    assert out[0, 0, 0, 0] == (rounded / (1 + p)).to(torch.bfloat16)
    assert lse is not None and torch.isclose(lse[0, 0, 0], torch.log(1 + p), rtol=1e-6)


def test_large_scores_lose_nothing_but_in_lse() -> None:
    """A constant of 1e4 in every score leaves the output as it was: the exponent is rounded once."""
    plan = lowered("fa2", "full", 1, head_dim=4)
    torch.manual_seed(0)
    q, k, v = torch.randint(-2, 3, (3, 1, 17, 1, 4)).float().unbind(0)
    q[..., 3], k[..., 3] = 1.0, 0.0
    out, _ = simulate(plan, q, k, v, softmax_scale=1.0)
    k[..., 3] = 1e4
    moved, _ = simulate(plan, q, k, v, softmax_scale=1.0)
    assert (moved - out).abs().max() < 2e-6


@pytest.mark.parametrize("dims", [(64, 128), (64, 256), (128, 192), (192, 256)], ids=str)
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_v_may_be_wider_than_q(dims: tuple[int, int], mask: str) -> None:
    """What auto picks on sm_90a stages O over Q where room is short, and O is then the larger of the two."""
    kernel = attngen.compile(
        {"problem": {"head_dim": {"qk": dims[0], "v": dims[1]}}, "mask": mask}, arch="sm_90a"
    )
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, seqlen, 3, cols, generator=generator).bfloat16()
        for seqlen, cols in ((400, dims[0]), (300, dims[0]), (300, dims[1]))
    )
    for plan in kernel.call.programs:
        out, lse = simulate(plan, q, k, v, return_lse=True)
        assert compare(out, lse, q, k, v, plan.mask).ok


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("schedule", KINDS)
def test_what_is_hidden_of_v_spreads_within_its_tile_and_column(schedule: str, value: float) -> None:
    """A weight of 0 times NaN or infinity is NaN; what a skipped tile holds reaches nobody, and K none at all."""
    plan = lowered(schedule, "causal", 1, inputs="f32")
    shape = Shape(1, 1, 1, 4 * plan.block_m, 4 * plan.block_m)
    q, k, v = random_inputs(shape, plan.head_dim_qk, plan.head_dim_v, torch.float32, seed=0)
    want = simulate(plan, q, k, v)
    want = want[0] if isinstance(want, tuple) else want
    v[0, shape.seqlen_k - 1, 0, 3] = value
    found = simulate(plan, q, k, v)
    found = found[0] if isinstance(found, tuple) else found
    spoilt = found[0, :, 0].isnan() | found[0, :, 0].isinf()
    assert spoilt[-1, 3] and spoilt[:, 3].sum() <= plan.block_m and not spoilt[: -plan.block_m].any()
    assert torch.equal(found[~spoilt[None, :, None]], want[~spoilt[None, :, None]])
