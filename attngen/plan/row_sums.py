"""The sheet that adds sums of rows up to the gradient of what a spec declares, and the list of all sheets."""

from dataclasses import dataclass

from attngen.expr import SIZE_NAMES, GradientSite
from attngen.plan.block_map import MapBlocks
from attngen.plan.declared_places import BlockTables, gradient_value
from attngen.plan.formulas import Formula, ceil_div, product
from attngen.plan.places import LENGTHS, Rows
from attngen.plan.plan import Param
from attngen.plan.quantizing_sheets import FindMaxima, PackValues, Quantize
from attngen.plan.query_sums import FinishSums
from attngen.plan.sheets import FillTables, FindBoundaries, PrepareRows, Sheet, SheetOfPlan
from attngen.plan.sinks import SumSink
from attngen.plan.tile_list import ListTiles


@dataclass(frozen=True)
class SumRows(SheetOfPlan):
    """Add up, for each element of a declared tensor, the rows that read it, always in the same order.

    An index is clamped to its dimension, so that the last element of one may be read by many rows, and others by none.

    Attributes:
        plan: the kernel that leaves a sum for each query, or each key, of every head; or a table for each block of
            queries, whose rows are the blocks.
        site: what is read, by indices that are b, h, h_kv, the row, or constant, or make up an entry of the tables.
        sums: that.
    """

    site: GradientSite
    sums: Rows | BlockTables
    word = "sums"
    threads = 256

    @property
    def lanes(self) -> int:
        """Threads that share an element: a block where its rows are all of some heads, else one."""
        return self.threads if self.site.owner in ("head", "table") else 1

    @property
    def sizes(self) -> tuple[Formula, ...]:
        """Of the dimensions of the tensor."""
        return declared_shape(self.site.dims)

    @property
    def params(self) -> tuple[Param, ...]:
        """Fields of the struct: pointers first."""
        value = gradient_value(self.site.name)
        length = LENGTHS[self.sums.axis] if isinstance(self.sums, Rows) else "seqlen_q"
        of_call = dict.fromkeys(("batch", "num_heads_q", "group", length))
        own = dict.fromkeys(size for size in self.sizes if isinstance(size, str) and size not in of_call)
        return (
            Param("sums", "pointer", f"{self.sums}.ptr"),
            Param("gradient", "pointer", f"{value}.ptr"),
            *(Param(f"stride_{i}", "i64", f"{value}.stride_{i}") for i in range(len(self.sizes))),
            *(Param(size, "i32", size) for size in of_call),
            *(Param(field_of(size), "i32", size) for size in own),
        )

    @property
    def reads(self) -> tuple[str, ...]:
        """Sums of rows, dense (batch, num_heads_q, seqlen) of f32, or tables."""
        return (self.sums.name,)

    @property
    def writes(self) -> tuple[str, ...]:
        """The gradient."""
        return (gradient_value(self.site.name),)

    @property
    def tiles(self) -> Formula:
        """Blocks of elements, or elements."""
        elements = product(1, *self.sizes)
        return elements if self.lanes > 1 else ceil_div(elements, self.threads)


def declared_shape(dims: tuple[str | int, ...]) -> tuple[Formula, ...]:
    """The shape of a tensor that is made as one is declared."""
    return tuple(dim if isinstance(dim, int) or dim in SIZE_NAMES else f"size.{dim}" for dim in dims)


def field_of(size: str) -> str:
    """The field that carries a size of a declared tensor."""
    return size if size in SIZE_NAMES else size.replace("size.", "size_of_", 1)


SHEETS: tuple[type[Sheet], ...] = (
    FillTables,
    ListTiles,
    FindBoundaries,
    FindMaxima,
    Quantize,
    PackValues,
    PrepareRows,
    FinishSums,
    SumRows,
    SumSink,
    MapBlocks,
)
"""Every sheet there is."""
