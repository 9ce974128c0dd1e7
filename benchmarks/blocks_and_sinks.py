"""What given blocks and a learned sink cost beside the dense kernel, and beside FlexAttention with its BlockMask.

Parts of `bench_ragged.py`. Results are held against f32 on some blocks of rows, drawn once.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from figures import BLOCK, Candidate, Comparison, Figure, Medians, Point, Tensors, peer
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import attngen

HEADS, HEAD_DIM = 16, 128
KEPT = (0.1, 0.25, 0.5)
LENGTHS = (16384, 65536)
SEQLEN_OF_FLEX = 16384
"""FlexAttention is measured up to this length."""
BLOCKS = {"block_m": BLOCK, "block_n": BLOCK}
SAMPLED = 8
"""Blocks of rows that are worked out in f32."""


def normal(
    count: int, shape: Sequence[int], device: str | torch.device, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """So many bf16 tensors of N(0, 1), drawn where they are used."""
    generator = torch.Generator(device).manual_seed(seed)
    return tuple(
        torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(count)
    )


def compiled(spec: dict[str, Any], on: torch.Tensor) -> attngen.Kernel:
    """The kernel of a spec for the device of a tensor."""
    return attngen.compile(spec, arch=None if on.is_cuda else "simulator")


def sampled_rows(seqlen: int) -> list[int]:
    """Where some blocks of rows begin, the first and the last among them."""
    last = seqlen - BLOCK
    return sorted({last * place // (SAMPLED - 1) // BLOCK * BLOCK for place in range(SAMPLED)})


def sample(out: torch.Tensor) -> Tensors:
    """Those rows of an output (batch, seqlen, heads, head_dim) of one batch element."""
    return tuple(out[0, row : row + BLOCK] for row in sampled_rows(out.shape[1]))


def in_f32(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    kept: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
) -> Tensors:
    """The `sample` of what attention gives.

    Args:
        q: (1, seqlen, heads, head_dim), like k and v.
        k: see q.
        v: see q.
        causal: whether a row sees no key behind it.
        kept: bool, (1, heads, blocks, blocks).
        sink: f32, (heads).
    """
    keys, values = (x[0].transpose(0, 1).float() for x in (k, v))
    place, made = torch.arange(q.shape[1], device=q.device), []
    for row in sampled_rows(q.shape[1]):
        rows = slice(row, row + BLOCK)
        scores = q[0, rows].transpose(0, 1).float() @ keys.transpose(1, 2) * q.shape[-1] ** -0.5
        if causal:
            scores = scores.masked_fill(place > place[rows, None], -torch.inf)
        if kept is not None:
            hidden = ~kept[0, :, row // BLOCK].repeat_interleave(BLOCK, -1)[:, None]
            scores = scores.masked_fill(hidden, -torch.inf)
        lse = scores.logsumexp(-1, keepdim=True)
        if sink is not None:
            lse = torch.logaddexp(lse, sink[:, None, None])
        weights = (scores - lse).exp().nan_to_num()  # of rows that see no key, NaN
        made.append((weights @ values).transpose(0, 1))
    return tuple(made)


def drawn_map(seqlen: int, kept: float, heads: int, device: str) -> torch.Tensor:
    """Which blocks are kept, each by chance, (1, heads, blocks, blocks); all of them where `kept` is 1."""
    generator = torch.Generator(device).manual_seed(1)
    count = seqlen // BLOCK
    return torch.rand(1, heads, count, count, generator=generator, device=device) < kept


def listed(kept: torch.Tensor) -> BlockMask:
    """A map as a BlockMask whose blocks are all full, so that FlexAttention asks no pair."""
    counts = kept.sum(-1, dtype=torch.int32)
    indices = kept.int().argsort(dim=-1, descending=True, stable=True).int()
    return BlockMask.from_kv_blocks(
        torch.zeros_like(counts), indices, counts, indices, BLOCK_SIZE=BLOCK, mask_mod=sees_all
    )


def sees_all(b: Any, h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The mask inside a block; one function for all, so that what is compiled is compiled once."""
    return q >= 0


