"""The fp64 gradients against torch's autograd through a plain formula, their properties, and a rule with teeth."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from attngen.check.gradients import Gradients, attention_gradients, compare_gradients, standard_gradients
from attngen.check.inputs import Shape, random_inputs
from attngen.check.reference import attention
from attngen.errors import ArgumentError
from attngen.expr import Expr, parse_mask, parse_score, read_declarations

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
DECLARATIONS = read_declarations(
    {"n": "i32"},
    {"doc": "i32[batch, seqlen_k]", "slopes": "f32[num_heads_q]", "bias": "bf16[num_heads_q, seqlen_q, seqlen_k]"},
    {},
).declarations  # fmt: skip

# Each twice: as the text under test, and as a function of q_pos and kv_idx, or of scaled products as well,
# with what is declared. They broadcast over (batch, heads, seqlen_q, seqlen_k). The cap is a power of two, since
# constants of slopes, as 1 / cap, are f32.
MASKS: dict[str, Callable[[Tensor, Tensor, dict[str, Any]], Tensor]] = {
    "full": lambda i, j, given: (i == i) & (j == j),
    "causal": lambda i, j, given: j <= i,
    "window(7, 2)": lambda i, j, given: (i - 7 <= j) & (j <= i + 2),
    "prefix(n)": lambda i, j, given: (j < given["n"]) | (j <= i),
    "document(doc)": lambda i, j, given: (
        pad(given["doc"], (0, 1))[:, None, i[:, 0].clamp(0), None] == given["doc"][:, None, None]
    ),
}
SCORES: dict[str, Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]] = {
    "score": lambda s, i, j, given: s,
    "softcap(score, 2.0)": lambda s, i, j, given: 2.0 * torch.tanh(s / 2.0),
    "score + alibi(slopes)": lambda s, i, j, given: s + given["slopes"].double()[:, None, None] * (j - i),
    "score + f32(bias[h, q_idx, kv_idx])": lambda s, i, j, given: s + given["bias"].double(),
}
LENGTHS = [(1, 1), (1, 3), (3, 1), (9, 4), (113, 203), (239, 1), (64, 128), (4, 0), (0, 4)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def mask_of(text: str) -> Expr:
    """A mask that may read what is declared."""
    return parse_mask(text, DECLARATIONS)


def score_of(text: str) -> Expr:
    """A score that may read what is declared."""
    return parse_score(text, DECLARATIONS)


def draw(shape: Shape, dtype: torch.dtype, dims: tuple[int, int] = (16, 24), seed: int = 0) -> Inputs:
    """q, k, v and dout."""
    q, k, v = random_inputs(shape, *dims, dtype, seed=seed)
    return q, k, v, random_inputs(shape, dims[1], dims[1], dtype, seed=seed + 1)[0]


def declared_of(shape: Shape) -> dict[str, Any]:
    """A value for all that is declared."""
    made = torch.Generator().manual_seed(5)
    heads, rows, keys = shape.heads, shape.seqlen_q, shape.seqlen_k
    return {
        "n": 3,
        "doc": torch.randint(0, 3, (shape.batch, keys), generator=made).int().sort(-1).values,
        "slopes": torch.rand(heads, generator=made),
        "bias": torch.randn(heads, rows, keys, generator=made).bfloat16(),
    }


def by_autograd(
    inputs: Inputs, mask: str, score: str, given: dict[str, Any], scale: float, dlse: Tensor | None
) -> tuple[Tensor, ...]:
    """Through softmax written plainly, in fp64, (batch, seqlen, heads, head_dim); rows without keys are left out."""
    q, k, v, dout = (x.double().detach().requires_grad_() for x in inputs)
    rows, keys = q.shape[1], k.shape[1]
    group = q.shape[2] // k.shape[2]
    i, j = torch.arange(rows)[:, None] + keys - rows, torch.arange(keys)[None]
    products = scale * torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(group, 2))
    seen = MASKS[mask](i, j, given).expand_as(products)
    weights = SCORES[score](products, i, j, given).exp().masked_fill(~seen, 0.0)
    total = weights.sum(-1, keepdim=True)
    total = torch.where(total == 0, 1.0, total)
    out = torch.einsum("bhij,bjhd->bihd", weights / total, v.repeat_interleave(group, 2))
    loss = (out * dout.detach()).sum()
    if dlse is not None:
        loss = loss + (total[..., 0].log() * dlse).sum()
    return torch.autograd.grad(loss, (q, k, v))


@pytest.mark.matrix
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("with_dlse", [False, True])
@pytest.mark.parametrize("scale", [None, -0.3, 0.0])
def test_agrees_with_autograd(
    lengths: tuple[int, int], score: str, mask: str, group: int, with_dlse: bool, scale: float | None
) -> None:
    """All gradients are torch's in fp64 to 1e-11, in either layout."""
    shape = Shape(2, 2 * group, 2, *lengths)
    inputs, given = draw(shape, torch.float32), declared_of(shape)
    dlse = torch.randn(2, 2 * group, lengths[0]) if with_dlse else None
    about = {"dlse": dlse, "score": score_of(score), "declared": given}
    found = attention_gradients(*inputs, mask_of(mask), scale, **about)
    expected = by_autograd(inputs, mask, score, given, 0.25 if scale is None else scale, dlse)
    turned = attention_gradients(*(x.transpose(1, 2) for x in inputs), mask_of(mask), scale, "bhsd", **about)
    for x, y, z in zip(found, expected, turned, strict=True):
        assert x.dtype == torch.float64 and x.shape == y.shape
        torch.testing.assert_close(x, y, rtol=0, atol=1e-11)
        assert torch.equal(x, z.transpose(1, 2))


