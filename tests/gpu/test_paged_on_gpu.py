"""Keys in pages on the GPU: each request is what it is with padded keys, wherever its pages lie."""

import math
from typing import Any

import pytest
import torch

import attngen
from attngen.check.cuts import NO_PAGE, Cut
from attngen.check.inputs import MemoryLayout, Shape, random_inputs
from attngen.check.judging import judge
from attngen.check.paging import as_padded
from attngen.errors import ArgumentError
from attngen.kernel import Kernel
from tests.faces.attention64 import attention64
from tests.gpu.gpu_kernels import WARPGROUP_KINDS, captured, skip_unless_runs_here

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]
HEADS, HEADS_KV = 4, 2
PAGES = (1, 3, 16, 24, 64, 528)
SEQLENS_Q = (5, 1, 0, 130, 1, 64, 17, 128)


def kernels(
    head_dim: int = 64, mask: str = "causal", queries: str = "dense", kind: str = "fa2", **more: Any
) -> tuple[Kernel, Kernel]:
    """A kernel of keys in pages, and one of padded keys of the same schedule and tiles."""
    skip_unless_runs_here(kind)
    problem = {"head_dim": head_dim, "queries": queries, "keys": "paged"}
    paged = attngen.compile({"problem": problem, "mask": mask, "schedule": {"kind": kind}, **more})
    plan = paged.plan
    depth = {"stages": plan.stages, "warps": plan.warps} if kind == "fa2" else {}
    padded = attngen.compile(
        {
            "problem": problem | {"keys": "padded"},
            "mask": mask,
            "tile": {"block_m": plan.block_m, "block_n": plan.block_n},
            "schedule": {"kind": kind, **depth},
            **more,
        }
    )
    return paged, padded


def shape_of(page: int, queries: str = "dense", skipped: tuple[int, ...] = ()) -> Shape:
    """Requests of none, one, and about a page and two of keys; more than one block of them."""
    lengths = (0, 1, page - 1, page, page + 1, 2 * page + 1, 300, 777)
    keys = Cut("paged", lengths, skipped, tail=page, page=page)
    cut = Cut("ragged", SEQLENS_Q, tail=3) if queries == "ragged" else None
    return Shape(8, HEADS, HEADS_KV, cut.size if cut else 9, keys.size, cut, keys)


def drawn(kernel: Kernel, shape: Shape, layout: MemoryLayout = "contiguous") -> tuple[Any, dict[str, Any]]:
    """q and caches, with poison wherever nothing counts, and what the call passes."""
    plan = kernel.plan
    inputs = random_inputs(shape, plan.head_dim_qk, plan.head_dim_v, torch.bfloat16, "cuda", 1, layout)
    return inputs, shape.arguments("cuda")


def check(
    kernels: tuple[Kernel, Kernel], shape: Shape, layout: MemoryLayout = "contiguous", **more: Any
) -> None:
    """Bit for bit the padded kernel's, and within the bound of the reference."""
    paged, padded = kernels
    (q, k, v), passed = drawn(paged, shape, layout)
    out, lse = paged(q, k, v, return_lse=True, **passed, **more)
    _, own_k, own_v, own = as_padded(paged.plan.lengths, k, v, passed)
    expected, expected_lse = padded(q, own_k, own_v, return_lse=True, **own, **more)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse) and out.any()
    assert judge(paged.spec, paged.plan, out, lse, q, k, v, declared=passed | more).ok
    turned = [x.transpose(1, 2) for x in (k, v)]
    assert torch.equal(paged(q, *turned, layout="hnd", **passed, **more), out)


@pytest.mark.parametrize("kind", WARPGROUP_KINDS)
@pytest.mark.parametrize("queries", ["dense", "ragged"])
@pytest.mark.parametrize("page", [8, 16, 24, 64, 128, 528])
def test_the_copy_engine_brings_pieces_of_pages(page: int, queries: str, kind: str) -> None:
    """As padded keys bit for bit; pages of 16 and 64 rows therefore give the same bits."""
    check(kernels(queries=queries, kind=kind), shape_of(page, queries))


@pytest.mark.parametrize("mask", ["full", "window(100, 3)", "causal and (kv_idx > q_pos - 60 or kv_idx < 9)"])
@pytest.mark.parametrize("head_dim", [96, 128, 192, 256])
def test_pieces_in_other_head_dims_and_masks(head_dim: int, mask: str) -> None:
    """Closed forms and a walk."""
    check(kernels(head_dim, mask, kind="warp_specialized"), shape_of(16))


