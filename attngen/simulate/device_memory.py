"""Device memory of one call: the user's tensors and the workspaces, who wrote what, how much was moved."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from attngen.expr import SINK
from attngen.plan import (
    DENSE,
    SINK_VALUES,
    Axis,
    BlockTables,
    CacheDescales,
    KernelPlan,
    Lengths,
    PairMatrix,
    PartRows,
    QueryRanks,
    QuerySums,
    Rows,
    Tensor,
    padded_start,
)
from attngen.quantize import unpack_values
from attngen.simulate.page_table import PageTable
from attngen.simulate.tile_source import Tile
from attngen.simulate.traffic import Traffic
from attngen.simulate.visits import Blocks, Member, Sizes, ceil_div

NOTHING = torch.empty(0, dtype=torch.float32, device="cpu")
"""Stands for every value when a program is only counted."""
OfRows = Tensor | Rows | QuerySums | QueryRanks
"""What stands in device memory by the rows of a sequence."""


class Addition(NamedTuple):
    """What a warpgroup adds to sums for a pair of blocks."""

    batch: int
    head: int
    m_block: int
    n_block: int
    warpgroup: int


class DeviceMemory:
    """Tensors by their name in the plan, each seen as (batch, heads, seqlen, cols) or (batch, heads, seqlen).

    Attributes:
        members_written: how many heads have written share i of a place, by (name, i); of a tensor how many columns.
        share_rows: rows that are written to a place at a time: a block of them, or a warpgroup's part of one.
        parts_written: how many columns tiles have left of their part in a place, by its name and their numbers.
        tickets: how many parts of a tile have been counted, by the number of the first, 0 once all have.
        added: how often what has been added to sums.
    """

    def __init__(
        self,
        tensors: dict[str, torch.Tensor] | None,
        traffic: Traffic | None,
        wanted: tuple[str, ...] = (),
        lengths: Lengths = DENSE,
        group: int = 1,
        pages: PageTable | None = None,
    ) -> None:
        """Take the values of a call.

        Args:
            tensors: by the names of places, without those not asked for; None to count only.
            traffic: where to count, or None.
            wanted: optional places to write although they are not among the tensors.
            lengths: of the sequences; what has no batches has one, in which all of them lie.
            group: query heads that share a head of K and V.
            pages: where rows lie that are in pages, of which a tensor has as many as others have batches.
        """
        self._lengths = lengths
        self._group = group
        self._pages = pages
        self.holds_values = tensors is not None
        self.tensors = dict(tensors or {})
        self.traffic = traffic
        self.wanted = frozenset((*wanted, *self.tensors))
        self.members_written: dict[tuple[str, int], int] = {}
        self.share_rows: dict[str, int] = {}
        self.parts_written: dict[str, Counter[int]] = {}
        self.tickets: Counter[int] = Counter()
        self.added: Counter[Addition] = Counter()

    def wants(self, place: Tensor | Rows) -> bool:
        """Whether this is to be written: the call asks for it, or it is not optional."""
        return not place.optional or place.name in self.wanted

    def valid_rows(self, place: Tensor | Rows, tile: Tile, first: int, rows: int) -> int:
        """How many of rows first, first + 1, ... exist, what rows are padded by included."""
        if isinstance(place, Rows) and place.is_padded:
            return rows
        return max(0, min(rows, self.rows_of(place, tile) - first))

    def rows_of(self, place: Tensor | Rows, tile: Tile) -> int:
        """Rows of the tile's sequence, those of all heads of a group where they are packed."""
        return tile.sequence(place.axis)[1] * (self._group if place.is_packed else 1)

    def read(
        self,
        place: Tensor | Rows,
        tile: Tile,
        first: int,
        shape: tuple[int, ...],
        past_end: bool = False,
    ) -> torch.Tensor:
        """Rows first, first + 1, ... of the tile's heads as f32, zero beyond what exists; of a transposed tensor keys.

        Args:
            place: where.
            tile: whose heads.
            first: first row.
            shape: (rows, cols) of a tensor, (rows,) of rows.
            past_end: what stands behind the sequence exists too, up to the end of the tensor, or of a piece of a page.

        Returns:
            (members, *shape), f32.
        """
        is_transposed = isinstance(place, Tensor) and place.is_transposed
        valid = self.valid_rows(place, tile, first, shape[-1] if is_transposed else shape[0])
        if self.traffic:
            self.traffic.count_read(place.name, len(tile.members) * valid * _row_bytes(place))
        if not self.holds_values:
            return NOTHING
        batch, heads = self._heads(place, tile)
        start = self._start(place, tile) + first
        if place.is_packed:
            found = self.tensors[place.name][self._packed(place, tile, range(first, first + valid))].float()
            return _filled(found, shape)
        if self._pages is not None and self._lengths.is_paged(place.axis):
            piece = self._pages.piece_of(shape[0]) if past_end else 1
            page, row = self._pages.places(tile, first, ceil_div(valid, piece) * piece, piece)
            return _filled(self.tensors[place.name][page, heads.unsqueeze(1), row].float(), shape)
        if is_transposed:  # zeros follow the last key
            rows = self.tensors[place.name][..., start : start + shape[-1]]
        else:
            rows = self.tensors[place.name][:, :, start : start + (shape[0] if past_end else valid)]
        return _filled(rows[batch, heads].float(), shape)  # of these rows alone: to pick heads is to copy

    def read_descales(self, of: CacheDescales, tile: Tile, first: int, keys: int) -> torch.Tensor:
        """The descales of keys first, first + 1, ... of a tile's heads, (members, keys), f32; 0 past the end."""
        start, length = tile.sequence("keys")
        valid = max(0, min(keys, length - first))
        if self.traffic:
            self.traffic.count_read(of.name, 4 * len(tile.members) * valid)
        if not self.holds_values:
            return NOTHING
        batch, _, head = (column.unsqueeze(1) for column in tile.columns)
        stored: tuple[torch.Tensor, ...] = (batch, torch.arange(start + first, start + first + valid))
        if self._pages is not None:
            stored = self._pages.places(tile, first, valid)
        if of.scales == "per_page" or self._lengths.is_by_token("keys"):
            stored = stored[:1] if of.scales == "per_page" else stored[1:]
        found = self.tensors[of.name][(*stored, head)]
        return _filled(found.expand(len(tile.members), valid), (keys,))

    def write(
        self,
        place: Tensor | Rows,
        tile: Tile,
        first: int,
        values: torch.Tensor,
        shape: tuple[int, ...],
        first_col: int = 0,
    ) -> None:
        """Write (members, *shape) to rows first, first + 1, ... and columns from first_col on.

        What does not exist is dropped.
        """
        valid = self.valid_rows(place, tile, first, shape[0])
        columns, size = range(1), 4
        if isinstance(place, Tensor):
            columns = range(first_col, min(first_col + shape[-1], place.cols))
            size = place.dtype.bytes * len(columns)
        if self.traffic:
            self.traffic.count_written(place.name, len(tile.members) * valid * size)
        share = (place.name, first // shape[0])
        if valid:
            written = len(tile.members) * len(columns)
            self.members_written[share] = self.members_written.get(share, 0) + written
        self.share_rows[place.name] = shape[0]
        if not self.holds_values:
            return
        batch, head = self._heads(place, tile)
        target = self.tensors[place.name]
        found = values[:, :valid]
        if isinstance(place, Tensor):
            found, target = found[..., : len(columns)], target[..., columns.start : columns.stop]
        if place.is_packed:
            target[self._packed(place, tile, range(first, first + valid))] = found.to(target.dtype)
            return
        start = tile.sequence(place.axis)[0] + first
        target[batch, head, start : start + valid] = found.to(target.dtype)

    def write_part(
        self,
        place: PartRows,
        tile: Tile,
        numbers: list[int],
        rows: range,
        values: torch.Tensor,
        columns: range,
    ) -> None:
        """Write the first of (members, rows, columns) to these rows of the tiles of these numbers.

        Columns that do not exist are dropped; a place of one number a row has one.
        """
        columns = columns[: max(0, (place.cols or 1) - columns.start)]
        if self.traffic:
            self.traffic.count_written(place.name, 4 * len(tile.members) * len(rows) * len(columns))
        elements = len(rows) * len(columns)
        self.parts_written.setdefault(place.name, Counter()).update(dict.fromkeys(numbers, elements))
        if self.holds_values:
            target, found = self.tensors[place.name], values[:, : len(rows), : len(columns)]
            if place.cols:
                target[numbers, rows.start : rows.stop, columns.start : columns.stop] = found
            else:
                target[numbers, rows.start : rows.stop] = found.squeeze(-1)

    def _packed(self, place: Tensor | Rows, tile: Tile, rows: range) -> tuple[torch.Tensor, ...]:
        """Where packed rows of the tile's heads stand, for indexing: batch, head and row, (members, rows) each."""
        batch, head, _ = tile.columns
        batch = batch * (not self._lengths.is_by_token(place.axis))
        numbers = torch.arange(rows.start, rows.stop)
        start, _ = tile.sequence(place.axis)
        return batch.view(-1, 1), head.view(-1, 1) + numbers % self._group, start + numbers // self._group

    def _start(self, place: OfRows, tile: Tile) -> int:
        """Where the rows of the tile's sequence begin in a place."""
        start, _ = tile.sequence(place.axis)
        is_padded = isinstance(place, QuerySums | QueryRanks) or (isinstance(place, Rows) and place.is_padded)
        if is_padded and self._lengths.is_by_token(place.axis):
            return padded_start(start, tile.members[0].batch)
        return start

    def _heads(self, place: OfRows, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch and head of each of the tile's members, as the place has them: (members,) each."""
        batch, head, head_kv = tile.columns
        is_shared = isinstance(place, Tensor) and place.heads == "kv"
        return batch * (not self._lengths.is_by_token(place.axis)), head_kv if is_shared else head

    def write_pairs(
        self, place: PairMatrix, tile: Tile, rows: range, keys: range, values: torch.Tensor
    ) -> None:
        """Write (members, rows, keys) to some pairs; what does not exist is dropped."""
        rows, keys = rows[: max(0, tile.seqlen_q - rows.start)], keys[: max(0, tile.seqlen_k - keys.start)]
        if self.traffic:
            pairs = len(tile.members) * len(rows) * len(keys)
            self.traffic.count_written(place.name, pairs * place.dtype.bytes)
        if not self.holds_values:
            return
        target = self.tensors[place.name]
        for member, found in zip(tile.members, values, strict=True):
            of: dict[str, int | slice] = {
                "b": member.batch,
                "h": member.head,
                "h_kv": member.head_kv,
                "q_idx": slice(rows.start, rows.stop),
                "kv_idx": slice(keys.start, keys.stop),
            }
            at = tuple(of[index] if isinstance(index, str) else index for index in place.indices)
            own = found[: len(rows), : len(keys)].to(target.dtype)
            by_key = place.indices.index("kv_idx") < place.indices.index("q_idx")
            target[at] = own.mT if by_key else own

    def add(self, place: QuerySums, tile: Tile, first: tuple[int, int], values: torch.Tensor) -> None:
        """Add (members, rows, cols) to a row and those after it, from a column on; of each head once, in any order."""
        if self.traffic:
            self.traffic.count_written(place.name, 4 * len(tile.members) * place.block_m * place.cols // 2)
        if not self.holds_values:
            return
        batch, head = self._heads(place, tile)
        (row, column), (_, rows, cols) = first, values.shape
        row += self._start(place, tile)
        self.tensors[place.name][batch, head, row : row + rows, column : column + cols] += values

    def ranks(self, place: QueryRanks, tile: Tile, block: int, owner: int) -> torch.Tensor:
        """How many blocks of keys have added an owner's part of a block of queries, of each head: (members,)."""
        return self.tensors[place.name][self._rank(place, tile, block, owner)]

    def count_up(self, place: QueryRanks, tile: Tile, block: int, owner: int) -> None:
        """Count one more block of keys for each head."""
        self.tensors[place.name][self._rank(place, tile, block, owner)] += 1

    def _rank(self, place: QueryRanks, tile: Tile, block: int, owner: int) -> tuple[torch.Tensor | int, ...]:
        return (*self._heads(place, tile), self._start(place, tile) // place.block_m + block, owner)

    def not_added_once(self, plan: KernelPlan, visits: Iterable[Addition]) -> str:
        """What has not been added to the sums of a kernel once; empty where there is nothing of the kind.

        Args:
            plan: the kernel.
            visits: of its launch.
        """
        expected = set(visits) if plan.query_sums else set()
        for each in self.added.keys() | expected:
            if self.added[each] != int(each in expected):
                pair = f"block {each.m_block} and keys of block {each.n_block}, head {each.head}, batch {each.batch}"
                return f"rows of {pair} count {self.added[each]} times, warpgroup {each.warpgroup}"
        return ""

    def write_table(self, place: BlockTables, tile: Tile, block: int, values: torch.Tensor) -> None:
        """Write (members, entries) for a block of rows."""
        if self.traffic:
            self.traffic.count_written(place.name, 4 * len(tile.members) * place.entries)
        if self.holds_values:
            batch, head, _ = tile.columns
            self.tensors[place.name][batch, head, block] = values

    def part_not_left(self, place: PartRows, rows: int, tiles: Iterable[int]) -> int | None:
        """Of some tiles of so many rows the number of one that has not left its part in a place."""
        written, elements = self.parts_written.get(place.name, Counter()), rows * (place.cols or 1)
        return next((number for number in tiles if written[number] != elements), None)

    def unwritten(self, plan: KernelPlan, tiles: Iterable[tuple[Blocks, Member]]) -> tuple[str, int] | None:
        """A block of rows of an output, by name and number, that not every head has written exactly once."""
        members = {member for _, member in tiles if member.part == 0}
        wanted: tuple[Tensor | Rows, ...] = (
            *(tensor for tensor in plan.outputs if self.wants(tensor)),
            *(rows for rows in plan.written_rows if self.wants(rows)),
        )
        for place in wanted:
            packed = self._group if place.is_packed else 1
            lengths = Counter(
                each.seqlen_k if place.axis == "keys" else each.seqlen_q * packed for each in members
            )
            rows = self.share_rows.get(place.name, plan.block_m)
            for share in range(ceil_div(max(lengths, default=0), rows)):
                heads = sum(count for length, count in lengths.items() if length > share * rows)
                if isinstance(place, Rows) and plan.scheduler.kind == "key_blocks":
                    heads *= self._group
                columns = place.cols if isinstance(place, Tensor) else 1
                if self.members_written.get((place.name, share), 0) != heads * columns:
                    return place.name, share * rows // plan.block_m
        return None


def by_heads(plan: KernelPlan, sizes: Sizes, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The values that an attention kernel's places name, heads before rows."""

    def batched(x: torch.Tensor, axis: Axis) -> torch.Tensor:
        return x.unsqueeze(0) if plan.lengths.is_by_token(axis) else x

    found = {scale.name: values[scale.name] for scale in plan.every_descale}
    if plan.has_sink:
        (found[SINK],) = (values[name] for name in SINK_VALUES if name in values)
    rows = (*plan.read_rows, *plan.scratch, *plan.parts, *plan.writes)
    for place in rows:
        if place.name in values:
            x = values[place.name]
            found[place.name] = batched(x, place.axis) if isinstance(place, OfRows) else x
    for tensor in (*plan.reads, *plan.outputs):
        if tensor.optional and tensor.name not in values:
            continue
        x = batched(values[tensor.name], tensor.axis)
        if (
            tensor.is_transposed
        ):  # the order of 16 keys is for the registers of a lane, which are not simulated
            found[tensor.name] = unpack_values(x, sizes.seqlen_k).permute(0, 2, 3, 1)
        else:
            found[tensor.name] = x.transpose(1, 2)
    return found


def _filled(found: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """What was found for each member, with zeros for all else of a shape."""
    if found.shape[1:] == shape:
        return found
    result = found.new_zeros((found.shape[0], *shape))
    result[(slice(None), *(slice(n) for n in found.shape[1:]))] = found
    return result


def _row_bytes(place: Tensor | Rows) -> int:
    return place.cols * place.dtype.bytes if isinstance(place, Tensor) else 4
