"""Caches to append to, as hypothesis draws them, and what they hold then: row by row, in Python."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from hypothesis import example
from hypothesis import strategies as st
from torch import Tensor

E4M3 = torch.float8_e4m3fn
NEW_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CACHE_DTYPES = (*NEW_DTYPES, E4M3)
LARGEST = 2**31 - 1
PLACES = ("apart", "k and v", "layers", "columns")
"""How caches lie: each on its own, K and V page by page, or as one of three layers page by page, or side by side."""


@dataclass(frozen=True)
class AppendCase:
    """What a call passes.

    Attributes:
        lengths: new rows of each sequence; dense sequences have all as many as the first.
        is_ragged: whether they follow one another, two rows of nobody ahead, and three behind.
        page: rows of a page; None for a cache without a table.
        room: pages of each sequence.
        lies: whether some of the numbers are wrong.
        has_index: whether sequences say which row they have, leftpad whether keys at the beginning do not count.
        rotation: columns that are rotated, by angles of that type, and whether these are neighbours; None for none.
        scales: of e4m3 the shape of scales, "number" or None.
    """

    lengths: tuple[int, ...] = (2, 2, 2)
    is_ragged: bool = False
    heads: tuple[int, int] = (4, 2)
    columns: tuple[int, int] = (16, 24)
    page: int | None = 4
    room: int = 3
    layout: str = "nhd"
    places: str = "apart"
    new: torch.dtype = torch.bfloat16
    cache: torch.dtype = torch.bfloat16
    rotation: tuple[int, torch.dtype, bool] | None = (16, torch.float32, True)
    q_advances: bool = True
    has_q: bool = True
    lies: bool = False
    has_index: bool = False
    has_leftpad: bool = False
    scales: str | None = None
    seed: int = 0
    passed: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """All arguments of a call. What caches hold before is any bits, NaN among them."""
        draw = torch.Generator().manual_seed(self.seed)
        made: dict[str, Any] = {}
        for name, heads, columns in (
            ("k_new", self.heads[1], self.columns[0]),
            ("v_new", self.heads[1], self.columns[1]),
            ("q", self.heads[0], self.columns[0]),
        ):
            shape = (*self._row_shape, heads, columns + 8)  # rows of something wider
            made[name] = (torch.randn(shape, generator=draw) * 3).to(self.new)[..., :columns]
        pages = self.batch * self.room * 2 + 1 if self.page is not None else self.batch + 2 * self.has_index
        page = self.page if self.page is not None else 4 * self.room
        made["k_cache"], made["v_cache"] = self._caches(pages, page, draw)
        used = torch.randint(0, page * self.room if self.page else page, (self.batch,), generator=draw)
        made["seqused_k"] = self._lied(used, draw)
        if self.page is not None:
            rows = self.batch + 2 * self.has_index
            table = torch.randperm(max(pages, rows * self.room), generator=draw)[: rows * self.room]
            table = self._lied(table.view(rows, self.room), draw)
            made["block_table"] = table.T.contiguous().T if self.seed % 2 else table
        if self.is_ragged:
            starts = torch.tensor([2, *self.lengths]).cumsum(0)
            made["cu_seqlens_q"] = self._lied(starts, draw)
        if self.has_index:
            order = torch.randperm(self.batch + 2, generator=draw)[: self.batch]
            made["cache_batch_idx"] = self._lied(order, draw)
        if self.has_leftpad:
            made["leftpad_k"] = self._lied(torch.randint(0, 3, (self.batch,), generator=draw), draw)
        if self.rotation is not None:
            columns, dtype, made["rotary_interleaved"] = self.rotation
            angles = torch.rand(7 if self.lies else 40, columns // 2, generator=draw) * 2 * math.pi
            made["rotary"] = (angles.cos().to(dtype), angles.sin().to(dtype))
            made["q_advances"] = self.q_advances
        if self.rotation is None or not self.has_q:
            del made["q"]
        if self.scales is not None and self.cache == E4M3:
            shape = {
                "number": (),
                "all": (1,),
                "heads": (self.heads[1],),
                "both": (self.batch, self.heads[1]),
            }
            for name in ("k_scale", "v_scale"):
                scale = torch.rand(shape[self.scales], generator=draw) + 0.01
                made[name] = scale.item() if self.scales == "number" else scale
        return {**made, "layout": self.layout, **self.passed}

    @property
    def _row_shape(self) -> tuple[int, ...]:
        if self.is_ragged:
            return (2 + sum(self.lengths) + 3,)
        return (self.batch, self.lengths[0] if self.lengths else 2)

    def _lied(self, x: Tensor, draw: torch.Generator) -> Tensor:
        """The numbers as i32, some of them wrong if some shall be."""
        wrong = torch.tensor([-1, -LARGEST - 1, LARGEST, LARGEST - 1, 10**6])
        lies = wrong[torch.randint(0, len(wrong), x.shape, generator=draw)]
        return x.where(torch.rand(x.shape, generator=draw) > 0.3 * self.lies, lies).int()

    def _caches(self, pages: int, page: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Views of one tensor of random bits, or of one each."""
        size, (of_k, of_v) = self.cache.itemsize, self.columns
        rows = (page, self.heads[1]) if self.layout == "nhd" else (self.heads[1], page)

        def bits(*shape: int) -> Tensor:
            drawn = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), generator=draw, dtype=torch.uint8)
            return drawn.view(self.cache)

        widest = max(of_k, of_v)
        if self.places == "apart":
            return bits(pages, *rows, of_k), bits(pages, *rows, of_v)
        if self.places == "columns":
            both = bits(pages, *rows, of_k + of_v)
            return both[..., :of_k], both[..., of_k:]
        whole = bits(pages, *((2,) if self.places == "k and v" else (3, 2)), *rows, widest)
        mine = whole if self.places == "k and v" else whole[:, 1]
        return mine[:, 0, ..., :of_k], mine[:, 1, ..., :of_v]