def test_auto_takes_pieces_where_pages_have_them() -> None:
    """Both kernels of one call, beside the reference; what a call says chooses."""
    kernel = attngen.compile({"problem": {"head_dim": 128, "keys": "paged"}, "mask": "causal"})
    for page in (3, 16, 64):
        shape = shape_of(page)
        (q, k, v), passed = drawn(kernel, shape)
        out, lse = kernel(q, k, v, return_lse=True, **passed)
        assert judge(kernel.spec, kernel.plan, out, lse, q, k, v, declared=passed).ok and out.any()


@pytest.mark.parametrize("queries", ["dense", "ragged"])
@pytest.mark.parametrize("page", PAGES)
def test_pages_of_any_size_hold_what_padded_keys_are(page: int, queries: str) -> None:
    """Shuffled, in a pool of poison, with stale entries behind what is needed; with and without keys ahead."""
    both = kernels(queries=queries)
    check(both, shape_of(page, queries))
    check(both, shape_of(page, queries, skipped=(0, 3, 1, page, 2 * page, 5, 70, 0)))


@pytest.mark.parametrize(
    ("head_dim", "mask"),
    [
        *((128, mask) for mask in ("full", "causal", "window(100, 20)", "kv_idx % 3 != q_idx % 2")),
        *((head_dim, "causal") for head_dim in (32, 40, 96, 192, 256)),
        (256, "window(100, 20)"),
    ],
)
def test_head_dims_and_masks(head_dim: int, mask: str) -> None:
    """Of every width of a row, columns that are padded too; closed forms and a walk."""
    check(kernels(head_dim, mask, "ragged"), shape_of(16, "ragged"))


@pytest.mark.parametrize("layout", ["strided", "packed_qkv", "offset", "bhsd"])
def test_caches_may_have_any_strides(layout: MemoryLayout) -> None:
    """Gaps between rows and heads, K and V in one tensor, and heads before rows."""
    check(kernels(), shape_of(16), layout)


def test_scores_sinks_and_declared_tensors_go_with_pages() -> None:
    """A cap, a bias by key, a mask of keys and a learned sink."""
    tensors = {"keep": "bool[batch, seqlen_k]", "bias": "f32[num_heads_q, length]"}
    both = kernels(mask="causal and keep[b, kv_idx]", score="softcap(score, 20.0) + bias[h, kv_idx]",
                   tensors=tensors, sink="per_head")  # fmt: skip
    shape, make = shape_of(16), torch.Generator("cuda").manual_seed(2)
    keep = torch.rand(8, shape.seqlen_k, device="cuda", generator=make) < 0.7
    bias, sink = (torch.randn(HEADS, *more, device="cuda", generator=make) for more in ((500,), ()))
    check(both, shape, keep=keep, bias=bias, sink=sink)


@pytest.mark.parametrize("split", ["auto", {"keys": 256}])
@pytest.mark.parametrize("page", [1, 16, 528])
def test_keys_in_pages_may_be_cut_into_parts(page: int, split: object) -> None:
    """Each part looks up its own pages, in one warp: the bits are those of padded keys that are cut alike."""
    problem = {"head_dim": 128, "queries": "ragged"}
    both = [
        attngen.compile({"problem": problem | {"keys": keys}, "mask": "causal", "split": split})
        for keys in ("paged", "padded")
    ]
    assert both[0].plan.block_n == both[1].plan.block_n and both[0].plan.warps == both[1].plan.warps
    check((both[0], both[1]), shape_of(page, "ragged"))


def test_drafts_that_are_a_tree() -> None:
    """What each draft sees of the others is declared, beside the bits of a mask that is asked alike of padded keys."""
    context = "(seqlen_k - seqlen_q)"
    tensors = {"tree": "bool[batch, drafts, drafts]"}
    mask = f"kv_idx < {context} or tree[b, q_idx, kv_idx - {context}]"
    both = [
        attngen.compile({"problem": {"head_dim": 128, "keys": keys}, "tensors": tensors, "mask": mask, "split": "auto"})
        for keys in ("paged", "padded")
    ]  # fmt: skip
    shape = shape_of(16)
    make = torch.Generator("cuda").manual_seed(5)
    tree = torch.rand(8, shape.seqlen_q, shape.seqlen_q, device="cuda", generator=make) < 0.4
    check((both[0], both[1]), shape, tree=tree | torch.eye(shape.seqlen_q, dtype=torch.bool, device="cuda"))


