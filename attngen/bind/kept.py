"""Tables of extremes that outlive a call: what they were made of is remembered, and a call that differs is refused."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from attngen.bind.arguments import Given
from attngen.errors import ArgumentError

_SIZES = ("batch", "seqlen_q", "seqlen_k", "num_heads_q", "num_heads_kv")


class TableSignature(NamedTuple):
    """What calls that share tables have in common, but for where tensors are and what they hold.

    Attributes:
        kernel: name of the kernel that reads the tables, which fixes the grid of tiles.
        sizes: of the call.
        tensors: name, shape and strides of each declared tensor, and of each that says lengths.
        scalars: name and value of each declared scalar; lookups may have read it.
    """

    kernel: str
    sizes: tuple[int, ...]
    tensors: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    scalars: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, kernel: str, given: Given) -> "TableSignature":
        """The signature of a call that this kernel takes."""
        return cls(
            kernel,
            tuple(given.sizes[name] for name in _SIZES),
            tuple((name, tuple(x.shape), x.stride()) for name, x in given.by_name.items()),
            tuple(given.scalars.items()),
        )


@dataclass(frozen=True)
class TileTables:
    """Extremes of declared tensors by tile, made by `attngen.Kernel.tables` and passed to calls as `tables`.

    Attributes:
        signature: of the calls that may use them.
        contents: address and version of each tensor they were made of.
        memory: the tables: of a GPU one after another, as the binder lays them out; of the simulator by value.
    """

    signature: TableSignature
    contents: tuple[tuple[int, int], ...]
    memory: torch.Tensor | Mapping[str, torch.Tensor]

    @classmethod
    def of(
        cls,
        signature: TableSignature,
        tensors: Iterable[torch.Tensor],
        memory: torch.Tensor | Mapping[str, torch.Tensor],
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
