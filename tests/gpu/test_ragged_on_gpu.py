"""Sequences with lengths of their own on the GPU: the list of tiles, and each sequence against a dense call of it."""

import math
import random
from typing import Any

import pytest
import torch
from gpu_kernels import KINDS, Wanted, skip_unless_runs_here

import attngen
from attngen.kernel import Kernel
from attngen.plan import ListTiles
from attngen.simulate.tile_lists import list_tiles
from attngen.simulate.visits import Declared, Sizes

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]
HEADS, HEADS_KV = 4, 2
SEQLENS_Q = (5, 0, 130, 900, 1, 64, 257, 128)
SEQLENS_K = (5, 7, 300, 900, 0, 64, 129, 1000)
LARGEST = 2**31 - 1


def kernel_of(
    kind: str, mask: str = "causal", head_dim: int = 64, lengths: str = "ragged", **more: Any
) -> Kernel:
    """A kernel whose queries and keys are both cut in one way."""
    skip_unless_runs_here(kind)
    spec = Wanted(kind, mask, dims=(head_dim, head_dim)).spec
    spec["problem"] |= {} if lengths == "dense" else {"queries": lengths, "keys": lengths}
    return attngen.compile(spec | more)


def numbers(of: list[int]) -> torch.Tensor:
    return torch.tensor(of, dtype=torch.int32, device="cuda")


def starts_of(seqlens: tuple[int, ...], between: int = 0) -> list[int]:
    """Where sequences begin, and the last ends, with rows of nobody ahead of each and behind."""
    found = [between]
    for length in seqlens:
        found.append(found[-1] + length + between)
    return found


def drawn(rows: int, heads: int, head_dim: int, seed: int) -> torch.Tensor:
    made = torch.randn(rows, heads, head_dim, generator=torch.Generator().manual_seed(seed))
    return made.to(torch.bfloat16).cuda()


def listed(kernel: Kernel, cu_q: list[int], cu_k: list[int], tokens: tuple[int, int]) -> torch.Tensor:
    """What the GPU lists, up to the last entry."""
    q, k, v = (
        drawn(rows, heads, 64, 0)
        for rows, heads in ((tokens[0], HEADS), (tokens[1], HEADS_KV), (tokens[1], HEADS_KV))
    )
    work = kernel.work(q, k, v, cu_seqlens_q=numbers(cu_q), cu_seqlens_k=numbers(cu_k))
    assert isinstance(work.memory, torch.Tensor)
    entries = work.memory.view(torch.int32).view(-1, 8).cpu()
    return entries[: 1 + int(entries[0, 0])]


def expected_list(kernel: Kernel, cu_q: list[int], cu_k: list[int], tokens: tuple[int, int]) -> torch.Tensor:
    """What the simulator lists."""
    (plan,) = kernel.call.programs
    sizes = Sizes(
        len(cu_q) - 1, *tokens, HEADS, HEADS_KV, tokens_q=tokens[0], tokens_k=tokens[1], declared=Declared()
    )
    said = {
        name: torch.tensor(x, dtype=torch.int32)
        for name, x in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k))
    }
    entries = list_tiles(ListTiles(plan), said, sizes)[plan.tile_list]
    return entries[: 1 + int(entries[0, 0])]