_HALVES, _E4M3 = (16, torch.bfloat16, False), {"new": torch.float16, "cache": E4M3}
CASES = (
    AppendCase((5,) * 30, lies=True, rotation=_HALVES, has_leftpad=True),
    AppendCase((5, 0, 2, 5, 1) * 20, is_ragged=True, lies=True, has_index=True, rotation=_HALVES, page=3),
    AppendCase((5,) * 30, page=None, lies=True, has_index=True, rotation=_HALVES, q_advances=False),
    AppendCase((2,) * 4, scales="both", rotation=(16, torch.float32, True), columns=(64, 32), **_E4M3),
    AppendCase(
        (1, 3), is_ragged=True, scales="heads", rotation=(16, torch.float32, True), layout="hnd", **_E4M3
    ),
    AppendCase((300, 1), is_ragged=True, room=100, rotation=_HALVES),
)
"""Those that a small run may not draw: many numbers that lie, scales of heads, more rows than positions."""


def with_cases(test: Any) -> Any:
    """Have a test of drawn cases run these as well."""
    for case in CASES:
        test = example(case)(test)
    return test


Formats = tuple[torch.dtype, torch.dtype, tuple[torch.dtype, bool] | None]
"""Of new rows, of the cache, and of angles, with whether neighbours turn together; None where nothing does."""
ALL_FORMATS: tuple[Formats, ...] = tuple(
    (new, cache, turns)
    for new in NEW_DTYPES
    for cache in CACHE_DTYPES
    for turns in (None, *((dtype, pairs) for dtype in (new, torch.float32) for pairs in (True, False)))
)


