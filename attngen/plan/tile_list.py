"""The list of a call's tiles where sequences have lengths of their own: the sheet that makes it on the device."""

from dataclasses import dataclass

from attngen.expr import free_names, tensor_names
from attngen.plan.formulas import Formula, total
from attngen.plan.sheets import SheetInText

WORDS = 4
"""i32 of which an entry has a multiple, its fields first: 16 bytes, which a thread reads at once."""
BUCKETS_PER_OCTAVE = 8
"""Those of sequences whose lengths differ by less than an eighth count as alike."""


def bucket(length: int) -> int:
    """Which of the lengths that count as alike a number of blocks is: 0 and up, exact below 16."""
    octave = max(0, length.bit_length() - 4)
    return octave * BUCKETS_PER_OCTAVE + (length >> octave)


MOST_BLOCKS = 2**30
"""What a tile visits at most; a whole sequence that visits more counts as one that visits so many."""
WIDTHS_OF_ONE_WAVE = 24
"""Widths of parts that are tried for one wave of blocks of threads; the lanes of a warp try more waves by the rest."""
BUCKETS = bucket(MOST_BLOCKS) + 1


@dataclass(frozen=True)
class ListTiles(SheetInText):
    """List the tiles of a kernel, those of the longest sequences first, by what a call says of lengths on the device.

    An entry is a block of the rows of a sequence, or of its keys, or a whole sequence, as the kernel's tiles are. Rows
    that are no sequence's (behind the last, behind what is used of one) are listed as well, as those of a sequence
    that sees nothing, so that results there are 0. Entries are sorted by the blocks that tiles of their sequence visit
    at most (`bucket`), else in the order of sequences; those of a sequence stay together, since they read its keys, and
    begin with the block that sees the most, or that is to start first. The same lengths give the same list.

    It stands in the kernel's text and takes the same struct. Numbers that lie are kept within the tensors: a sequence
    begins and ends among the tokens, and lengths end where it does. What such numbers list beyond the room that true
    ones need is left out.

    Where keys are split (`KernelPlan.split`), an entry is a part of a block of rows. Parts have as many blocks of keys
    as the split says, or as all tiles' keys come to for each block of threads that the GPU holds at a time. Where the
    rows of a sequence are one block, what is cut are the keys that it visits by its closed form; else all keys of the
    sequence, of which a tile visits what it sees.

    Attributes:
        plan: the kernel.
    """

    word = "tiles"
    threads = 1024

    @property
    def reads(self) -> tuple[str, ...]:
        """What a call says of its lengths, if it must say it."""
        return tuple(each.name for each in self.plan.lengths.arguments if not each.is_optional)

    @property
    def writes(self) -> tuple[str, ...]:
        """The list: how many entries there are, then the entries, `entry_words` each."""
        return (self.plan.tile_list,)

    @property
    def shape(self) -> tuple[Formula, ...]:
        """Of the list."""
        return (total(1, self.plan.most_entries), self.entry_words)

    @property
    def knows_visits(self) -> bool:
        """Whether the keys that a tile visits have a closed form of lengths alone.

        A list is for all heads, and calls that pass other scalars and tensors may use it too.
        """
        seen = self.plan.key_blocks
        if seen is None or seen.boundaries:
            return False
        declared = {"h", "h_kv", "b", *self.plan.declarations.scalars}
        return all(
            free_names(bound).isdisjoint(declared) and not tensor_names(bound) for bound in seen.bounds
        )

    @property
    def entry_words(self) -> int:
        """i32 of an entry."""
        return -(-len(self.plan.scheduler.entry_fields) // WORDS) * WORDS

    @property
    def tiles(self) -> Formula:
        """One block lists them all."""
        return 1
