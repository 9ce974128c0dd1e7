"""Sheets: kernels that work through rows at the speed of memory, each a text of its own rather than a program of Steps.

A sheet has one name in three places: the class, the macro that emits it (`templates/sheets`) and the function that
means it, in torch (`simulated_sheets`). The classes tell what a launch must know; no text is made here.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from attngen.arch import Arch
from attngen.expr import Boundary, Table, tensor_names
from attngen.plan.formulas import Formula, ceil_div, maximum, minimum, product
from attngen.plan.lengths import LengthArgument, padded_blocks
from attngen.plan.places import PADDED_ROWS, QueryRanks, QuerySums, Rows
from attngen.plan.plan import KernelPlan, Param
from attngen.plan.quantizer import CHUNK

ROW_SOURCES = ("out", "dout", "lse")
"""Values of which the numbers of rows are made that a backward pass reads."""
ROW_NUMBERS = ("delta", "lse_log2")
"""These numbers."""
STRIDES = ("batch", "seqlen", "head")
"""Axes of a tensor of rows of heads whose strides a sheet takes."""
SIZES = ("batch", "seqlen_q", "seqlen_k", "num_heads_q", "num_heads_kv", "group")
"""Sizes of a call that it takes."""


class Sheet(ABC):
    """A kernel that is a text.

    `reads` and `writes` are names of values, `tiles` what the blocks of a launch work on, together.
    """

    smem_bytes = 0
    repeats = False
    """Whether a block may work on many tiles."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Entry name of the kernel."""

    @property
    @abstractmethod
    def module(self) -> str:
        """Name of the text that it is emitted to."""

    @property
    @abstractmethod
    def arch(self) -> Arch:
        """Where it shall run."""

    @property
    @abstractmethod
    def params(self) -> tuple[Param, ...]:
        """Fields of the struct that it takes by value."""

    @property
    @abstractmethod
    def reads(self) -> tuple[str, ...]:
        """Values that it reads."""

    @property
    @abstractmethod
    def writes(self) -> tuple[str, ...]:
        """Values that it writes."""

    @property
    @abstractmethod
    def threads(self) -> int:
        """Threads of a block."""

    @property
    @abstractmethod
    def tiles(self) -> Formula:
        """What its blocks work on."""

    @property
    def grid(self) -> Formula:
        """Blocks of a launch."""
        return self.tiles


@dataclass(frozen=True)
class SheetOfPlan(Sheet):
    """A sheet that works beside a program: its name is the program's and a word, and it stands in a text of its own.

    Attributes:
        plan: the program.
    """

    plan: KernelPlan
    word: ClassVar[str]

    @property
    def name(self) -> str:
        """Entry name of the kernel."""
        return f"{self.plan.name}_{self.word}"

    @property
    def module(self) -> str:
        """A text of its own."""
        return self.name

    @property
    def arch(self) -> Arch:
        """Where the program runs."""
        return self.plan.arch

    @property
    def is_ragged(self) -> bool:
        """Whether the queries of all sequences follow one another; there is no stride from batch to batch then."""
        return self.plan.lengths.is_by_token("queries")


class SheetInText(SheetOfPlan):
    """A sheet that stands in the text of a program and takes the struct that the program takes."""

    @property
    def module(self) -> str:
        """That of the program."""
        return self.plan.module

    @property
    def params(self) -> tuple[Param, ...]:
        """Those of the program."""
        return self.plan.params


@dataclass(frozen=True)
class FillTables(SheetInText):
    """Work out the extremes of lookups over each block of rows or keys, which an attention kernel's classes read.

    Block i of threads works on entry i of every table that has one.

    Attributes:
        plan: the attention kernel.
    """

    word = "tables"
    threads = 128

    @property
    def reads(self) -> tuple[str, ...]:
        """The tensors that are looked up."""
        names = frozenset().union(*(tensor_names(table.lookup) for table in self.plan.tables))
        return tuple(f"tensor.{name}" for name in self.plan.declarations.tensors if name in names)

    @property
    def writes(self) -> tuple[str, ...]:
        """The least and the greatest of each entry."""
        return tuple(self.plan.table_values[end] for table in self.plan.tables for end in table.ends)

    @property
    def tiles(self) -> Formula:
        """Entries of the largest table; none where there is no pair, and nothing is looked up."""
        entries = [product(1, *table_shape(table, self.plan)) for table in self.plan.tables]
        return product(maximum(*entries), minimum(1, "seqlen_q", "seqlen_k"))


