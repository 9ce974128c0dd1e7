"""What went wrong in public backward passes, each report a test here, or one elsewhere that is named.

FA: Dao-AILab/flash-attention. 4, 11, 12, 13 and 15 also stand in `tests/gpu/test_gradient_traps_on_gpu.py`.

- 5, P not zeroed where packed sequences hide keys (FA#1947): `two_documents_are_two_calls`.
- 9, causal from the top left (ffpa-attn#300, FA#436, FA#1778): the mutant of that name, and causal cases.
- 10, strides of dO (FA#355, FA#325, FA#818, xformers#282): `test_a_sum_has_gradients`.
- 12, D of a half-written dO (FA#2481, FA#2498, FA#2756): `test_backward_kernels_compile_without_spills`.
- 13, not deterministic (FA#746, FA#1596, FA#2244, FA#2510, FA#2549, triton#10415): `test_each_gradient_has_one_owner`.
- 14, adds in turns that hang (FBGEMM#4982, FA#1870, FA#1893): `test_ordered_sums.py`, on 1, 2 and 3 multiprocessors.
- 16 and 17 for sequences packed by offsets: `test_fused_lengths.py`, with NaN wherever nothing counts.
- 17, tails that nobody writes (FA#2324, FA#1228, FA#41): the simulator faults, and `what_sees_nothing_touches_nothing`.
- 20, second derivatives (pytorch#116350, FA#699): `test_second_derivatives_are_refused`.

- 21, a postprocess beside swapped products (FA#2887, FA#2888): `test_the_text_that_finishes_sums`.

There is nothing yet that 18 (a persistent pass that overwrites its staging: facebookexperimental/triton#1853, #3286)
could go wrong in.
"""

import math
from dataclasses import replace

import pytest
import torch

from attngen.plan.steps import RecoverP
from attngen.simulate import STEPS_SIMULATED, RoleRun
from tests.gradients.backward_cases import BackwardCase
from tests.gradients.gradient_properties import Inputs, Made, Subject, assert_same

SUBJECT = Subject("sm_90a")


def assert_within_the_rule(case: BackwardCase, given: Inputs) -> Made:
    """All is finite, and as near to fp64 as it must be."""
    made = SUBJECT(case, given)
    assert all(x.isfinite().all() for x in made.gradients)
    verdict = case.verdict(
        made.gradients, given.tensors, given.declared, out=made.out, lse=made.lse, dlse=given.dlse
    )
    assert verdict.ok, verdict.failures
    return made


def far_below_zero(case: BackwardCase) -> Inputs:
    """Inputs whose products, scaled, all are near -122."""
    given = Inputs.of(case)
    q, k = (x / 8 for x in (given.q, given.k))
    q[..., 0], k[..., 0] = 26.0, -26.5
    return replace(given, q=q, k=k)


@pytest.mark.parametrize("inputs", ["bf16", "f16"])
@pytest.mark.parametrize("mask", ["full", "kv_idx < lens[b]", "kv_idx % 3 != q_idx % 2"])
@pytest.mark.parametrize("lengths", [(70, 96), (130, 32), (1, 128), (1, 100)])
def test_1_and_2_an_lse_far_below_zero(lengths: tuple[int, int], mask: str, inputs: str) -> None:
    """With the last tile of keys half empty too, whose zeros would have weights of e^122.

    Sources: pytorch#196678, trl#7181; cudnn-frontend#1072 and #160.
    """
    case = BackwardCase(mask, lengths=lengths, inputs=inputs)
    made = assert_within_the_rule(case, far_below_zero(case))
    assert made.lse[made.lse.isfinite()].max() < -88.7


