"""Caches in e4m3 on the GPU: the error rule, the bits that are promised, and what reaches nothing."""

import math
from functools import cache
from typing import Any

import pytest
import torch

import attngen
from attngen.arch import arch_for_capability
from attngen.check.caches import CACHE_TYPE, OF_CACHE, drawn_descales
from attngen.check.cuts import Cut
from attngen.check.inputs import MemoryLayout, Shape, random_inputs
from attngen.check.judging import judge
from attngen.kernel import Kernel
from tests.gpu.gpu_kernels import captured

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]
HEADS, HEADS_KV = 8, 2
SCALES = ("per_tensor", "per_head", "per_token", "per_page")
LENGTHS = (0, 1, 15, 16, 17, 33, 300, 777)


@pytest.fixture(autouse=True)
def needs_the_conversion() -> None:
    """f16 of e4m3 is an instruction from compute capability 8.9 on."""
    if not arch_for_capability(torch.cuda.get_device_capability()).converts_e4m3:
        pytest.skip("no instruction makes f16 of e4m3 here")


@cache
def _compiled(text: str) -> Kernel:
    return attngen.compile(eval(text))


def kernel(
    scales: str = "per_head", inputs: str = "bf16", head_dim: Any = 128, keys: str = "paged", **more: Any
) -> Kernel:
    problem = {"head_dim": head_dim, "keys": keys, "queries": more.pop("queries", "dense")}
    precision = {"inputs": inputs, "cache": "e4m3", "scales": scales, **more.pop("precision", {})}
    return _compiled(repr({"problem": problem, "precision": precision, "mask": "causal", **more}))


def drawn(
    of: Kernel, seqlen_q: int = 4, page: int = 16, layout: MemoryLayout = "contiguous", lengths: Any = LENGTHS
) -> tuple[Any, dict[str, Any]]:
    """q and caches, poison wherever nothing counts, and what the call passes."""
    kind = of.spec.problem.keys
    unused = (1,) * len(lengths) if kind == "ragged" else ()
    keys = Cut(kind, lengths, unused=unused, tail=page, page=page if kind == "paged" else 0)  # type: ignore[arg-type]
    queries = (
        Cut("ragged", tuple(min(n, 9) for n in lengths), tail=3)
        if of.spec.problem.queries != "dense"
        else None
    )
    shape = Shape(
        len(lengths), HEADS, HEADS_KV, queries.size if queries else seqlen_q, keys.size, queries, keys
    )
    dims, number = of.spec.problem.head_dim, getattr(torch, of.plan.inputs.torch_name)
    inputs = random_inputs(shape, dims.qk, dims.v, number, "cuda", 1, layout, cache=CACHE_TYPE)
    return inputs, shape.arguments("cuda") | drawn_descales(of.spec, shape, "cuda", 1)


def check(of: Kernel, scale: float | None = None, **about: Any) -> None:
    """Within the error rule, and the same bits in a second call."""
    inputs, passed = drawn(of, **about)
    out, lse = of(*inputs, scale, return_lse=True, **passed)
    verdict = judge(of.spec, of.plan, out, lse, *inputs, scale, declared=passed)
    assert verdict.ok, str(verdict)
    again = of(*inputs, scale, return_lse=True, **passed)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


@pytest.mark.parametrize("split", ["none", "auto", {"keys": 128}], ids=str)
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("inputs", ["bf16", "f16"])
def test_every_kind_of_scale(inputs: str, scales: str, split: Any) -> None:
    """In pages, whole and in parts."""
    check(kernel(scales, inputs, split=split))


@pytest.mark.parametrize(
    "head_dim", [32, 48, 64, 80, 96, 112, 192, 256, {"qk": 192, "v": 128}, {"qk": 64, "v": 80}]
)
@pytest.mark.parametrize("scales", ["per_head", "per_token"])
def test_every_width(scales: str, head_dim: Any) -> None:
    """Odd numbers of chunks too, and both families of tiles."""
    for split in ("none", "auto"):
        check(kernel(scales, head_dim=head_dim, split=split))


@pytest.mark.parametrize("queries", ["dense", "ragged"])
@pytest.mark.parametrize("keys", ["padded", "ragged", "paged"])
def test_every_kind_of_length(keys: str, queries: str) -> None:
    """Poison behind every sequence reaches nothing."""
    for split in ("none", "auto"):
        check(kernel("per_token", keys=keys, queries=queries, split=split))


@pytest.mark.parametrize("page", [1, 3, 16, 64, 528])
@pytest.mark.parametrize("scales", ["per_head", "per_token", "per_page"])
def test_every_size_of_page(scales: str, page: int) -> None:
    """With any strides of 16 bytes."""
    for layout in ("contiguous", "strided", "packed_qkv", "offset"):
        check(kernel(scales, split="auto"), page=page, layout=layout)


@pytest.mark.parametrize("mask", ["full", "window(100, 0)", "causal and kv_idx % 5 != 3"])
@pytest.mark.parametrize(
    "score", ["score", "softcap(score, 30.0)", "softcap(score, 5.0)", "score * (1.0 + f32(h))"]
)
def test_masks_and_scores(mask: str, score: str) -> None:
    """Hidden keys too; a negative scale turns Q after it has become f16."""
    for scales in ("per_head", "per_token"):
        check(kernel(scales, mask=mask, score=score, split="auto"))
        check(kernel(scales, mask=mask, score=score), scale=-0.1, seqlen_q=130)


