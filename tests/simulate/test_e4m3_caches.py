"""Caches in e4m3 beside 16-bit queries, on the simulator: values, scales of every kind, and what reaches nothing."""

import math
from functools import cache
from typing import Any

import pytest
import torch

import attngen
from attngen.check.caches import OF_CACHE
from attngen.check.judging import judge
from attngen.errors import ArgumentError
from attngen.kernel import Kernel
from tests.simulate.cache_calls import HEADS, HEADS_KV, CacheCall

SCALES = ("per_tensor", "per_head", "per_token", "per_page")
WALK = "causal and kv_idx % 5 != 3"  # which hides keys from every query
LENGTHS_K, LENGTHS_Q = (150, 0, 7, 64), (5, 3, 0, 1)


@cache
def _compiled(text: str) -> Kernel:
    return attngen.compile(eval(text))


def kernel(
    scales: str = "per_head",
    inputs: str = "bf16",
    *,
    keys: str = "paged",
    queries: str = "dense",
    cached: bool = True,
    **more: Any,
) -> Kernel:
    """A kernel of an emitted target, or of the simulator; of a 16-bit cache where it is not `cached`."""
    in_e4m3 = {"cache": "e4m3", "scales": scales} if cached else {}
    problem = {"head_dim": 32, "queries": queries, "keys": keys}
    spec = {
        "target": "sm_90a",
        "problem": problem,
        "precision": {"inputs": inputs, **in_e4m3},
        "mask": "causal",
    }
    return _compiled(repr(spec | more))


def drawn(of: Kernel, seed: int = 0) -> CacheCall:
    of_q = of.spec.problem.queries
    return CacheCall.drawn(of.spec, LENGTHS_K, LENGTHS_Q if of_q != "dense" else (3,) * len(LENGTHS_K), seed)


def assert_right(of: Kernel, call: CacheCall, softmax_scale: float | None = None) -> None:
    """Within the bound of the project's rule, against exact attention on what the cache stands for."""
    out, lse = of(*call.tensors, softmax_scale, return_lse=True, **call.passed)
    verdict = judge(of.spec, of.plan, out, lse, *call.tensors, softmax_scale, declared=call.passed)
    assert verdict.ok, str(verdict)
    assert out.abs().max() > 0.1


@pytest.mark.matrix
@pytest.mark.parametrize("split", ["none", "auto", {"keys": 64}], ids=str)
@pytest.mark.parametrize("queries", ["dense", "ragged", "padded"])
@pytest.mark.parametrize(
    ("scales", "keys"),
    [
        (scales, keys)
        for scales in SCALES
        for keys in ("paged", "padded", "ragged")
        if keys == "paged" or scales != "per_page"
    ],
)
@pytest.mark.parametrize("inputs", ["bf16", "f16"])
def test_every_kind_of_scale_and_length(
    inputs: str, scales: str, keys: str, queries: str, split: Any
) -> None:
    """NaN in rows, pages and descales that nobody needs reaches nothing."""
    of = kernel(scales, inputs, keys=keys, queries=queries, split=split)
    assert_right(of, drawn(of))


@pytest.mark.parametrize("scales", SCALES[:3])
def test_dense_keys(scales: str) -> None:
    """One length for all, on tiles of the simulator and on those of a GPU."""
    for target in ("simulator", "sm_90a"):
        of = kernel(scales, keys="dense", target=target)
        assert_right(of, CacheCall.drawn(of.spec, (97, 97), (70, 70)), softmax_scale=-0.3)


PAIRS: dict[str, dict[str, Any]] = {
    "full": {"mask": "full"},
    "window": {"mask": "window(40, 0)"},
    "walk": {"mask": WALK},
    "bounded": {"score": "softcap(score, 5.0)"},
    "capped": {"score": "softcap(score, 30.0)"},
    "heads asked for": {"score": "score * (1.0 + f32(h))"},
}


@pytest.mark.parametrize("scales", ["per_head", "per_token"])
@pytest.mark.parametrize("name", PAIRS)
def test_masks_and_scores_see_true_scores(name: str, scales: str) -> None:
    """In parts and whole; heads that are asked for by their number are not packed."""
    for split in ("none", "auto"):
        of = kernel(scales, split=split, **PAIRS[name])
        assert_right(of, drawn(of))


def test_a_sink_joins_as_ever() -> None:
    """Its logit is in natural units, as scores are."""
    of = kernel("per_token", sink="per_head", split="auto")
    call = drawn(of)
    call.passed["sink"] = torch.tensor([0.5, -2.0, 3.0, -math.inf])
    assert_right(of, call)


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("scales", ["per_head", "per_token"])
def test_every_number_of_stages(scales: str, stages: int) -> None:
    """Each has waits of its own before Q is there."""
    of = kernel(scales, schedule={"kind": "fa2", "stages": stages})
    assert_right(of, drawn(of))


