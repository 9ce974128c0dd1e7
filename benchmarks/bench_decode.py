"""A few queries against long caches in pages, beside FlashAttention-3: `python benchmarks/bench_decode.py --out DIR`.

bf16, inputs N(0, 1), pages of a shuffled table, CUDA graphs of 20 calls over caches that together are larger than the
L2, replayed in turns in one process. `--only` names parts: `plain` (32 query heads of 8, head_dim 128, one query),
`pages`, `prefill` (chunks of 2,048 queries), `speculation` (4 and 8), `head_dims`, `masks`, `e4m3` (caches of it, and
FlashAttention-3's queries too), `host` (what a call takes of it); `--points` measures the points with this in their
name.
FlashAttention-3 takes part where the environment's FA3 names its library, the better of its own splits and none, its
metadata made before as our list of parts is.
"""

import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from types import MappingProxyType
from typing import Any

import torch
from figures import MOST_DIFFERENCE, Figure, Point, Present, Row, command_line, difference, measure_parts
from ragged_launches import OnHost
from varlen_peers import load_fa3

import attngen
from attngen.few_queries import cut_into, tile_of_few
from attngen.plan import Lengths

IN_GRAPH = 20
"""Calls of one captured graph."""
L2_BYTES = 100_000_000
"""More than an H200's L2 holds, and what waits to be written back from it."""
GOALS = {"1 of 1024": 11.7 / 5.8, "1 of 4096": 14.0 / 8.8, "8 of 1024": 18.1 / 12, "8 of 8192": 72.4 / 65.7}
GOALS |= {"1 of 131072": 138 / 129, "64 of 4096": 251 / 250, "256 of 1024": 1.03, "ragged": 1.13}
"""FlashAttention-3's time over ours: what a hand-written kernel of one launch had."""


@dataclass(frozen=True)
class Shape:
    """A call: the keys of each request, heads, the queries of each, the rows of a page, and the format of caches."""

    lengths: tuple[int, ...]
    heads: int = 32
    heads_kv: int = 8
    head_dim: int = 128
    queries: int = 1
    page: int = 64
    cache: torch.dtype = torch.bfloat16

    @property
    def bytes(self) -> int:
        """Of all keys and values."""
        return 2 * self.cache.itemsize * sum(self.lengths) * self.heads_kv * self.head_dim

    @property
    def is_e4m3(self) -> bool:
        """Whether caches are."""
        return self.cache is torch.float8_e4m3fn


