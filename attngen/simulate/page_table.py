"""Where the keys of a call lie whose K and V are caches of pages: what `offset_in_pages` is for emitted kernels."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from attngen.plan import BLOCK_TABLE, CACHE_ROWS, evaluate_formula, piece_of
from attngen.simulate.faults import SimulationFault
from attngen.simulate.tile_source import Tile


@dataclass(frozen=True)
class PageTable:
    """Which pages hold the rows of each request.

    Attributes:
        table: (table_rows, max_pages), i32.
        rows: of the table, a request each, (batch,); the row of its number where None.
        pages: of a cache; a number that none has is kept within them.
        page_size: rows of a page.
    """

    table: torch.Tensor
    rows: torch.Tensor | None
    pages: int
    page_size: int

    @classmethod
    def of(cls, values: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> "PageTable":
        """That of a call that passes these values."""
        table, rows = values[BLOCK_TABLE.name], values.get(CACHE_ROWS.name)
        return cls(table, rows, sizes["pages"], sizes["page_size"])

    def piece_of(self, block: int) -> int:
        """Rows of a page that come by one copy, of a block of so many keys."""
        return evaluate_formula(piece_of(block), {"page_size": self.page_size})

    def places(self, tile: Tile, first: int, count: int, piece: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Page, and row of it, of rows first, first + 1, ... of the sequence of each of a tile's heads.

        Args:
            tile: whose heads.
            first: first row.
            count: of rows.
            piece: rows of a page that come together, those past the sequence's end with the last before it.

        Returns:
            (members, count) each, i64.

        Raises:
            SimulationFault: a row past the sequence's end, of which the table says nothing, or rows that are no pieces.
        """
        start, length = tile.sequence("keys")
        if first < 0 or (count and first + count > -(-length // piece) * piece):
            message = f"pages of rows {first} .. {first + count - 1} are looked up, of a sequence of {length}"
            raise SimulationFault("out of bounds", message, place=BLOCK_TABLE.name, where=str(tile))
        if (start + first) % piece or self.page_size % piece:
            message = f"rows of pages of {self.page_size} come by {piece}, from row {start + first} on"
            raise SimulationFault("out of bounds", message, place=BLOCK_TABLE.name, where=str(tile))
        batch, *_ = tile.columns
        row = batch if self.rows is None else self.rows.long()[batch].clamp(0, self.table.shape[0] - 1)
        stored = torch.arange(start + first, start + first + count).expand(len(tile.members), count)
        found = self.table[row.unsqueeze(1), stored // self.page_size].long()
        return found.clamp(0, self.pages - 1), stored % self.page_size