@st.composite
def append_cases(draw: st.DrawFn, formats: tuple[Formats, ...] = ALL_FORMATS) -> AppendCase:
    """Any case; of dense sequences all have as many new rows."""
    is_ragged, batch = draw(st.booleans()), draw(st.integers(0, 4))
    length = st.sampled_from((0, 1, 2, 5))
    lengths = tuple(draw(length) for _ in range(batch)) if is_ragged else (draw(length),) * batch
    new, cache, turns = draw(st.sampled_from(formats))
    of_k, of_v = (
        draw(st.sampled_from((8, 16, 24, 64) if turns is None or x == "v" else (16, 24, 64))) for x in "kv"
    )
    return AppendCase(
        lengths,
        is_ragged,
        heads=draw(st.sampled_from(((1, 1), (4, 2), (3, 1)))),
        columns=(of_k, of_v),
        page=draw(st.sampled_from((None, 1, 3, 8))),
        room=draw(st.integers(1, 4)),
        layout=draw(st.sampled_from(("nhd", "hnd"))),
        places=draw(st.sampled_from(PLACES)),
        new=new,
        cache=cache,
        rotation=None if turns is None else (draw(st.sampled_from((16, of_k // 16 * 16))), *turns),
        q_advances=draw(st.booleans()),
        has_q=draw(st.booleans()),
        lies=draw(st.booleans()),
        has_index=draw(st.booleans()),
        has_leftpad=draw(st.booleans()),
        scales=draw(st.sampled_from((None, "number", "all", "heads", "both"))),
        seed=draw(st.integers(0, 1000)),
    )


@dataclass(frozen=True)
class Expected:
    """What a call does.

    Attributes:
        rows: what stands at (cache, page, slot) then: rows of heads, f32, before they are rounded; where several are
            written to one place there is None.
        q: rotated, f32, by row of all; 0 of rows of nobody.
    """

    rows: dict[tuple[str, int, int], Tensor | None]
    q: dict[int, Tensor]


def expected_of(case: AppendCase) -> Expected:
    """Go through sequences and their rows, one by one."""
    given = case.tensors
    rows: dict[tuple[str, int, int], Tensor | None] = {}
    k, v, q = (
        None if x is None else x.reshape(-1, *x.shape[-2:]) for x in map(given.get, ("k_new", "v_new", "q"))
    )
    tokens, heads_first = len(k), case.layout == "hnd"
    pages, page = (given["k_cache"].transpose(1, 2) if heads_first else given["k_cache"]).shape[:2]
    table = given.get("block_table")
    starts = given.get("cu_seqlens_q")
    has_rows = {}
    for b in range(case.batch):
        if starts is None:
            begin, end = b * given["k_new"].shape[1], (b + 1) * given["k_new"].shape[1]
        else:
            begin, end = (min(max(0, int(x)), tokens) for x in starts[b : b + 2])
        has_rows |= {token: (b, token - begin) for token in range(begin, end)}  # the last one that has it
    turned = {}
    for token, (b, i) in has_rows.items():
        used = int(given["seqused_k"][b])
        first = used - (int(given["leftpad_k"][b]) if "leftpad_k" in given else 0)
        k_row = turn(k[token].float(), given, first + i)
        if q is not None:
            turned[token] = turn(q[token].float(), given, first + i if given["q_advances"] else first)
        row, place = int(given["cache_batch_idx"][b]) if "cache_batch_idx" in given else b, used + i
        rows_of_pages = [[number] for number in range(pages)] if table is None else table.tolist()
        found = rows_of_pages[row] if 0 <= row < len(rows_of_pages) else []
        if used < 0 or not place < len(found) * page or not 0 <= found[place // page] < pages:
            continue
        for name, x in (("k", k_row), ("v", v[token].float())):
            by = given.get(f"{name}_scale", 1.0)
            if isinstance(by, Tensor):
                by = by.expand(case.batch, case.heads[1])[b].unsqueeze(-1)
            at = (f"{name}_cache", found[place // page], place % page)
            rows[at] = None if at in rows else x / by
    return Expected(rows, turned)


def turn(x: Tensor, given: dict[str, Any], position: int) -> Tensor:
    """Rows of heads with pairs of columns as complex numbers, times those of angles, in f64."""
    if "rotary" not in given:
        return x
    cos, sin = (table[min(max(0, position), len(table) - 1)].double() for table in given["rotary"])
    half = len(cos)
    pairs = x[:, : 2 * half].double()
    a, b = (
        (pairs[:, ::2], pairs[:, 1::2]) if given["rotary_interleaved"] else (pairs[:, :half], pairs[:, half:])
    )
    made = torch.complex(a, b) * torch.complex(cos, sin)
    both = (made.real, made.imag)
    turned = torch.stack(both, -1).flatten(-2) if given["rotary_interleaved"] else torch.cat(both, -1)
    return torch.cat((turned.float(), x[:, 2 * half :]), -1)


@dataclass(frozen=True)
class Before:
    """What caches hold before a call, and all memory that they are views of."""

    caches: dict[str, Tensor]
    memory: dict[str, Tensor]

    @classmethod
    def of(cls, case: AppendCase) -> "Before":
        caches = {name: case.tensors[name] for name in ("k_cache", "v_cache")}
        return cls(
            {name: x.clone() for name, x in caches.items()},
            {name: memory_of(x).clone() for name, x in caches.items()},
        )


def assert_appended(case: AppendCase, before: Before, q: Tensor | None) -> None:
    """Caches hold what they shall, every other byte is as it was, and q is rotated."""
    expected, given = expected_of(case), case.tensors
    for name, was in before.caches.items():
        now = given[name]
        is_same = rows_first(now, case.layout) == rows_first(was, case.layout)
        for (_, page, slot), row in ((at, row) for at, row in expected.rows.items() if at[0] == name):
            is_same[page, slot] = True
            if row is not None:
                assert_rounded(now[page, :, slot] if case.layout == "hnd" else now[page, slot], row)
        assert is_same.all(), name
    for name, memory in before.memory.items():  # of one that caches share, both their views count
        for view in (given[each].view(torch.uint8) for each in before.caches):
            if view.untyped_storage().data_ptr() == given[name].untyped_storage().data_ptr():
                memory.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(view)
        assert torch.equal(memory_of(given[name]), memory)
    assert (q is None) == ("q" not in given)
    if q is not None:
        assert q.shape == given["q"].shape and q.dtype == case.new and q.is_contiguous()
        nothing = torch.zeros(q.shape[-2:])
        for token, row in enumerate(q.reshape(-1, *q.shape[-2:])):
            assert_rounded(row, expected.q.get(token, nothing))


def rows_first(cache: Tensor, layout: str) -> Tensor:
    """A view as (pages, page, heads, columns), of bytes."""
    return (cache.transpose(1, 2) if layout == "hnd" else cache).view(torch.uint8)


def assert_rounded(found: Tensor, exact: Tensor) -> None:
    """Numbers are the nearest of their format, or next to it where f32 has rounded on the way; e4m3 ends at 448."""
    if found.dtype == E4M3:
        # Half a step of a significand of four bits, or of the smallest numbers, 2^-9.
        torch.testing.assert_close(
            found.float(), exact.clamp(-448, 448), rtol=2**-4 + 1e-5, atol=2**-10 + 1e-5
        )
    else:
        eps = torch.finfo(found.dtype).eps
        torch.testing.assert_close(found.float(), exact, rtol=eps / 2 + 1e-6, atol=2e-6)


def memory_of(x: Tensor) -> Tensor:
    """All bytes of the memory that a tensor is a view of."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())
