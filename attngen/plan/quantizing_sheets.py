"""The sheets that make e4m3 operands of Q, K and V in 16 bits, and that lay out V which is e4m3 already."""

from dataclasses import dataclass

from attngen.arch import Arch
from attngen.plan.formulas import Formula, ceil_div, maximum, minimum, product, total
from attngen.plan.plan import Param
from attngen.plan.quantizer import Quantizer
from attngen.plan.sheets import SIZES, STRIDES, Sheet
from attngen.quantize import DESCALES, KEY_BLOCK

SOURCES = ("bf16", "f16")
"""Formats that are quantised."""
TENSORS = ("q", "k", "v")
OPERANDS = (*TENSORS, *DESCALES)
"""Values that an attention kernel of e4m3 reads."""
MAXIMA = "maxima"
"""The largest magnitudes of Q, of K and of V."""
VALUE_ROWS = "v.rows"
"""V in e4m3 as a caller passes it, a row a key."""


def source_of(tensor: str, source: str) -> str:
    """The value of Q, K or V in a format that is quantised."""
    return f"{tensor}.{source}"


@dataclass(frozen=True)
class _QuantizingSheet(Sheet):
    """What the sheets that make e4m3 operands have in common.

    Attributes:
        quantizer: their numbers.
    """

    quantizer: Quantizer

    @property
    def module(self) -> str:
        """One text for all of them."""
        return f"{self.quantizer.name}_quantize"

    @property
    def arch(self) -> Arch:
        """Where they shall run."""
        return self.quantizer.arch

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.quantizer.threads

    def _params(self, sources: tuple[str, str, str]) -> tuple[Param, ...]:
        """The struct, which all of them take: pointers first. Those that one does not use are 0."""
        strides = zip(TENSORS, sources, strict=True)
        return (
            *(Param(name, "pointer", f"{value}.ptr") for name, value in zip(TENSORS, sources, strict=True)),
            *(Param(f"{name}8", "pointer", f"{name}.ptr") for name in TENSORS),
            *(Param(name, "pointer", f"{name}.ptr") for name in DESCALES),
            *((Param(MAXIMA, "pointer", f"{MAXIMA}.ptr"),) if self.quantizer.finds_maxima else ()),
            *(
                Param(f"{name}_stride_{axis}", "i64", f"{value}.stride_{axis}")
                for name, value in strides
                for axis in STRIDES
            ),
            *(Param(size, "i32", size) for size in SIZES),
        )


@dataclass(frozen=True)
class _SourceSheet(_QuantizingSheet):
    """What reads Q, K and V in a format of 16 bits: first the rows of Q, then those of K, then those of V.

    Attributes:
        source: the format.
    """

    source: str

    @property
    def sources(self) -> tuple[str, str, str]:
        """The values of Q, K and V."""
        q, k, v = (source_of(name, self.source) for name in TENSORS)
        return q, k, v

    @property
    def params(self) -> tuple[Param, ...]:
        """Fields of the struct."""
        return self._params(self.sources)

    @property
    def smem_bytes(self) -> int:  # type: ignore[override]
        """What is staged."""
        return self.quantizer.smem_bytes

    @property
    def repeats(self) -> bool:  # type: ignore[override]
        """Whether a block takes part after part."""
        return self.quantizer.persistent

    @property
    def tiles(self) -> Formula:
        """Parts of 128 rows of all heads."""
        return total(
            product("batch", "num_heads_q", self._parts("seqlen_q")),
            product(2, "batch", "num_heads_kv", self._parts("seqlen_k")),
        )

    @property
    def grid(self) -> Formula:
        """Blocks of a launch: one for each part, or as many as the GPU holds at a time."""
        resident = product("num_sms", self.quantizer.blocks_per_sm)
        return minimum(self.tiles, resident) if self.repeats else self.tiles

    def _parts(self, seqlen: str) -> Formula:
        """Parts of a head; one at least where it has a descale though it has no rows."""
        parts = ceil_div(seqlen, KEY_BLOCK)
        return maximum(1, parts) if self.quantizer.finds_maxima else parts


@dataclass(frozen=True)
class FindMaxima(_SourceSheet):
    """Find the largest magnitudes, where a scale spans more than what a block of threads sees."""

    @property
    def name(self) -> str:
        """Entry name of the kernel."""
        return f"{self.quantizer.name}_amax_{self.source}"

    @property
    def reads(self) -> tuple[str, ...]:
        """Q, K and V."""
        return self.sources

    @property
    def writes(self) -> tuple[str, ...]:
        """The maxima."""
        return (MAXIMA,)


@dataclass(frozen=True)
class Quantize(_SourceSheet):
    """Make the e4m3 operands and their descales, see `attngen.quantize.Operands`."""

    @property
    def name(self) -> str:
        """Entry name of the kernel."""
        return f"{self.quantizer.name}_quantize_{self.source}"

    @property
    def reads(self) -> tuple[str, ...]:
        """Q, K and V, and the maxima where they were found before."""
        return (*self.sources, *((MAXIMA,) if self.quantizer.finds_maxima else ()))

    @property
    def writes(self) -> tuple[str, ...]:
        """The operands."""
        return OPERANDS


@dataclass(frozen=True)
class PackValues(_QuantizingSheet):
    """Lay V that is e4m3 already out as the attention kernel reads it, see `attngen.quantize.pack_values`."""

    @property
    def name(self) -> str:
        """Entry name of the kernel."""
        return f"{self.quantizer.name}_pack_v"

    @property
    def params(self) -> tuple[Param, ...]:
        """Fields of the struct; those of Q and K carry nothing."""
        return self._params((source_of("q", "e4m3"), source_of("k", "e4m3"), VALUE_ROWS))

    @property
    def reads(self) -> tuple[str, ...]:
        """V."""
        return (VALUE_ROWS,)

    @property
    def writes(self) -> tuple[str, ...]:
        """V, transposed."""
        return ("v",)

    @property
    def tiles(self) -> Formula:
        """Blocks of keys of all heads."""
        return product("batch", "num_heads_kv", ceil_div("seqlen_k", KEY_BLOCK))
