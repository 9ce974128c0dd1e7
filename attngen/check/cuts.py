"""How the rows of a call that is drawn are cut into sequences: what its tensors hold, and what it passes to say so."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from operator import add
from typing import Any, Literal

import torch

CutKind = Literal["ragged", "padded", "paged"]
"""The kinds of `attngen.plan.Lengths` in which sequences have lengths of their own."""
NO_PAGE = 2**31 - 1
"""What a drawn table has where no page is needed: none has that number."""


@dataclass(frozen=True)
class Cut:
    """The sequences of queries, or of keys.

    Attributes:
        kind: as the spec says.
        lengths: rows of each sequence that count.
        skipped: rows that lie before these and do not count (`leftpad_k`), a number a sequence; of keys alone.
        unused: rows that lie behind these and do not count (what `seqused` leaves out of a ragged sequence), likewise.
        tail: rows behind the last sequence; of padded ones behind the longest, of paged ones up to the end of a page.
        page: rows of a page, of paged keys.
    """

    kind: CutKind
    lengths: tuple[int, ...]
    skipped: tuple[int, ...] = ()
    unused: tuple[int, ...] = ()
    tail: int = 0
    page: int = 0

    @property
    def used(self) -> tuple[int, ...]:
        """Rows of each sequence up to the last that counts (`seqused`)."""
        return tuple(map(add, self.lengths, self._skipped))

    @property
    def stored(self) -> tuple[int, ...]:
        """Rows of each sequence, with those that do not count."""
        unused = self.unused or (0,) * len(self.lengths)
        return tuple(map(add, self.used, unused))

    @property
    def _skipped(self) -> tuple[int, ...]:
        return self.skipped or (0,) * len(self.lengths)

    @property
    def rows(self) -> int:
        """Rows of the tensor, or of one of its batches; of paged keys those that a row of the table has room for."""
        rows = (sum(self.stored) if self.kind == "ragged" else max(self.stored, default=0)) + self.tail
        return -(-rows // self.page) * self.page if self.kind == "paged" else rows

    @property
    def size(self) -> int:
        """What a call takes for the length of its sequences where one number must do; what is skipped is of them."""
        return max(self.used, default=0) if self.kind == "ragged" else self.rows

    @property
    def spans(self) -> Iterator[tuple[int, int]]:
        """First row that counts and row behind the last, of each sequence, in the tensor or in its own batch."""
        start = 0
        for length, skipped, stored in zip(self.lengths, self._skipped, self.stored, strict=True):
            yield start + skipped, start + skipped + length
            start += stored if self.kind == "ragged" else 0

    @property
    def unused_rows(self) -> torch.Tensor:
        """Which rows of the tensor no sequence counts: (batches, rows), of ragged sequences one batch."""
        found = torch.ones(
            1 if self.kind == "ragged" else len(self.lengths), self.rows, dtype=torch.bool, device="cpu"
        )
        for place, (first, end) in enumerate(self.spans):
            found[0 if self.kind == "ragged" else place, first:end] = False
        return found

    @property
    def pool_pages(self) -> int:
        """Pages of a cache: twice as many as are needed, and at least one."""
        return max(1, 2 * sum(map(len, self._needed)))

    @property
    def _needed(self) -> list[range]:
        """The places of the pages that each sequence needs."""
        return [
            range(skip // self.page, -(-used // self.page) if skip < used else 0)
            for skip, used in zip(self._skipped, self.used, strict=True)
        ]

    @property
    def page_sizes(self) -> dict[str, int]:
        """The sizes of a cache of such pages, and of its table."""
        rows, most = len(self.lengths), self.rows // self.page
        return {"pages": self.pool_pages, "page_size": self.page, "table_rows": rows, "max_pages": most}

    @property
    def block_table(self) -> torch.Tensor:
        """Which pages hold the rows of each sequence: (batch, max_pages), i32; `NO_PAGE` where none is needed."""
        found = torch.full(
            (len(self.lengths), self.rows // self.page), NO_PAGE, dtype=torch.int32, device="cpu"
        )
        shuffled = torch.randperm(self.pool_pages, generator=torch.Generator().manual_seed(0), device="cpu")
        taken = 0
        for row, places in zip(found, self._needed, strict=True):
            row[places.start : places.stop] = shuffled[taken : taken + len(places)]
            taken += len(places)
        return found

    def arguments(self, letter: Literal["q", "k"], device: torch.device | str = "cpu") -> dict[str, Any]:
        """What a call passes to say all this, by name."""

        def numbers(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        found: dict[str, Any] = {}
        if self.kind == "ragged":
            ends = [0, *accumulate(self.stored)]
            found = {f"cu_seqlens_{letter}": numbers(ends), f"max_seqlen_{letter}": self.size}
        if self.kind == "paged":
            found["block_table"] = self.block_table.to(device)
        if self.kind != "ragged" or self.unused:
            found[f"seqused_{letter}"] = numbers(list(self.used))
        if self.skipped:
            found[f"leftpad_{letter}"] = numbers(list(self.skipped))
        return found
