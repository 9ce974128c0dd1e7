"""Frozen facts about number formats, each with its source. Nothing here rounds or converts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from attngen.errors import InternalError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DType:
    """A number format.

    Attributes:
        name: attngen's word for it, also PTX's: `bf16`.
        bits: size of one number.
        torch_name: attribute of `torch`: `bfloat16`.
        cuda_type: type of one number in memory in the emitted text. The 16-bit formats are words there, since
            attngen includes no CUDA headers and the instructions take registers of packed bits.
        max_finite: largest finite number.
        mantissa_bits: bits of the significand that are stored.
        source: where these facts are written.
    """

    name: str
    bits: int
    torch_name: str
    cuda_type: str
    max_finite: float
    mantissa_bits: int
    source: str

    @property
    def bytes(self) -> int:
        """Size of one number in bytes."""
        return self.bits // 8

    @property
    def epsilon(self) -> float:
        """Distance from 1 to the next number."""
        return 2.0**-self.mantissa_bits


_IEEE = "IEEE 754-2019, table 3.5"
_PTX_ALTERNATE = "PTX ISA, Alternate Floating-Point Data Formats"

F16 = DType("f16", 16, "float16", "unsigned short", 65504.0, 10, _IEEE)
BF16 = DType("bf16", 16, "bfloat16", "unsigned short", (2 - 2.0**-7) * 2.0**127, 7, _PTX_ALTERNATE)
F32 = DType("f32", 32, "float32", "float", (2 - 2.0**-23) * 2.0**127, 23, _IEEE)
E4M3 = DType(
    "e4m3", 8, "float8_e4m3fn", "unsigned char", 448.0, 3, "OCP 8-bit Floating Point Specification 1.0, E4M3"
)
F64 = DType("f64", 64, "float64", "double", (2 - 2.0**-52) * 2.0**1023, 52, _IEEE)

DTYPES: dict[str, DType] = {dtype.name: dtype for dtype in (F16, BF16, E4M3, F32, F64)}


def dtype(name: str) -> DType:
    """The format called `name`; names from users have been checked by the spec.

    Raises:
        InternalError: there is no such format.
    """
    if name not in DTYPES:
        raise InternalError(f"no number format is called {name!r}; known: {', '.join(DTYPES)}")
    return DTYPES[name]


def torch_dtype(dtype: DType) -> "torch.dtype":
    """The torch dtype of a format. torch is imported here and not before."""
    import torch

    found = getattr(torch, dtype.torch_name)
    assert isinstance(found, torch.dtype)  # a slip in the table above, caught by its test
    return found


ELEMENTS = {
    "bool": "bool",
    "u8": "uint8",
    "i32": "int32",
    **{name: DTYPES[name].torch_name for name in ("f16", "bf16", "f32")},
}
"""What a tensor that a spec declares may hold, by its name there: torch's name for it."""


def element_dtype(name: str) -> "torch.dtype":
    """The torch dtype of a key of `ELEMENTS` or of a format."""
    import torch

    found = getattr(torch, ELEMENTS[name] if name in ELEMENTS else dtype(name).torch_name)
    assert isinstance(found, torch.dtype)
    return found