# ---- the 16-bit kernel on the dequantised cache ----------------------------------------------------------------------
@pytest.mark.parametrize("split", ["none", {"keys": 64}], ids=str)
@pytest.mark.parametrize("mask", ["causal", WALK])
@pytest.mark.parametrize("target", ["simulator", "sm_90a"])
def test_f16_queries_give_the_bits_of_the_f16_kernel(target: str, mask: str, split: Any) -> None:
    """With descales of 1 and the same tiles: a product of a descale of 1 and every conversion are exact."""
    of = kernel("per_tensor", "f16", target=target, mask=mask, split=split)
    tile = {"block_m": of.plan.block_m, "block_n": of.plan.block_n}
    schedule = {"kind": "fa2", "stages": of.plan.stages, "warps": of.plan.warps}
    plain = kernel(
        inputs="f16", cached=False, target=target, mask=mask, split=split, tile=tile, schedule=schedule
    )
    call = drawn(of)
    q, k, v = call.tensors
    passed = {name: x for name, x in call.passed.items() if name not in OF_CACHE}
    one = {name: torch.ones(()) for name in OF_CACHE}
    found = of(q, k, v, return_lse=True, **passed, **one)
    expected = plain(q, k.half(), v.half(), return_lse=True, **passed)
    assert all(map(torch.equal, found, expected))


def test_powers_of_two_of_all_keys_are_those_of_a_tensor() -> None:
    """The reference of V's descales is then all that P would be multiplied by: the same bits, with strides of 0."""
    whole = kernel("per_tensor")
    call = drawn(whole)
    others = {name: x for name, x in call.passed.items() if name not in OF_CACHE}
    k, v = torch.tensor(0.25), torch.tensor(8.0)
    expected = whole(*call.tensors, return_lse=True, **others, k_descale=k, v_descale=v)
    pages, page = call.tensors[1].shape[:2]
    for scales, shape in (("per_token", (pages, page, HEADS_KV)), ("per_page", (pages, HEADS_KV))):
        of = kernel(scales, tile={"block_m": whole.plan.block_m, "block_n": whole.plan.block_n})
        found = of(
            *call.tensors, return_lse=True, **others, k_descale=k.expand(shape), v_descale=v.expand(shape)
        )
        assert all(map(torch.equal, found, expected))


# ---- shapes and strides of descales ----------------------------------------------------------------------------------
@pytest.mark.parametrize("scales", ["per_tensor", "per_head"])
def test_one_number_a_number_of_a_head_and_one_of_each_request(scales: str) -> None:
    """What is shorter stands for all; strides may be any, 0 too, as serving has them."""
    of = kernel(scales)
    call = drawn(of)
    batch = call.shape.batch
    of_heads = torch.tensor([0.5, 0.3])

    def run(x: torch.Tensor) -> torch.Tensor:
        return of(*call.tensors, **call.passed | {"k_descale": x, "v_descale": x})

    whole = run(of_heads.expand(batch, -1))
    assert torch.equal(run(of_heads), whole)
    assert torch.equal(run(of_heads.repeat(batch, 1).t().contiguous().t()), whole)
    one = run(torch.full((batch, HEADS_KV), 0.5))
    for number in (torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5).expand(batch, HEADS_KV)):
        assert torch.equal(run(number), one)
    assert not torch.equal(one, whole)


def test_descales_that_are_left_out_or_of_another_shape_are_refused() -> None:
    """By name, with the shape that would do."""
    of = kernel("per_token")
    call = drawn(of)
    pages, page = call.tensors[1].shape[:2]
    for wrong, says in (
        ({"k_descale": None}, r"k_descale: got nothing.*f32\[pages, page_size, num_heads_kv\]"),
        ({"v_descale": torch.ones(pages, page, HEADS_KV + 1)}, "where num_heads_kv is 2"),
        ({"v_descale": torch.ones(pages, HEADS_KV)}, "2 dimensions"),
        ({"k_descale": torch.ones(pages, page, HEADS_KV).half()}, "float16"),
        ({"q_descale": torch.ones(())}, "q_descale"),
    ):
        with pytest.raises(ArgumentError, match=says):
            of(*call.tensors, **call.passed | wrong)


