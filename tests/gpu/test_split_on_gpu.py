"""Keys in parts on the GPU: each sequence against the same kernel in one piece, and against itself."""

import math
from typing import Any

import pytest
import torch

import attngen
from attngen.api import kernel_of_call
from attngen.few_queries import tile_of_few
from attngen.kernel import Kernel
from attngen.plan import Lengths

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]
SEQLENS_K = (777, 0, 64, 5000, 1, 63, 65, 4097)
SPLITS: tuple[Any, ...] = ("auto", {"keys": 64}, {"keys": 1024})
SPECS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"mask": "causal"},
    "window": {"mask": "window(100, 0)"},
    "sinks and window": {"mask": "causal and (kv_idx > q_pos - 100 or kv_idx < 4)"},
    "softcap": {"mask": "causal", "score": "softcap(score, 30.0)"},
    "alibi": {"mask": "causal", "score": "score + alibi(slopes)", "tensors": {"slopes": "f32[num_heads_q]"}},
    "sink": {"mask": "causal", "sink": "per_head"},
}


WARPGROUPS: dict[str, dict[str, Any]] = {
    "a warpgroup": {"schedule": {"kind": "warp_specialized"}},
    "two warpgroups": {"schedule": {"kind": "warp_specialized"}, "tile": {"block_m": 128}},
    "turns": {"schedule": {"kind": "pingpong", "warpgroups": 2}},
}


def kernel(name: str = "causal", split: Any = "auto", head_dim: int = 128, **more: Any) -> Kernel:
    whole = {"schedule": {"kind": "fa2"}} if split == "none" else {}
    problem = {"head_dim": head_dim, "queries": "ragged", "keys": "padded"}
    return attngen.compile({"problem": problem, "split": split, **SPECS[name], **whole, **more})


def drawn(
    seqlen_q: int, heads: int, heads_kv: int, head_dim: int = 128, dtype: Any = torch.bfloat16
) -> dict[str, Any]:
    """A call: caches in which what stands behind a sequence is NaN, and rows of nobody behind the last."""
    batch, longest = len(SEQLENS_K), max(SEQLENS_K) + 7
    make = torch.Generator().manual_seed(seqlen_q * heads)
    q, k, v = (
        torch.randn(*shape, head_dim, generator=make).to(dtype)
        for shape in ((batch * seqlen_q + 3, heads), (batch, longest, heads_kv), (batch, longest, heads_kv))
    )
    for b, length in enumerate(SEQLENS_K):
        k[b, length:] = v[b, length:] = math.nan
    starts = torch.arange(0, (batch + 1) * seqlen_q, seqlen_q, dtype=torch.int32)
    lengths = {"cu_seqlens_q": starts, "seqused_k": torch.tensor(SEQLENS_K, dtype=torch.int32)}
    return {name: x.cuda() for name, x in {"q": q, "k": k, "v": v, **lengths}.items()}


def passed(name: str, heads: int) -> dict[str, torch.Tensor]:
    slopes, sink = -torch.rand(heads).cuda() / 50, torch.randn(heads).cuda()
    return {"alibi": {"slopes": slopes}, "sink": {"sink": sink}}.get(name, {})


@pytest.mark.parametrize("seqlen_q", [1, 5])
@pytest.mark.parametrize(("heads", "heads_kv"), [(8, 2), (3, 3), (14, 2)])
@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_parts_come_to_what_the_whole_comes_to(
    name: str, split: Any, heads: int, heads_kv: int, seqlen_q: int
) -> None:
    """Within the rounding of O; what is behind a sequence reaches nobody, and there are no ties in time."""
    call, more = drawn(seqlen_q, heads, heads_kv), passed(name, heads)
    split_kernel = kernel(name, split)
    out, lse = split_kernel(**call, **more, return_lse=True)
    whole, whole_lse = kernel(name, "none")(**call, **more, return_lse=True)
    assert torch.equal(lse.isfinite(), whole_lse.isfinite())
    assert (out.float() - whole.float()).abs().max() <= 0.02 and whole.abs().max() > 0.5
    assert (lse - whole_lse).nan_to_num(0, 0, 0).abs().max() <= 2e-5
    again = split_kernel(**call, **more, return_lse=True, work=split_kernel.work(**call, **more))
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)


@pytest.mark.parametrize("seqlen_q", [1, 5, 40])
@pytest.mark.parametrize(("heads", "heads_kv"), [(8, 2), (3, 3), (14, 2)])
@pytest.mark.parametrize("split", ["auto", {"keys": 256}], ids=str)
@pytest.mark.parametrize("kind", WARPGROUPS)
@pytest.mark.parametrize("name", SPECS)
def test_parts_of_tiles_of_warpgroups_come_to_what_the_whole_comes_to(
    name: str, kind: str, split: Any, heads: int, heads_kv: int, seqlen_q: int
) -> None:
    """Within the rounding of O, and the same bits again."""
    call, more = drawn(seqlen_q, heads, heads_kv), passed(name, heads)
    split_kernel = kernel(name, split, **WARPGROUPS[kind])
    out, lse = split_kernel(**call, **more, return_lse=True)
    whole, whole_lse = kernel(name, "none", **WARPGROUPS[kind])(**call, **more, return_lse=True)
    assert torch.equal(lse.isfinite(), whole_lse.isfinite())
    assert (out.float() - whole.float()).abs().max() <= 0.02 and whole.abs().max() > 0.5
    assert (lse - whole_lse).nan_to_num(0, 0, 0).abs().max() <= 5e-5
    again = split_kernel(**call, **more, return_lse=True, work=split_kernel.work(**call, **more))
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)


