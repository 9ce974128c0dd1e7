"""The map of given blocks as values of a call, and the sheet that makes one of lists of kept blocks."""

from collections.abc import Iterator
from dataclasses import dataclass

from attngen.expr import GIVEN_BLOCKS, block_sizes
from attngen.plan.formulas import Formula, ceil_div, product
from attngen.plan.plan import KernelPlan, Param
from attngen.plan.sheets import SheetOfPlan

BLOCK_MAP = f"tensor.{GIVEN_BLOCKS.name}"
"""The value that kernels read: of bool, (batch or 1, query heads or 1, blocks of queries, blocks of keys)."""
BLOCK_LISTS = ("blocks.counts", "blocks.indices")
"""Of each block of queries how many blocks of keys are kept, and which these are; of i32."""
MORE_BLOCK_LISTS = ("blocks.more_counts", "blocks.more_indices")
"""More of them, of the same shapes: who makes lists has those apart in which a mask hides nothing."""
GIVEN_BLOCK_VALUES = (BLOCK_MAP, *BLOCK_LISTS, *MORE_BLOCK_LISTS)
"""What a call may pass: the map, or the lists, or two kinds of these."""


def takes_blocks(plan: KernelPlan) -> bool:
    """Whether calls of an attention kernel pass which blocks are kept."""
    return GIVEN_BLOCKS.name in plan.declarations.tensors


def block_shapes(plan: KernelPlan) -> Iterator[tuple[str, str, tuple[Formula, ...]]]:
    """Name, format and shape of each value that a call may pass for given blocks."""
    sizes = block_sizes(plan.mask)
    assert sizes is not None
    batch, heads, *_ = map(str, GIVEN_BLOCKS.dims)
    of_counts = (batch, heads, ceil_div("seqlen_q", sizes[0]))
    of_indices = (*of_counts, ceil_div("seqlen_k", sizes[1]))
    yield BLOCK_MAP, GIVEN_BLOCKS.dtype, of_indices
    for counts, indices in (BLOCK_LISTS, MORE_BLOCK_LISTS):
        yield counts, "i32", of_counts
        yield indices, "i32", of_indices


@dataclass(frozen=True)
class MapBlocks(SheetOfPlan):
    """Make the map of given blocks of lists of those that are kept.

    A block of threads makes a row of the map. Of a list counts what lies in it and names a block that there is; what is
    listed twice is kept as well.

    Attributes:
        plan: the attention kernel that reads the map.
    """

    word = "blocks"
    threads = 128

    @property
    def params(self) -> tuple[Param, ...]:
        """Fields of the struct: pointers first. Those of lists that a call has not are 0."""
        lists = (*BLOCK_LISTS, *MORE_BLOCK_LISTS)
        return (
            Param("kept", "pointer", f"{BLOCK_MAP}.ptr"),
            *(Param(_field(value), "pointer", f"{value}.ptr") for value in lists),
            *(
                Param(f"{_field(value)}_stride_{i}", "i64", f"{value}.stride_{i}")
                for value in lists
                for i in range(4 if value.endswith("indices") else 3)
            ),
            *(Param(str(dim), "i32", f"size.{dim}") for dim in GIVEN_BLOCKS.dims[1:]),
        )

    @property
    def reads(self) -> tuple[str, ...]:
        """Lists of one kind; and of the other where a call has it."""
        return BLOCK_LISTS

    @property
    def writes(self) -> tuple[str, ...]:
        """The map."""
        return (BLOCK_MAP,)

    @property
    def tiles(self) -> Formula:
        """Rows of the map."""
        return product(*(f"size.{dim}" for dim in GIVEN_BLOCKS.dims[:3]))


def _field(value: str) -> str:
    """The field of a list's value."""
    return value.removeprefix("blocks.")