@pytest.mark.parametrize("mask", ["full", "causal", "window(300, 0)"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_list_is_the_simulators(kind: str, mask: str) -> None:
    """Entry by entry, twice; one long sequence among many, 10,000 sequences, none, and numbers that lie."""
    kernel, draw = kernel_of(kind, mask), random.Random(0)
    batches = [
        tuple(draw.choice((0, 1, 10, 200, 1000)) for _ in range(1000)),
        (*(10,) * 300, 100_000, *(10,) * 300),
        (7,) * 10_000,
        (),
    ]
    for seqlens in batches:
        cu = starts_of(seqlens)
        tokens = (cu[-1] + 3, cu[-1] + 3)
        expected = expected_list(kernel, cu, cu, tokens)
        for _ in range(2):
            assert torch.equal(listed(kernel, cu, cu, tokens), expected)
    lies = [draw.choice((0, 5000, -7, LARGEST, -LARGEST - 1, draw.randrange(5000))) for _ in range(101)]
    found = listed(kernel, lies, lies[::-1], (5000, 4000))
    assert torch.equal(found, expected_list(kernel, lies, lies[::-1], (5000, 4000)))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("mask", ["full", "causal", "window(100, 20)", "kv_idx % 3 != q_idx % 2"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_ragged_sequence_is_a_dense_call(kind: str, mask: str, head_dim: int) -> None:
    """Out and lse bit for bit, with NaN between sequences; rows of nobody become 0, with lse -inf."""
    ragged, dense = (kernel_of(kind, mask, head_dim, lengths) for lengths in ("ragged", "dense"))
    between = 3
    cu_q, cu_k = starts_of(SEQLENS_Q, between), starts_of(SEQLENS_K, between)
    q = drawn(cu_q[-1] + 50, HEADS, head_dim, 1)
    k, v = (drawn(cu_k[-1] + 50, HEADS_KV, head_dim, seed) for seed in (2, 3))
    places = [
        (slice(a, a + m), slice(b, b + n))
        for a, m, b, n in zip(cu_q, SEQLENS_Q, cu_k, SEQLENS_K, strict=False)
    ]
    for x, number in ((q, 0), (k, 1), (v, 1)):
        used = torch.zeros(len(x), dtype=torch.bool, device="cuda")
        for each in places:
            used[each[number]] = True
        x[~used] = math.nan
    said = {"cu_seqlens_q": numbers(cu_q), "cu_seqlens_k": numbers(cu_k)}
    said |= {"seqused_q": numbers(list(SEQLENS_Q)), "seqused_k": numbers(list(SEQLENS_K))}
    out, lse = ragged(q, k, v, return_lse=True, **said)
    for rows, keys in places:
        if rows.stop > rows.start:
            alone, alone_lse = dense(q[rows][None], k[keys][None], v[keys][None], return_lse=True)
            assert torch.equal(out[rows], alone[0])
            assert torch.equal(lse[:, rows], alone_lse[0])
        out[rows], lse[:, rows] = 0, -math.inf
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_sequence_is_a_dense_call(kind: str) -> None:
    """Lengths per batch, and keys that begin later, with NaN in what is not used."""
    padded, dense = kernel_of(kind, lengths="padded"), kernel_of(kind, lengths="dense")
    rows, keys, skipped = [200, 0, 77, 129], [300, 130, 5, 0], [4, 130, 0, 0]
    q = drawn(4 * 200, HEADS, 64, 1).view(4, 200, HEADS, 64)
    k, v = (drawn(4 * 300, HEADS_KV, 64, seed).view(4, 300, HEADS_KV, 64) for seed in (2, 3))
    for b in range(4):
        q[b, rows[b] :] = math.nan
        for x in (k, v):
            x[b, keys[b] :], x[b, : skipped[b]] = math.nan, math.nan
    said = {"seqused_q": numbers(rows), "seqused_k": numbers(keys), "leftpad_k": numbers(skipped)}
    out = padded(q, k, v, **said)
    for b in range(4):
        if rows[b]:
            own = slice(skipped[b], max(skipped[b], keys[b]))
            assert torch.equal(
                out[b, : rows[b]], dense(q[b : b + 1, : rows[b]], k[b : b + 1, own], v[b : b + 1, own])[0]
            )
        assert (out[b, rows[b] :] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_that_lie_reach_no_memory_of_others(kind: str) -> None:
    """Starts that decrease or lie beyond the tokens: what stands around the output stays, the next call is right."""
    kernel, draw = kernel_of(kind), random.Random(1)
    q, k, v = (drawn(1000, heads, 64, seed) for seed, heads in enumerate((HEADS, HEADS_KV, HEADS_KV)))
    cu = numbers([0, 300, 301, 1000])
    expected = kernel(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    around = torch.full((3000, HEADS, 64), 7.0, dtype=torch.bfloat16, device="cuda")
    for _ in range(20):
        lies = [draw.choice((0, 1000, -5, LARGEST, -LARGEST - 1, draw.randrange(1000))) for _ in range(9)]
        kernel(q, k, v, out=around[1000:2000], cu_seqlens_q=numbers(lies), cu_seqlens_k=numbers(lies[::-1]))
        assert (around[:1000] == 7).all() and (around[2000:] == 7).all()
        assert torch.equal(kernel(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_tiles_than_blocks_leave_the_counter_at_0(kind: str) -> None:
    """No tile at all, one, and then as many as fill the GPU: each call finds the counter as the first did."""
    kernel = kernel_of(kind, "full")
    q, k, v = (drawn(40_000, heads, 64, seed) for seed, heads in enumerate((HEADS, HEADS_KV, HEADS_KV)))
    many = numbers(list(range(0, 40_001, 400)))
    expected = kernel(q, k, v, cu_seqlens_q=many, cu_seqlens_k=many)
    for rows in (0, 1, 130):
        cu = numbers([0, rows])
        assert kernel(q[:rows], k[:rows], v[:rows], cu_seqlens_q=cu, cu_seqlens_k=cu).isfinite().all()
        assert torch.equal(kernel(q, k, v, cu_seqlens_q=many, cu_seqlens_k=many), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_replays_with_other_lengths(kind: str) -> None:
    """Lengths are read by the device: a captured call takes those that stand there when it is replayed."""
    kernel = kernel_of(kind)
    q, k, v = (drawn(1000, heads, 64, seed) for seed, heads in enumerate((HEADS, HEADS_KV, HEADS_KV)))
    cu = numbers([0, 300, 301, 1000])
    kernel(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    for starts in ([0, 300, 301, 1000], [0, 0, 999, 1000], [0, 500, 500, 500]):
        cu.copy_(numbers(starts))
        graph.replay()
        assert torch.equal(out, kernel(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu))