def test_rows_are_taken_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few scores at a time give what all at once give."""
    inputs = draw(Shape(1, 2, 1, 37, 11), torch.float32)
    whole = attention_gradients(*inputs, mask_of("causal"))
    monkeypatch.setattr("attngen.check.gradients.SCORES", 50)
    for x, y in zip(attention_gradients(*inputs, mask_of("causal")), whole, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-13)


def test_dout_may_repeat_one_number() -> None:
    """The gradient of a sum has strides of 0."""
    q, k, v, dout = draw(Shape(1, 2, 2, 5, 7), torch.float32)
    ones = torch.ones((), dtype=torch.float32).expand_as(dout)
    for x, y in zip(
        attention_gradients(q, k, v, ones), attention_gradients(q, k, v, ones.contiguous()), strict=True
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("keys", [1, 2, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_are_exact(keys: int, dtype: torch.dtype) -> None:
    """Where Q is 0 and a power of two of keys is seen, P is a power of two, and sums of small integers are exact.

    dQ is then what plain sums of integers give, dK is 0 as Q is, and the yardstick has the same numbers in f32.
    """
    generator = torch.Generator().manual_seed(keys)
    q = torch.zeros(1, 4, 2, 8, dtype=dtype)
    k, v = (torch.randint(-2, 3, (1, keys, 1, 8), generator=generator).to(dtype) for _ in range(2))
    dout = torch.randint(-2, 3, (1, 4, 2, 8), generator=generator).to(dtype)
    products = torch.einsum("bihd,bjd->bhij", dout.double(), v[:, :, 0].double())
    ds = (products - products.mean(-1, keepdim=True)) / keys
    dq = torch.einsum("bhij,bjd->bihd", ds, k[:, :, 0].double())
    dv = (dout.double().sum((1, 2)) / keys).expand(keys, 8)[None, :, None]
    found = attention_gradients(q, k, v, dout, softmax_scale=1.0)
    for x, y in zip(found, (dq, torch.zeros_like(k).double(), dv), strict=True):
        assert torch.equal(x, y)
    if dtype == torch.float32:
        for x, y in zip(standard_gradients(q, k, v, dout, softmax_scale=1.0), found, strict=True):
            assert torch.equal(x.double(), y)


def test_a_constant_added_to_all_scores_changes_nothing() -> None:
    """Softmax does not see it, nor do gradients."""
    inputs = draw(Shape(1, 2, 1, 9, 12), torch.float32)
    found = attention_gradients(*inputs, score=parse_score("score + 100.0"))
    for x, y in zip(found, attention_gradients(*inputs), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("with_dlse", [False, True])
def test_dt_sums_to_dlse(with_dlse: bool) -> None:
    """Where all keys hold one row, dQ is softmax_scale times it times the sum of dT over the keys, which is dlse."""
    q, k, v, dout = draw(Shape(1, 2, 1, 9, 12), torch.float32)
    k = k[:, :1].expand_as(k)
    dlse = (
        torch.randn(1, 2, 9, dtype=torch.float64) if with_dlse else torch.zeros(1, 2, 9, dtype=torch.float64)
    )
    dq = attention_gradients(q, k, v, dout, softmax_scale=0.5, dlse=dlse if with_dlse else None).dq
    expected = 0.5 * dlse.transpose(1, 2)[..., None] * k[:, :1, :1].double()
    torch.testing.assert_close(dq, expected, rtol=0, atol=1e-13)


def test_permuted_keys_permute_their_gradients() -> None:
    """The order of keys means nothing without a mask."""
    q, k, v, dout = draw(Shape(2, 2, 1, 9, 12), torch.float32)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    dq, dk, dv = attention_gradients(q, k, v, dout)
    permuted = attention_gradients(q, k[:, order], v[:, order], dout)
    for x, y in zip(permuted, (dq, dk[:, order], dv[:, order]), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_and_verdicts_scale_with_dout(dtype: torch.dtype) -> None:
    """A power of two times dO is that power times all gradients, exactly, and the rule asks what it asked before."""
    q, k, v, dout = draw(Shape(1, 2, 1, 9, 12), dtype)
    for compute in (attention_gradients, standard_gradients):
        for x, y in zip(compute(q, k, v, 8 * dout), compute(q, k, v, dout), strict=True):
            assert torch.equal(x, 8 * y)
    got = standard_gradients(q, k, v, dout)
    once, scaled = (compare_gradients([c * x for x in got], q, k, v, c * dout) for c in (1, 8))
    for x, y in zip(scaled.by_name.values(), once.by_name.values(), strict=True):
        assert x.max_bound == pytest.approx(8 * y.max_bound) and x.rmse_bound == pytest.approx(
            8 * y.rmse_bound
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_no_pair_joins_is_0_and_leaks_nothing(dtype: torch.dtype) -> None:
    """NaN and inf in a row that sees no key, and in a key that no row sees, reach nothing: by mask or by -inf."""
    q, k, v, dout = draw(Shape(1, 2, 1, 6, 8), dtype)
    clean = attention_gradients(q, k, v, dout, mask_of("q_idx != 2 and kv_idx != 5"))
    for x, bad in ((q, math.nan), (dout, math.inf)):
        x[:, 2] = bad
    for x, bad in ((k, math.inf), (v, math.nan)):
        x[:, 5] = bad
    masks = {
        "q_idx != 2 and kv_idx != 5": "score",
        "full": "score if q_idx != 2 and kv_idx != 5 else -exp(1000.0)",
    }
    for mask, score in masks.items():
        about = {"mask": mask_of(mask), "score": score_of(score)}
        found = attention_gradients(q, k, v, dout, **about)
        for x, y in zip(found, clean, strict=True):
            assert torch.equal(x, y)
        assert not found.dq[:, 2].any() and not found.dk[:, 5].any() and not found.dv[:, 5].any()
        standard = standard_gradients(q, k, v, dout, **about)
        assert compare_gradients(standard, q, k, v, dout, **about).ok
        for i, (place, name) in enumerate(((2, "dq"), (5, "dk"), (5, "dv"))):
            touched = [x.clone() for x in standard]
            touched[i][0, place, 0, 0] = 1e-6
            verdict = compare_gradients(touched, q, k, v, dout, **about)
            assert verdict.failures == (f"{name} max",)


def test_a_visible_nan_spoils_what_it_reaches() -> None:
    """NaN in one row of dO is NaN in its dQ, in dV's column and in all of dK; the rule wants it there alone."""
    q, k, v, dout = draw(Shape(1, 1, 1, 4, 3), torch.bfloat16)
    dout[0, 1, 0, 7] = math.nan
    dq, dk, dv = standard = standard_gradients(q, k, v, dout)
    assert dq[0, 1].isnan().all() and dq[0, ::2].isfinite().all()
    assert dk.isnan().all() and dv[..., 7].isnan().all() and dv[..., :7].isfinite().all()
    assert compare_gradients(standard, q, k, v, dout).ok
    assert not compare_gradients([x.nan_to_num() for x in standard], q, k, v, dout).ok
    dv[0, 0, 0, 0] = math.nan
    assert compare_gradients((dq, dk, dv), q, k, v, dout).failures == ("dv max", "dv rmse")


