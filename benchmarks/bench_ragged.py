"""Ragged sequences, given blocks and learned sinks beside others: `python benchmarks/bench_ragged.py --out DIR`.

bf16, head_dim 128, 16 heads, inputs N(0, 1), all candidates of a point interleaved in one process, every figure beside
its goal. `--only` names parts: `documents`, which are causal, `skewed`, `backward`, `blocks` and `sink`
(`blocks_and_sinks.py`), `list` (`ragged_launches.py`); `--points 65536` measures the points with this in their name.
FlashAttention-3 takes part where the environment's FA3 names its library.
"""

import math
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import blocks_and_sinks
import ragged_launches
import torch
import varlen_peers
from blocks_and_sinks import HEAD_DIM, HEADS, compiled, normal
from figures import (
    Candidate,
    Comparison,
    Figure,
    Medians,
    Point,
    Tensors,
    command_line,
    measure_parts,
    peer,
)
from torch._functorch import config as functorch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from varlen_peers import Packed

from attngen.check import timing

TOKENS, DOCUMENTS = (4096, 16384, 65536), (4, 16, 64)
EQUAL = ((16, 1024), (4, 4096), (1, 16384), (16, 4096))
"""Sequences, and the length of each."""
GRADIENTS = ["q", "k", "v"]
GOAL_OF_DOCUMENTS = 1.08
MADE_BEFORE = ("", "prepared ")
"""How the name of a candidate begins whose list, table or metadata its call makes, or was made before."""


def packed(lengths: list[int], device: str = "cuda", heads: int = HEADS) -> Packed:
    """Random sequences of these lengths."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return Packed(*normal(3, (starts[-1], heads, HEAD_DIM), device), tuple(starts))


def cut_at_random(tokens: int, documents: int) -> list[int]:
    """Lengths of documents, none empty, that fill so many tokens; the same in every run."""
    cuts = sorted(random.Random(documents).sample(range(1, tokens), documents - 1))
    return [stop - start for start, stop in zip([0, *cuts], [*cuts, tokens], strict=True)]


def spec(mask: str, *, ragged: bool = False, **more: Any) -> dict[str, Any]:
    """A spec of sequences one after another, or of a dense batch."""
    cut = {"queries": "ragged", "keys": "ragged"} if ragged else {}
    return {"problem": {"head_dim": HEAD_DIM, **cut}, "mask": mask, **more}


def said(of: Packed) -> dict[str, Any]:
    """What a ragged call passes by name."""
    starts = of.on_device(of.starts)
    bounds = {"max_seqlen_q": of.longest, "max_seqlen_k": of.longest}
    return {"cu_seqlens_q": starts, "cu_seqlens_k": starts, **bounds}


def ids(of: Packed) -> torch.Tensor:
    """The number of each token's document, (1, tokens)."""
    numbers = torch.arange(len(of.lengths), dtype=torch.int32)
    return numbers.repeat_interleave(torch.tensor(of.lengths))[None].to(of.q.device)


def by_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, of: Packed, *, causal: bool) -> torch.Tensor:
    """What attention gives, a sequence after another by torch: (tokens, heads, head_dim)."""
    made = []
    for start, stop in zip(of.starts, of.starts[1:], strict=False):
        rows = [x[start:stop].transpose(0, 1)[None] for x in (q, k, v)]
        made.append(scaled_dot_product_attention(*rows, is_causal=causal)[0].transpose(0, 1))
    return torch.cat(made)


def documents(of: Packed) -> Comparison:
    """Causal documents: by cu_seqlens, by sorted ids, and by others."""
    q, k, v = of.q, of.k, of.v
    wanted = (by_torch(q, k, v, of, causal=True),)
    ragged, cut = compiled(spec("causal", ragged=True), q), said(of)
    tensors = {"doc": "i32[batch, seqlen_k] sorted"}
    by_ids, doc = compiled(spec("causal and document(doc)", tensors=tensors), q), ids(of)
    dense = (q[None], k[None], v[None])
    runs = {
        "prepared ragged": partial(ragged, q, k, v, work=ragged.work(q, k, v, **cut), **cut),
        "ragged": partial(ragged, q, k, v, **cut),
        "prepared sorted": partial(by_ids, *dense, doc=doc, tables=by_ids.tables(*dense, doc=doc)),
        "sorted": partial(by_ids, *dense, doc=doc),
    }
    candidates = {
        name: Candidate(run, wanted if "ragged" in name else (wanted[0][None],)) for name, run in runs.items()
    }
    if q.is_cuda:
        for splits in (0, 1):
            for is_prepared in (False, True):
                name = f"{MADE_BEFORE[is_prepared]}fa3 of {splits} splits"
                candidates |= peer(
                    name,
                    lambda s=splits, p=is_prepared: Candidate(
                        varlen_peers.fa3_run(of, causal=True, splits=s, is_prepared=p), wanted, first
                    ),
                )
        candidates |= peer("flash", lambda: Candidate(varlen_peers.torch_run(of, causal=True), wanted, first))
    return Comparison(candidates, beside_fa3)


