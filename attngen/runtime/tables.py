"""Tables of extremes that outlive a call: what they were made of is remembered, and a call that differs is refused."""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from attngen.emit.manifest import Manifest
from attngen.errors import ArgumentError
from attngen.runtime.declared import DeclaredValues

MOST_STREAMS = 64
"""For which memory is kept; a program with more starts over."""

_SIZES = ("batch", "seqlen_q", "seqlen_k", "num_heads_q", "num_heads_kv")


class TableMemory(threading.local):
    """Memory for the tables of calls, kept for each thread, device and stream: the largest asked for so far.

    Calls of a stream follow one another, so one's tables may take the place of another's; but another thread's kernels
    may come between the two of a call. A graph that is captured keeps memory of its own.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], torch.Tensor] = {}

    def on(self, device: int, stream: int, q: torch.Tensor, size: int) -> torch.Tensor:
        """At least `size` elements of q's type on q's device, whose current stream has that raw handle."""
        if torch._C._cuda_getDevice() != device or torch._C._cuda_isCurrentStreamCapturing():
            return q.new_empty(size)  # of another device nobody asks whether it captures
        memory = self._kept.get((device, stream))
        if memory is None or memory.numel() < size:
            if len(self._kept) >= MOST_STREAMS:
                self._kept.clear()
            memory = self._kept[device, stream] = q.new_empty(size)
        return memory


class TableSignature(NamedTuple):
    """What calls that share tables have in common, but for where tensors are and what they hold.

    Attributes:
        kernel: name of the kernel that reads the tables, which fixes the grid of tiles.
        sizes: of the call.
        tensors: name, shape and strides of each declared tensor.
        scalars: name and value of each declared scalar; lookups may have read it.
    """

    kernel: str
    sizes: tuple[int, ...]
    tensors: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    scalars: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, manifest: Manifest, sizes: Mapping[str, int], declared: DeclaredValues) -> "TableSignature":
        """The signature of a call."""
        return cls(
            manifest.name,
            tuple(sizes[name] for name in _SIZES),
            tuple((name, tuple(x.shape), x.stride()) for name, x in declared.tensors.items()),
            tuple(declared.scalars.items()),
        )


@dataclass(frozen=True)
class TileTables:
    """Extremes of declared tensors by tile, made by `attngen.Kernel.tables` and passed to calls as `tables`.

    Attributes:
        signature: of the calls that may use them.
        contents: address and version of each tensor they were made of.
        memory: the tables, one after another; None where the simulator makes its own.
    """

    signature: TableSignature
    contents: tuple[tuple[int, int], ...]
    memory: torch.Tensor | None

    @classmethod
    def of(
        cls, signature: TableSignature, tensors: Iterable[torch.Tensor], memory: torch.Tensor | None = None
    ) -> "TileTables":
        """The tables of a call that passes these tensors."""
        return cls(signature, _contents(tensors), memory)

    def check(self, signature: TableSignature, tensors: Iterable[torch.Tensor]) -> None:
        """Refuse tables that are not of the call that has this signature and passes these tensors.

        Raises:
            ArgumentError: names what differs.
        """
        if not isinstance(self, TileTables):  # whatever a caller passed
            raise ArgumentError("tables", type(self).__name__, "what kernel.tables(...) made")
        contents = _contents(tensors)
        if self.signature != signature or self.contents != contents:
            self._refuse(signature, contents)

    def _refuse(self, now: TableSignature, contents: tuple[tuple[int, int], ...]) -> None:
        made = self.signature
        cure = "make them anew with kernel.tables(...)"
        if made.kernel != now.kernel:
            raise ArgumentError("tables", f"tables of {made.kernel}", f"tables of {now.kernel}", cure)
        if made.sizes != now.sizes:
            got, must = (", ".join(map("{} {}".format, _SIZES, each.sizes)) for each in (made, now))
            raise ArgumentError("tables", f"tables of {got}", must, cure)
        if made.scalars != now.scalars:
            got, must = (str(dict(each.scalars)) for each in (made, now))
            raise ArgumentError("tables", f"tables made with {got}", must, cure)
        for (name, *was), (_, *has), was_in, is_in in zip(
            made.tensors, now.tensors, self.contents, contents, strict=True
        ):
            for what, old, new in zip(
                ("address", "version", "shape", "strides"), (*was_in, *was), (*is_in, *has), strict=True
            ):
                if old != new:
                    must = f"{what} {new}, as {name} has now"
                    raise ArgumentError("tables", f"tables of {name} with {what} {old}", must, cure)


def _contents(tensors: Iterable[torch.Tensor]) -> tuple[tuple[int, int], ...]:
    """Address and version of each."""
    try:
        return tuple([(x.data_ptr(), x._version) for x in tensors])
    except RuntimeError:
        must = "tensors made outside of torch.inference_mode, whose writes are counted"
        raise ArgumentError("tables", "tensors of torch.inference_mode", must, "pass no tables") from None