@pytest.mark.parametrize(
    ("kind", "head_dim"),
    [
        *((kind, head_dim) for kind in WARPGROUPS for head_dim in (32, 40, 64, 80, 96, 128)),
        *(
            ("a warpgroup", head_dim) for head_dim in (192, 256)
        ),  # two of these widths nothing asks for by itself
    ],
)
@pytest.mark.parametrize("output", ["f16", "f32"])
def test_tiles_of_warpgroups_of_other_head_dims(kind: str, head_dim: int, output: str) -> None:
    call, more = drawn(9, 8, 2, head_dim, torch.float16), {"precision": {"inputs": "f16", "output": output}}
    whole = kernel("causal", "none", head_dim, **more)(**call)
    of_kind = WARPGROUPS[kind]
    in_blocks_of_64 = of_kind | {"tile": of_kind.get("tile", {}) | {"block_n": 64}}
    for split, fields in (("auto", of_kind), ({"keys": 320}, in_blocks_of_64)):  # 5,000 keys are 16 parts
        out = kernel("causal", split, head_dim, **more, **fields)(**call)
        assert (out.float() - whole.float()).abs().max() <= 2e-3


@pytest.mark.parametrize("queries", [8, 16, 40, 70])
def test_attention_of_few_queries_takes_tiles_of_warpgroups(queries: int) -> None:
    """And gives what the kernel in one piece does, pages that the copy engine does not take included."""
    for page_size in (64, 12):
        pages = -(-4096 // page_size)
        q = torch.randn(2, queries, 32, 128, device="cuda", dtype=torch.bfloat16)
        k, v = torch.randn(2, 2 * pages, page_size, 8, 128, device="cuda", dtype=torch.bfloat16)
        table = torch.randperm(2 * pages, device="cuda", dtype=torch.int32).view(2, -1)
        lengths = torch.tensor([4000, 1777], device="cuda", dtype=torch.int32)
        named = {"block_table": table, "seqused_k": lengths}
        made_of = {"mask": "causal", "lengths": Lengths("dense", "paged"), "passed": named}
        chosen, whole = (kernel_of_call(q, k, v, **made_of, may_split=split) for split in (True, False))
        rows = tile_of_few(q, k, v, ("causal", "score"), made_of["lengths"], named, has_warpgroups=True)
        assert chosen.plan.block_m == rows if rows else chosen is whole
        assert bool(rows) == (page_size == 64 or queries <= 8)
        made = (each(q, k, v, **named).float() for each in (chosen, whole))
        assert torch.sub(*made).abs().max() <= 0.02


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(64, torch.float16), (96, torch.bfloat16), (256, torch.bfloat16)]
)
def test_other_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    call, inputs = drawn(2, 8, 2, head_dim, dtype), "f16" if dtype == torch.float16 else "bf16"
    more: dict[str, Any] = {"precision": {"inputs": inputs, "output": "f32"}}
    out = kernel("causal", "auto", head_dim, **more)(**call)
    whole = kernel("causal", "none", head_dim, **more)(**call)
    assert (out - whole).abs().max() <= 2e-3 and out.dtype == torch.float32


def test_parts_of_so_many_keys_give_the_same_bits_alone_and_beside_others() -> None:
    call, fixed = drawn(3, 8, 2), kernel("causal", {"keys": 1024})
    out = fixed(**call)
    starts = torch.tensor([0, 3], dtype=torch.int32).cuda()
    for b in range(len(SEQLENS_K)):
        own = {"q": call["q"][3 * b : 3 * b + 3], "k": call["k"][b : b + 1], "v": call["v"][b : b + 1]}
        alone = fixed(**own, cu_seqlens_q=starts, seqused_k=call["seqused_k"][b : b + 1])
        assert torch.equal(alone, out[3 * b : 3 * b + 3])


def test_a_captured_call_follows_lengths_that_grow() -> None:
    """A graph makes the list of parts anew in every replay; the last of each ten is held against an eager call."""
    call, split = drawn(1, 8, 2), kernel("causal")
    call["k"].nan_to_num_(1.0), call["v"].nan_to_num_(1.0)
    lengths = call["seqused_k"].clamp_(max=4000)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        split(**call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = split(**call)
    for step in range(200):
        lengths += 1
        graph.replay()
        if step % 10 == 9:
            assert torch.equal(out, split(**call))
