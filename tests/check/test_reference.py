"""The fp64 reference against torch's SDPA under masks filled by plain loops, and against itself."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from attngen.check.inputs import EXACT_SCALE, Shape, random_inputs
from attngen.check.problem import Layout
from attngen.check.reference import attention, attention_as_fractions, attention_chunked, standard_attention
from attngen.expr import Expr, parse_mask

Visible = Callable[[dict[str, int]], bool]
Oracle = Callable[..., tuple[Tensor, Tensor]]

# Each mask twice: as the text under test, and as a Python predicate over one query and one key.
MASKS: dict[str, tuple[str, Visible]] = {
    "full": ("full", lambda n: True),
    "causal": ("causal", lambda n: n["kv_idx"] - n["q_idx"] <= n["seqlen_k"] - n["seqlen_q"]),
    "top_left": ("kv_idx <= q_idx", lambda n: n["kv_idx"] <= n["q_idx"]),
    "band": (
        "q_pos - 3 < kv_idx <= q_pos",
        lambda n: 0 <= n["q_idx"] + n["seqlen_k"] - n["seqlen_q"] - n["kv_idx"] < 3,
    ),
    "per_head": (
        "kv_idx <= q_idx + h or kv_idx == b",
        lambda n: n["kv_idx"] <= n["q_idx"] + n["h"] or n["kv_idx"] == n["b"],
    ),
    "per_kv_head": ("kv_idx != h_kv", lambda n: n["kv_idx"] != n["h_kv"]),
    "none": ("false", lambda n: False),
}
# (batch, heads, heads_kv, seqlen_q, seqlen_k)
SHAPES = [
    Shape(2, 4, 2, 7, 5),
    Shape(1, 6, 2, 5, 9),
    Shape(3, 2, 2, 8, 8),
    Shape(1, 3, 1, 1, 1),
    Shape(2, 1, 1, 9, 1),
]
ORACLES = {"naive": attention, "chunked": lambda *a, **kw: attention_chunked(*a, **kw, chunk=3)}


def problem(
    shape: Shape, head_dim_qk: int = 6, head_dim_v: int = 4, seed: int = 0, **kw: Any
) -> tuple[Tensor, ...]:
    """fp64 inputs: torch's SDPA then computes in fp64 too."""
    return random_inputs(shape, head_dim_qk, head_dim_v, torch.float64, seed=seed, **kw)


def loop_mask(shape: Shape, visible: Visible) -> Tensor:
    """The mask as (batch, heads, seqlen_q, seqlen_k), filled one element at a time."""
    filled = torch.zeros(shape.batch, shape.heads, shape.seqlen_q, shape.seqlen_k, dtype=torch.bool)
    for b in range(shape.batch):
        for h in range(shape.heads):
            for i in range(shape.seqlen_q):
                for j in range(shape.seqlen_k):
                    h_kv = h * shape.heads_kv // shape.heads
                    lengths = {"seqlen_q": shape.seqlen_q, "seqlen_k": shape.seqlen_k}
                    filled[b, h, i, j] = visible(
                        {"b": b, "h": h, "h_kv": h_kv, "q_idx": i, "kv_idx": j, **lengths}
                    )
    return filled


