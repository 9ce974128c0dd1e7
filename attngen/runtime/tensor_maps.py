"""Tensor maps: the copy engine's descriptors, from the manifest and a tensor's strides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from attngen.dtypes import dtype
from attngen.plan import TensorMapEntry, evaluate_formula
from attngen.runtime.driver import encode_tensor_map

ADDRESS_BYTES = 8
LEAST_STRIDE = 16
"""Bytes; stands for the stride of a dimension that has one element only."""


@dataclass(frozen=True)
class MapGeometry:
    """What a descriptor says besides the address: extents, and strides in bytes, cols first."""

    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_bytes: int = 2


def geometry(entry: TensorMapEntry, sizes: Mapping[str, int], strides: Sequence[int]) -> MapGeometry:
    """The geometry of a call's tensor.

    Args:
        entry: of the manifest.
        sizes: run-time sizes of the call.
        strides: of the tensor in elements between batches or pages, rows and heads; 0 where there is one only.
    """
    element_bytes = dtype(entry.dtype).bytes
    dims = tuple(max(1, evaluate_formula(dim, sizes)) for dim in entry.dims)
    batch, seqlen, head = (stride * element_bytes for stride in strides)
    steps = tuple(
        step if extent > 1 else LEAST_STRIDE
        for extent, step in zip(dims[1:], (seqlen, head, batch), strict=True)
    )
    box = tuple(evaluate_formula(extent, sizes) for extent in entry.box)
    return MapGeometry(dims, steps, box, element_bytes)


def encode(map_: MapGeometry, address: int) -> bytes:
    """The 128 bytes of a descriptor."""
    return encode_tensor_map(address or LEAST_STRIDE, map_.dims, map_.strides, map_.box, map_.element_bytes)


@cache
def address_comes_first() -> bool:
    """Whether a descriptor's first eight bytes are the address and no other byte depends on it.

    CUDA does not promise it; it is tried once per process, and where it fails descriptors are encoded for every
    address anew.
    """
    sample = MapGeometry((64, 128, 4, 2), (512, 128, 65536), (64, 64, 1, 1))
    addresses = (0x7F0000000000, 0x7ABCDEF01200, 0x10)
    encoded = [encode(sample, address) for address in addresses]
    starts = [int.from_bytes(data[:ADDRESS_BYTES], "little") for data in encoded]
    return starts == list(addresses) and len({data[ADDRESS_BYTES:] for data in encoded}) == 1
