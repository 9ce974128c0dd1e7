"""Caches of `attngen.flash_attn` on one GPU: in pages and contiguous, new keys rotated and appended, within a graph.

What caches hold then, and how q is rotated, is what `attngen.append` makes of copies on the CPU; results are held to
the project's rule against fp64.
"""

from typing import Any

import pytest
import torch

import attngen
from attngen.check.judging import judge
from attngen.flash_attn import version2, version3, version4

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]
DEVICE = "cuda"
HEADS, HEADS_KV, HEAD_DIM = 8, 2, 128
BEFORE, ROOM = (1500, 0, 384, 33), 1600
"""Keys of each sequence, and how many each has room for; few queries of so many have their keys split."""
MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window(200, 0)": {"causal": True, "window_size": (200, -1)},
}


def integers(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(DEVICE, torch.bfloat16)


def tables_of(rotary_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of each place, f32."""
    steps = 10000 ** -torch.arange(0, 1, 2 / rotary_dim, dtype=torch.float32)
    angles = torch.arange(ROOM, dtype=torch.float32)[:, None] * steps
    return angles.cos().to(DEVICE), angles.sin().to(DEVICE)


def caches_of(page: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """K and V in shuffled pages of a pool of twice as many, NaN where no key is, and their table."""
    room = -(-ROOM // page)
    pages = torch.randperm(2 * room * len(BEFORE), generator=torch.Generator().manual_seed(page))
    table = pages[: room * len(BEFORE)].view(len(BEFORE), room).int().to(DEVICE)
    caches = []
    for seed in (1, 2):
        rows = drawn(len(BEFORE), room * page, HEADS_KV, HEAD_DIM, seed=seed)
        for b, length in enumerate(BEFORE):
            rows[b, length:] = torch.nan
        cache = torch.full_like(rows, torch.nan).view(-1, page, HEADS_KV, HEAD_DIM).repeat(2, 1, 1, 1)
        cache[table.flatten().long()] = rows.view(-1, page, HEADS_KV, HEAD_DIM)
        caches.append(cache)
    return caches, table


def check(
    mask: str, q: torch.Tensor, caches: list[torch.Tensor], rows: torch.Tensor, used: torch.Tensor, made: Any
) -> None:
    """Out and lse keep the rule, of keys that lie in those pages."""
    spec = attngen.load(
        {"target": "simulator", "problem": {"head_dim": HEAD_DIM, "keys": "padded"}, "mask": mask}
    )
    read = [x[rows.long()].flatten(1, 2).contiguous() for x in caches]
    plan = attngen.compile(spec, arch="simulator").plan
    verdict = judge(spec, plan, *made, q, *read, declared={"seqused_k": used})
    assert verdict.ok, verdict.failures


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("seqlen", [1, 5])
@pytest.mark.parametrize("page", [16, 3, 256])
def test_new_keys_are_rotated_appended_and_read(page: int, seqlen: int, mask: str) -> None:
    """By flash_attn 2 and 3, either order of columns, other rows of the table."""
    which = integers(2, 0, 3, 1)
    q, k, v = (drawn(4, seqlen, n, HEAD_DIM, seed=n) for n in (HEADS, HEADS_KV, HEADS_KV))
    before = integers(*(BEFORE[row] for row in which.tolist()))
    cos, sin = tables_of(64)
    for interleaved, face, name in ((True, version2, "block_table"), (False, version3, "page_table")):
        caches, table = caches_of(page)
        expected = [x.cpu() for x in caches]
        rotated = attngen.append(
            k.cpu(),
            v.cpu(),
            *expected,
            seqused_k=before.cpu(),
            block_table=table.cpu(),
            cache_batch_idx=which.cpu(),
            rotary=(cos.cpu(), sin.cpu()),
            rotary_interleaved=interleaved,
            q=q.cpu(),
            q_advances=mask != "full",
        )
        assert rotated is not None
        passed = {name: table, "cache_seqlens": before, "cache_batch_idx": which, **MASKS[mask]}
        passed |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
        made = face.flash_attn_with_kvcache(q, *caches, k, v, **passed, return_softmax_lse=True)
        for found, wanted in zip(caches, expected, strict=True):
            assert torch.equal(found.cpu().view(torch.int16), wanted.view(torch.int16))
        check(mask, rotated.to(DEVICE), caches, table[which.long()], before + seqlen, made)


@pytest.mark.parametrize("seqlen", [1, 70])
def test_a_contiguous_cache_is_read_by_an_index(seqlen: int) -> None:
    """Its sequences are pages, which are not copied; more of them than are read."""
    k_cache, v_cache = (drawn(6, ROOM, HEADS_KV, HEAD_DIM, seed=seed) for seed in (1, 2))
    q, which = drawn(4, seqlen, HEADS, HEAD_DIM), integers(5, 0, 3, 3)
    used = integers(*BEFORE)
    passed: dict[str, Any] = {"cache_seqlens": used, "cache_batch_idx": which, "causal": True}
    made = version3.flash_attn_with_kvcache(q, k_cache, v_cache, **passed, return_softmax_lse=True)
    check("causal", q, [k_cache, v_cache], which[:, None], used, made)


@pytest.mark.parametrize("page", [16, 3])
def test_ragged_queries_read_pages(page: int) -> None:
    """flash_attn 2 and 4 and torch's function alike; each sequence is a dense one of its rows."""
    caches, table = caches_of(page)
    rows, used = (3, 1, 130, 0), integers(*BEFORE)
    starts_q, starts_k = (
        integers(0, *torch.tensor(lengths).cumsum(0).tolist()) for lengths in (rows, BEFORE)
    )
    q = drawn(sum(rows), HEADS, HEAD_DIM)
    out, lse, _ = version2.flash_attn_varlen_func(
        q, *caches, starts_q, starts_k, max(rows), max(BEFORE),
        causal=True, block_table=table, return_attn_probs=True,
    )  # fmt: skip
    for b in (0, 1, 2):
        at = slice(int(starts_q[b]), int(starts_q[b + 1]))
        one = (out[None, at], lse[None, :, at])
        check("causal", q[None, at], caches, table[b : b + 1], used[b : b + 1], one)
    of_queries: dict[str, Any] = {"cu_seqlens_q": starts_q, "max_seqlen_q": max(rows), "causal": True}
    same, _ = version4.flash_attn_varlen_func(q, *caches, page_table=table, seqused_k=used, **of_queries)
    assert (same.float() - out.float()).abs().max() <= 2.0**-7 * out.abs().max()  # whose keys are not cut
    options: dict[str, Any] = {"block_table": table, "seqused_k": used, "enable_gqa": True}
    torchs = attngen.varlen_attn(
        q, *caches, starts_q, None, max(rows), max(BEFORE), window_size=(-1, 0), **options
    )
    assert torch.equal(torchs, out) and out.any()


def test_a_graph_replays_while_lengths_grow() -> None:
    """A step of decoding, captured: what stands in lengths and new rows then is appended and read, with no wait."""
    caches, table = caches_of(16)
    others = [x.clone() for x in caches]
    q, k, v = (drawn(4, 1, n, HEAD_DIM, seed=n) for n in (HEADS, HEADS_KV, HEADS_KV))
    cos, sin = tables_of(HEAD_DIM)
    used = integers(*BEFORE)

    def step(k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        made = version2.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cos, sin, used, block_table=table, causal=True
        )
        assert isinstance(made, torch.Tensor)
        return made

    for _ in range(2):
        step(*others)  # writes what the first replay writes too
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*others)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(*caches)
    for i in range(8):
        for x in (q, k, v):
            x.copy_(drawn(*x.shape, seed=i + 10))
        graph.replay()
        assert torch.equal(out, step(*others)) and out.any()
        used += 1
    assert all(
        torch.equal(x.view(torch.int16), y.view(torch.int16)) for x, y in zip(caches, others, strict=True)
    )
