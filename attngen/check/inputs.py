"""Inputs for checks, fuzzing and benchmarks, and the poison and canaries that show what a kernel touches.

Values depend on the shape, dtype, kind and seed alone: they are drawn on the CPU and then moved, so that
every device and every memory layout holds the same numbers (`expanded` repeats some of them). A memory
layout is an honest view: what lies around the tensor in the same storage is NaN. Nothing here knows a
kernel.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from attngen.check.cuts import Cut
from attngen.check.paging import in_pages
from attngen.memory import check_room
from attngen.torch_state import torch_defaults

MemoryLayout = Literal["contiguous", "strided", "packed_qkv", "expanded", "offset", "bhsd"]
MEMORY_LAYOUTS: tuple[MemoryLayout, ...] = get_args(MemoryLayout)
"""How the storage of q, k and v is arranged; their shape is (batch, seqlen, heads, head_dim) in each.

- contiguous
- strided: gaps after every row, head and batch; odd strides on dimensions of size 1
- packed_qkv: slices of one tensor whose rows hold q, k and v side by side; of (q) and (k, v) where
  seqlen_q is not seqlen_k
- expanded: k repeats over the batch and v over the heads, by strides of 0
- offset: storage offsets of 16, 48 and 80 bytes, never a multiple of 32
- bhsd: `q.transpose(1, 2)` is contiguous
"""

Kind = Literal["randn", "integers", "outliers", "spans"]
KINDS: tuple[Kind, ...] = ("randn", "integers", "outliers")
"""What is drawn, of numbers of any format.

- randn: N(0, 1)
- integers: the exact tier; with `softmax_scale=EXACT_SCALE` every sum is exact, see `EXACT_SCALE`
- outliers: N(0, 1) + N(0, 100) * Bernoulli(0.001), the second argument being the variance
"""

KINDS_WITH_SCALES: tuple[Kind, ...] = get_args(Kind)
"""Distributions of what is quantised, from bf16: those above, and

- spans: N(0, 1) times 2^-20 to 2^20, a power for each `SPAN` rows of a head and here and there for a row; blocks of
  zeros, and single numbers 64 times as large. Q is 2^20 times smaller, so that products are those of N(0, 1) at most
"""
SPAN = 64
"""Rows of Q, K or V that share a power of two in `spans`."""

EXACT_SCALE = math.log(2.0)
"""The softmax_scale that makes attention on `integers` exact.

q holds -1, 0, 1, a row of k has at most two entries that are not 0 and are -1 or 1, v holds -3 to 3. A score
is then an integer of at most 2 in absolute value, every weight 2^(score - maximum) a power of two from 1/16
to 1 in any order of blocks, and every sum over up to 2^18 keys a multiple of 1/16 below 2^20: 24 bits, exact
in f32. What is left is one division and one rounding to the output dtype, so that a wrong index is a wrong
number and not noise.
"""

ALIGNMENT_BYTES = 16
"""Rows start on this boundary in every layout, where head_dim allows it in the contiguous one."""

CPU_BYTES = (64, 16)
"""Memory that a call on the CPU and its reference take at least, for an element of Q and for one of K or V.