@dataclass(frozen=True)
class Caches:
    """One set of tensors of a call; pages lie in any order."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor

    @classmethod
    def drawn(cls, of: Shape) -> "Caches":
        """Random numbers, and a table whose entries behind the last page are those of no page."""
        batch, most = len(of.lengths), -(-max(of.lengths) // of.page)
        used = [-(-length // of.page) for length in of.lengths]
        pool, more = sum(used), {"device": "cuda", "dtype": torch.bfloat16}
        k, v = torch.randn(2, pool, of.page, of.heads_kv, of.head_dim, **more).to(of.cache)
        numbers = torch.randperm(pool, device="cuda", dtype=torch.int32).split(used)
        table = torch.full((batch, most), 2**31 - 1, device="cuda", dtype=torch.int32)
        for row, own in zip(table, numbers, strict=True):
            row[: len(own)] = own
        return cls(torch.randn(batch, of.queries, of.heads, of.head_dim, **more), k, v, table)

    def wanted(self, of: Shape) -> torch.Tensor:
        """What a causal call returns, in f32."""
        made = []
        for q, pages, length in zip(self.q, self.table, of.lengths, strict=True):
            own = pages[: -(-length // of.page)].long()
            k, v = (x[own].flatten(0, 1)[:length].float().transpose(0, 1) for x in (self.k, self.v))
            rows = (
                q.float().unflatten(1, (of.heads_kv, -1)).permute(1, 2, 0, 3)
            )  # (heads_kv, group, queries, columns)
            scores = rows @ k.unsqueeze(1).mT / math.sqrt(of.head_dim)
            place = torch.arange(of.queries, device="cuda").view(-1, 1) + length - of.queries
            hidden = torch.arange(length, device="cuda") > place
            out = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v.unsqueeze(1)
            made.append(out.permute(2, 0, 1, 3).flatten(1, 2))
        return torch.stack(made)


Calls = Sequence[Callable[[], torch.Tensor]]
"""A call for each set of tensors."""


def ours(
    of: Shape,
    sets: Sequence[Caches],
    is_prepared: bool,
    more: Mapping[str, Any] = MappingProxyType({}),
    declared: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> Calls:
    """Ours, the list of parts made before, or by each call; of a causal spec and `more`, as `attention` asks for it."""
    texts, lengths = (more.get("mask", "causal"), more.get("score", "score")), Lengths("dense", "paged")
    q, k, v, table = vars(sets[0]).values()
    rows = tile_of_few(q, k, v, texts, lengths, {"block_table": table}, has_warpgroups=True)
    kernel = attngen.compile(
        {
            "problem": {"head_dim": of.head_dim, "keys": "paged"},
            "precision": {"inputs": "bf16", "cache": "e4m3" if of.is_e4m3 else "auto"},
            "mask": "causal",
            **cut_into(rows),
            **more,
        }
    )
    descale = torch.ones(len(of.lengths), of.heads_kv, device="cuda")
    used = torch.tensor(of.lengths, dtype=torch.int32, device="cuda")
    out = torch.empty_like(q)

    def call(one: Caches) -> Callable[[], torch.Tensor]:
        named: dict[str, Any] = {"block_table": one.table, "seqused_k": used, **declared}
        if of.is_e4m3:
            named |= {"k_descale": descale, "v_descale": descale}
        work = kernel.work(one.q, one.k, one.v, **named) if is_prepared else None
        return lambda: kernel(one.q, one.k, one.v, work=work, out=out, **named)

    return [call(one) for one in sets]


def fa3s(of: Shape, sets: Sequence[Caches], splits: int) -> Calls:
    """FlashAttention-3's; `splits` of 0 leaves them to it."""
    fa3, batch = load_fa3(), len(of.lengths)
    lengths = torch.tensor(of.lengths, dtype=torch.int32, device="cuda")
    starts = torch.arange(0, (batch + 1) * of.queries, of.queries, dtype=torch.int32, device="cuda")
    sizes = (
        batch,
        of.queries,
        max(of.lengths),
        of.heads,
        of.heads_kv,
        of.head_dim,
        of.head_dim,
        of.cache,
    )
    about = (lengths, starts, *[None] * 4, of.page, 0, True, -1, -1, False, splits, None, 0)
    metadata = fa3.get_scheduler_metadata(*sizes, *about)
    descale = torch.ones(batch, of.heads_kv, device="cuda") if of.is_e4m3 else None

    def call(one: Caches) -> Callable[[], torch.Tensor]:
        q = one.q.flatten(0, 1).to(of.cache)
        table = one.table.clamp(max=one.k.shape[0] - 1)

        def run() -> torch.Tensor:
            made = fa3.fwd(
                *(
                    q,
                    one.k,
                    one.v,
                    *[None] * 4,
                    starts,
                    *[None] * 3,
                    lengths,
                    of.queries,
                    max(of.lengths),
                    table,
                ),
                *([None] * 5),
                *([descale] * 3),
                *(of.head_dim**-0.5, True, -1, -1, 0.0, True, metadata, splits, None, 0, None, 1, 0, None),
            )
            return made[0].view_as(one.q)

        return run

    return [call(one) for one in sets]


@dataclass(frozen=True)
class Graphs:
    """Candidates, each a graph of calls, whose replays take turns.

    Attributes:
        wanted: what the first call of each returns; None of a candidate whose mask is another.
    """

    of: Shape
    calls: Mapping[str, Calls]
    wanted: Mapping[str, torch.Tensor | None]
    figures: Callable[[Mapping[str, float]], Iterator[Figure]]

    def measure(self, rounds: int) -> Row:
        """Milliseconds of a call."""
        found = {
            name: difference(self.calls[name][0](), wanted)
            for name, wanted in self.wanted.items()
            if wanted is not None
        }
        wrong = sorted(name for name, by in found.items() if by > MOST_DIFFERENCE)
        graphs = {name: _captured(calls) for name, calls in self.calls.items() if name not in wrong}
        samples: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(rounds):
            for name, graph in graphs.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                samples[name].append(start.elapsed_time(end) / IN_GRAPH)
        medians = Present({name: median(times) for name, times in samples.items()})
        return {"ms": samples, "differences": found, "wrong": wrong, "figures": [*self.figures(medians)]}


