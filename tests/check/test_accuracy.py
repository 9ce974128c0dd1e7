"""The rule that judges every kernel accepts exact algorithms in any order and refuses each mutant."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attngen.check.accuracy import Accuracy, compare
from attngen.check.inputs import KINDS, Kind, Shape, random_inputs
from attngen.check.reference import attention, standard_attention
from attngen.errors import ArgumentError
from attngen.expr import Expr, parse_mask

BLOCK_N = 64  # keys in the last block that the mutant drops
CAP = 217  # lengths of the table, capped so that the whole table runs in seconds
LENGTHS = [
    (1, 1),
    (64, 128),
    (113, 203),
    (239, 1),
    (799, 3),
    (128, 217),
    (1023, 1024),
    (1024, 1023),
    (4096, 4096),
]
CAPPED = sorted({(min(q, CAP), min(k, CAP)) for q, k in LENGTHS})
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MASKS = {"full": "full", "causal": "causal"}

Problem = tuple[Tensor, Tensor, Tensor]


def draw(lengths: tuple[int, int], dtype: torch.dtype, head_dim: int = 64, kind: Kind = "randn") -> Problem:
    """Two batches, GQA 3:1."""
    return random_inputs(Shape(2, 6, 2, *lengths), head_dim, head_dim, dtype, kind=kind)


def flash(q: Tensor, k: Tensor, v: Tensor, mask: str, block_n: int, serial: bool) -> tuple[Tensor, Tensor]:
    """The kernels' arithmetic in a dozen lines: blocks of keys, last first, running maximum, P in the input
    dtype.

    Written without the reference, so that the bound is tested on an algorithm that is not its own yardstick.
    """
    seqlen_q, seqlen_k, heads = q.shape[1], k.shape[1], q.shape[2]
    queries, keys, values = (x.transpose(1, 2).float() for x in (q, k, v))
    keys, values = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (keys, values))
    row_max = queries.new_full((*queries.shape[:3], 1), -math.inf)
    row_sum, acc_o = torch.zeros_like(row_max), queries.new_zeros(*queries.shape[:3], v.shape[-1])
    for start in reversed(range(0, seqlen_k, block_n)):
        score = (
            queries @ keys[:, :, start : start + block_n].mT * (math.log2(math.e) / math.sqrt(q.shape[-1]))
        )
        if mask == "causal":
            kv_idx = torch.arange(start, min(start + block_n, seqlen_k))
            score[..., kv_idx > torch.arange(seqlen_q)[:, None] + (seqlen_k - seqlen_q)] = -math.inf
        old_sum, new_max = row_sum, torch.maximum(row_max, score.amax(-1, keepdim=True))
        origin = new_max.masked_fill(new_max.isneginf(), 0.0)
        alpha, p = (row_max - origin).exp2(), (score - origin).exp2()
        row_max, row_sum = new_max, alpha * old_sum + p.sum(-1, keepdim=True)
        pv = p.to(q.dtype).float() @ values[:, :, start : start + block_n]
        acc_o = (alpha * old_sum * acc_o + pv) / row_sum.clamp(min=1e-30) if serial else alpha * acc_o + pv
    out = acc_o if serial else torch.where(row_sum > 0, acc_o / row_sum, 0.0)
    lse = (row_max + row_sum.log2()) * math.log(2.0)
    return out.to(q.dtype).transpose(1, 2), lse[..., 0]


def mutants(q: Tensor, k: Tensor, v: Tensor, mask: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Outputs of kernels with one fault each, made by the fp64 reference on altered inputs and rounded once.

    - zeros: nothing was written.
    - last block dropped: the keys from the start of the last block of BLOCK_N on are never met.
    - mask off by one: the causal diagonal one key too far or too near; under the full mask, which has no
      diagonal, the tail mask that cuts the last key.

    What cannot be seen, and is left out here: a diagonal one key too far where no query has a next key,
    seqlen_q = 1; zeros and dropped blocks where they are right, in problems whose rows see no key at all.
    """
    seqlen_k = k.shape[1]
    expr = parse_mask(mask)
    kept = (seqlen_k - 1) // BLOCK_N * BLOCK_N
    near, far = ("causal and kv_idx < q_pos", "kv_idx <= q_pos + 1")
    if mask == "full":
        near = f"kv_idx < {seqlen_k - 1}"
    altered = {"last block dropped": f"{mask} and kv_idx < {kept}", "mask off by one": near}
    if mask == "causal" and q.shape[1] > 1:
        altered["mask off by one, too far"] = far
    found = {"zeros": (torch.zeros_like(standard_attention(q, k, v, expr)[0]), attention(q, k, v, expr)[1])}
    for name, text in altered.items():
        found[name] = attention(q, k, v, parse_mask(text))
    return {name: (out.to(q.dtype), lse.float()) for name, (out, lse) in found.items()}