Measured as the peak of `attngen run` from 1 to 16,000 heads in all: 75 to 78, and 16.
"""
GPU_BYTES = (4, 4)
"""What drawing takes on the host: f32."""

POISON = (math.nan, math.inf, 6e4, -math.inf)
"""What rows that no kernel may use hold, in turn. 6e4, finite even in f16, also shows where a
maximum drops the NaN.
"""


@dataclass(frozen=True)
class Shape:
    """The run-time sizes of one attention problem.

    Attributes:
        queries: how they are cut, where sequences have lengths of their own; batch is then how many there are, and
            seqlen_q the `size` of the cut.
        keys: likewise.
    """

    batch: int
    heads: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    queries: Cut | None = None
    keys: Cut | None = None

    @property
    def cuts(self) -> dict[Literal["q", "k"], Cut]:
        """What is cut, by the letter that arguments end in."""
        found: dict[Literal["q", "k"], Cut | None] = {"q": self.queries, "k": self.keys}
        return {letter: cut for letter, cut in found.items() if cut is not None}

    @property
    def tokens(self) -> tuple[int, int]:
        """Rows of all sequences of queries and of keys, where these are ragged; else 0."""
        of_q, of_k = (cut.rows if cut and cut.kind == "ragged" else 0 for cut in (self.queries, self.keys))
        return of_q, of_k

    @property
    def page_sizes(self) -> dict[str, int]:
        """The sizes of a cache and of its table, where keys are paged."""
        return self.keys.page_sizes if self.keys and self.keys.kind == "paged" else {}

    @property
    def lengths(self) -> Iterator[tuple[int, int]]:
        """Queries and keys of each sequence."""
        queries = self.queries.lengths if self.queries else repeat(self.seqlen_q, self.batch)
        keys = self.keys.lengths if self.keys else repeat(self.seqlen_k, self.batch)
        return zip(queries, keys, strict=True)

    def stored(self, letter: Literal["q", "k"]) -> tuple[int, int]:
        """Batches, and rows of each, in which queries or keys lie; a batch of all tokens where they are ragged."""
        cut = self.cuts.get(letter)
        if cut is None:
            return self.batch, self.seqlen_q if letter == "q" else self.seqlen_k
        return (1 if cut.kind == "ragged" else self.batch), cut.rows

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key of one sequence, in one head of all sequences."""
        if not self.cuts:
            return self.batch * self.seqlen_q * self.seqlen_k
        return sum(queries * keys for queries, keys in self.lengths)

    def arguments(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """What a call passes by name to say how long its sequences are."""
        return {
            name: x for letter, cut in self.cuts.items() for name, x in cut.arguments(letter, device).items()
        }


@torch_defaults()
def random_like(x: Tensor, seed: int = 0) -> Tensor:
    """Draw N(0, 1) in the shape and dtype of a tensor, on its device: the gradient of an output, say."""
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return drawn.to(x.device, x.dtype)


@torch_defaults()
def random_inputs(
    shape: Shape,
    head_dim_qk: int,
    head_dim_v: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
    layout: MemoryLayout = "contiguous",
    kind: Kind = "randn",
    cache: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q, k and v, of a type; k and v of that of a cache, where there is one.

    Rows that no sequence counts hold `POISON`. Of queries, or keys, that are ragged the first two dimensions are one:
    (tokens, heads, head_dim); those of keys that are paged are pages and their rows.

    Returns:
        q: (batch, seqlen_q, heads, head_dim_qk), last dimension contiguous.
        k: (batch, seqlen_k, heads_kv, head_dim_qk), likewise.
        v: (batch, seqlen_k, heads_kv, head_dim_v), likewise.

    Raises:
        MemoryError: this machine can never hold what a call on them takes.
    """
    generator = torch.Generator().manual_seed(seed)
    heads, heads_kv = shape.heads, shape.heads_kv
    size_q = (*shape.stored("q"), heads, head_dim_qk)
    size_k = (*shape.stored("k"), heads_kv, head_dim_qk)
    size_v = (*size_k[:3], head_dim_v)
    of_q, of_kv = CPU_BYTES if torch.device(device).type == "cpu" else GPU_BYTES
    size = of_q * math.prod(size_q) + of_kv * (math.prod(size_k) + math.prod(size_v))
    check_room(size, f"a call of q {size_q}, k {size_k} and v {size_v}")
    batch_k = size_k[0]
    if layout == "expanded":
        size_k = (batch_k if shape.keys else min(1, batch_k), *size_k[1:])
        size_v = (*size_v[:2], min(1, heads_kv), head_dim_v)
    q, k, v = (
        _in_cache(_poisoned(_draw(size, kind, name, generator), cut), cut).to(number).to(device)
        for size, name, cut, number in (
            (size_q, "q", shape.queries, dtype),
            (size_k, "k", shape.keys, cache or dtype),
            (size_v, "v", shape.keys, cache or dtype),
        )
    )
    if layout == "expanded":
        k = k if shape.keys else k.expand(batch_k, -1, -1, -1)
        v = v.expand(-1, -1, heads_kv, -1)
    else:
        q, k, v = arrange(q, k, v, layout)
    return _without_batch(q, shape.queries), _without_batch(k, shape.keys), _without_batch(v, shape.keys)


@torch_defaults()
def poison_unused(x: Tensor, cut: Cut | None) -> Tensor:
    """A copy of rows of heads as `random_inputs` has them that holds `POISON` in the rows that no sequence counts."""
    if cut is None:
        return x
    return _without_batch(_poisoned((x[None] if cut.kind == "ragged" else x).clone(), cut), cut)


def _poisoned(x: Tensor, cut: Cut | None) -> Tensor:
    """Rows of heads in batches, `POISON` in those that no sequence counts."""
    if cut is not None:
        rows = cut.unused_rows.to(x.device)
        values = torch.tensor(POISON, dtype=x.dtype, device=x.device)
        x[rows] = values[torch.arange(int(rows.sum()), device=x.device) % len(POISON)][:, None, None]
    return x


def _in_cache(x: Tensor, cut: Cut | None) -> Tensor:
    """Rows of heads in batches; where they are paged, as a cache of pages."""
    if cut is None or cut.kind != "paged":
        return x
    return in_pages(x, cut, torch.tensor(POISON, dtype=x.dtype, device=x.device))


def _without_batch(x: Tensor, cut: Cut | None) -> Tensor:
    """Rows of heads as a call takes them: of ragged sequences one after another."""
    return x[0] if cut is not None and cut.kind == "ragged" else x


@torch_defaults()
def arrange(q: Tensor, k: Tensor, v: Tensor, layout: MemoryLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Lay values out in another way: (batch, seqlen, heads, head_dim) each, contiguous as given.

    Nothing is repeated, so that `expanded` is `contiguous` here.
    """
    if layout == "strided":
        return _with_gaps(q), _with_gaps(k), _with_gaps(v)
    if layout == "packed_qkv":
        if q.shape[:2] == k.shape[:2] and q.dtype == k.dtype:
            q, k, v = _packed(q, k, v)
        else:
            k, v = _packed(k, v)
        return q, k, v
    if layout == "offset":
        return _with_offset(q, 1), _with_offset(k, 3), _with_offset(v, 5)
    if layout == "bhsd":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    return q, k, v


@torch_defaults()
def poison(
    q: Tensor, k: Tensor, v: Tensor, *, rows: int = 256, values: tuple[float, ...] = POISON
) -> tuple[Tensor, Tensor, Tensor]:
    """Copy (batch, seqlen, heads, head_dim) inputs into the middle of larger buffers that must not be used.

    Before the first and past the last row of every batch lie `rows` rows that hold `values` in turn, row by
    row; the rest of each buffer, past the last head and the last column, is NaN. A kernel may load what lies
    there, since the storage is valid, but no output may depend on it. 256 rows are the longest tile.

    Returns:
        q, k and v as views, equal to what was given.
    """

    def surround(x: Tensor) -> Tensor:
        batch, seqlen, heads, head_dim = x.shape
        pad = _aligned(head_dim, x) + _unit(x)
        buffer = x.new_full((batch, rows + seqlen + rows, heads + 1, pad), math.nan)
        for i, value in enumerate(values):
            buffer[:, i : rows : len(values), :heads] = value
            buffer[:, rows + seqlen + i :: len(values), :heads] = value
        view = buffer[:, rows : rows + seqlen, :heads, :head_dim]
        return view.copy_(x)

    return surround(q), surround(k), surround(v)


class Canary:
    """An output tensor inside a buffer whose every other word must stay as it was.

    The buffer is filled with one bit pattern, a NaN no arithmetic makes, in f16, bf16 and f32 alike. Before,
    past and between the rows of `out` it must survive, and inside `out` it shows what was never written.
    """

    GUARD_ROWS = 256
    _WORDS = {2: (torch.int16, 0x7FA5), 4: (torch.int32, 0x7FA5A5A5)}

    @torch_defaults()
    def __init__(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        """Make the buffer; `out` is (batch, seqlen_q, heads, head_dim_v) on aligned rows with gaps."""
        batch, seqlen, heads, head_dim = shape
        word, self._pattern = self._WORDS[dtype.itemsize]
        unit = ALIGNMENT_BYTES // dtype.itemsize
        pad = -(-head_dim // unit) * unit + unit
        rows = self.GUARD_ROWS + seqlen + self.GUARD_ROWS
        self._words = torch.full((batch, rows, heads + 1, pad), self._pattern, dtype=word, device=device)
        self._inside = torch.zeros_like(self._words, dtype=torch.bool)
        self._here = (
            slice(None),
            slice(self.GUARD_ROWS, self.GUARD_ROWS + seqlen),
            slice(heads),
            slice(head_dim),
        )
        self._inside[self._here] = True
        self.out = self._words.view(dtype)[self._here]

    @torch_defaults()
    def damaged(self) -> tuple[int, ...] | None:
        """The first place around `out` that was overwritten, in the coordinates of `out`; None where intact.

        A row or a column outside the range of `out`, negative rows included, says on which side the write
        fell.
        """
        changed = ((self._words != self._pattern) & ~self._inside).nonzero()
        if not changed.numel():
            return None
        batch, row, head, column = changed[0].tolist()
        return batch, row - self.GUARD_ROWS, head, column

    @torch_defaults()
    def unwritten(self) -> int:
        """How many elements of `out` still hold the canary."""
        return int((self._words[self._here] == self._pattern).sum())


def _draw(size: tuple[int, ...], kind: Kind, name: str, generator: torch.Generator) -> Tensor:
    """One tensor in f32, on the CPU."""
    if kind == "randn":
        return torch.randn(size, generator=generator, dtype=torch.float32)
    if kind == "outliers":
        common, large = (torch.randn(size, generator=generator, dtype=torch.float32) for _ in range(2))
        return common + 10.0 * large * (torch.rand(size, generator=generator, dtype=torch.float32) < 0.001)
    if kind == "spans":
        return _spans(size, name, generator)
    if name == "q":
        return torch.randint(-1, 2, size, generator=generator).float()
    if name == "v":
        return torch.randint(-3, 4, size, generator=generator).float()
    keys = torch.zeros(size, dtype=torch.float32)
    for _ in range(2):  # two places of a row, perhaps the same one
        place = torch.randint(0, size[-1], (*size[:-1], 1), generator=generator)
        sign = 2.0 * torch.randint(0, 2, place.shape, generator=generator).float() - 1.0
        keys.scatter_(-1, place, sign)
    return keys


def _spans(size: tuple[int, ...], name: str, generator: torch.Generator) -> Tensor:
    """N(0, 1) times powers of two that differ from block to block."""
    batch, seqlen, heads, _ = size
    blocks = torch.randint(-20, 21, (batch, -(-seqlen // SPAN), heads, 1), generator=generator)
    zeros = torch.rand(blocks.shape, generator=generator, dtype=torch.float32) < 0.125
    exponents, is_zero = (x.repeat_interleave(SPAN, 1)[:, :seqlen] for x in (blocks, zeros))
    rows = torch.randint(-20, 21, exponents.shape, generator=generator)
    exponents = torch.where(
        torch.rand(rows.shape, generator=generator, dtype=torch.float32) < 0.01, rows, exponents
    )
    exponents = exponents - (40 if name == "q" else 0)
    x = torch.randn(size, generator=generator, dtype=torch.float32) * torch.exp2(exponents.float())
    x = torch.where(torch.rand(size, generator=generator, dtype=torch.float32) < 0.002, 64.0 * x, x)
    return x.masked_fill_(is_zero, 0.0)


def _unit(x: Tensor) -> int:
    """Elements in one aligned unit of storage."""
    return ALIGNMENT_BYTES // x.element_size()


def _aligned(elements: int, x: Tensor) -> int:
    return -(-elements // _unit(x)) * _unit(x)


def _with_gaps(x: Tensor) -> Tensor:
    batch, seqlen, heads, head_dim = x.shape
    pad = _aligned(head_dim, x) + _unit(x)
    buffer = x.new_full((batch, seqlen + 1, heads + 2, pad), math.nan)
    view = buffer[:, :seqlen, :heads, :head_dim]
    view.copy_(x)
    # The stride of a dimension of size 1 says nothing; 3 is no multiple of any alignment and must do no harm.
    strides = [
        3 if size == 1 else stride for size, stride in zip(x.shape[:3], view.stride()[:3], strict=True)
    ]
    return view.as_strided(x.shape, (*strides, 1))


def _packed(*parts: Tensor) -> tuple[Tensor, ...]:
    """Views of one tensor, (batch, seqlen, sum of heads * head_dim), each part starting on the alignment."""
    widths = [_aligned(x.shape[2] * x.shape[3], x) for x in parts]
    starts = [sum(widths[:i]) for i in range(len(parts))]
    packed = parts[0].new_full((*parts[0].shape[:2], sum(widths)), math.nan)
    views = []
    for x, start in zip(parts, starts, strict=True):
        width = x.shape[2] * x.shape[3]
        view = packed[..., start : start + width].view(x.shape)
        views.append(view.copy_(x))
    return tuple(views)


def _with_offset(x: Tensor, units: int) -> Tensor:
    storage = x.new_full((x.numel() + 2 * units * _unit(x),), math.nan)
    start = units * _unit(x)
    return storage[start : start + x.numel()].view(x.shape).copy_(x)