def repeated_heads(x: Tensor, heads: int) -> Tensor:
    """One K or V head for every query head, picked by a plain loop."""
    return torch.stack([x[:, :, h * x.shape[2] // heads] for h in range(heads)], dim=2)


@pytest.mark.matrix
@pytest.mark.parametrize("oracle", ORACLES.values(), ids=ORACLES)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [None, 1.7, -0.4, 0.0])
def test_agrees_with_torch_sdpa(oracle: Oracle, name: str, shape: Shape, scale: float | None) -> None:
    """In every row that sees a key, out is torch's SDPA in fp64 to 1e-12; in the others it is exactly 0."""
    text, visible = MASKS[name]
    q, k, v = problem(shape)
    mask = loop_mask(shape, visible)
    out, lse = oracle(q, k, v, parse_mask(text), scale)
    expected = scaled_dot_product_attention(
        q.transpose(1, 2),
        repeated_heads(k, shape.heads).transpose(1, 2),
        repeated_heads(v, shape.heads).transpose(1, 2),
        attn_mask=mask,
        scale=scale,
    )
    assert out.dtype == lse.dtype == torch.float64
    assert out.shape == (shape.batch, shape.seqlen_q, shape.heads, 4)
    assert lse.shape == (shape.batch, shape.heads, shape.seqlen_q)
    sees_a_key = mask.any(dim=-1)
    by_head = out.transpose(1, 2)
    torch.testing.assert_close(by_head[sees_a_key], expected[sees_a_key], rtol=0, atol=1e-12)
    assert torch.all(by_head[~sees_a_key] == 0)
    assert torch.all(lse[~sees_a_key] == -math.inf)
    assert torch.all(lse[sees_a_key].isfinite())


@pytest.mark.parametrize("oracle", ORACLES.values(), ids=ORACLES)
def test_lse_is_the_log_of_the_sum(oracle: Oracle) -> None:
    """The lse is log(sum(exp(scale * q.k))) over the visible keys, summed by Python's fsum."""
    shape = Shape(2, 4, 2, 5, 7)
    q, k, v = problem(shape)
    _, lse = oracle(q, k, v, parse_mask("causal"), 0.3)
    for b in range(2):
        for h in range(4):
            for i in range(5):
                scores = [0.3 * math.fsum((q[b, i, h] * k[b, j, h // 2]).tolist()) for j in range(i + 3)]
                assert lse[b, h, i].item() == pytest.approx(
                    math.log(math.fsum(map(math.exp, scores))), abs=1e-13
                )


@pytest.mark.parametrize("oracle", [*ORACLES.values(), standard_attention], ids=[*ORACLES, "standard"])
def test_hand_values(oracle: Oracle) -> None:
    """Scores 0, log 2, log 5 weigh the values 1/8, 2/8, 5/8: 8 * out = 1*8 + 2*16 + 5*32, lse = log 8."""
    q = torch.ones(1, 1, 1, 1)
    k = torch.tensor([0.0, math.log(2.0), math.log(5.0)]).view(1, 3, 1, 1)
    v = torch.tensor([8.0, 16.0, 32.0]).view(1, 3, 1, 1)
    out, lse = oracle(q, k, v)
    assert out.item() == pytest.approx(25.0, rel=1e-6)
    assert lse.item() == pytest.approx(math.log(8.0), rel=1e-6)


@pytest.mark.parametrize("oracle", [*ORACLES.values(), standard_attention], ids=[*ORACLES, "standard"])
def test_layouts_agree(oracle: Oracle) -> None:
    """layout="bhsd" on exchanged inputs gives the exchanged out and the same lse."""
    q, k, v = (x.float() for x in problem(Shape(2, 4, 2, 5, 7)))
    out, lse = oracle(q, k, v, parse_mask("causal"))
    exchanged: Layout = "bhsd"
    other, other_lse = oracle(*(x.transpose(1, 2) for x in (q, k, v)), parse_mask("causal"), layout=exchanged)
    assert torch.equal(other.transpose(1, 2), out)
    assert torch.equal(other_lse, lse)


@pytest.mark.matrix(most=4)
@pytest.mark.parametrize("text", ["full", "causal", "kv_idx < 40 or q_idx < 3", "false"])
@pytest.mark.parametrize("chunk", [1, 7, 32, 4096])
def test_chunks_change_nothing(text: str, chunk: int) -> None:
    """attention_chunked is attention to 1e-12 whatever the chunk, also with scores of some hundreds."""
    q, k, v = problem(Shape(1, 4, 2, 33, 65), head_dim_qk=16)
    mask = parse_mask(text)
    for scale in (None, 20.0):
        naive = attention(q, k, v, mask, scale)
        chunked = attention_chunked(q, k, v, mask, scale, chunk=chunk)
        for got, expected in zip(chunked, naive, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("oracle", [attention_chunked, standard_attention], ids=["chunked", "standard"])
def test_rows_are_the_rows_of_the_whole(oracle: Oracle) -> None:
    """With rows, out and lse are those rows of the whole result: the mask still sees their true q_idx."""
    q, k, v = (x.float() for x in problem(Shape(2, 2, 1, 9, 11)))
    rows = [7, 0, 3]
    out, lse = oracle(q, k, v, parse_mask("causal"))
    some, some_lse = oracle(q, k, v, parse_mask("causal"), rows=rows)
    torch.testing.assert_close(some, out[:, rows], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(some_lse, lse[:, :, rows], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(some, out[:, :3], atol=1e-3)


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest storage that any torch operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("mask", [parse_mask("full"), parse_mask("causal")], ids=["full", "causal"])
def test_chunked_memory_is_linear(mask: Expr) -> None:
    """At every length the largest tensor of attention_chunked is out or one chunk; the naive one is N^2."""
    chunk, head_dim = 32, 4
    for length in (64, 128, 256, 512):
        q, k, v = problem(Shape(1, 2, 1, length, length), head_dim, head_dim)
        with LargestTensor() as chunked:
            attention_chunked(q, k, v, mask, chunk=chunk)
        assert chunked.elements <= max(q.numel(), chunk * max(chunk, head_dim))
        with LargestTensor() as naive:
            attention(q, k, v, mask)
        assert naive.elements >= 2 * length * length


@pytest.mark.parametrize("oracle", [*ORACLES.values(), standard_attention], ids=[*ORACLES, "standard"])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(0, 2, 1, 3, 4),
        Shape(1, 0, 0, 3, 4),
        Shape(1, 2, 1, 0, 4),
        Shape(1, 2, 1, 3, 0),
        Shape(0, 0, 0, 0, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("text", ["full", "causal"])
def test_sizes_of_zero(oracle: Oracle, shape: Shape, text: str) -> None:
    """A size of 0 gives outputs of the right shape: empty, or 0 and -inf where there are rows and no keys."""
    out, lse = oracle(*(x.float() for x in problem(shape)), parse_mask(text))
    assert out.shape == (shape.batch, shape.seqlen_q, shape.heads, 4)
    assert lse.shape == (shape.batch, shape.heads, shape.seqlen_q)
    assert torch.all(out == 0)
    assert torch.all(lse == -math.inf)


@pytest.mark.parametrize("oracle", [*ORACLES.values(), standard_attention], ids=[*ORACLES, "standard"])
@pytest.mark.parametrize("poison", [math.inf, math.nan])
@pytest.mark.parametrize("position", range(7))
def test_a_bad_score_spoils_its_row_alone(oracle: Oracle, poison: float, position: int) -> None:
    """A score of +inf or NaN makes each row that sees it NaN, out and lse; all others stay as they were."""
    q, k, v = (x.float() for x in problem(Shape(1, 2, 2, 7, 7)))
    q = q.abs() + 0.1
    clean = oracle(q, k, v, parse_mask("causal"))
    k[0, position, 0, 0] = poison
    out, lse = oracle(q, k, v, parse_mask("causal"))
    assert out[0, position:, 0].isnan().all() and lse[0, 0, position:].isnan().all()
    for got, expected in ((out[:, :, 1], clean[0][:, :, 1]), (lse[:, 1], clean[1][:, 1])):
        assert torch.equal(got, expected)
    assert torch.equal(out[0, :position, 0], clean[0][0, :position, 0])
    assert torch.equal(lse[0, 0, :position], clean[1][0, 0, :position])


@pytest.mark.parametrize("oracle", [*ORACLES.values(), standard_attention], ids=[*ORACLES, "standard"])
@pytest.mark.parametrize("position", range(5))
def test_a_score_of_minus_inf_is_masked(oracle: Oracle, position: int) -> None:
    """A key whose score is -inf counts as not there; a row of such keys alone is empty."""
    q, k, v = (x.float() for x in problem(Shape(1, 1, 1, 3, 5)))
    q = q.abs() + 0.1
    others = [j for j in range(5) if j != position]
    expected = oracle(q, k[:, others], v[:, others])
    k[0, position, 0, 0] = -math.inf
    for got, want in zip(oracle(q, k, v), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    out, lse = oracle(q, k[:, [position]], v[:, [position]])
    assert torch.all(out == 0) and torch.all(lse == -math.inf)


@pytest.mark.parametrize("oracle", [*ORACLES.values(), standard_attention], ids=[*ORACLES, "standard"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_masked_value_contributes_nothing(oracle: Oracle, value: float) -> None:
    """An inf or NaN in V reaches the rows that see its key, in its column, and no other element."""
    q, k, v = (x.float() for x in problem(Shape(1, 1, 1, 6, 6)))
    clean, _ = oracle(q, k, v, parse_mask("causal"))
    v[0, 3, 0, 1] = value
    out, _ = oracle(q, k, v, parse_mask("causal"))
    changed = torch.zeros_like(out, dtype=torch.bool)
    changed[0, 3:, 0, 1] = True
    assert torch.equal(out[~changed], clean[~changed])
    torch.testing.assert_close(out[changed], torch.full_like(out[changed], value), equal_nan=True)


def test_inputs_are_left_alone() -> None:
    """Neither oracle writes to its inputs, which it may hold as views, nor records a gradient."""
    given = problem(Shape(1, 2, 1, 5, 7))
    kept = [x.clone() for x in given]
    q, k, v = (x.requires_grad_() for x in given)
    for oracle in (attention, attention_chunked, standard_attention):
        out, _ = oracle(q, k, v, parse_mask("causal"))
        assert not out.requires_grad
    assert all(torch.equal(x, y) for x, y in zip(given, kept, strict=True))


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_standard_rounds_p_before_it_normalises(dtype: torch.dtype, unit: float) -> None:
    """A weight just above 1/2 loses what the input dtype cannot hold, the f32 sum and lse keep it.

    Two keys with scores 0 and -s where exp(-s) = 1/2 + unit/8 : P is (1, 1/2) after rounding, values (0, 1)
    give 0.5 / (1.5 + unit/8) in f32 where rounding after the division, or none, would give (0.5 + unit/8) /
    (1.5 + unit/8).
    """
    weight = 0.5 + unit / 8
    q = torch.ones(1, 1, 1, 1, dtype=dtype)
    k = torch.tensor([0.0, -1.0], dtype=dtype).view(1, 2, 1, 1)
    v = torch.tensor([0.0, 1.0], dtype=dtype).view(1, 2, 1, 1)
    out, lse = standard_attention(q, k, v, softmax_scale=-math.log(weight), out_dtype=torch.float32)
    assert out.item() == pytest.approx(0.5 / (1 + weight), rel=1e-6)
    assert out.item() != pytest.approx(weight / (1 + weight), rel=unit / 16)
    assert lse.item() == pytest.approx(math.log1p(weight), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("text", ["full", "causal"])
def test_standard_is_exact_on_the_exact_tier(dtype: torch.dtype, text: str) -> None:
    """On integer inputs the yardstick is the fraction of exact integers, bit by bit, divided in f32."""
    q, k, v = random_inputs(Shape(2, 4, 2, 113, 203), 64, 32, dtype, kind="integers")
    out, _ = standard_attention(q, k, v, parse_mask(text), EXACT_SCALE)
    numerator, denominator = attention_as_fractions(q, k, v, parse_mask(text))
    assert torch.equal(out, (numerator.float() / denominator.float()).to(dtype))


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("text", ["full", "causal", "kv_idx < 2 and q_idx != h"])
def test_fractions_are_the_reference(layout: Layout, text: str) -> None:
    """The fractions are of dyadic integers, their quotients out to 1e-14, log(denominator) lse."""
    given = random_inputs(Shape(2, 4, 2, 9, 7), 8, 4, torch.float32, kind="integers")
    q, k, v = given if layout == "bshd" else (x.transpose(1, 2) for x in given)
    out, lse = attention(q, k, v, parse_mask(text), EXACT_SCALE, layout)
    numerator, denominator = attention_as_fractions(q, k, v, parse_mask(text), layout)
    assert torch.equal((4 * numerator).round(), 4 * numerator) and torch.equal(
        (4 * denominator).round(), 4 * denominator
    )
    torch.testing.assert_close((numerator / denominator).nan_to_num(), out, rtol=0, atol=1e-14)
    by_head = denominator if layout == "bhsd" else denominator.transpose(1, 2)
    torch.testing.assert_close(by_head[..., 0].log(), lse, rtol=0, atol=1e-14)


def test_standard_splits_long_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a few queries give the numbers of the whole, and no piece holds more scores than it may."""
    q, k, v = random_inputs(Shape(1, 2, 1, 65, 129), 16, 8, torch.bfloat16)
    whole, whole_lse = standard_attention(q, k, v, parse_mask("causal"))
    monkeypatch.setattr("attngen.check.reference.STANDARD_SCORES", 129 * 4)
    with LargestTensor() as largest:
        out, lse = standard_attention(q, k, v, parse_mask("causal"))
    assert largest.elements <= q.numel()  # 65 * 32, against 65 * 129 scores of a head
    torch.testing.assert_close(out, whole, rtol=2.0**-7, atol=0)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-6, atol=1e-6)


# ---- learned sinks --------------------------------------------------------------------------------------------------
SINKS = ((0.5, -2.0, 3.0, 1e3), (-math.inf, math.inf, -1e30, 1e30))


@pytest.mark.parametrize("sink", SINKS, ids=str)
@pytest.mark.parametrize("oracle", [*ORACLES.values(), standard_attention])
def test_a_sink_is_a_key_without_a_value(oracle: Oracle, sink: tuple[float, ...]) -> None:
    """Out is what the keys make of it, times their share; lse has the sink; a row without keys has nothing else."""
    q, k, v = problem(SHAPES[0])
    mask, logits = parse_mask(MASKS["causal"][0]), torch.tensor(sink)
    if oracle is standard_attention:
        q, k, v = q.float(), k.float(), v.float()
    out, lse = oracle(q, k, v, mask, declared={"sink": logits})
    plain, of_keys = attention(q, k, v, mask)
    whole = torch.logaddexp(of_keys, logits.double()[None, :, None])
    assert of_keys.isneginf().any()
    share = (of_keys - whole).exp().nan_to_num(0.0)  # of nothing, and beside infinity
    expected = plain * share.transpose(1, 2)[..., None]
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(lse.double(), whole, rtol=1e-6, atol=1e-6)
    assert not out[:, :, logits == math.inf].any()


def test_a_sink_of_minus_infinity_is_none() -> None:
    """To the bit, in every oracle."""
    q, k, v = problem(SHAPES[0])
    mask, none = parse_mask(MASKS["band"][0]), torch.full((4,), -math.inf)
    for oracle in (*ORACLES.values(), standard_attention):
        for x, y in zip(oracle(q, k, v, mask, declared={"sink": none}), oracle(q, k, v, mask), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-14, atol=0.0)


def test_fractions_know_a_sink() -> None:
    """It joins the denominator alone, with a weight of e."""
    q, k, v = random_inputs(SHAPES[0], 6, 4, torch.float32, kind="integers")
    sink = torch.tensor([math.log(2.0), 0.0, -1.0, -math.inf])
    numerator, denominator = attention_as_fractions(q, k, v, declared={"sink": sink})
    plain, of_keys = attention_as_fractions(q, k, v)
    assert torch.equal(numerator, plain)
    torch.testing.assert_close(denominator - of_keys, sink.double().exp().view(1, 1, 4, 1).expand_as(of_keys))
    exact, _ = attention(q, k, v, softmax_scale=EXACT_SCALE, declared={"sink": sink})
    torch.testing.assert_close(numerator / denominator, exact)


@pytest.mark.parametrize("oracle", ORACLES.values(), ids=ORACLES)
def test_a_bad_score_spoils_its_row_beside_a_sink(oracle: Oracle) -> None:
    """And a sink of NaN all rows of its head."""
    q, k, v = problem(SHAPES[0])
    q[0, 3, 1] = math.nan
    out, lse = oracle(q, k, v, declared={"sink": torch.tensor([1.0, 2.0, math.nan, math.inf])})
    spoilt = torch.zeros(2, 4, 7, dtype=torch.bool)
    spoilt[0, 1, 3], spoilt[:, 2] = True, True
    assert torch.equal(lse.isnan(), spoilt) and torch.equal(out.isnan().any(-1).transpose(1, 2), spoilt)
