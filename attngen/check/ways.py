"""Attention as programs compute it with torch, for memory and time of a kernel to stand beside.

Each of these takes a `Problem` and gives out, (batch, num_heads_q, seqlen_q, head_dim_v), in the type of the inputs,
which autograd differentiates. They are written as programs write them, not as oracles: rows that see no key are NaN.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from attngen.check.problem import Problem
from attngen.check.timing import CAUSAL, SCORE
from attngen.errors import ToolchainError
from attngen.expr import TRUE, derivative, free_names, parse_mask
from attngen.memory import check_room

CHUNK = 128
"""Queries that `query_chunked` has in memory at a time."""
_BYTES_OF_A_PLACE = 8
"""That reading a mask takes for each pair."""
_TOP_LEFT = parse_mask("causal_top_left")


def eager(problem: Problem) -> Tensor:
    """The whole score matrix in memory, as the eager attention of models: heads of K and V repeated, softmax in f32."""
    q, (k, v) = problem.q, (_repeated(x, problem.group) for x in (problem.k, problem.v))
    scores = (q @ k.mT) * problem.softmax_scale
    if (problem.score or SCORE) is not SCORE:
        scores = problem.modified(scores, *problem.every_index())
    if (problem.mask or TRUE) is not TRUE:
        scores = scores.masked_fill(~problem.sees(*problem.every_index()), -torch.inf)
    if problem.sink is not None:
        logits = problem.sink.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, logits), dim=-1)
    p = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return p[..., : k.shape[2]] @ v


def query_chunked(problem: Problem) -> Tensor:
    """`eager`, `CHUNK` queries at a time: memory linear in the lengths; a backward pass computes each chunk anew.

    Source: Rabe and Staats, Self-attention Does Not Need O(n^2) Memory, arXiv 2112.05682, with one chunk of keys.
    """

    def of_chunk(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        return eager(replace(problem, q=q, k=k, v=v, rows=rows))

    chunks = zip(torch.split(problem.q, CHUNK, 2), torch.split(problem.rows, CHUNK), strict=True)
    made = [
        checkpoint(of_chunk, q, problem.k, problem.v, rows, use_reentrant=False, preserve_rng_state=False)
        if torch.is_grad_enabled()
        else of_chunk(q, problem.k, problem.v, rows)
        for q, rows in chunks
    ]
    return torch.cat(made, dim=2)


def sdpa_arguments(problem: Problem) -> tuple[Tensor | None, bool]:
    """The mask tensor, and is_causal, of torch's scaled_dot_product_attention.

    A mask that torch knows by no name is written out, bool, and so is what is added to scores, in the type of q, with
    -inf where a key is hidden; both for as many batches and heads as they ask for.

    Raises:
        ToolchainError: it takes no such score, or no sinks.
        MemoryError: this machine can never hold what is written out.
    """
    mask, score = problem.mask or TRUE, problem.score or SCORE
    if problem.sink is not None:
        raise ToolchainError("it knows no learned sinks", "ask about a call without")
    if derivative(score) is not derivative(SCORE):
        raise ToolchainError("it knows no scores but those that something is added to", "ask about another")
    if score is SCORE and mask is TRUE:
        return None, False
    if score is SCORE and (mask is _TOP_LEFT or (mask is CAUSAL and problem.seqlen_q == problem.seqlen_k)):
        return None, True
    b, h, q_idx, kv_idx = problem.every_index()
    read = free_names(mask) | free_names(score)
    places = (b if "b" in read else b[:1], h if read & {"h", "h_kv"} else h[:, :1], q_idx, kv_idx)
    whole = (places[0].shape[0], places[1].shape[1], problem.seqlen_q, problem.seqlen_k)
    if q_idx.device.type == "cpu":
        check_room(math.prod(whole) * _BYTES_OF_A_PLACE, "a mask that is written out")
    seen = problem.sees(*places).expand(whole)
    if score is SCORE:
        return seen.contiguous(), False
    nothing = torch.zeros(whole, dtype=torch.float32, device=q_idx.device)
    added = problem.modified(nothing, *places).to(problem.q.dtype)
    return added.masked_fill(~seen, -torch.inf), False


def sdpa(problem: Problem, backend: SDPBackend, mask: Tensor | None, is_causal: bool) -> Callable[[], Tensor]:
    """A call of torch's scaled_dot_product_attention by one backend, with a mask of `sdpa_arguments`."""

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                problem.q,
                problem.k,
                problem.v,
                mask,
                is_causal=is_causal,
                scale=problem.softmax_scale,
                enable_gqa=problem.group > 1,
            )

    return run


def _repeated(x: Tensor, times: int) -> Tensor:
    return x if times == 1 else x.repeat_interleave(times, dim=1)