@dataclass(frozen=True)
class Loop:
    """A kernel's arithmetic, written without the yardstick: f32, blocks of keys, last first, P and dS rounded."""

    block: int

    def __call__(self, inputs: Inputs, mask: str) -> tuple[list[Tensor], Tensor, Tensor]:
        """Gradients in the inputs' dtype, and the out and lse they were made from."""
        q, k, v, dout = inputs
        dtype, group = q.dtype, q.shape[2] // k.shape[2]
        rows, count = q.shape[1], k.shape[1]
        queries, keys, values, douts = (x.transpose(1, 2).float() for x in inputs)
        keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
        scale = 1 / math.sqrt(q.shape[3])
        hidden = ~MASKS[mask](torch.arange(rows)[:, None] + count - rows, torch.arange(count)[None], {})
        blocks = [slice(at, at + self.block) for at in reversed(range(0, count, self.block))]
        scores = {at.start: queries @ keys[:, :, at].mT * (scale * math.log2(math.e)) for at in blocks}
        row_max = queries.new_full((*queries.shape[:3], 1), -math.inf)
        row_sum, acc_o = torch.zeros_like(row_max), torch.zeros_like(douts)
        for at in blocks:
            s = scores[at.start].masked_fill(hidden[:, at], -math.inf)
            new_max = torch.maximum(row_max, s.amax(-1, keepdim=True))
            origin = new_max.masked_fill(new_max.isneginf(), 0.0)
            alpha, p = (row_max - origin).exp2(), (s - origin).exp2()
            row_max, row_sum = new_max, alpha * row_sum + p.sum(-1, keepdim=True)
            acc_o = alpha * acc_o + p.to(dtype).float() @ values[:, :, at]
        out = torch.where(row_sum > 0, acc_o / row_sum, 0.0).to(dtype)
        lse = row_max + row_sum.log2()
        d = (douts * out.float()).sum(-1, keepdim=True)
        dq, dk, dv = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for at in blocks:
            p = (scores[at.start] - lse).exp2().masked_fill(hidden[:, at] | lse.isneginf(), 0.0)
            ds = (p * (douts @ values[:, :, at].mT - d)).to(dtype).float()
            dq += ds @ keys[:, :, at]
            dk[:, :, at] = ds.mT @ queries
            dv[:, :, at] = p.to(dtype).float().mT @ douts
        dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
        found = [x.to(dtype).transpose(1, 2) for x in (scale * dq, scale * dk, dv)]
        return found, out.transpose(1, 2), lse[..., 0] * math.log(2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_accepts_an_exact_algorithm(mask: str, dtype: torch.dtype) -> None:
    """A loop over blocks of 1 to 64 keys passes at every length, by its own out and by the yardstick's."""
    for lengths, block in itertools.product([x for x in LENGTHS if all(x)], (1, 7, 64)):
        if block == 1 and lengths[1] > 130:
            continue
        inputs = draw(Shape(2, 3, 1, *lengths), dtype)
        got, out, lse = Loop(block)(inputs, mask)
        for forward in ({}, {"out": out, "lse": lse}):
            verdict = compare_gradients(got, *inputs, mask_of(mask), **forward)
            assert verdict.ok, (lengths, block, str(verdict))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_fair_to_few_elements(dtype: torch.dtype) -> None:
    """One row and few keys, where the yardstick may be exact by luck or by cancellation: none of 160 is refused."""
    for seed, dim, keys in itertools.product(range(20), (4, 64), (1, 2, 3, 9)):
        inputs = draw(Shape(1, 1, 1, 1, keys), dtype, (dim, dim), seed=2 * seed)
        got, out, lse = Loop(1 + seed % 4)(inputs, "full")
        verdict = compare_gradients(got, *inputs, out=out, lse=lse)
        assert verdict.ok, (seed, dim, keys, str(verdict))


def mutants(inputs: Inputs, mask: str) -> dict[str, Gradients]:
    """Gradients with one fault each: of fp64, rounded once, on an altered problem."""
    q, k, v, dout = inputs
    last = k.shape[1] - 1
    altered = {
        "last block dropped": f"{mask} and kv_idx < {last // 16 * 16}",
        "one key too few": f"{mask} and kv_idx < " + ("q_pos" if mask == "causal" else str(last)),
    }
    if mask == "causal" and q.shape[1] > 1:
        altered["one key too far"] = "kv_idx <= q_pos + 1"
    right = attention_gradients(*inputs, mask_of(mask))
    out, _ = attention(q, k, v, mask_of(mask))
    d = (out * dout.double()).sum(-1).transpose(1, 2)
    scale = 1 / math.sqrt(q.shape[3])
    found = {name: attention_gradients(*inputs, mask_of(text)) for name, text in altered.items()} | {
        "zeros": Gradients(*(torch.zeros_like(x) for x in right)),
        "D forgotten": attention_gradients(*inputs, mask_of(mask), dlse=d),
    }
    if k.shape[1] > 1:  # dQ and dK are 0 else
        found["scale twice"] = Gradients(scale * right.dq, scale * right.dk, right.dv)
    return {name: Gradients(*(x.to(q.dtype) for x in each)) for name, each in found.items()}


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 3), (9, 40), (239, 1), (113, 203), (64, 128)], ids=str)
def test_refuses_every_mutant(lengths: tuple[int, int], mask: str, dtype: torch.dtype) -> None:
    """Each is refused; what is right, rounded once, and the yardstick pass."""
    inputs = draw(Shape(2, 6, 2, *lengths), dtype, (64, 64))
    for right in (standard_gradients(*inputs, mask_of(mask)), attention_gradients(*inputs, mask_of(mask))):
        verdict = compare_gradients([x.to(dtype) for x in right], *inputs, mask_of(mask))
        assert verdict.ok, str(verdict)
    for name, faulty in mutants(inputs, mask).items():
        verdict = compare_gradients(faulty, *inputs, mask_of(mask))
        assert not verdict.ok, f"{name} passed: {verdict}"
        wrong = {"D forgotten": "dq dk", "scale twice": "dq dk", "zeros": "dv"}.get(name, "dv").split()
        assert {line.split()[0] for line in verdict.failures} >= {*wrong}, f"{name}: {verdict}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_refuses_a_forgotten_slope(dtype: torch.dtype) -> None:
    """What softcap adds to a score, taken as a bias, has P right and every slope 1."""
    q, k, v, dout = inputs = draw(Shape(1, 2, 2, 64, 128), dtype, (64, 64))
    products = torch.einsum("bihd,bjhd->bhij", q.float(), k.float())[0] / 8
    declared = read_declarations({}, {"bent": "f32[num_heads_q, seqlen_q, seqlen_k]"}, {}).declarations
    forgotten = attention_gradients(
        *inputs,
        score=parse_score("score + bent[h, q_idx, kv_idx]", declared),
        declared={"bent": 3.0 * torch.tanh(products / 3.0) - products},
    )
    about = {"score": score_of("softcap(score, 3.0)")}
    verdict = compare_gradients([x.to(dtype) for x in forgotten], *inputs, **about)
    assert {"dq rmse", "dk rmse"} <= {*verdict.failures} and verdict.dv.ok, str(verdict)
    assert compare_gradients(standard_gradients(*inputs, **about), *inputs, **about).ok


def test_refuses_a_gradient_of_another_shape() -> None:
    """It would else be broadcast."""
    inputs = draw(Shape(1, 2, 1, 4, 3), torch.bfloat16)
    dq, dk, dv = standard_gradients(*inputs)
    with pytest.raises(ArgumentError):
        compare_gradients((dq[:, :1], dk, dv), *inputs)


def test_verdicts_name_places_in_the_callers_layout() -> None:
    """The index leads to the element that was spoilt."""
    for layout in ("bshd", "bhsd"):
        inputs = draw(Shape(2, 4, 2, 9, 7), torch.bfloat16)
        inputs = inputs if layout == "bshd" else tuple(x.transpose(1, 2) for x in inputs)
        got = standard_gradients(*inputs, layout=layout)
        got.dk[1, 0, 1, 5] += 100
        verdict = compare_gradients(got, *inputs, layout=layout)
        assert verdict.dk.worst_index == (1, 0, 1, 5) and verdict.dq.ok and "dk FAILED" in str(verdict)