@pytest.mark.parametrize("kind", ["fa2", "warp_specialized"])
def test_pages_may_lie_further_apart_than_32_bits_count(kind: str) -> None:
    """A page begins more than 2^31 elements behind another; rows of the table are each request's by another tensor."""
    paged, _ = kernels(mask="full", kind=kind)
    step, make = 2**31 + 64, torch.Generator("cuda").manual_seed(0)
    storage = torch.empty(step + 16 * 2 * 64, dtype=torch.bfloat16, device="cuda")
    far = storage.as_strided((2, 16, 2, 64), (step, 128, 64, 1))
    near = torch.randn(2, 16, 2, 64, device="cuda", generator=make).bfloat16()
    far.copy_(near)
    q = torch.randn(2, 3, 4, 64, device="cuda", generator=make).bfloat16()
    table = torch.tensor([[0, 1], [1, NO_PAGE]], dtype=torch.int32, device="cuda")
    said = {"seqused_k": torch.tensor([13, 30], dtype=torch.int32, device="cuda")}
    rows = torch.tensor([1, 0], dtype=torch.int32, device="cuda")
    out = paged(q, far, far, block_table=table, cache_batch_idx=rows, **said)
    assert torch.equal(out, paged(q, near, near, block_table=table[[1, 0]], **said)) and out.any()


@pytest.mark.parametrize("kind", ["fa2", "pingpong"])
def test_a_graph_replays_while_requests_grow_and_pages_move(kind: str) -> None:
    """Lengths, tables and pages are read by the device: replays take those that stand there then."""
    paged, _ = kernels(kind=kind)
    (q, k, v), passed = drawn(paged, shape_of(16))
    k, v = (x.nan_to_num(0.5, 1.0, -1.0) for x in (k, v))
    table, used = passed["block_table"], passed["seqused_k"]
    paged(q, k, v, **passed)
    graph, out = captured(lambda: paged(q, k, v, **passed))
    most = table.shape[1] * 16
    make = torch.Generator("cuda").manual_seed(0)
    for step in range(30):
        table.copy_(torch.randint(0, len(k), table.shape, generator=make, device="cuda"))
        used.copy_(torch.randint(0, most + 1, used.shape, generator=make, device="cuda") * (step % 5 > 0))
        graph.replay()
        assert torch.equal(out, paged(q, k, v, **passed))
        assert bool(out.any()) == (step % 5 > 0)