@cache
def compiled_flex() -> Callable[..., torch.Tensor]:
    """FlexAttention, compiled for each shape."""
    torch.compiler.reset()
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def given_blocks(seqlen: int, share: float, device: str = "cuda", heads: int = HEADS) -> Comparison:
    """A random map, lists of it, the dense kernel, and FlexAttention."""
    q, k, v = normal(3, (1, seqlen, heads, HEAD_DIM), device)
    kept = drawn_map(seqlen, share, heads, device)
    blocks = listed(kept)
    with_blocks = compiled({"problem": {"head_dim": HEAD_DIM}, "blocks": BLOCKS}, q)
    dense = compiled({"problem": {"head_dim": HEAD_DIM}}, q)
    wanted = in_f32(q, k, v, kept=kept)
    runs = {
        "map": partial(with_blocks, q, k, v, blocks=kept),
        "lists": partial(with_blocks, q, k, v, blocks=blocks),
    }
    candidates = {name: Candidate(run, wanted, sample) for name, run in runs.items()}
    candidates["dense"] = Candidate(partial(dense, q, k, v), in_f32(q, k, v), sample)
    if q.is_cuda and seqlen <= SEQLEN_OF_FLEX:
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        flex = partial(compiled_flex(), *heads_first, block_mask=blocks)
        candidates |= peer("flex", lambda: Candidate(flex, wanted, lambda made: sample(made.transpose(1, 2))))
    visited = float(kept.float().mean())

    def figures(ms: Medians) -> Iterator[Figure]:
        for name in runs:
            if share == 1:
                yield Figure(f"time of all blocks by {name} to none's", ms[name] / ms["dense"], at_most=1.03)
                continue
            yield Figure(
                f"time of a block by {name} to dense's", ms[name] / visited / ms["dense"], at_most=1.12
            )
            if "flex" in candidates:
                yield Figure(f"speed of {name} to flex's", ms["flex"] / ms[name], at_least=1.5)

    return Comparison(candidates, figures)


def of_blocks() -> Iterator[Point]:
    """Maps of each length."""
    for seqlen in LENGTHS:
        for share in (*KEPT, 1.0):
            yield Point(f"{share:.0%} of blocks at {seqlen}", partial(given_blocks, seqlen, share))


def learned_sink(
    seqlen: int, head_dim: int, causal: bool, device: str = "cuda", width: int = HEADS * HEAD_DIM
) -> Comparison:
    """The kernel with a sink beside the one without."""
    heads = width // head_dim
    q, k, v = normal(3, (1, seqlen, heads, head_dim), device)
    sink = torch.linspace(-2.0, 6.0, heads, device=device)
    spec = {"problem": {"head_dim": head_dim}, "mask": "causal" if causal else "full"}
    plain, with_sink = compiled(spec, q), compiled(spec | {"sink": "per_head"}, q)
    candidates = {
        "without": Candidate(partial(plain, q, k, v), in_f32(q, k, v, causal=causal), sample),
        "with": Candidate(
            partial(with_sink, q, k, v, sink=sink), in_f32(q, k, v, causal=causal, sink=sink), sample
        ),
    }

    def figures(ms: Medians) -> Iterator[Figure]:
        yield Figure("time with a sink to without", ms["with"] / ms["without"], at_most=1.01)

    return Comparison(candidates, figures)


def of_sinks() -> Iterator[Point]:
    """Sinks at both lengths, head_dims and masks."""
    for head_dim in (64, 128):
        for causal in (False, True):
            for seqlen in (4096, 16384):
                name = f"{seqlen}, head_dim {head_dim}, {'causal' if causal else 'full'}"
                yield Point(name, partial(learned_sink, seqlen, head_dim, causal))
