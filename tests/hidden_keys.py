"""Keys that masks hide from every query: which they are, calls that hold poison in them, and the Steps for them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from attngen.expr import Expr, evaluate
from attngen.plan import Program, Step, body_of
from attngen.plan.steps import FenceAsync, SyncThreads, SyncWarpgroup, WaitFull, ZeroHidden

TENSORS = {
    "pad": "bool[batch, seqlen_k]",
    "lens": "i32[batch]",
    "keep": "bool[num_heads_q, seqlen_k]",
    "rank": "i32[batch, seqlen_k] sorted",
}
BATCH, HEADS, HEADS_KV = 2, 4, 2
POISONS = (math.nan, math.inf, -math.inf)
BESIDE = (WaitFull, SyncThreads, FenceAsync, SyncWarpgroup)
"""What orders zeros and those who read them."""


def declared_by(mask: str) -> dict[str, str]:
    """The tensors of a spec with this mask."""
    return {name: text for name, text in TENSORS.items() if f"{name}[" in mask}


def passed(mask: str, keys: int) -> dict[str, torch.Tensor]:
    """What a call passes for them: padding here and there, a long stretch of it, and ends."""
    random = torch.Generator().manual_seed(3)
    pad, keep = (torch.rand(rows, keys, generator=random) > 0.4 for rows in (BATCH, HEADS))
    pad[1, keys // 4 : -(keys // 6)] = False
    keep[:, keys // 3 : keys // 2] = False
    lens = torch.tensor([keys // 2 - 1, 2 * keys // 3 + 1], dtype=torch.int32)
    rank = (torch.arange(keys) // 7).expand(BATCH, -1).int()
    values = {"pad": pad, "lens": lens, "keep": keep, "rank": rank}
    return {name: values[name] for name in declared_by(mask)}


def hidden_keys(mask: Expr, declared: Mapping[str, torch.Tensor], queries: int, keys: int) -> torch.Tensor:
    """Which keys no query sees that shares them, (batch, keys, heads of K and V), found pair by pair."""
    b, h, q_idx, kv_idx = torch.meshgrid(*map(torch.arange, (BATCH, HEADS, queries, keys)), indexing="ij")
    names = {"b": b, "h": h, "h_kv": h // (HEADS // HEADS_KV), "q_idx": q_idx, "kv_idx": kv_idx}
    names |= {"seqlen_q": queries, "seqlen_k": keys}
    seen = torch.as_tensor(evaluate(mask, names, dict(declared))).expand(b.shape)
    return ~seen.any(2).view(BATCH, HEADS_KV, -1, keys).any(2).transpose(1, 2)


def inputs(queries: int, keys: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q, K and V in bf16."""
    random = torch.Generator().manual_seed(1)
    q = torch.randn(BATCH, queries, HEADS, dim, generator=random)
    k, v = torch.randn(2, BATCH, keys, HEADS_KV, dim, generator=random)
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def without_one(program: Program) -> Iterator[tuple[Step, Program]]:
    """A program without one of the Steps that are there for hidden keys, for each of them, and that Step.

    These write zeros, and are those right before and behind them that order who reads.
    """
    of_zeros = {i for i, step in enumerate(program) if isinstance(step, ZeroHidden)}
    for i, step in enumerate(program):
        is_before = not of_zeros.isdisjoint((i + 1, i + 2)) and all(
            isinstance(each, WaitFull) for each in program[i : min(j for j in of_zeros if j > i)]
        )
        is_behind = not of_zeros.isdisjoint((i - 1, i - 2)) and isinstance(step, BESIDE)
        if i in of_zeros or is_before or is_behind:
            yield step, program[:i] + program[i + 1 :]
        for left_out, body in without_one(body_of(step)):
            yield left_out, (*program[:i], replace(step, body=body), *program[i + 1 :])  # type: ignore[call-arg]