@pytest.mark.matrix(most=10)
@pytest.mark.parametrize("inputs", ["bf16", "f16"])
@pytest.mark.parametrize("mask", ["full", "window(1000, 1000)"])
@pytest.mark.parametrize(
    ("head_dim", "score"), [(64, "score"), (128, "score"), (128, "score + alibi(slopes)")]
)
@pytest.mark.parametrize("lengths", [(256, 1), (300, 200)])
def test_1_and_2_where_dq_is_added_up_beside_dk(
    lengths: tuple[int, int], head_dim: int, score: str, mask: str, inputs: str
) -> None:
    """Whole blocks of queries beside a block of keys of which a part exists: there dQ sums over the keys of a block."""
    case = BackwardCase(mask, score, lengths, head_dim=(head_dim, head_dim), inputs=inputs,
                        scale=32**-0.5, spec={"deterministic": False})  # fmt: skip
    assert [plan.schedule for plan in case.kernel("sm_90a").call.gradients] == ["fused_gradients"]
    made = assert_within_the_rule(case, far_below_zero(case))
    assert made.lse.min() < -88.7


def test_1_a_key_that_does_not_exist_is_masked() -> None:
    """A kernel that trusts it to be 0 is found."""

    def masks_nothing(step: RecoverP, role: RoleRun) -> None:
        STEPS_SIMULATED[RecoverP](replace(step, mask=None), role)

    case = BackwardCase(lengths=(70, 96))
    given = far_below_zero(case)
    assert SUBJECT(case, given).dq.isfinite().all()
    assert not replace(SUBJECT, steps={RecoverP: masks_nothing})(case, given).dq.isfinite().any()


@pytest.mark.parametrize("lengths", [(1, 1), (1, 2), (2, 1), (3, 3), (64, 1), (70, 2), (1, 70), (65, 3)])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_3_few_keys_and_large_inputs_in_f16(lengths: tuple[int, int], mask: str) -> None:
    """Three times N(0, 1): what dS of a key that does not exist would be, f16 cannot hold.

    Sources: FA#334, FA#443, FA#1052.
    """
    case = BackwardCase(mask, lengths=lengths, inputs="f16")
    given = Inputs.of(case)
    assert_within_the_rule(case, Inputs(*(3 * x for x in given.tensors)))


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_4_what_stands_behind_the_rows_of_a_head(mask: str) -> None:
    """In memory D and lse of a head are followed by those of the next: NaN there stays there.

    Sources: tilelang#2461; TransformerEngine#2186.
    """
    case = BackwardCase(mask, lengths=(70, 70), heads=(3, 3))
    given = Inputs.of(case)
    poisoned = {name: getattr(given, name).clone() for name in ("q", "dout")}
    for x in poisoned.values():
        x[:, :, 1] = math.nan
    made, spoilt = SUBJECT(case, given), SUBJECT(case, replace(given, **poisoned))
    for x, y in zip(spoilt.gradients, made.gradients, strict=True):
        assert torch.equal(x[:, :, ::2], y[:, :, ::2]) and x[:, :, 1].isnan().any()


def test_6_rows_without_keys_by_either_infinity() -> None:
    """lse of a row without keys may be -inf, or +inf as older kernels have it: no bit differs, and dlse counts nothing.

    Sources: FA#1936, FA#978.
    """
    case = BackwardCase("causal", lengths=(130, 70), heads=(2, 1))
    given = Inputs.of(case)
    out, lse = case.kernel("sm_90a")(*given.tensors[:3], return_lse=True)
    empty = lse.isneginf()
    dlse = torch.randn(lse.shape, generator=torch.Generator().manual_seed(0))
    given = replace(given, dlse=dlse)
    made = SUBJECT.backward(case, given, out, lse)
    assert empty.any() and not made[0].transpose(1, 2)[empty].any() and made[0].any()
    other = replace(given, dlse=dlse.masked_fill(empty, math.nan))
    assert_same(SUBJECT.backward(case, other, out, lse.masked_fill(empty, math.inf)), made)


STEEP = (
    "sqrt(abs(score))",
    "log(score * score)",
    "score / (kv_idx - 100)",
    "score if kv_idx % 3 > 0 else log(0.0 * score)",
)
"""Of a key that does not exist, whose product is 0, or of a score of -inf, the slope is infinite or NaN."""