@pytest.mark.matrix(classes=lambda lengths, mask, dtype: [("lengths", lengths, mask), ("mask", mask, dtype)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", CAPPED, ids=str)
def test_refuses_every_mutant(lengths: tuple[int, int], mask: str, dtype: torch.dtype) -> None:
    """Each mutant is refused by out alone, without lse; where it computes lse wrong, by lse as well."""
    q, k, v = draw(lengths, dtype)
    faulty = mutants(q, k, v, mask)
    assert len(faulty) >= 3
    for name, (out, lse) in faulty.items():
        verdict = compare(out, None, q, k, v, parse_mask(mask))
        assert not verdict.ok, f"{name} passed: {verdict}"
        assert verdict.failures and verdict.worst_index
        if name != "zeros":
            right = standard_attention(q, k, v, parse_mask(mask))[0]
            verdict = compare(right, lse, q, k, v, parse_mask(mask))
            assert verdict.failures == ("lse",), f"{name} passed by lse: {verdict}"


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_refuses_mutants_at_full_length(dtype: torch.dtype, mask: str) -> None:
    """At 1023 by 1024, where errors of a block are small against the noise, the mutants are still refused."""
    q, k, v = random_inputs(Shape(1, 2, 1, 1023, 1024), 64, 64, dtype)
    right = standard_attention(q, k, v, parse_mask(mask))[0]
    for name, (out, lse) in mutants(q, k, v, mask).items():
        # One key in 1024 may move the rows of the full mask by less than bf16 can tell from noise: lse tells.
        by_lse = name == "mask off by one" and mask == "full"
        verdict = compare(right if by_lse else out, lse if by_lse else None, q, k, v, parse_mask(mask))
        assert not verdict.ok, f"{name} passed: {verdict}"


@pytest.mark.parametrize("mask", MASKS)
def test_mutants_are_wrong_on_the_reference_too(mask: str) -> None:
    """The mutants differ from the reference by far more than rounding: the test above is not about bounds."""
    q, k, v = draw((113, 203), torch.float32)
    ref, _ = attention(q, k, v, parse_mask(mask))
    for name, (out, _) in mutants(q, k, v, mask).items():
        assert (out.double() - ref).abs().max() > 1e-3, name


@pytest.mark.matrix(classes=lambda kind, mask, dtype: [("kind", kind), ("mask", mask, dtype)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_accepts_an_exact_algorithm(mask: str, dtype: torch.dtype, kind: Kind) -> None:
    """Flash and serial loops pass with blocks of 1 to 128 keys, at every length of the table, capped."""
    for lengths, block_n, serial in itertools.product(CAPPED, (1, 3, 32, 128), (False, True)):
        if block_n == 1 and lengths[1] > 130:
            continue
        q, k, v = draw(lengths, dtype, head_dim=40, kind=kind)
        verdict = compare(*flash(q, k, v, mask, block_n, serial), q, k, v, parse_mask(mask))
        assert verdict.ok, (lengths, block_n, serial, str(verdict))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_fair_to_few_elements(dtype: torch.dtype) -> None:
    """One row and head_dim 1 to 4, where the yardstick may be exact by luck: 600 problems, none refused."""
    for seed, head_dim, seqlen_k in itertools.product(range(50), (1, 4), (1, 2, 3, 5, 9, 64)):
        shape = Shape(1, 1, 1, 1, seqlen_k)
        q, k, v = random_inputs(shape, head_dim, head_dim, dtype, seed=seed)
        verdict = compare(*flash(q, k, v, "full", 1 + seed % 4, seed % 2 == 1), q, k, v)
        assert verdict.ok, (seed, head_dim, seqlen_k, str(verdict))


@pytest.mark.parametrize("serial", [False, True])
def test_f32_blocks_are_allowed_their_roundings(serial: bool) -> None:
    """2048 blocks of one key, scores of 0 and one v: f32 loses more than the yardstick's sums, yet no more than each
    block may; mutants are refused as ever, and short inputs are allowed nothing more.
    """
    q, k, v = random_inputs(Shape(1, 1, 1, 64, 2048), 4, 4, torch.float32)
    q, v = torch.zeros_like(q), v[:, :1].expand(-1, 2048, -1, -1)
    run = flash(q, k, v, "full", 1, serial)
    assert not compare(*run, q, k, v).ok
    assert compare(*run, q, k, v, block_n=1).ok
    assert compare(
        *(x.transpose(1, 2) if x.dim() == 4 else x for x in (*run, q, k, v)), layout="bhsd", block_n=1
    ).ok
    q, k, v = draw((113, 203), torch.float32)
    for name, (out, _) in mutants(q, k, v, "causal").items():
        assert not compare(out, None, q, k, v, parse_mask("causal"), block_n=1).ok, name
    q, k, v = draw((113, 203), torch.bfloat16)
    run = flash(q, k, v, "full", 1, serial)
    assert compare(*run, q, k, v, block_n=1) == compare(*run, q, k, v)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_rmse_binds_where_the_maximum_does_not(dtype: torch.dtype) -> None:
    """At 16384 rows an output with twice the yardstick's error everywhere is refused by its RMSE alone."""
    q, k, v = random_inputs(Shape(2, 8, 2, 1024, 128), 16, 16, dtype)
    ref, lse = attention(q, k, v)
    standard, _ = standard_attention(q, k, v)
    noise = torch.randn(ref.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).clamp(
        -2, 2
    )
    rmse = (standard.double() - ref).square().mean().sqrt()
    verdict = compare((ref + 2 * rmse * noise).to(dtype), lse.float(), q, k, v)
    assert verdict.failures == ("rmse",), str(verdict)


def test_repeated_rows_count_once() -> None:
    """Rows that repeat one draw leave RMSE its whole allowance for chance, which different rows do not."""
    q, k, v = random_inputs(Shape(1, 1, 1, 64, 32), 16, 16, torch.float16)
    many = compare(*correct(q, k, v), q, k, v)
    q = q[:, :1].expand(-1, 64, -1, -1)
    one = compare(*correct(q, k, v), q, k, v)
    single = compare(*correct(q[:, :1], k, v), q[:, :1], k, v)
    assert one.rmse_bound == pytest.approx(single.rmse_bound)
    chance, whole = (x.rmse_bound - 1.2 * x.standard_rmse for x in (many, one))
    assert chance <= whole / 4  # 1/16, but term itself varies by powers of two between the draws


def test_bounds_are_the_rule_as_written() -> None:
    """The numbers of the rule, computed again by a plain Python loop over a small bf16 problem."""
    q, k, v = random_inputs(Shape(1, 2, 1, 3, 9), 8, 4, torch.bfloat16)
    out, lse = flash(q, k, v, "causal", 2, False)
    verdict = compare(out, lse, q, k, v, parse_mask("causal"))
    ref, ref_lse = attention(q, k, v, parse_mask("causal"))
    standard, _ = standard_attention(q, k, v, parse_mask("causal"))

    def bf16(x: float) -> float:
        return torch.tensor(x, dtype=torch.float64).to(torch.bfloat16).item()

    refs, outs, standards = (x.double().flatten().tolist() for x in (ref, out, standard))
    errors = [abs(x - y) for x, y in zip(outs, refs, strict=True)]
    standard_errors = [abs(x - y) for x, y in zip(standards, refs, strict=True)]
    term = 2 * max(abs(bf16(bf16(bf16(x) + 0.3) - 0.3) - bf16(x)) for x in refs)
    term = max(term, 2.0 ** (math.floor(math.log2(max(abs(bf16(x)) for x in refs))) - 7))
    assert verdict.max_error == pytest.approx(max(errors))
    assert verdict.max_bound == pytest.approx(2 * max(standard_errors) + term)
    mean_square = math.fsum(x * x for x in errors) / len(errors)
    standard_mean_square = math.fsum(x * x for x in standard_errors) / len(errors)
    assert verdict.rmse == pytest.approx(math.sqrt(mean_square))
    assert verdict.rmse_bound == pytest.approx(1.2 * math.sqrt(standard_mean_square) + term * 4 / (2 * 3))
    flat_lse = zip(lse.flatten().tolist(), ref_lse.flatten().tolist(), strict=True)
    worst = max(flat_lse, key=lambda pair: abs(pair[0] - pair[1]) / (1e-4 + 1e-6 * abs(pair[1])))
    assert verdict.lse_error == pytest.approx(abs(worst[0] - worst[1]))
    assert verdict.lse_bound == pytest.approx(1e-4 + 1e-6 * abs(worst[1]))
    assert verdict.ok


def correct(q: Tensor, k: Tensor, v: Tensor, mask: Expr | None = None) -> tuple[Tensor, Tensor]:
    """An out and lse that pass, to be spoilt by a test."""
    out, lse = standard_attention(q, k, v, mask)
    return out.clone(), lse.clone()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("index", [(0, 0, 0, 0), (1, 12, 5, 63), (0, 7, 3, 9)])
def test_a_stray_nan_fails_with_its_index(value: float, index: tuple[int, ...]) -> None:
    """One NaN or inf in out where the reference is finite is refused, and the report names the place."""
    q, k, v = draw((13, 17), torch.float16)
    out, lse = correct(q, k, v)
    out[index] = value
    verdict = compare(out, lse, q, k, v)
    assert verdict.failures[0] == "max" and verdict.worst_index == index
    assert verdict.max_error == math.inf
    assert str(index) in str(verdict) and "FAILED" in str(verdict) and "\n" not in str(verdict)
    exchanged = compare(out.transpose(1, 2), lse, *(x.transpose(1, 2) for x in (q, k, v)), layout="bhsd")
    b, row, head, column = index
    assert exchanged.worst_index == (b, head, row, column)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e3])
def test_a_wrong_lse_fails_with_its_index(value: float) -> None:
    """A wrong element of lse is refused although out is right, and the report names the place."""
    q, k, v = draw((13, 17), torch.float16)
    out, lse = correct(q, k, v)
    lse[1, 4, 11] = value
    verdict = compare(out, lse, q, k, v)
    assert verdict.failures == ("lse",) and verdict.lse_index == (1, 4, 11)
    assert "(1, 4, 11)" in str(verdict)


def test_nan_equals_nan() -> None:
    """Rows that a NaN in K makes NaN must be NaN in out and lse, and no other row may."""
    q, k, v = draw((9, 9), torch.bfloat16)
    mask = parse_mask("causal")
    clean = correct(q, k, v, mask)
    k[0, 4, 1, 0] = math.nan  # kv head 1: heads 3 to 5 of q, rows 4 and on
    out, lse = correct(q, k, v, mask)
    assert out[0, 4:, 3:].isnan().all() and lse[0, 3:, 4:].isnan().all()
    assert compare(out, lse, q, k, v, mask).ok
    assert compare(*clean, q, k, v, mask).failures == ("max", "lse")
    out[0, 3, 3, 0] = math.nan
    assert compare(out, lse, q, k, v, mask).worst_index == (0, 3, 3, 0)


def test_empty_rows_are_exactly_zero() -> None:
    """A row that sees no key must be 0 with lse = -inf: no tiny number, no finite lse."""
    q, k, v = draw((9, 4), torch.bfloat16)
    mask = parse_mask("causal")
    out, lse = correct(q, k, v, mask)
    assert compare(out, lse, q, k, v, mask).ok
    out[0, 2, 1, 3] = 1e-30
    assert compare(out, lse, q, k, v, mask).worst_index == (0, 2, 1, 3)
    out[0, 2, 1, 3] = 0.0
    lse[0, 1, 2] = -1e30
    assert compare(out, lse, q, k, v, mask).lse_index == (0, 1, 2)


@pytest.mark.parametrize("shape", [Shape(0, 2, 1, 3, 4), Shape(1, 2, 1, 0, 4), Shape(1, 2, 1, 3, 0)], ids=str)
def test_sizes_of_zero(shape: Shape) -> None:
    """Nothing to compare passes; rows without keys pass as zeros and fail as anything else."""
    q, k, v = random_inputs(shape, 8, 4, torch.float16)
    out = torch.zeros(shape.batch, shape.seqlen_q, shape.heads, 4, dtype=torch.float16)
    lse = torch.full((shape.batch, shape.heads, shape.seqlen_q), -math.inf)
    assert compare(out, lse, q, k, v).ok
    assert compare(out + 1, None, q, k, v).ok == (out.numel() == 0)


def test_long_problems_are_compared_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above NAIVE_SCORES the naive reference is not called, and the verdict is the same."""
    q, k, v = draw((65, 129), torch.bfloat16)
    out, lse = correct(q, k, v)
    naive = compare(out, lse, q, k, v)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the naive reference was asked for a long problem")

    monkeypatch.setattr("attngen.check.accuracy_terms.NAIVE_SCORES", 1000)
    monkeypatch.setattr("attngen.check.accuracy_terms.attention", refuse)
    chunked = compare(out, lse, q, k, v)
    assert chunked.max_error == pytest.approx(naive.max_error, rel=1e-9)
    assert chunked.rmse_bound == pytest.approx(naive.rmse_bound, rel=1e-9)


def test_rows_compare_those_rows_alone() -> None:
    """With rows, an error in one of them is found under its true index; one elsewhere goes unseen."""
    q, k, v = draw((30, 20), torch.bfloat16)
    mask = parse_mask("causal")
    out, lse = correct(q, k, v, mask)
    out[1, 17, 2, 5] += 1
    lse[0, 3, 29] += 1
    assert compare(out, lse, q, k, v, mask, rows=[11, 0, 28]).ok
    verdict = compare(out, lse, q, k, v, mask, rows=[11, 29, 17])
    assert verdict.worst_index == (1, 17, 2, 5) and verdict.lse_index == (0, 3, 29)
    assert set(verdict.failures) >= {"max", "lse"}


@pytest.mark.parametrize("argument", ["out", "lse"])
def test_a_wrong_shape_is_the_users_fault(argument: str) -> None:
    """An out or lse of another shape raises with both shapes; it is not broadcast into agreement."""
    q, k, v = draw((5, 7), torch.bfloat16)
    out, lse = correct(q, k, v)
    given = {"out": out, "lse": lse}
    given[argument] = given[argument][:1]
    with pytest.raises(ArgumentError) as fault:
        compare(given["out"], given["lse"], q, k, v)
    assert fault.value.argument == argument
    assert str(tuple(given[argument].shape)) in str(fault.value)


def test_the_report_is_one_line() -> None:
    """A verdict prints as one line with errors, bounds and place, the same by str and describe."""
    q, k, v = draw((5, 7), torch.bfloat16)
    out, lse = correct(q, k, v)
    verdict = compare(out, lse, q, k, v)
    assert isinstance(verdict, Accuracy) and str(verdict) == verdict.describe()
    for part in (
        "ok",
        f"{verdict.max_error:.2e}",
        f"{verdict.rmse_bound:.2e}",
        "lse",
        str(verdict.worst_index),
    ):
        assert part in str(verdict)
    assert "\n" not in str(verdict)
    assert str(replace(verdict, ok=False, failures=("max",))).startswith("FAILED (max)")