def _captured(calls: Calls) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for number in range(IN_GRAPH):
            calls[number % len(calls)]()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _sets(of: Shape) -> list[Caches]:
    torch.manual_seed(0)
    return [Caches.drawn(of) for _ in range(max(2, min(IN_GRAPH, -(-L2_BYTES // of.bytes))))]


def beside_fa3(of: Shape, goal: float = -math.inf) -> Graphs:
    """A plain causal call."""
    sets = _sets(of)
    wanted = sets[0].wanted(of)
    calls = {"attngen": ours(of, sets, True), "attngen's whole call": ours(of, sets, False)}
    try:
        calls |= {f"fa3, {word}": fa3s(of, sets, splits) for word, splits in (("splits", 0), ("whole", 1))}
    except (ImportError, RuntimeError) as error:
        print(f"fa3 does not take part: {str(error).partition(chr(10))[0]}", flush=True)

    def figures(ms: Mapping[str, float]) -> Iterator[Figure]:
        best = min(ms["fa3, splits"], ms["fa3, whole"])
        yield Figure("speed to fa3's", best / ms["attngen"], at_least=goal)
        yield Figure("speed of a whole call to fa3's", best / ms["attngen's whole call"])
        yield Figure("of K and V", of.bytes / ms["attngen"] / 1e9, unit=" TB/s")

    judged = {name: None if of.is_e4m3 and name.startswith("fa3") else wanted for name in calls}
    return Graphs(of, calls, judged, figures)


def prefill(of: Shape) -> Graphs:
    """Chunks of new queries on caches that hold more: pages by pieces, row by row, and FlashAttention-3's."""
    sets, whole = _sets(of), {"split": "none", "tile": {}, "schedule": {}}
    calls = {"attngen": ours(of, sets, True, whole)}
    calls["attngen, row by row"] = ours(of, sets, True, whole | {"schedule": {"kind": "fa2"}})
    try:
        calls["fa3"] = fa3s(of, sets, 1)
    except (ImportError, RuntimeError) as error:
        print(f"fa3 does not take part: {str(error).partition(chr(10))[0]}", flush=True)
    pairs = sum(of.queries * length - of.queries * (of.queries - 1) // 2 for length in of.lengths)

    def figures(ms: Mapping[str, float]) -> Iterator[Figure]:
        yield Figure("speed to fa3's", ms["fa3"] / ms["attngen"])
        yield Figure("speed to row by row", ms["attngen, row by row"] / ms["attngen"])
        yield Figure("of products", 4 * pairs * of.heads * of.head_dim / ms["attngen"] / 1e9, unit=" TFLOP/s")

    return Graphs(of, calls, dict.fromkeys(calls, sets[0].wanted(of)), figures)


@dataclass(frozen=True)
class Masked:
    """A mask or a score, on eight caches of 32,768 keys, and what a plain call reads as many bytes of."""

    spec: Mapping[str, Any]
    queries: int = 1
    plain_keys: int = 32768


CONTEXT = "(seqlen_k - seqlen_q)"
TREE = f"kv_idx < {CONTEXT} or tree[b, q_idx, kv_idx - {CONTEXT}]"
MASKS = {
    "softcap": Masked({"score": "softcap(score, 30.0)"}),
    "window of 4096": Masked({"mask": "window(4096, 0)"}, plain_keys=4096),
    "window and sinks": Masked({"mask": "causal and (kv_idx > q_pos - 4096 or kv_idx < 4)"}, plain_keys=4096),
    "tree of 4": Masked({"mask": TREE, "tensors": {"tree": "bool[batch, drafts, drafts]"}}, queries=4),
}


def masked(name: str) -> Graphs:
    """Another mask or score beside the plain kernel, on as many bytes."""
    mask = MASKS[name]
    of = Shape((32768,) * 8, queries=mask.queries)
    plain = replace(of, lengths=(mask.plain_keys,) * 8)
    sets = _sets(of)
    plain_sets = sets if plain == of else _sets(plain)
    drafts = torch.ones(mask.queries, mask.queries, dtype=torch.bool, device="cuda").tril()
    passed = {"tree": drafts.expand(8, -1, -1)} if "tensors" in mask.spec else {}
    calls = {"plain": ours(plain, plain_sets, True), name: ours(of, sets, True, mask.spec, passed)}
    causal = plain_sets[0].wanted(plain)

    def figures(ms: Mapping[str, float]) -> Iterator[Figure]:
        yield Figure("time of a visited byte to plain's", ms[name] / ms["plain"], at_most=1.1)

    return Graphs(of, calls, {"plain": causal, name: causal if passed else None}, figures)


def on_host() -> OnHost:
    """A call of one query, its list of parts made before, and that call bound; the GPU has next to nothing to do."""
    of = Shape((64,) * 2)
    one, lengths = Caches.drawn(of), torch.tensor(of.lengths, dtype=torch.int32, device="cuda")
    named = {"block_table": one.table, "seqused_k": lengths}
    kernel = attngen.compile(
        {"problem": {"head_dim": 128, "keys": "paged"}, "mask": "causal", "split": "auto"}
    )
    passed = (one.q, one.k, one.v)
    named |= {"work": kernel.work(*passed, **named), "out": torch.empty_like(one.q)}
    calls = {"prepared": lambda: kernel(*passed, **named), "bound": kernel.bind(*passed, **named)}
    return OnHost(calls, lambda us: [Figure("a bound call", us["bound"], at_most=8.0, unit=" us")])


def main() -> int:
    """Measure the parts that the command line names."""
    even = {(count, length): Shape((length,) * count) for count, length in (
        (1, 1024), (1, 4096), (1, 32768), (1, 131072), (8, 1024), (8, 8192), (64, 4096), (256, 1024),
    )}  # fmt: skip
    draw = random.Random(1)
    ragged = Shape(tuple(int(draw.random() ** 3 * 32000) + 16 for _ in range(64)))

    def of_plain() -> Iterator[Point]:
        for (count, length), shape in even.items():
            name = f"{count} of {length}"
            yield Point(name, lambda s=shape, n=name: beside_fa3(s, GOALS.get(n, -math.inf)))
        yield Point("64 ragged", lambda: beside_fa3(ragged, GOALS["ragged"]))

    def of_pages() -> Iterator[Point]:
        for page in (1, 16, 528):
            yield Point(f"8 of 8192, page {page}", lambda p=page: beside_fa3(Shape((8192,) * 8, page=p)))

    def of_prefill() -> Iterator[Point]:
        for page in (16, 64):
            shape = Shape((8192,) * 2, queries=2048, page=page)
            yield Point(f"2 of 8192, page {page}", lambda s=shape: prefill(s))

    def of_speculation() -> Iterator[Point]:
        for queries in (4, 8):
            for count, length in ((1, 4096), (8, 8192), (64, 4096)):
                goal = 1.05 if count == 1 else 0.98
                shape = Shape((length,) * count, queries=queries)
                yield Point(
                    f"{queries} queries, {count} of {length}", lambda s=shape, g=goal: beside_fa3(s, g)
                )

    def of_head_dims() -> Iterator[Point]:
        for dim, heads, heads_kv in ((64, 64, 8), (256, 16, 8)):
            for count, length in ((1, 4096), (64, 4096)):
                shape = Shape((length,) * count, heads, heads_kv, dim)
                yield Point(f"head_dim {dim}, {count} of {length}", lambda s=shape: beside_fa3(s, 1.1))

    def of_masks() -> Iterator[Point]:
        for name in MASKS:
            yield Point(f"{name}, 8 of 32768", lambda n=name: masked(n))

    def of_host() -> Iterator[Point]:
        yield Point("a call on the host", on_host)

    def of_e4m3() -> Iterator[Point]:
        for count, length in (
            (1, 1024),
            (1, 4096),
            (1, 32768),
            (8, 1024),
            (8, 8192),
            (64, 4096),
            (256, 1024),
        ):
            shape = Shape((length,) * count, cache=torch.float8_e4m3fn)
            yield Point(f"e4m3, {count} of {length}", lambda s=shape: beside_fa3(s, 1.25))

    parts = {
        "plain": of_plain,
        "pages": of_pages,
        "prefill": of_prefill,
        "speculation": of_speculation,
        "head_dims": of_head_dims,
        "masks": of_masks,
        "e4m3": of_e4m3,
        "host": of_host,
    }
    return measure_parts(command_line(__doc__, parts).parse_args(), "decode.json", parts, {})


if __name__ == "__main__":
    sys.exit(main())