def first(made: Any) -> Tensors:
    """The output among what a peer returns."""
    return (made,) if isinstance(made, torch.Tensor) else (made[0],)


def beside_fa3(ms: Medians) -> Iterator[Figure]:
    """How many times as fast as FlashAttention-3 each way is, by whichever number of splits that is faster."""
    for made in MADE_BEFORE:
        theirs = min((ms[name] for name in ms if name.startswith(f"{made}fa3 ")), default=math.nan)
        for way in ("ragged", "sorted"):
            yield Figure(f"speed of {made}{way} to {made}fa3's", theirs / ms[f"{made}{way}"], at_least=1.0)
    if "flash" in ms:
        yield Figure("speed of ragged to torch's", ms["flash"] / ms["ragged"])


def equal_lengths(of: Packed) -> Comparison:
    """Sequences of one length beside the dense kernel of them as a batch."""
    q, k, v = of.q, of.k, of.v
    wanted = by_torch(q, k, v, of, causal=True)
    ragged, cut, dense = compiled(spec("causal", ragged=True), q), said(of), compiled(spec("causal"), q)
    batch = (len(of.lengths), of.longest)
    runs = {
        "prepared ragged": partial(ragged, q, k, v, work=ragged.work(q, k, v, **cut), **cut),
        "ragged": partial(ragged, q, k, v, **cut),
    }
    candidates = {name: Candidate(run, (wanted,)) for name, run in runs.items()}
    of_batch = [x.unflatten(0, batch) for x in (q, k, v, wanted)]
    candidates["dense"] = Candidate(partial(dense, *of_batch[:3]), (of_batch[3],))

    def figures(ms: Medians) -> Iterator[Figure]:
        for name in runs:
            yield Figure(f"time of {name} to dense's", ms[name] / ms["dense"], at_most=1.02)

    return Comparison(candidates, figures)


def skewed(of: Packed) -> Comparison:
    """One long sequence among short ones of one length, beside a dense call of it and one of them."""
    q, k, v = of.q, of.k, of.v
    wanted = by_torch(q, k, v, of, causal=True)
    place = of.lengths.index(of.longest)
    begin, end, short = of.starts[place], of.starts[place + 1], min(of.lengths)
    ragged, cut, dense = compiled(spec("causal", ragged=True), q), said(of), compiled(spec("causal"), q)
    alone = [x[begin:end][None] for x in (q, k, v, wanted)]
    others = [torch.cat([x[:begin], x[end:]]).unflatten(0, (-1, short)) for x in (q, k, v, wanted)]
    candidates = {
        "prepared ragged": Candidate(
            partial(ragged, q, k, v, work=ragged.work(q, k, v, **cut), **cut), (wanted,)
        ),
        "ragged": Candidate(partial(ragged, q, k, v, **cut), (wanted,)),
        "dense, the long one": Candidate(partial(dense, *alone[:3]), (alone[3],)),
        "dense, the others": Candidate(partial(dense, *others[:3]), (others[3],)),
    }

    def figures(ms: Medians) -> Iterator[Figure]:
        both = ms["dense, the long one"] + ms["dense, the others"]
        for made in MADE_BEFORE:
            yield Figure(f"time of {made}ragged to both's", ms[f"{made}ragged"] / both, at_most=1.1)

    return Comparison(candidates, figures)


def backward_of(of: Packed, causal: bool) -> tuple[timing.Run, torch.Tensor, Tensors, Tensors]:
    """A ragged backward pass; the gradient of out that it takes, its leaves, and the gradients that torch gives."""
    mask = "causal" if causal else "full"
    kernel, cut = compiled(spec(mask, ragged=True, gradients=GRADIENTS), of.q), said(of)
    out, lse = kernel(of.q, of.k, of.v, return_lse=True, **cut)
    (dout,) = normal(1, out.shape, out.device, seed=1)
    leaves = tuple(x.detach().requires_grad_() for x in (of.q, of.k, of.v))
    wanted = torch.autograd.grad(by_torch(*leaves, of, causal=causal), leaves, dout)
    return partial(kernel.backward, dout, of.q, of.k, of.v, out, lse, **cut), dout, leaves, wanted