def test_a_thousand_steps_of_one_graph() -> None:
    """A graph of one step, replayed while caches grow by a key at a time: every step is causal attention's row."""
    steps, batch, page, first = 1000, 3, 16, (1, 250, 777)
    kernel = attngen.compile(
        {"problem": {"head_dim": 64, "keys": "paged"}, "mask": "causal", "split": "auto"}
    )
    make = torch.Generator("cuda").manual_seed(6)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=make).bfloat16()

    pages = -(-(max(first) + steps) // page)
    table = torch.randperm(batch * pages, device="cuda", generator=make).int().view(batch, pages)
    k, v = (draw(batch * pages, page, HEADS_KV, 64) for _ in range(2))
    queries, used = draw(steps, batch, 1, HEADS, 64), torch.tensor(first, dtype=torch.int32, device="cuda")
    q, said = queries[0].clone(), {"block_table": table, "seqused_k": used}
    kernel(q, k, v, **said)
    graph, out = captured(lambda: kernel(q, k, v, **said))
    outs = torch.empty_like(queries)
    for step in range(steps):
        q.copy_(queries[step])
        graph.replay()
        outs[step] = out
        used += 1
    for b in range(batch):
        own_k, own_v = (x[table[b].long()].flatten(0, 1)[: first[b] + steps - 1] for x in (k, v))
        seen = torch.ones(steps, len(own_k), dtype=torch.bool, device="cuda").tril(first[b] - 1)
        expected, _ = attention64(queries[:, b, 0], own_k, own_v, seen)
        assert (outs[:, b, 0].double() - expected).abs().max() < 0.01
    assert torch.equal(kernel(q, k, v, **said | {"seqused_k": used - 1}), out)


def test_a_bound_call_follows_what_its_tensors_hold() -> None:
    """Eager and in a graph, its list made by itself, or anew where it lies; on two streams one after the other."""
    kernel = attngen.compile(
        {"problem": {"head_dim": 64, "keys": "paged"}, "mask": "causal", "split": "auto"}
    )
    (q, k, v), passed = drawn(kernel, shape_of(16))
    k, v = (x.nan_to_num(0.5, 1.0, -1.0) for x in (k, v))
    used, most = passed["seqused_k"], passed["block_table"].shape[1] * 16
    passed["block_table"].clamp_(max=len(k) - 1)
    work = kernel.work(q, k, v, **passed)
    out = torch.empty_like(q)
    calls = [
        kernel.bind(q, k, v, return_lse=True, **passed),
        kernel.bind(q, k, v, out=out, work=work, **passed),
    ]
    graph, _ = captured(calls[0])
    other, make = torch.cuda.Stream(), torch.Generator("cuda").manual_seed(7)
    for step in range(20):
        used.copy_(torch.randint(0, most + 1, used.shape, generator=make, device="cuda"))
        q.copy_(torch.randn(q.shape, generator=make, device="cuda"))
        expected, lse = kernel(q, k, v, return_lse=True, **passed)
        kernel.work(q, k, v, out=work, **passed)
        torch.cuda.synchronize()
        with torch.cuda.stream(other if step % 3 == 0 else torch.cuda.current_stream()):
            _ = graph.replay() if step % 2 else calls[0]()
            assert calls[1]() is out
        torch.cuda.synchronize()
        assert torch.equal(calls[0].out, expected) and torch.equal(calls[0].lse, lse)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("kind", ["fa2", "warp_specialized"])
def test_numbers_that_lie_reach_no_memory_of_others(kind: str) -> None:
    """Lengths beyond the table, pages and rows that are not there: kept within; `verify` says which is wrong."""
    paged, _ = kernels(mask="full", kind=kind)
    (q, k, v), passed = drawn(paged, shape_of(16))
    k, v = (x.nan_to_num(0.5, 1.0, -1.0) for x in (k, v))
    make, last = torch.Generator().manual_seed(0), len(k) - 1
    most = passed["block_table"].shape[1]
    for _ in range(10):
        lies = {
            "block_table": torch.randint(-(2**31), 2**31, passed["block_table"].shape, generator=make),
            "seqused_k": torch.randint(-(2**31), 2**31, (8,), generator=make),
            "leftpad_k": torch.randint(-9, 40, (8,), generator=make),
            "cache_batch_idx": torch.randint(-3, 12, (8,), generator=make),
        }
        if kind != "fa2":  # copies of pieces begin where pages do
            del lies["leftpad_k"]
        limits = {"block_table": last, "seqused_k": 16 * most, "leftpad_k": 16 * most, "cache_batch_idx": 7}
        truth = {name: x.clamp(0, limits[name]) for name, x in lies.items()}
        found, expected = (
            paged(q, k, v, **{name: x.int().cuda() for name, x in each.items()}) for each in (lies, truth)
        )
        assert torch.equal(found, expected) and found.isfinite().all()
        with pytest.raises(ArgumentError, match="seqused_k|leftpad_k|cache_batch_idx|block_table"):
            paged.verify(q, k, v, **{name: x.int().cuda() for name, x in lies.items()})
    paged.verify(q, k, v, **passed)


def test_requests_without_keys_read_nothing() -> None:
    """A table that says nothing, one without columns, no request at all, and caches of NaN."""
    paged, _ = kernels()
    q = torch.randn(3, 2, 4, 64, device="cuda").bfloat16()
    cache = torch.full((2, 16, 2, 64), math.nan, device="cuda").bfloat16()
    none = torch.zeros(3, dtype=torch.int32, device="cuda")
    table = torch.full((3, 5), NO_PAGE, dtype=torch.int32, device="cuda")
    for of_three in (table, table[:, :0]):
        out, lse = paged(q, cache, cache, return_lse=True, block_table=of_three, seqused_k=none)
        assert not out.any() and lse.isneginf().all()
    assert paged(q[:0], cache, cache, block_table=table[:0], seqused_k=none[:0]).shape == (0, 2, 4, 64)


def test_layers_share_a_list_of_tiles() -> None:
    """`kernel.work` for one layer's caches serves another's, whatever pages its table names."""
    paged, _ = kernels()
    (q, k, v), passed = drawn(paged, shape_of(16))
    work = paged.work(q, k, v, **passed)
    expected = paged(q, k, v, **passed)
    assert torch.equal(paged(q, k, v, work=work, **passed), expected)
    moved = torch.randperm(len(k), generator=torch.Generator().manual_seed(4)).cuda()
    back = torch.argsort(moved).int()
    table = passed["block_table"].long()
    other = torch.where(table == NO_PAGE, table, back.long()[table.clamp(max=len(k) - 1)]).int()
    found = paged(q, k[moved], v[moved], work=work, **passed | {"block_table": other})
    assert torch.equal(found, expected) and found.any()
