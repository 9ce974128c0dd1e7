"""What `ListTiles` means: the tiles of sequences that have lengths of their own, in the order in which they start."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Self

import torch

from attngen.plan import (
    KEYS,
    LENGTHS,
    LETTERS,
    MOST_BLOCKS,
    WIDTHS_OF_ONE_WAVE,
    Axis,
    KernelPlan,
    ListTiles,
    Split,
    bucket,
    evaluate_formula,
)
from attngen.simulate.visits import Member, Sizes, block_bounds, ceil_div, declared_values, heads_in_rows

Values = Mapping[str, torch.Tensor]


class Span(NamedTuple):
    """Rows of a sequence, and where they begin among the rows of a tensor."""

    start: int
    length: int

    @property
    def end(self) -> int:
        """Where the next row would stand."""
        return self.start + self.length


class Piece(NamedTuple):
    """Rows of one sequence, or rows that no sequence uses, behind or before one."""

    sequence: int
    span: Span
    is_used: bool


NOTHING = Span(0, 0)


def list_tiles(sheet: ListTiles, values: Values, sizes: Sizes) -> dict[str, torch.Tensor]:
    """The list of a kernel's tiles: how many there are, then an entry each."""
    plan = sheet.plan
    rows = evaluate_formula(sheet.shape[0], sizes.values)
    found = torch.zeros((rows, sheet.entry_words), dtype=torch.int32)
    # Sequences that overlap may have more tiles than there is room for.
    entries = sorted(_entries(plan, values, sizes), key=lambda each: -bucket(each[0]))[: rows - 1]
    found[0, 0] = len(entries)
    for row, (_, *fields) in enumerate(entries, 1):
        found[row, : len(fields)] = torch.tensor(fields, dtype=torch.int32)
    return {plan.tile_list: found}


def call_sizes(
    plan: KernelPlan,
    seqlen_q: int,
    seqlen_k: int,
    batch: int,
    heads: int,
    heads_kv: int | None,
    declared: Mapping[str, Any] | None,
    tokens: tuple[int, int] = (0, 0),
) -> Sizes:
    """The sizes of a call of which a kernel is run without values, with the list of its tiles where it has one.

    Args:
        plan: of the kernel.
        seqlen_q: of the call; of ragged queries a bound.
        seqlen_k: see seqlen_q.
        batch: see seqlen_q.
        heads: see seqlen_q.
        heads_kv: as many as heads where None.
        declared: what the call passes by name: lengths, which must be there, and what the spec declares, as far as
            it is known.
        tokens: of all sequences of queries and of keys, of ragged ones.
    """
    passed, heads_kv = declared or {}, heads if heads_kv is None else heads_kv
    tokens_q, tokens_k = tokens
    sizes = Sizes(batch, seqlen_q, seqlen_k, heads, heads_kv, tokens_q=tokens_q, tokens_k=tokens_k)
    sizes = replace(sizes, declared=declared_values(plan, sizes, passed))
    if not plan.scheduler.is_listed:
        return sizes
    return sizes.with_tensors(list_tiles(ListTiles(plan), passed, sizes))


def _entries(plan: KernelPlan, values: Values, sizes: Sizes) -> Iterator[tuple[int, ...]]:
    """How many blocks tiles of its sequence visit at most, and the fields of the entry of each tile; in the order of
    sequences, and of their blocks, the last first where that sees the most.
    """
    own = plan.scheduler.axis
    axis: Axis = own.axis if own else "queries"
    other: Axis = "queries" if axis == "keys" else "keys"
    seen = spans(plan, values, sizes, other)
    parts = _Parts.of(plan, sizes, spans(plan, values, sizes, "queries"), seen) if plan.split else None
    for piece in pieces(plan, values, sizes, axis):
        if piece.span.length <= 0:  # of sequences that overlap what lies between them is less than nothing
            continue
        beside = seen[piece.sequence] if piece.is_used else NOTHING
        queries, keys = (piece.span, beside) if axis == "queries" else (beside, piece.span)
        places = (queries.start, queries.length, keys.start, keys.length)
        rows = queries.length * heads_in_rows(plan, sizes)
        of_queries, of_keys = ceil_div(rows, plan.block_m), ceil_div(keys.length, plan.block_n)
        if own is None:
            yield (min(of_queries * of_keys, MOST_BLOCKS), piece.sequence, 0, *places)
            continue
        count, visited = (of_keys, of_queries) if own is KEYS else (of_queries, of_keys)
        is_reversed = piece.is_used and plan.scheduler.starts_last
        for block in reversed(range(count)) if is_reversed else range(count):
            if parts is None:
                yield (visited, piece.sequence, block, *places)
                continue
            for part in parts.of_sequence(piece.sequence) if piece.is_used else (WHOLE,):
                yield (visited, piece.sequence, block, *places, *part)


class Part(NamedTuple):
    """Blocks of keys n_begin .. n_end - 1, the part-th of so many parts of a tile's."""

    n_begin: int
    n_end: int
    part: int
    parts: int


WHOLE = Part(0, 0, 0, 1)
"""All blocks that a tile of rows sees that nobody uses."""