@pytest.mark.parametrize("score", STEEP)
@pytest.mark.parametrize("mask", ["full", "causal", "kv_idx % 3 != q_idx % 2"])
def test_7_slopes_of_what_is_not_seen(mask: str, score: str) -> None:
    """A pair of weight 0 contributes 0, whatever the slope of its score is.

    Source: FA#1033.
    """
    case = BackwardCase(mask, score, lengths=(70, 70), heads=(2, 1))
    assert_within_the_rule(case, Inputs.of(case))


def test_7_two_caps_are_two_kernels() -> None:
    """Scores that differ in a number have other texts, under other names.

    Source: FA#2402.
    """
    kernels = [BackwardCase(score=f"softcap(score, {cap})").kernel("sm_90a") for cap in (3.0, 5.0)]
    texts = [{name: module.source for name, module in kernel.modules.items()} for kernel in kernels]
    attention = [{name for name in each if "rows" not in name} for each in texts]
    assert attention[0] and attention[0].isdisjoint(attention[1])


@pytest.mark.parametrize(
    "score",
    [
        "score * (f32(q_idx % 5) - 1.5)",
        "score * (f32(kv_idx % 7) - 2.5)",
        "tanh(score) * (1.0 + f32(h)) + score * f32(h_kv)",
        "score * (1.0 + f32(b))",
    ],
)
def test_8_a_slope_knows_its_pair(score: str) -> None:
    """The slope of a score is that of its own query, key, head, head of keys and sequence.

    Sources: FA#2786; native-sparse-attention-triton#27.
    """
    case = BackwardCase("causal", score, lengths=(130, 130), heads=(6, 2))
    assert_within_the_rule(case, Inputs.of(case))


@pytest.mark.parametrize("head_dim", [(32, 64), (64, 32), (192, 128), (40, 72)])
def test_8_values_have_columns_of_their_own(head_dim: tuple[int, int]) -> None:
    """V and dO may be wider or narrower than Q and K.

    Source: native-sparse-attention-triton#27.
    """
    case = BackwardCase("causal", lengths=(70, 70), head_dim=head_dim)
    assert_within_the_rule(case, Inputs.of(case))


def test_11_strides_are_64_bits_wide() -> None:
    """What a coordinate is multiplied by is an i64, in every kernel of the pass and for every tensor.

    Sources: FA#2611, FA#1500, NATTEN#347, pytorch#190857.
    """
    for target in ("sm_80", "sm_90a"):
        call = BackwardCase("causal").kernel(target).call
        rows = next(each for each in call.kernels if "delta" in map(str, each.writes))
        for kernel in (*call.gradients, rows):
            strides = [param for param in kernel.params if "stride" in param.name]
            maps = [param for param in kernel.params if param.ctype == "tensor_map"]  # which have their own
            assert len(strides) + 3 * len(maps) >= 6 and {param.ctype for param in strides} <= {"i64"}


@pytest.mark.parametrize("lens", [(0, 70), (70, 0), (0, 0)])
def test_16_a_sequence_without_keys(lens: tuple[int, int]) -> None:
    """One among others has gradients of 0, and others do not feel it.

    Sources: FA#2562, FA#2568, FA#2421.
    """
    case = BackwardCase("kv_idx < lens[b]", lengths=(70, 70))
    given = replace(Inputs.of(case), declared={"lens": torch.tensor(lens, dtype=torch.int32)})
    made = assert_within_the_rule(case, given)
    for i, keys in enumerate(lens):
        assert all(bool(x[i].any()) == bool(keys) for x in made.gradients)


@pytest.mark.parametrize(("batch", "lengths"), [(0, (70, 70)), (2, (0, 70)), (2, (70, 0)), (2, (0, 0))])
def test_16_a_call_without_pairs(batch: int, lengths: tuple[int, int]) -> None:
    """Nothing hangs, and what there is of gradients is 0.

    Sources: FA#2562, FA#2568, FA#2421.
    """
    case = BackwardCase("causal", lengths=lengths, batch=batch)
    given = Inputs.of(case)
    for x, like in zip(SUBJECT(case, given).gradients, given.tensors, strict=False):
        assert x.shape == like.shape and not x.any()
