"""Scores that are huge and finite: every schedule and format gives what softmax of f32 gives, and that is finite."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attngen
from attngen.check.accuracy import compare
from attngen.check.reference import attention, attention_chunked, standard_attention
from tests.check.huge_scores import CONSTANTS, DIM, PADDINGS, WHOLE_NUMBERS, faults, random_operands, spec

PLANS = [
    ("simulator", "f32", "auto"),
    ("simulator", "bf16", "serial"),
    *(("sm_80", inputs, kind) for inputs in ("bf16", "f16") for kind in ("fa2", "serial")),
    *(("sm_90a", inputs, "auto") for inputs in ("bf16", "f16", "e4m3")),
    ("sm_90a", "bf16", "pingpong"),
]


@pytest.mark.matrix
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("target", "inputs", "kind"), PLANS)
def test_padding_counts_for_nothing_or_alone(target: str, inputs: str, kind: str, padding: str) -> None:
    """Good keys are as without padding; a row of padding alone is the mean of V, and its lse the padding's number."""
    how = PADDINGS[padding]
    kernel = attngen.compile(spec(how, inputs, target=target, schedule={"kind": kind}))
    fills = CONSTANTS if inputs == "e4m3" else (*CONSTANTS, *WHOLE_NUMBERS)
    found = [fault for fill in fills for fault in faults(kernel, how, inputs, fill, lens=(0, 100))]
    assert not found, "\n".join(found)


FILLS = st.builds(
    lambda sign, digits, exponent: sign * min(digits * 10.0**exponent, 3.4e38),
    st.sampled_from((-1.0, 1.0)),
    st.floats(1.0, 9.99),
    st.integers(7, 38),
)
KERNELS = {
    (target, inputs): attngen.compile(spec(PADDINGS["chosen"], inputs, target=target))
    for target, inputs in (("sm_80", "f16"), ("sm_90a", "bf16"))
}


@given(fill=FILLS, target=st.sampled_from(sorted(KERNELS)))
def test_any_number_may_pad(fill: float, target: tuple[str, str]) -> None:
    """No constant hits the rounding of a maximum so that a row is lost."""
    found = list(faults(KERNELS[target], PADDINGS["chosen"], target[1], fill, lens=(0, 77)))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("target", ["simulator", "sm_80", "sm_90a"])
def test_huge_products_choose_one_key(target: str, dim: int) -> None:
    """Inputs near 1e5 make scores beyond 1e10, of which one stands out: O is its V."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((1, length, 1, dim) for length in (50, 300, 300))
    q, k, v = (torch.randn(*shape, generator=generator, dtype=torch.float32) for shape in shapes)
    q, k, v = ((x * gain).bfloat16() for x, gain in ((q, 1e5), (k, 1e5), (v, 1.0)))
    kernel = attngen.compile({"target": target, "problem": {"head_dim": dim}})
    out, lse = kernel(q, k, v, return_lse=True)
    scores = (q.double().transpose(1, 2) @ k.double().transpose(1, 2).mT)[0, 0] * dim**-0.5
    assert torch.equal(out[0, :, 0], v[0, :, 0][scores.argmax(-1)])
    torch.testing.assert_close(lse[0, 0], scores.amax(-1).float(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("fill", CONSTANTS)
def test_the_oracles_know_it_too(fill: float) -> None:
    """fp64 and the yardstick give means of V where padding is all there is, and the rule of errors lets that pass."""
    q, k, v = random_operands("bf16", "cpu")
    score = attngen.load({"problem": {"head_dim": DIM}, "score": f"0.0 * score + ({fill!r})"}).score_expr
    mean = v.double().mean(1, keepdim=True).expand(1, *q.shape[1:3], DIM)
    for oracle in (standard_attention, attention, attention_chunked):
        out, lse = oracle(q, k, v, score=score)
        torch.testing.assert_close(out.double(), mean, rtol=0.0, atol=2e-3)
    torch.testing.assert_close(lse, torch.full_like(lse, fill), rtol=1e-6, atol=6.0)
    assert compare(mean.bfloat16(), lse, q, k, v, score=score).ok
    assert not compare(0 * mean.bfloat16(), lse, q, k, v, score=score).ok


def test_terms_that_may_be_huge_are_added_behind_the_product() -> None:
    """The tensor core drops bits of large accumulators, and what is divided by softmax_scale may overflow."""

    def adds_before(score: str, **declared: dict[str, str]) -> bool:
        text = {"problem": {"head_dim": DIM}, "score": score, **declared}
        return "SeedScores" in str(attngen.compile(text, arch="sm_90a").plan.worker.program)

    assert adds_before("score - 10000.0")
    assert adds_before("score + alibi(slopes)", tensors={"slopes": "f32[num_heads_q]"})
    assert not adds_before("score - 1e9")
    assert not adds_before("score + where(kv_idx > 9, -1000000000, 0)")
    assert not adds_before("score + n", scalars={"n": "i32"})
    fill = {"tensors": {"fill": "f32[num_heads_q]"}}
    assert not adds_before("score + fill[h] * where(kv_idx > 9, 1.0, 0.0)", **fill)
    assert not adds_before("score + where(kv_idx > 9, 2.0 * fill[h], 0.0)", **fill)
    assert not adds_before("score + c", scalars={"c": "f32"})
