"""Places of gradients of what a spec declares: in device memory, and a thread's own table in shared memory."""

from dataclasses import dataclass

from attngen.dtypes import DType
from attngen.plan.formulas import Formula


@dataclass(frozen=True)
class PairMatrix:
    """An element for each pair of query and key in device memory, of each of some heads: what a spec may declare.

    Attributes:
        of: as the spec declares it.
        indices: what each of its dimensions runs along, "b", "h", "h_kv", "q_idx" or "kv_idx", or the one of its
            elements that is meant. What no index comes to is 0.
        shape: at least as long in each dimension as its index.
        is_covered: indices come to every element.
    """

    of: str
    dtype: DType
    indices: tuple[str | int, ...]
    shape: tuple[Formula, ...]
    is_covered: bool

    @property
    def name(self) -> str:
        """The value: the gradient of what is declared."""
        return gradient_value(self.of)

    def __str__(self) -> str:
        return f"gradient of {self.of}"


@dataclass(frozen=True)
class Elements:
    """A tensor of f32 in device memory, as a spec declares it, to whose elements blocks of threads add in any order.

    Attributes:
        of: as the spec declares it.
        shape: of it.
    """

    of: str
    shape: tuple[Formula, ...]

    @property
    def name(self) -> str:
        """The value: the gradient of what is declared."""
        return gradient_value(self.of)

    def __str__(self) -> str:
        return f"gradient of {self.of}"


def gradient_value(declared: str) -> str:
    """The value that is the gradient of what a spec declares."""
    return f"gradient.{declared}"


@dataclass(frozen=True)
class PrivateTable:
    """A table of f32 in shared memory of which every thread has its own, so that nobody waits to add to an entry.

    Attributes:
        offset: bytes from the start of the block's shared memory.
    """

    name: str
    entries: int
    threads: int
    offset: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the tables of all threads."""
        return 4 * self.entries * self.threads

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class BlockTables:
    """A table of f32 for each block of rows of each head, dense (batch, num_heads_q, blocks, entries)."""

    name: str
    entries: int
    block_m: int

    def __str__(self) -> str:
        return self.name