class _Parts:
    """How the keys of each sequence are cut."""

    def __init__(self, visited: list[range], width: int, is_fixed: bool) -> None:
        self._visited, self._width, self._is_fixed = visited, width, is_fixed

    @classmethod
    def of(cls, plan: KernelPlan, sizes: Sizes, queries: list[Span], keys: list[Span]) -> Self:
        """Those of a call: a part has as many blocks as the split says, or as fill the GPU."""
        assert plan.split is not None
        group = heads_in_rows(plan, sizes)
        tiles = [ceil_div(of.length * group, plan.block_m) for of in queries]
        visited = [
            _visited(plan, sizes, Member(b, 0, 0, q.length, k.length, q.start, k.start), count)
            for b, (q, k, count) in enumerate(zip(queries, keys, tiles, strict=True))
        ]
        if plan.split.keys is not None:
            return cls(visited, plan.split.keys // plan.block_n, is_fixed=True)
        of_sequences = [(count, len(blocks)) for count, blocks in zip(tiles, visited, strict=True)]
        return cls(visited, _width(plan, plan.split, sizes, of_sequences), is_fixed=False)

    def of_sequence(self, sequence: int) -> Iterator[Part]:
        """The parts of a tile of a sequence."""
        visited, width = self._visited[sequence], self._width
        begin = visited.start // width * width if self._is_fixed else visited.start
        count = ceil_div(visited.stop - begin, width) if visited else 1
        if visited and not self._is_fixed:
            width = ceil_div(len(visited), count)
            count = ceil_div(len(visited), width)
        for part in range(count):
            yield Part(begin + part * width, begin + (part + 1) * width, part, count)


def _width(plan: KernelPlan, split: Split, sizes: Sizes, of_sequences: list[tuple[int, int]]) -> int:
    """Blocks of keys of a part, by the tiles of each sequence and the blocks that these visit; as `Split` says."""
    heads, resident = sizes.values[plan.listed_heads], sizes.num_sms * plan.blocks_per_sm
    work = heads * sum(tiles * blocks for tiles, blocks in of_sequences)
    least, narrowest = ceil_div(split.least, plan.block_n), ceil_div(work, resident)
    one_wave = [narrowest + i * max(1, narrowest // 32) for i in range(WIDTHS_OF_ONE_WAVE)]
    more = [ceil_div(work, resident * waves) for waves in range(2, split.waves + 1)]

    rows = evaluate_formula(plan.part_rows, sizes.values)
    most = max((blocks for tiles, blocks in of_sequences if tiles), default=0)

    def guess(width: int) -> int:
        parts = heads * sum(tiles * max(1, ceil_div(blocks, width)) for tiles, blocks in of_sequences)
        merges = ceil_div(most, width) * (rows // split.merged) if split.merged else 0
        if parts <= resident:
            return 2 * (width * plan.block_n + split.start + merges)
        shared_out = work * plan.block_n + parts * split.start
        return 2 * (ceil_div(shared_out, resident) + merges) + width * plan.block_n

    return min((max(least, min(width, MOST_BLOCKS)) for width in (*one_wave, *more)), key=guess)


def _visited(plan: KernelPlan, sizes: Sizes, member: Member, tiles: int) -> range:
    """The blocks of keys that are cut: those that the one tile of a sequence visits, where it is known; else all."""
    if tiles == 1 and ListTiles(plan).knows_visits:
        (seen,) = block_bounds(plan, sizes, [0], member)
        return range(seen.n_min, max(seen.n_min, seen.n_max))
    return range(ceil_div(member.seqlen_k, plan.block_n)) if tiles else range(0)


def spans(plan: KernelPlan, values: Values, sizes: Sizes, axis: Axis) -> list[Span]:
    """The rows of each sequence, kept within the tensors whatever the numbers are."""
    letter, kind = LETTERS[axis], plan.lengths.of(axis)
    rows = int(sizes.values[f"tokens_{letter}" if kind == "ragged" else LENGTHS[axis]])
    starts, stops = [0] * sizes.batch, [rows] * sizes.batch
    if kind == "ragged":
        *starts, _ = cumulative = values[f"cu_seqlens_{letter}"].tolist()
        stops = cumulative[1:]
    used = _numbers(values, f"seqused_{letter}", sizes.batch, rows)
    skipped = _numbers(values, f"leftpad_{letter}", sizes.batch, 0)
    found = []
    for start, stop, length, skip in zip(starts, stops, used, skipped, strict=True):
        first = min(max(start, 0), rows)
        room = min(max(stop, first), rows) - first
        length, skip = min(max(length, 0), room), min(max(skip, 0), room)
        found.append(Span(first + skip, max(0, length - skip)))
    return found


def pieces(plan: KernelPlan, values: Values, sizes: Sizes, axis: Axis) -> Iterator[Piece]:
    """The rows of a tensor: those of each sequence, and those before, between and behind them that nobody uses."""
    is_ragged = plan.lengths.is_by_token(axis)
    rows = int(sizes.values[f"tokens_{LETTERS[axis]}" if is_ragged else LENGTHS[axis]])
    end = 0
    for sequence, span in enumerate(spans(plan, values, sizes, axis)):
        yield Piece(sequence, Span(end, span.start - end), is_used=False)
        yield Piece(sequence, span, is_used=True)
        end = span.end
        if not is_ragged:
            yield Piece(sequence, Span(end, rows - end), is_used=False)
            end = 0
    if is_ragged:
        yield Piece(max(0, sizes.batch - 1), Span(end, rows - end), is_used=False)


def _numbers(values: Values, name: str, count: int, default: int) -> list[int]:
    return values[name].tolist() if name in values else [default] * count