def backward_documents(of: Packed, causal: bool) -> Comparison:
    """The backward pass of documents, and on a GPU that of compiled FlexAttention."""
    run, dout, leaves, wanted = backward_of(of, causal)
    candidates = {"ragged": Candidate(run, wanted)}
    if of.q.is_cuda:
        candidates |= peer("flex", lambda: Candidate(flex_backward(of, causal, dout, leaves), wanted))

    def figures(ms: Medians) -> Iterator[Figure]:
        yield Figure("speed of ragged to flex's", ms["flex"] / ms["ragged"], at_least=1.3)

    return Comparison(candidates, figures)


def flex_backward(of: Packed, causal: bool, dout: torch.Tensor, leaves: Tensors) -> timing.Run:
    """The backward pass of compiled FlexAttention, whose block mask is built before."""
    doc, tokens = ids(of)[0], len(of.q)

    def sees(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (doc[q] == doc[k]) & (k <= q) if causal else doc[q] == doc[k]

    functorch.donated_buffer = False  # else a compiled backward pass runs once
    torch.compiler.reset()
    seen = create_block_mask(sees, None, None, tokens, tokens, device=str(of.q.device))
    compiled_flex = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    made = compiled_flex(*(x.transpose(0, 1)[None] for x in leaves), block_mask=seen)
    return partial(torch.autograd.grad, made, leaves, dout.transpose(0, 1)[None], retain_graph=True)


def backward_equal(of: Packed, causal: bool) -> Comparison:
    """The backward pass of sequences of one length beside the dense one of them as a batch."""
    run, dout, _, wanted = backward_of(of, causal)
    kernel = compiled(spec("causal" if causal else "full", gradients=GRADIENTS), of.q)
    batch = (len(of.lengths), of.longest)
    q, k, v, grad = (x.unflatten(0, batch) for x in (of.q, of.k, of.v, dout))
    dense = partial(kernel.backward, grad, q, k, v, *kernel(q, k, v, return_lse=True))
    of_batch = tuple(x.unflatten(0, batch) for x in wanted)

    def figures(ms: Medians) -> Iterator[Figure]:
        yield Figure("time of ragged to dense's", ms["ragged"] / ms["dense"], at_most=1.05)

    return Comparison({"ragged": Candidate(run, wanted), "dense": Candidate(dense, of_batch)}, figures)


def main() -> int:
    """Measure the parts that the command line names."""
    causal_or_full = {"causal": True, "full": False}

    def of_documents() -> Iterator[Point]:
        for tokens in TOKENS:
            for count in DOCUMENTS:
                name = f"{tokens} tokens of {count} documents"
                yield Point(name, lambda t=tokens, n=count: documents(packed(cut_at_random(t, n))))
        for count, length in EQUAL:
            yield Point(f"{count} of {length} each", lambda n=count, m=length: equal_lengths(packed([m] * n)))

    def of_backward() -> Iterator[Point]:
        for word, causal in causal_or_full.items():
            lengths = cut_at_random(16384, 16)
            yield Point(
                f"16384 tokens of 16 documents, {word}",
                lambda c=causal, of=lengths: backward_documents(packed(of), c),
            )
            for count, length in EQUAL[:3]:
                name = f"{count} of {length} each, {word}"
                yield Point(name, lambda c=causal, n=count, m=length: backward_equal(packed([m] * n), c))

    one_among_many = [512] * 128 + [8192] + [512] * 127
    parts: dict[str, Callable[[], Iterator[Point]]] = {
        "documents": of_documents,
        "skewed": lambda: iter([Point("8192 among 255 of 512", lambda: skewed(packed(one_among_many)))]),
        "backward": of_backward,
        "blocks": blocks_and_sinks.of_blocks,
        "sink": blocks_and_sinks.of_sinks,
        "list": ragged_launches.of_launches,
    }
    means = {
        f"speed of {made}{way} to {made}fa3's": GOAL_OF_DOCUMENTS
        for made in MADE_BEFORE
        for way in ("ragged", "sorted")
    }
    return measure_parts(command_line(__doc__, parts).parse_args(), "ragged.json", parts, means)


if __name__ == "__main__":
    sys.exit(main())
