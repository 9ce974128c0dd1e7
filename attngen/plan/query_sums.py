"""The sheet that makes dQ of sums to which blocks of keys have added in device memory."""

from dataclasses import dataclass

from attngen.plan.formulas import Formula, ceil_div, product
from attngen.plan.lengths import LengthArgument, padded_blocks
from attngen.plan.places import PADDED_ROWS, QuerySums, Tensor
from attngen.plan.plan import Param
from attngen.plan.sheets import STRIDES, SheetOfPlan


@dataclass(frozen=True)
class FinishSums(SheetOfPlan):
    """Multiply sums of rows by the scale of gradients and write them, rounded, or add them to what a call accumulates.

    Attributes:
        plan: the kernel whose blocks add to them.
        sums: of rows, whose elements stand in the order of registers.
        results: where they go: a tensor for each format that a call may want.
    """

    sums: QuerySums
    results: tuple[Tensor, ...]
    word = "finish"
    threads = 256

    @property
    def params(self) -> tuple[Param, ...]:
        """Fields of the struct: pointers first, 0 where a call does not want a format."""
        names = [result.name for result in self.results]
        return (
            *(Param(name, "pointer", f"{name}.ptr") for name in (*self.reads, *names)),
            *(
                Param(f"{name}_stride_{axis}", "i64", f"{name}.stride_{axis}")
                for name in names
                for axis in STRIDES
            ),
            *(Param(size, "i32", size) for size in (*self._rows, "num_heads_q")),
            Param("gradient_scale", "f32", "gradient_scale"),
            Param("accumulates", "i32", "accumulates"),
        )

    @property
    def _rows(self) -> tuple[str, ...]:
        """Sizes that say how many rows there are."""
        return ("batch", "tokens_q") if self.is_ragged else ("seqlen_q",)

    @property
    def starts(self) -> tuple[LengthArgument, ...]:
        """What says where sequences begin, if their rows follow one another."""
        return tuple(
            each for each in self.plan.lengths.arguments if each.axis == "queries" and each.is_cumulative
        )

    @property
    def reads(self) -> tuple[str, ...]:
        """The sums, and where sequences begin."""
        return (self.sums.name, *(each.name for each in self.starts))

    @property
    def writes(self) -> tuple[str, ...]:
        """The gradient, in the format that is wanted."""
        return tuple(result.name for result in self.results)

    @property
    def tiles(self) -> Formula:
        """Blocks of rows of all heads."""
        if self.is_ragged:
            of_padded = PADDED_ROWS // self.sums.block_m
            return product("num_heads_q", of_padded, padded_blocks("tokens_q"))
        return product("batch", "num_heads_q", ceil_div("seqlen_q", self.sums.block_m))
