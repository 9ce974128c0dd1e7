"""The kernel that merges partial results: its parameters and its text."""

from dataclasses import dataclass
from typing import ClassVar

from attngen.dtypes import DType
from attngen.emit.environment import POINTEES, macros
from attngen.emit.sheet_text import sink_reader
from attngen.plan import Param, sink_params
from attngen.serving.lone_kernel import LoneKernel

MOST_PARTS = 32
"""Parts that one launch merges: their addresses and strides are parameters, of which a kernel has 4 KB."""
CHUNK = 8
"""Elements of a row that a thread takes."""
AXES = ("batch", "seqlen", "head")
"""Axes of rows: ragged ones are of one batch."""


@dataclass(frozen=True)
class MergeStates(LoneKernel):
    """Merge normalised outputs and their log-sum-exps, a thread for eight elements of a row.

    Attributes:
        inputs: format of the parts' outputs: f16, bf16 or f32.
        output: format of the result.
    """

    inputs: DType
    output: DType
    threads: ClassVar[int] = 256
    at_once: ClassVar[int] = 4
    """Parts whose loads a thread has under way together."""

    @property
    def name(self) -> str:
        """Entry name of the kernel."""
        return f"attn_merge_{self.arch.token}_{self.inputs.name}_to_{self.output.name}"

    @property
    def params(self) -> tuple[Param, ...]:
        """Fields of the struct: pointers, strides in elements, sizes."""
        parts = range(MOST_PARTS)
        strided = (*(f"outs{part}" for part in parts), *(f"lses{part}" for part in parts), "out")
        sink = sink_params()
        return (
            *(Param(name, "pointer", f"{name}.ptr") for name in (*strided, "lse")),
            *(param for param in sink if param.ctype == "pointer"),
            *(
                Param(f"{name}_stride_{axis}", "i64", f"{name}.stride_{axis}")
                for name in strided
                for axis in AXES
            ),
            *(param for param in sink if param.ctype != "pointer"),
            *(Param(name, "i32", name) for name in ("parts", "batch", "seqlen", "num_heads", "chunks")),
        )

    def body(self) -> str:
        """The text of the kernel and its own functions."""
        return str(
            macros("serving/merge.cuh.j2").MergeStates(
                self,
                most_parts=MOST_PARTS,
                source=POINTEES[self.inputs.name],
                result=POINTEES[self.output.name],
                read_sink=sink_reader(),
            )
        )
