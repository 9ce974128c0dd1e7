"""How long the sequences of a call are: all alike, or each as long as numbers in device memory say."""

from dataclasses import dataclass
from typing import Literal, get_args

from attngen.expr import LARGEST_LENGTH
from attngen.plan.formulas import Formula, ceil_div, total
from attngen.plan.places import PADDED_ROWS, Axis

LengthKind = Literal["dense", "ragged", "padded", "paged"]
LENGTH_KINDS: tuple[str, ...] = get_args(LengthKind)
PAGES_BY_ROW = "pages_by_row"
"""The size that is 1 where each row of a call must be looked up, and 0 where pages are whole pieces, and blocks are."""
LETTERS: dict[Axis, Literal["q", "k"]] = {"queries": "q", "keys": "k"}
"""What arguments and sizes of an axis end in."""


@dataclass(frozen=True)
class Lengths:
    """How queries, and how keys, are cut into sequences.

    "dense": (batch, seqlen, heads, cols), all of one length. "padded": likewise, of which the first `seqused` count.
    "ragged": (tokens, heads, cols), the sequences one after another, each from `cu_seqlens[b]` to `cu_seqlens[b + 1]`,
    of which the first `seqused` count where a call gives that. "paged", of keys alone: in pages of a cache, see
    `attngen.plan.pages`, of which the first `seqused` keys count.
    """

    queries: LengthKind = "dense"
    keys: LengthKind = "dense"

    @property
    def are_dense(self) -> bool:
        """Whether all sequences are of one length."""
        return self.queries == self.keys == "dense"

    def of(self, axis: Axis) -> LengthKind:
        """How one of them is cut."""
        return self.queries if axis == "queries" else self.keys

    def is_by_token(self, axis: Axis) -> bool:
        """Whether the rows of all sequences follow one another, so that a tensor has no batches."""
        return self.of(axis) == "ragged"

    def is_paged(self, axis: Axis) -> bool:
        """Whether rows lie in pages, wherever a table says that each page is."""
        return self.of(axis) == "paged"

    def has_neighbours(self, axis: Axis) -> bool:
        """Whether behind a sequence's last row stands another's, or nobody's, rather than nothing."""
        return self.of(axis) != "dense"

    @property
    def arguments(self) -> tuple["LengthArgument", ...]:
        """The tensors in which a call says lengths."""
        found: list[LengthArgument] = []
        for axis, letter in LETTERS.items():
            kind = self.of(axis)
            if kind == "ragged":
                found.append(LengthArgument(f"cu_seqlens_{letter}", axis))
            if kind != "dense":
                found.append(LengthArgument(f"seqused_{letter}", axis, is_optional=kind == "ragged"))
            if kind != "dense" and axis == "keys":
                found.append(LengthArgument(f"leftpad_{letter}", axis, is_optional=True))
        return tuple(found)

    @property
    def bounds(self) -> tuple[str, ...]:
        """The numbers in which a call says how long sequences are at most."""
        return tuple(f"max_seqlen_{letter}" for axis, letter in LETTERS.items() if self.is_by_token(axis))


@dataclass(frozen=True)
class LengthArgument:
    """A tensor of i32 in which a call says lengths, or where sequences begin; contiguous, never read by the host.

    Attributes:
        axis: of what.
        is_optional: a call may leave it out.
    """

    name: str
    axis: Axis
    is_optional: bool = False

    @property
    def is_cumulative(self) -> bool:
        """Whether it has one element more than there are sequences."""
        return self.name.startswith("cu_seqlens")


def padded_start(start: int, sequence: int) -> int:
    """Where the rows of a ragged sequence begin among rows that are padded to whole blocks of `PADDED_ROWS`.

    A sequence of n rows that begins at `start` ends before the next begins: these lie n / PADDED_ROWS blocks apart,
    rounded down or up, and one more.
    """
    return (start // PADDED_ROWS + sequence) * PADDED_ROWS


def padded_blocks(tokens: str) -> Formula:
    """Blocks of `PADDED_ROWS` in which the padded rows of ragged sequences lie, see `padded_start`."""
    return total(ceil_div(tokens, PADDED_ROWS), "batch")


DENSE = Lengths()
ANY_LENGTH = LARGEST_LENGTH
"""What a bound is that a call does not give."""