@dataclass(frozen=True)
class FindBoundaries(SheetOfPlan):
    """Find the boundaries that kernels of a call read, each element by a bisection of one thread.

    Attributes:
        plan: the first of these kernels, whose fields of the struct it takes as far as expressions read them.
    """

    word = "boundaries"
    threads = 128

    @property
    def boundaries(self) -> tuple[Boundary, ...]:
        """What is found."""
        return self.plan.boundaries

    @property
    def among(self) -> str:
        """What the boundaries are: "keys", or "rows"."""
        return "keys" if self.boundaries[0].along == "kv_idx" else "rows"

    @property
    def params(self) -> tuple[Param, ...]:
        """Boundaries, what is declared, and sizes."""
        found = {f"{each.name}.ptr" for each in self.boundaries}
        return tuple(
            param
            for param in self.plan.params
            if param.value in found
            or param.value in SIZES
            or param.value.startswith(("tensor.", "size.", "scalar."))
        )

    @property
    def reads(self) -> tuple[str, ...]:
        """The tensors that conditions look up."""
        names = frozenset().union(*(tensor_names(each.condition) for each in self.boundaries))
        return tuple(f"tensor.{name}" for name in self.plan.declarations.tensors if name in names)

    @property
    def writes(self) -> tuple[str, ...]:
        """The boundaries."""
        return tuple(each.name for each in self.boundaries)

    @property
    def tiles(self) -> Formula:
        """Elements of the largest, as many at a time as a block has threads; none where there are no heads."""
        elements = [product(1, *boundary_shape(each)) for each in self.boundaries]
        blocks = ceil_div(maximum(*elements, 0), self.threads)
        return product(blocks, minimum(1, "batch", "num_heads_q", "num_heads_kv"))


_EXTENTS: dict[str, Formula] = {
    "b": "batch",
    "h": "num_heads_q",
    "h_kv": "num_heads_kv",
    "q_idx": "seqlen_q",
    "kv_idx": "seqlen_k",
}


def boundary_shape(boundary: Boundary) -> tuple[Formula, ...]:
    """The shape of a boundary."""
    return tuple(_EXTENTS[index.name] for index in boundary.indices)


def table_shape(table: Table, plan: KernelPlan) -> tuple[Formula, ...]:
    """The shape of either end of a table."""
    sizes: dict[str, Formula] = {
        **_EXTENTS,
        "q_idx.tile": ceil_div("seqlen_q", plan.block_m),
        "kv_idx.tile": ceil_div("seqlen_k", plan.block_n),
    }
    return tuple(sizes[index.name] for index in table.indices)


@dataclass(frozen=True)
class PrepareRows(SheetOfPlan):
    """Work out the numbers of each row that a backward pass reads: D, and lse in log2 units.

    D is the sum of dO O over columns, less the gradient of lse where a call has it (value "dlse"). A row without keys,
    or past the end of the queries, has D 0 and lse +inf, so that its probabilities are 0.

    Attributes:
        plan: the attention kernel whose output it is.
        clears: sums that it writes zeros to where a call has them, and to their ranks; they are not among what it
            writes, which would leave out who adds to them.
    """

    clears: QuerySums | None = None

    word = "rows"
    threads = 128
    rows = Rows("lse_log2", "queries", is_padded=True)
    """Either of the numbers, as a place."""
    lane_rows = 4
    """Rows of which a lane takes its part."""

    @property
    def cleared(self) -> tuple[QuerySums | QueryRanks, ...]:
        """All that it writes zeros to."""
        found = (self.clears, self.clears.ranks) if self.clears else ()
        return tuple(each for each in found if each)

    @property
    def row_lanes(self) -> int:
        """Lanes that share a row, 16 bytes each: a power of two."""
        return min(32, max(self.lane_rows, 1 << (-(-self.plan.head_dim_v // CHUNK) - 1).bit_length()))

    @property
    def block_rows(self) -> int:
        """Rows of a block of threads, all of one head."""
        return self.threads // self.row_lanes * self.lane_rows

    @property
    def params(self) -> tuple[Param, ...]:
        """Fields of the struct: pointers first. `dlse` is 0 where nobody asks for gradients of lse."""
        return (
            *(Param(name, "pointer", f"{name}.ptr") for name in (*ROW_SOURCES, "dlse", *ROW_NUMBERS)),
            *(Param(each.name, "pointer", f"{each.name}.ptr") for each in self.cleared),
            *(
                Param(f"{name}_stride_{axis}", "i64", f"{name}.stride_{axis}")
                for name in ("out", "dout")
                for axis in STRIDES
            ),
            *(
                Param(f"{name}_stride_{axis}", "i64", f"{name}.stride_{number}")
                for name in ("lse", "dlse")
                for number, axis in enumerate(("batch", "head", "seqlen"), start=-1 if self.is_ragged else 0)
            ),
            *(Param(each.name, "pointer", f"{each.name}.ptr") for each in self._lengths),
            *(
                Param(size, "i32", size)
                for size in (("batch", "tokens_q") if self.is_ragged else ("seqlen_q",))
            ),
            Param("num_heads_q", "i32", "num_heads_q"),
        )

    @property
    def _lengths(self) -> tuple[LengthArgument, ...]:
        return tuple(each for each in self.plan.lengths.arguments if each.axis == "queries")

    @property
    def reads(self) -> tuple[str, ...]:
        """O, its gradient, lse and lengths; and dlse where a call has it."""
        return (*ROW_SOURCES, *(each.name for each in self._lengths if not each.is_optional))

    @property
    def writes(self) -> tuple[str, ...]:
        """D and lse in log2 units, both dense (batch, num_heads_q, rows) of f32, rows in whole `PADDED_ROWS`."""
        return ROW_NUMBERS

    @property
    def tiles(self) -> Formula:
        """Blocks of rows of all heads."""
        of_padded = PADDED_ROWS // self.block_rows
        if self.is_ragged:
            return product("num_heads_q", of_padded, padded_blocks("tokens_q"))
        return product("batch", "num_heads_q", product(of_padded, ceil_div("seqlen_q", PADDED_ROWS)))