def test_a_16_bit_kernel_says_what_takes_descales() -> None:
    """And a kernel of a cache takes no other format for one."""
    plain, of = kernel(cached=False), kernel()
    call = drawn(of)
    q, k, v = call.tensors
    with pytest.raises(ArgumentError, match="cache: e4m3"):
        plain(q, k.bfloat16(), v.bfloat16(), **call.passed)
    with pytest.raises(ArgumentError, match=r"k: got dtype torch.bfloat16.*float8_e4m3fn"):
        of(q, k.bfloat16(), v, **call.passed)


# ---- what reaches nothing, and what is exact -------------------------------------------------------------------------
@pytest.mark.parametrize("scales", ["per_head", "per_token"])
def test_what_hidden_keys_hold_reaches_nothing(scales: str) -> None:
    """NaN codes of K and V, and of their descales where keys have them, change no bit."""
    of = kernel(scales, keys="dense", mask=WALK)
    call = CacheCall.drawn(of.spec, (97, 97), (70, 70))
    expected = of(*call.tensors, return_lse=True, **call.passed)
    hidden = torch.arange(97) % 5 == 3
    q, *of_keys = call.tensors
    k, v = (x.float().masked_fill(hidden.view(1, -1, 1, 1), math.nan).to(x.dtype) for x in of_keys)
    for name in OF_CACHE if scales == "per_token" else ():
        call.passed[name][:, hidden] = math.nan
    found = of(q, k, v, return_lse=True, **call.passed)
    assert all(map(torch.equal, found, expected)) and bool(found[0].isfinite().all())


@pytest.mark.parametrize("power", [-126, -60, 0, 60, 120])
def test_rows_of_bf16_of_any_magnitude_keep_their_bits(power: int) -> None:
    """Rows of Q are brought to f16 by powers of two: scores are those of Q times another power, to the bit."""
    of = kernel("per_tensor", keys="dense", mask="full")
    q, k, v = CacheCall.drawn(of.spec, (40, 40), (9, 9)).tensors
    q = q.sign() * torch.exp2(torch.randint(-6, 1, q.shape).float()).bfloat16()
    one = {name: torch.ones(()) for name in OF_CACHE}
    expected = of(q, k, v, 0.25, return_lse=True, **one)
    k_descale = torch.tensor(2.0 ** min(-power, 126))
    times = (q.double() * 2.0**power).bfloat16()
    found = of(
        times,
        k,
        v,
        0.25 * 2.0 ** (-power - min(-power, 126)),
        return_lse=True,
        **one | {"k_descale": k_descale},
    )
    assert all(map(torch.equal, found, expected))


def test_numbers_of_a_row_far_below_its_largest_count() -> None:
    """Down to 2^-31 of it with all bits of bf16."""
    of = kernel("per_tensor", keys="dense", mask="full")
    q, k, v = CacheCall.drawn(of.spec, (2, 2), (1, 1)).tensors
    q.zero_(), k.zero_()
    q[..., 0], q[..., 1] = 1.9921875, 1.9921875 * 2.0**-31
    k[:, 0, :, 0], k[:, :, :, 1] = torch.tensor(448.0).to(k.dtype), torch.tensor(1.0).to(k.dtype)
    one = {name: torch.ones(()) for name in OF_CACHE}
    _, lse = of(q, k[:, 1:], v[:, 1:], 2.0**31, return_lse=True, **one)
    assert (lse == 1.9921875).all()


def test_descales_of_v_may_lie_far_apart() -> None:
    """An element is off by 2^-11 of attention of |V|, and 2^-25 for each key times 448 of V's largest descale met."""
    of = kernel(
        "per_token",
        "f16",
        keys="dense",
        mask="full",
        precision={"inputs": "f16", "cache": "e4m3", "scales": "per_token", "output": "f32"},
    )
    call = CacheCall.drawn(of.spec, (300, 300), (9, 9))
    generator = torch.Generator().manual_seed(1)
    call.passed["v_descale"] = 10.0 ** (9 * torch.rand(2, 300, HEADS_KV, generator=generator) - 6)
    out = of(*call.tensors, **call.passed).double()
    q, k, v = (x.double() for x in call.tensors)
    k, v = (x * call.passed[name].double()[..., None] for x, name in ((k, "k_descale"), (v, "v_descale")))
    k, v = (x.repeat_interleave(HEADS // HEADS_KV, 2) for x in (k, v))
    p = (torch.einsum("bqhd,bkhd->bhqk", q, k) / 32**0.5).softmax(-1)
    exact, size = (torch.einsum("bhqk,bkhd->bqhd", p, x) for x in (v, v.abs()))
    top = call.passed["v_descale"].amax().item()
    allowed = 1.01 * 2.0**-11 * size + 300 * 2.0**-25 * 448 * 2 * top
    assert bool(((out - exact).abs() <= allowed).all())
