"""A learned sink, a logit for each query head that joins the sum of its rows without a value, and its gradient.

A call passes it in one of several formats, each a value of its own: of the pointers that a kernel has for them all but
one are 0, as is all that a call has not.
"""

from dataclasses import dataclass

from attngen.expr import SINK
from attngen.plan.declared_places import gradient_value
from attngen.plan.formulas import Formula
from attngen.plan.plan import Param
from attngen.plan.sheets import ROW_NUMBERS, SheetOfPlan

SINK_FORMATS = ("f32", "bf16", "f16")


def sink_value(dtype: str) -> str:
    """The value that is the sink in a format."""
    return f"{SINK}_{dtype}"


def sink_gradient(dtype: str) -> str:
    """The value that is the gradient of the sink in a format."""
    return gradient_value(sink_value(dtype))


SINK_VALUES = tuple(map(sink_value, SINK_FORMATS))
SINK_GRADIENTS = tuple(map(sink_gradient, SINK_FORMATS))


def sink_params() -> tuple[Param, ...]:
    """The fields of a parameter struct by which a kernel finds the sink: pointers, and steps from head to head."""
    return (
        *(Param(name, "pointer", f"{name}.ptr") for name in SINK_VALUES),
        *(Param(f"{name}_stride", "i64", f"{name}.stride_0") for name in SINK_VALUES),
    )


@dataclass(frozen=True)
class SumSink(SheetOfPlan):
    """Add up, for each query head, what its rows give to the gradient of the sink, always in the same order.

    The probability of a sink is exp(sink - lse), its value 0: a row gives -exp(sink - lse) D, with D as `PrepareRows`
    has it. A row whose lse is infinite gives nothing: so do those past the end of a sequence, and of none.

    Attributes:
        plan: the attention kernel.
    """

    word = "sink"
    threads = 256

    @property
    def params(self) -> tuple[Param, ...]:
        """Fields of the struct: pointers first; the gradient has the format of the sink, and the others are 0."""
        return (
            *(Param(name, "pointer", f"{name}.ptr") for name in ROW_NUMBERS),
            *(
                Param(f"gradient_of_{name}", "pointer", f"{gradient}.ptr")
                for name, gradient in zip(SINK_VALUES, SINK_GRADIENTS, strict=True)
            ),
            *sink_params(),
            *(Param(size, "i32", size) for size in ("batch", self.length, "num_heads_q")),
        )

    @property
    def length(self) -> str:
        """The size that the rows of a head have, before they are padded."""
        return "tokens_q" if self.is_ragged else "seqlen_q"

    @property
    def reads(self) -> tuple[str, ...]:
        """D and lse of each row, beside the sink, which is there in one of its formats."""
        return ROW_NUMBERS

    @property
    def writes(self) -> tuple[str, ...]:
        """The gradient, in the format that is wanted."""
        return SINK_GRADIENTS

    @property
    def tiles(self) -> Formula:
        """Heads, a block of threads each."""
        return "num_heads_q"