def test_sums_that_are_exact_give_the_bits_of_the_f16_kernel() -> None:
    """Small integers in any order: descales of 1, the tiles of the f16 kernel, and its results to the bit."""
    for split in ("none", {"keys": 128}):
        of = kernel("per_tensor", "f16", split=split)
        plan = of.plan
        plain = _compiled(
            repr(
                {
                    "problem": {"head_dim": 128, "keys": "paged"},
                    "precision": {"inputs": "f16"},
                    "mask": "causal",
                    "split": split,
                    "tile": {"block_m": plan.block_m, "block_n": plan.block_n},
                    "schedule": {"kind": "fa2", "stages": plan.stages, "warps": plan.warps},
                }
            )
        )
        (q, k, v), passed = drawn(of)
        q = torch.randint(-1, 2, q.shape, device="cuda").half()
        k, v = (x.float().sign().to(x.dtype) for x in (k, v))
        others = {name: x for name, x in passed.items() if name not in OF_CACHE}
        one = {name: torch.ones((), device="cuda") for name in OF_CACHE}
        found = of(q, k, v, math.log(2.0), return_lse=True, **others, **one)
        expected = plain(q, k.half(), v.half(), math.log(2.0), return_lse=True, **others)
        assert all(map(torch.equal, found, expected))


def test_f16_queries_come_near_the_f16_kernel_on_any_numbers() -> None:
    """Only the order of 16 products within an instruction is another: a unit in the last place of out."""
    of = kernel("per_tensor", "f16")
    plain = _compiled(
        repr(
            {
                "problem": {"head_dim": 128, "keys": "paged"},
                "precision": {"inputs": "f16"},
                "mask": "causal",
                "tile": {"block_m": of.plan.block_m, "block_n": of.plan.block_n},
                "schedule": {"kind": "fa2", "stages": of.plan.stages, "warps": of.plan.warps},
            }
        )
    )
    (q, k, v), passed = drawn(of)
    others = {name: x for name, x in passed.items() if name not in OF_CACHE}
    one = {name: torch.ones((), device="cuda") for name in OF_CACHE}
    out, lse = of(q, k, v, return_lse=True, **others, **one)
    expected, expected_lse = plain(q, k.half(), v.half(), return_lse=True, **others)
    torch.testing.assert_close(out, expected, rtol=2**-9, atol=2**-9)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_the_simulator_comes_to_the_same() -> None:
    """Of every kind of scale: on the CPU the same plan, within the order of sums."""
    for scales in SCALES:
        of = kernel(scales, split={"keys": 128})
        inputs, passed = drawn(of)
        out, lse = of(*inputs, return_lse=True, **passed)
        on_cpu = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in passed.items()}
        expected, expected_lse = of(*(x.cpu() for x in inputs), return_lse=True, **on_cpu)
        torch.testing.assert_close(out.cpu(), expected, rtol=2**-6, atol=2**-7)
        torch.testing.assert_close(lse.cpu(), expected_lse, rtol=1e-5, atol=1e-5)


def test_rows_of_q_of_any_magnitude() -> None:
    """From subnormals of bf16 to its largest: K's descale makes scores of all of them."""
    of = kernel("per_tensor", keys="padded")
    (q, k, v), passed = drawn(of)
    for power in (-130, -60, 0, 60, 120):
        times = (q.sign() * 2.0**power).bfloat16()
        k_descale = torch.tensor(2.0 ** min(-power, 120), device="cuda")
        scale = 0.05 * 2.0 ** (-power - min(-power, 120))
        out, lse = of(times, k, v, scale, return_lse=True, **passed | {"k_descale": k_descale})
        verdict = judge(
            of.spec, of.plan, out, lse, times, k, v, scale, declared=passed | {"k_descale": k_descale}
        )
        assert verdict.ok, f"2^{power}: {verdict}"


def test_captured_calls_read_descales_that_are_written_to() -> None:
    """A graph replays with whatever the memory of descales then holds."""
    of = kernel("per_head", split="auto")
    inputs, passed = drawn(of)
    of(*inputs, **passed)
    graph, out = captured(lambda: of(*inputs, **passed))
    passed["v_descale"].mul_(2.0)
    graph.replay()
    assert torch.equal(out, of(*inputs, **passed))


def test_appended_rows_are_read() -> None:
    """FlashAttention-3's call with a cache of e4m3: what it appends is what it reads."""
    from attngen.flash_attn.version3 import flash_attn_with_kvcache

    k_cache, v_cache = (
        torch.full((40, 16, HEADS_KV, 128), math.nan, device="cuda").to(CACHE_TYPE) for _ in range(2)
    )
    table = torch.randperm(40, device="cuda").int().view(2, 20)
    q, k, v = (
        torch.randn(2, n, heads, 128, device="cuda").bfloat16() for n, heads in ((1, 8), (300, 2), (300, 2))
    )
    by = torch.tensor([[0.01, 0.02], [0.03, 0.015]], device="cuda")
    out = flash_attn_with_kvcache(
        q, k_cache, v_cache, k[:, :1], v[:, :1], cache_seqlens=torch.zeros(2, dtype=torch.int32, device="cuda"),
        page_table=table, k_descale=by, v_descale=by, causal=True,
    )  # fmt: skip
    exact = v[:, :1].repeat_interleave(HEADS // HEADS_KV, 2).float()
    torch.testing.assert_close(out.float(), exact, rtol=2**-4, atol=2**-6)
